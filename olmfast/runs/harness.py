"""What lm-evaluation-harness says of models: each task's metrics with its own standard errors, side by side."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from olmfast.errors import InputError
from olmfast.evaluation.harness import evaluate_module, load_harness, manager
from olmfast.evaluation.open import Evaluation, Settings, load_tokenizer
from olmfast.evaluation.scorer import Candidate
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.expressions import whole
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe

BATCH = 8  # inputs of a batch on a CPU; elsewhere the harness finds how many fit
NORMAL = 1.959964  # half of a 95 % interval, in standard errors


@dataclass
class HarnessBoard:
    """`rows` maps a model to what the harness gave of each task: `METRIC,FILTER` and `METRIC_stderr,FILTER` -> value;
    `samples` a model to a task's logged samples."""

    limit: float | None = None
    rows: dict[str, dict[str, dict[str, Any]]] = field(default_factory=dict)
    samples: dict[str, dict[str, list[dict[str, Any]]]] = field(default_factory=dict)

    def metrics(self) -> Iterator[tuple[str, str]]:
        """Task and metric (`acc,none`) of every figure."""
        for task, found in next(iter(self.rows.values()), {}).items():
            for key, value in found.items():
                if "_stderr," not in key and "," in key and isinstance(value, (int, float)):
                    yield task, key

    def cell(self, label: str, task: str, metric: str) -> str:
        """A figure, within the 95 % interval of the harness' standard error."""
        own = self.rows[label].get(task, {})
        name, _, filtered = metric.partition(",")
        value, error = own.get(metric), own.get(f"{name}_stderr,{filtered}")
        if not isinstance(value, (int, float)):
            return ""
        if isinstance(error, (int, float)) and math.isfinite(error):
            return f"{value:.4f} ± {NORMAL * error:.4f}"
        return f"{value:.4f}"

    @property
    def title(self) -> str:
        """Of the table: what its figures are."""
        part = "" if self.limit is None else f", at most {self.limit:g} documents of each"
        return f"lm-evaluation-harness (95 % intervals by its standard errors{part})"

    def table(self) -> list[list[str]]:
        """A head, and a row per task and metric with a column per model."""
        rows = [["task", "metric", "n", *self.rows]]
        for task, metric in self.metrics():
            n = next(iter(self.rows.values()))[task].get("n")
            name, _, filtered = metric.partition(",")
            shown = name if filtered in ("", "none") else f"{name} ({filtered})"
            rows.append([task, shown, str(n or ""), *(self.cell(label, task, metric) for label in self.rows)])
        return rows

    def to_json(self, samples: bool = True) -> dict[str, Any]:
        """Plain JSON values, read back by `from_json`."""
        told: dict[str, Any] = {"limit": self.limit, "results": self.rows}
        return told | ({"samples": self.samples} if samples else {})

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> HarnessBoard:
        """Read what `to_json` wrote."""
        return cls(data["limit"], dict(data["results"]), dict(data.get("samples", {})))

    def score(
        self,
        evaluation: Evaluation,
        recipes: Mapping[str, Recipe],
        tasks: Sequence[str],
        include: Path | None,
        progress: Callable[[str], None] = lambda _: None,
        companions: Mapping[str, str] | None = None,
    ) -> None:
        """Add a row per recipe, each evaluated as the live model.

        `companions` maps a label to the model whose tokenizer and generation config it has; by default its base.
        """
        model = evaluation.model
        for label, recipe in recipes.items():
            base = model.sources.pool[(companions or {}).get(label, recipe.base)]
            with model.trial(Candidate(label, recipe=recipe)), _generating_as(base, model.module):
                batch: int | str = BATCH if model.device.type == "cpu" else "auto"
                tokenizer, _ = load_tokenizer(base)
                found = evaluate_module(
                    model.module, tokenizer, tasks, include=include, limit=self.limit, batch_size=batch
                )
            counts = found.get("n-samples", {})
            self.rows[label] = {
                task: {key: _plain(value) for key, value in own.items() if key != "alias"}
                | ({"n": counts[task]["effective"]} if task in counts else {})
                for task, own in {**found["results"], **found.get("groups", {})}.items()
            }
            self.samples[label] = {
                task: [_sample(one) for one in sorted(logged, key=lambda one: (one["doc_id"], one["filter"]))]
                for task, logged in found.get("samples", {}).items()
            }
            progress(label)


def evaluate_with_harness(
    model: str,
    tasks: Sequence[str],
    against: Sequence[str] = (),
    *,
    include: Path | None = None,
    limit: float | None = None,
    models_dir: Path = Path("models"),
    device: str = "auto",
    dtype: str = "auto",
    progress: Callable[[str], None] = lambda _: None,
) -> HarnessBoard:
    """Evaluate a model (folder or Hub id in `models_dir`) and others on tasks, through lm-evaluation-harness.

    `include` is a folder of task files; `limit` the documents of each task, a share where it is below 1. Raises
    InputError for what is unusable, tasks first.
    """
    check_tasks(tasks, include, limit)
    here, names = Path.cwd(), list(dict.fromkeys([*against, model]))
    settings = Settings.of(device, dtype)
    pool = Pool.open(names, here / models_dir, here)
    pool.check_finite()
    evaluation, board = Evaluation(whole(model, pool.tensors), pool, settings), HarnessBoard(limit)
    board.score(evaluation, {name: whole(name, pool.tensors) for name in names}, tasks, include, progress)
    return board


def check_tasks(tasks: Sequence[str], include: Path | None, limit: float | None) -> None:
    """Raise InputError for tasks that the harness does not know, or a limit that is none."""
    load_harness()
    if not tasks:
        raise InputError("lm_eval: expected names of tasks, such as arc_easy,gsm8k")
    if limit is not None and not (limit > 0 and (limit < 1 or float(limit).is_integer())):
        raise InputError(f"lm_eval: limit {limit:g}: expected a number of documents, or a share below 1")
    manager(tasks, include)


@contextmanager
def _generating_as(base: Checkpoint, module: Any) -> Iterator[None]:
    """The module generates by a model's own files, as it does for whoever loads its folder."""
    from transformers import GenerationConfig

    kept, there = module.generation_config, (base.folder / "generation_config.json").is_file()
    read = GenerationConfig.from_pretrained(base.folder) if there else GenerationConfig.from_model_config(module.config)
    module.generation_config = read
    try:
        yield
    finally:
        module.generation_config = kept


def _sample(one: Mapping[str, Any]) -> dict[str, Any]:
    """Of a logged sample what is worth keeping: the document, what was answered, and how it was scored."""
    kept = ("doc_id", "doc", "target", "filtered_resps", "filter", "metrics", *one.get("metrics", ()))
    return {key: _plain(one[key]) for key in kept if key in one}


def _plain(value: Any) -> Any:
    """A value as JSON has it; what it has no word for as its text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(part) for part in value]
    if isinstance(value, torch.Tensor) or hasattr(value, "item"):
        return _plain(value.item()) if getattr(value, "size", 1) == 1 else str(value)
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
