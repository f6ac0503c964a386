"""The section `prune` of a run's config: which layers are merged into one, and how their alphas are found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Method = Literal["file", "similarity", "uniform", "drop"]
SHOTS = 5  # worked examples before each question of MMLU, as many as a subject has


class Pruning(BaseModel):
    """How a model is pruned; see docs/pruning.md. Paths are absolute once loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    method: Method | None = None
    alphas_file: Path | None = None
    num_layer: int | None = Field(None, ge=1)
    start: int | None = Field(None, ge=0)
    count: int | None = Field(None, ge=2)
    merge: Literal["projections", "all"] = "projections"
    data_dir: Path | None = None
    mmlu_as: Literal["spaced", "seed"] = "spaced"
    ntrain: int = Field(SHOTS, ge=0)
    num_tasks: int | None = Field(None, ge=1)
    num_samples: int | None = Field(None, ge=1)

    @property
    def way(self) -> str:
        """The method: that which is named, else the file's where there is one, else similarity."""
        return self.method or ("similarity" if self.alphas_file is None else "file")

    @property
    def is_evaluated(self) -> bool:
        """Whether the model or its result is run."""
        return self.way == "similarity" or self.data_dir is not None

    @model_validator(mode="after")
    def _check(self) -> Pruning:
        if self.way == "file" and self.alphas_file is None:
            raise ValueError("method file: alphas_file is missing")
        if self.alphas_file is not None and self.way in ("similarity", "uniform", "drop"):
            raise ValueError(f"alphas_file: method {self.way} makes its own alphas; leave one of the two out")
        if self.num_layer is not None and self.count is not None and self.count != self.num_layer + 1:
            raise ValueError(
                f"count {self.count} and num_layer {self.num_layer} differ: num_layer steps make one layer of "
                f"{self.num_layer + 1}; leave one of them out"
            )
        if self.num_layer is None and self.count is None and self.alphas_file is None:
            raise ValueError("num_layer: say how many layers go (or count: how many become one)")
        return self

    def steps(self, n_entries: int | None) -> int:
        """How many layers are merged into the one below them; `n_entries` are those of the alpha file, if any."""
        if self.num_layer is not None:
            return self.num_layer
        return self.count - 1 if self.count is not None else n_entries or 0

    def first_layer(self, n_blocks: int, n_steps: int) -> int:
        """The layer that the others are merged into. Raises ValueError for layers that are not there."""
        if n_steps >= n_blocks:
            raise ValueError(
                f"num_layer {n_steps}: the model has {n_blocks} layers, of which at most {n_blocks - 1} can go"
            )
        first = n_blocks - n_steps - 1 if self.start is None else self.start
        if first + n_steps >= n_blocks:
            raise ValueError(
                f"start {first}: {n_steps + 1} layers from it on end at {first + n_steps}, and the model's last layer "
                f"is {n_blocks - 1}"
            )
        return first


def default_output(model: str, section: Mapping[str, Any]) -> Path:
    """Where a pruned model goes if nothing else is said: `pruned_models/MODEL_METHOD_STEPS`."""
    method = section.get("method") or ("similarity" if section.get("alphas_file") is None else "file")
    steps = section.get("num_layer") or (section["count"] - 1 if section.get("count") else None)
    parts = [Path(model).name, str(method), *([] if steps is None else [str(steps)])]
    return Path("pruned_models") / "_".join(parts)
