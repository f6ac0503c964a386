"""Experiment trackers, as what they have in common; none of their packages is imported before it is asked for."""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from olmfast.errors import InputError, told

PROJECT = "olmfast"
MODULES = {"trackio": "trackio", "wandb": "wandb", "mlflow": "mlflow", "tensorboard": "torch.utils.tensorboard"}


class Tracker(Protocol):
    """What the trackers have in common: numbers by name at a step, and an end."""

    def log(self, values: Mapping[str, float], step: int) -> None:
        """Numbers of a step; these count up."""

    def end(self, summary: Mapping[str, float], step: int) -> None:
        """What it came to, after the last step."""


class Wandb:
    """Weights & Biases, and trackio, which has the same interface but for a run's summary."""

    def __init__(self, module: Any, name: str, config: Mapping[str, Any]) -> None:
        self.module = module
        self.run = module.init(project=PROJECT, name=name, config=dict(config))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        self.module.log(dict(values), step=step)

    def end(self, summary: Mapping[str, float], step: int) -> None:
        """See `Tracker.end`."""
        if summary:
            self.module.log(dict(summary), step=step)
        self.module.finish()


class Mlflow:
    """MLflow: an experiment of its own, whose parameters are the config's keys."""

    def __init__(self, module: Any, name: str, config: Mapping[str, Any]) -> None:
        self.module = module
        module.set_experiment(PROJECT)
        module.start_run(run_name=name)
        module.log_params({key: str(value)[:500] for key, value in config.items()})

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`. Names hold only what MLflow allows."""
        self.module.log_metrics({re.sub(r"[^\w\-. /]", "_", key): own for key, own in values.items()}, step=step)

    def end(self, summary: Mapping[str, float], step: int) -> None:
        """See `Tracker.end`."""
        if summary:
            self.log(summary, step)
        self.module.end_run()


class Tensorboard:
    """TensorBoard's files, in `tensorboard/NAME` beside the result."""

    def __init__(self, module: Any, folder: Path, config: Mapping[str, Any]) -> None:
        self.writer = module.SummaryWriter(log_dir=str(folder))
        self.writer.add_text("config", "\n".join(f"    {key}: {value}" for key, value in config.items()))

    def log(self, values: Mapping[str, float], step: int) -> None:
        """See `Tracker.log`."""
        for key, value in values.items():
            self.writer.add_scalar(key, value, step)
        self.writer.flush()

    def end(self, summary: Mapping[str, float], step: int) -> None:
        """See `Tracker.end`."""
        self.log(summary, step)
        self.writer.close()


def load_tracker(name: str | None) -> Any:
    """The tracker's module, None without a name. Raises InputError naming the extra where it is not installed."""
    if name is None:
        return None
    try:
        return importlib.import_module(MODULES[name])
    except ImportError as error:
        raise InputError(
            f"track: {name} cannot be imported ({told(error)}); install it with: pip install 'olmfast[{name}]'"
        ) from error
