"""What was tried, chosen and measured: enough to rebuild the model bit for bit and to resume after a kill.

A run's folder holds `merge_report.json` (strict JSON, replaced atomically after every step; its first keys have
the shape of the original tool's report), `evaluations.jsonl` (one line per candidate and dataset, append-only)
and `refined/` (tensors that evolution strategies made, as safetensors).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from olmfast.errors import InputError, OlmfastError
from olmfast.weights.digests import digest_tensor
from olmfast.weights.expressions import Stored
from olmfast.weights.recipe import Recipe, leaves

REPORT = "merge_report.json"
LEDGER = "evaluations.jsonl"
REFINED = "refined"


@dataclass
class Outcome:
    """What one step decided. `metrics` is dataset -> candidate label -> mean score (None: not evaluated)."""

    stage: str
    unit: str
    winner: str
    changed: bool
    metrics: dict[str, dict[str, float | None]]
    dropped: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    truncated: dict[str, dict[str, float]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Stage and unit, as tables name them."""
        return self.unit if self.stage == self.unit else f"{self.stage} {self.unit}"


class Report:
    """The state of a run in its folder. Every change is on disk before the method returns."""

    def __init__(self, folder: Path, data: dict[str, Any]) -> None:
        self.folder, self.data = folder, data

    @classmethod
    def create(
        cls,
        folder: Path,
        header: dict[str, Any],
        taken: Mapping[str, Outcome] | None = None,
        recipe: Recipe | None = None,
    ) -> Report:
        """Begin a report in a new folder; `header` says what the run is made of.

        `taken` are steps that another tool has taken, and `recipe` what they led to.
        """
        (folder / REFINED).mkdir(parents=True, exist_ok=True)
        own = {**header, "status": "running", "steps": {}, "recipe": None, "evaluations": 0}
        own |= {"ledger_bytes": 0, "elapsed_s": 0.0}
        report = cls(folder, {"base_model": {}, "boundary_layers": {}, "layers": {}, "tensors": {}, "olmfast": own})
        for key, outcome in (taken or {}).items():
            report._note_step(key, outcome)
        own["recipe"] = recipe.to_json() if recipe else None
        (folder / LEDGER).write_bytes(b"")
        report.save()
        return report

    @classmethod
    def load(cls, folder: Path) -> Report:
        """Read the report of a run. Raises InputError when it is no report of olmfast or of the original."""
        path = folder / REPORT
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: cannot be read: {error}") from None
        if not isinstance(data, dict) or not isinstance(data.get("base_model", {}), dict):
            raise InputError(f"{path}: is not a merge report")
        return cls(folder, data)

    @property
    def own(self) -> dict[str, Any]:
        """The part of the report that the original tool does not have; empty in a report of the original."""
        part: dict[str, Any] = self.data.get("olmfast", {})
        return part

    @property
    def status(self) -> str:
        """running, stopped (budget spent) or finished; `original` for a report of the original tool."""
        return str(self.own.get("status", "original"))

    def discard_unrecorded(self) -> None:
        """Drop what a killed run wrote after its last recorded step: ledger lines and refined tensors."""
        ledger = self.folder / LEDGER
        with ledger.open("ab") as file:
            file.truncate(self.own["ledger_bytes"])
        self._remove_superseded()

    def outcome(self, key: str) -> Outcome | None:
        """What a step decided in an earlier session, or None if it has not been taken."""
        entry = self.own["steps"].get(key)
        return Outcome(**entry) if entry else None

    @property
    def recipe(self) -> Recipe | None:
        """The recipe after the last recorded step."""
        return Recipe.from_json(self.own["recipe"]) if self.own["recipe"] else None

    def choices(self) -> list[Outcome]:
        """The outcomes of all steps that chose a donor or refined a tensor, in order."""
        return [Outcome(**entry) for entry in self.own["steps"].values() if entry["stage"] != "base"]

    def append_evaluations(self, lines: list[dict[str, Any]]) -> None:
        """Add lines to the ledger; they count once the step that they belong to is recorded."""
        text = "".join(json.dumps(_strict(line), ensure_ascii=False, allow_nan=False) + "\n" for line in lines)
        try:
            with (self.folder / LEDGER).open("ab") as file:
                file.write(text.encode())
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise _disk_error(self.folder / LEDGER, error) from None

    def store(self, name: str, tensor: str, value: torch.Tensor) -> Stored:
        """Keep a computed tensor beside the report and return the expression that stands for it."""
        file = f"{REFINED}/{name}.safetensors"
        value = value.cpu().contiguous()
        _write_atomically(self.folder / file, save({tensor: value}, metadata={"format": "pt"}))
        return Stored(file, tensor, digest_tensor(value))

    def record(
        self, key: str, outcome: Outcome, recipe: Recipe, n_evaluations: int, elapsed_s: float, standing: str
    ) -> None:
        """Record a step that has been taken; from here on it is never repeated.

        `standing` is what the next step stands on beside the recipe: JSON that only the search reads.
        """
        self._note_step(key, outcome)
        self.own["recipe"] = recipe.to_json()
        self.own["evaluations"] = n_evaluations
        self.own["elapsed_s"] = round(elapsed_s, 3)
        self.own["standing"] = standing
        self.own["ledger_bytes"] = (self.folder / LEDGER).stat().st_size
        self.save()
        self._remove_superseded()

    def update(self, **values: Any) -> None:
        """Set keys of olmfast's own part."""
        self.own.update(values)
        self.save()

    def save(self) -> None:
        """Write the report atomically. NaN and infinity become null: the file is strict JSON."""
        text = json.dumps(_strict(self.data), indent=1, ensure_ascii=False, allow_nan=False)
        _write_atomically(self.folder / REPORT, text.encode())

    def _note_step(self, key: str, outcome: Outcome) -> None:
        """Add a step to olmfast's own part and to the keys that the original tool's readers know."""
        self.own["steps"][key] = asdict(outcome)
        if outcome.stage == "base":
            metrics = {d: by_label.get(outcome.winner) for d, by_label in outcome.metrics.items()}
            self.data["base_model"] = {"name": outcome.winner, "metrics": metrics}
        elif outcome.stage == "boundary":
            self.data["boundary_layers"] = {"name": outcome.winner, "metrics": outcome.metrics}
        elif outcome.stage == "layers":
            for block, winner in zip(outcome.unit.split("+"), outcome.winner.split(" + "), strict=True):
                self.data["layers"][block] = {"metrics": outcome.metrics, "best_model": winner}
        elif outcome.stage == "tensors":
            self.data["tensors"][outcome.unit] = {"metrics": outcome.metrics, "best_model": outcome.winner}
        elif outcome.stage in ("svd_es", "norm_es"):
            entry = self.data["tensors"].setdefault(outcome.unit, {"metrics": {}, "best_model": None})
            entry.setdefault(outcome.stage, []).append({"winner": outcome.winner, "changed": outcome.changed})

    def _remove_superseded(self) -> None:
        recipe = self.recipe
        expressions = recipe.tensors.values() if recipe else ()
        needed = {leaf.file for e in expressions for leaf in leaves(e) if isinstance(leaf, Stored)}
        for path in (self.folder / REFINED).glob("*"):
            if f"{REFINED}/{path.name}" not in needed:
                path.unlink()


def _strict(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(item) for item in value]
    return value


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise _disk_error(path, error) from None


def _disk_error(path: Path, error: OSError) -> OlmfastError:
    return OlmfastError(
        f"{path}: cannot be written: {error.strerror}; what was decided before is saved, "
        "free some space and use --resume"
    )
