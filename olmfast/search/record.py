"""What was tried, chosen and measured: enough to rebuild the model bit for bit and to resume after a kill.

A run's folder holds `steps.jsonl` (the log, see `search/log.py`), `merge_report.json` (strict JSON for readers,
written from the log now and then; its first keys have the shape of the original tool's report), `evaluations.jsonl`
(one line per candidate and dataset, append-only) and `refined/` (tensors that evolution strategies made, as
safetensors).
"""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Container, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from olmfast import _shards
from olmfast.errors import InputError
from olmfast.search.log import (
    ADVICE,
    STEPS,
    Change,
    Entry,
    Outcome,
    RunEntry,
    Standing,
    StepEntry,
    ValuesEntry,
    append,
    disk_error,
    json_line,
    parse,
    read_log,
    sealed,
    strict,
)
from olmfast.weights import affine, by_row, offspring  # noqa: F401 (kinds of expressions that recipes hold)
from olmfast.weights.digests import digest_tensor
from olmfast.weights.expressions import Stored
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import leaves

REPORT = "merge_report.json"
LEDGER = "evaluations.jsonl"
REFINED = "refined"
SNAPSHOT = "snapshot: "  # before its name, in the record's values
REPORT_EVERY_S = 30.0  # the report grows with the model and the steps


class Record:
    """The state of a run, kept in its folder. Every change is on disk before the method returns.

    What is in memory has been read back from the line written: a resumed run continues from the very same values.
    """

    def __init__(self, folder: Path, clock: Callable[[], float] = time.monotonic) -> None:
        self.folder, self.clock = folder, clock
        self.header: dict[str, Any] = {}
        self.steps: dict[str, Outcome] = {}
        self.standing = Standing()
        self.evaluations: float = 0
        self.spent: dict[str, float] = {}  # step -> evaluations, it included
        self.elapsed_s, self.ledger_bytes = 0.0, 0
        self.values: dict[str, Any] = {}
        self._snapshots: dict[str, Recipe] = {}
        self._log_bytes, self._seal = 0, ""
        self._reported_s = -math.inf

    @classmethod
    def create(
        cls,
        folder: Path,
        header: dict[str, Any],
        taken: Mapping[str, Outcome] | None = None,
        recipe: Recipe | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> Record:
        """Begin a record in a new folder; `header` identifies the run's inputs.

        `taken` are steps that another tool has taken, and `recipe` their result.
        """
        (folder / REFINED).mkdir(parents=True, exist_ok=True)
        (folder / LEDGER).write_bytes(b"")
        entries: list[Entry] = [RunEntry(header), *(StepEntry(key, outcome) for key, outcome in (taken or {}).items())]
        if recipe is not None:
            entries.append(ValuesEntry({}, Change(recipe)))
        # Last and in one step: a folder with a log counts as begun.
        lines, seal = [], ""
        for entry in entries:
            line, seal = sealed(json_line(entry.to_json()), seal)
            lines.append(line)
        _write_atomically(folder / STEPS, b"".join(lines))
        record = cls.load(folder, clock)
        record.write_report()
        return record

    @classmethod
    def load(cls, folder: Path, clock: Callable[[], float] = time.monotonic) -> Record:
        """Read the log of a run. Raises InputError naming file and line where it is damaged."""
        record = cls(folder, clock)
        record._log_bytes, record._seal = read_log(folder, record._apply)
        return record

    @property
    def status(self) -> str:
        """running, stopped (budget spent) or finished."""
        return str(self.values.get("status", "running"))

    @property
    def recipe(self) -> Recipe | None:
        """The recipe after the last recorded step."""
        return self.standing.recipe

    @property
    def snapshots(self) -> dict[str, Recipe]:
        """What a joint search began with, and what each part of it that changed anything led to."""
        return dict(self._snapshots)

    def keep_snapshot(self, name: str) -> None:
        """Keep the current recipe, once, under the name of the part of the search that led to it."""
        if name not in self._snapshots and self.recipe is not None:
            values: dict[str, Any] = {SNAPSHOT + name: self.recipe.to_json()}
            self.update(None, **values)

    @property
    def validated(self) -> Recipe | None:
        """The snapshot that the validation questions chose."""
        chosen = self.values.get("validation", {}).get("result")
        return None if chosen is None else self.snapshots[chosen]

    def outcome(self, key: str) -> Outcome | None:
        """What a step decided in an earlier session, or None if it has not been taken."""
        return self.steps.get(key)

    def choices(self) -> list[Outcome]:
        """The outcomes of all steps that chose a donor or refined a tensor, in order."""
        return [outcome for outcome in self.steps.values() if outcome.stage != "base"]

    def check_ledger(self) -> None:
        """Raise InputError when the ledger has lost lines of recorded steps."""
        path = self.folder / LEDGER
        held = path.stat().st_size if path.exists() else 0
        if held < self.ledger_bytes:
            raise InputError(f"{path}: has {held} bytes, but the steps recorded wrote {self.ledger_bytes}; {ADVICE}")

    def discard_unrecorded(self) -> None:
        """Drop what a killed run wrote after its last recorded step: ledger lines and refined tensors."""
        with (self.folder / LEDGER).open("ab") as file:
            file.truncate(self.ledger_bytes)
        self._remove_superseded()

    def append_evaluations(self, lines: list[dict[str, Any]]) -> None:
        """Add lines to the ledger; they count once the step that they belong to is recorded."""
        append(self.folder / LEDGER, b"".join(map(json_line, lines)))

    def store(self, name: str, tensor: str, value: torch.Tensor) -> Stored:
        """Keep a computed tensor next to the record and return the expression that refers to it."""
        file = f"{REFINED}/{name}.safetensors"
        value = value.cpu().contiguous()
        _write_atomically(self.folder / file, save({tensor: value}, metadata={"format": "pt"}))
        return Stored(file, tensor, digest_tensor(value))

    def add(self, key: str, outcome: Outcome, standing: Standing, evaluations: float, elapsed_s: float) -> None:
        """Record a step that has been taken; from here on it is never repeated."""
        ledger_bytes = (self.folder / LEDGER).stat().st_size
        change = self.standing.change_to(standing)
        self._add(StepEntry(key, outcome, evaluations, round(elapsed_s, 3), ledger_bytes, change))
        self._remove_superseded()

    def update(self, recipe: Recipe | None = None, **values: Any) -> None:
        """Record values of the run, and the recipe if it changed other than by a step."""
        standing = self.standing
        if recipe is not None and recipe != standing.recipe:
            standing = Standing(recipe, {}, standing.scorer)  # the scores are of the one before
        self._add(ValuesEntry(values, self.standing.change_to(standing)))

    @property
    def data(self) -> dict[str, Any]:
        """What `merge_report.json` holds: the keys of the original tool's report, and the rest under `olmfast`."""
        own = {**self.header, "status": self.status, "steps": {key: asdict(one) for key, one in self.steps.items()}}
        own |= {"recipe": self.recipe.to_json() if self.recipe else None, "evaluations": self.evaluations}
        own |= {"ledger_bytes": self.ledger_bytes, "elapsed_s": self.elapsed_s}
        return {**_as_the_original(self.steps, self.header.get("donors", ())), "olmfast": own | self.values}

    def write_report(self) -> None:
        """Bring `merge_report.json` up to date, atomically. NaN and infinity become null: the file is strict JSON."""
        text = json.dumps(strict(self.data), indent=1, ensure_ascii=False, allow_nan=False)
        _write_atomically(self.folder / REPORT, text.encode())
        self._reported_s = self.clock()

    def _add(self, entry: Entry) -> None:
        line, seal = sealed(json_line(entry.to_json()), self._seal)
        append(self.folder / STEPS, line, at=self._log_bytes)
        self._log_bytes, self._seal = self._log_bytes + len(line), seal
        self._apply(parse(json.loads(line)))
        if self.clock() - self._reported_s >= REPORT_EVERY_S:
            self.write_report()

    def _apply(self, entry: Entry) -> None:
        if isinstance(entry, RunEntry):
            self.header = entry.header
            return
        if isinstance(entry, StepEntry):
            self.steps[entry.key] = entry.outcome
            self.evaluations, self.elapsed_s = entry.evaluations, entry.elapsed_s
            self.spent[entry.key] = entry.evaluations
            self.ledger_bytes = entry.ledger_bytes
        else:
            self.values |= entry.values
            self._snapshots |= {
                key.removeprefix(SNAPSHOT): Recipe.from_json(value)
                for key, value in entry.values.items()
                if key.startswith(SNAPSHOT)
            }
        self.standing = self.standing.changed_by(entry.change)

    def _remove_superseded(self) -> None:
        recipes = [*self._snapshots.values(), *self.standing.lines, *([self.recipe] if self.recipe else [])]
        expressions = {expression for recipe in recipes for expression in recipe.tensors.values()}
        needed = {leaf.file for e in expressions for leaf in leaves(e) if isinstance(leaf, Stored)}
        for path in (self.folder / REFINED).glob("*.safetensors*"):
            if path.is_file() and f"{REFINED}/{path.name}" not in needed:
                path.unlink()


def _as_the_original(steps: Mapping[str, Outcome], donors: Container[str]) -> dict[str, Any]:
    """The steps under the keys of the original tool's report, as its reader wants them.

    What it knows no name for (a blend, a tensor that only evolution changed) is not among them.
    """
    data: dict[str, Any] = {"base_model": {}, "boundary_layers": {}, "layers": {}, "tensors": {}}
    for outcome in steps.values():
        flat = {dataset: by_label.get(outcome.winner) for dataset, by_label in outcome.metrics.items()}
        name = f"{outcome.unit}.weight"
        if outcome.stage == "layers":
            for block, winner in zip(outcome.unit.split("+"), outcome.winner.split(" + "), strict=True):
                data["layers"].pop(block, None)
                if winner in donors:
                    data["layers"][block] = {"metrics": outcome.metrics, "best_model": winner}
        elif outcome.stage in ("svd_es", "norm_es") and name in data["tensors"]:
            told = {"winner": outcome.winner, "changed": outcome.changed}
            data["tensors"][name].setdefault(outcome.stage, []).append(told)
        elif outcome.winner not in donors:
            continue
        elif outcome.stage == "base":
            data["base_model"] = {"name": outcome.winner, "metrics": flat}
        elif outcome.stage == "boundary":
            data["boundary_layers"] = {"name": outcome.winner, "metrics": flat}
        elif outcome.stage == "tensors":
            data["tensors"][name] = {"metrics": outcome.metrics, "best_model": outcome.winner}
    return data


def _write_atomically(path: Path, content: bytes) -> None:
    temporary = path.with_name(path.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        _shards.sync_folder(path.parent)
    except OSError as error:
        raise disk_error(path, error) from error
