"""The log of a run, `steps.jsonl`: a line of JSON per entry, appended, never rewritten; all that a resumed run reads.

The length of a line depends on what happened, not on the size of the model: of the recipe, the scores and the
Scorer's state it holds what has changed since the line before.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import xxhash

from olmfast.errors import InputError, OlmfastError, show
from olmfast.weights.recipe import Recipe

STEPS = "steps.jsonl"
FORMAT = 1  # another number is not read
SEAL = re.compile(rb'(.*), "seal": "([0-9a-f]{8})"}', re.DOTALL)
ADVICE = "put the file back as it was, or use --overwrite to start anew"


@dataclass
class Outcome:
    """What one step decided. `metrics` is dataset -> candidate label -> mean score (None: not evaluated).

    `gain` is by how much the winner is estimated to be better than the incumbent, in skill retained (None: not known).
    """

    stage: str
    unit: str
    winner: str
    changed: bool
    metrics: dict[str, dict[str, float | None]]
    dropped: dict[str, str] = field(default_factory=dict)
    order: list[str] = field(default_factory=list)
    truncated: dict[str, dict[str, float]] = field(default_factory=dict)
    gain: float | None = None
    tested: bool = False
    spans: dict[str, list[float]] = field(default_factory=dict)

    @property
    def where(self) -> str:
        """Stage and unit, as tables name them."""
        return self.unit if self.stage == self.unit else f"{self.stage} {self.unit}"


@dataclass(frozen=True)
class Standing:
    """What the next step starts from.

    `recipe` is None before the first step. `scores` are the current model's, `Scores.to_json` of one candidate, empty
    where they are not known; `scorer` is `Scorer.state`. `lines` are what training on each half of the questions goes
    on from, and `crossed` the scores that it is compared with, as `scores` are: see `search/lines.py`.
    """

    recipe: Recipe | None = None
    scores: Mapping[str, Any] = field(default_factory=dict)
    scorer: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[Recipe, ...] = ()
    crossed: Mapping[str, Any] = field(default_factory=dict)

    def change_to(self, now: Standing) -> Change:
        """What has to be recorded to get from here to `now`."""
        before, recipe, part = self.recipe, now.recipe, None
        if before is not None and recipe is not None and _have_same_tensors(before, recipe):
            changed = {name: value for name, value in recipe.tensors.items() if value != before.tensors[name]}
            recipe, part = None, replace(before, tensors=changed) if changed else None
        return Change(
            recipe,
            part,
            _difference(self.scores, now.scores),
            _difference(self.scorer, now.scorer),
            now.lines if now.lines != self.lines else None,
            _difference(self.crossed, now.crossed),
        )

    def changed_by(self, change: Change) -> Standing:
        """What `change_to` was given."""
        recipe = change.recipe or self.recipe
        if change.part is not None:
            if recipe is None:
                raise ValueError("changes tensors of a recipe that no line before it gives")
            recipe = recipe.with_values(change.part.tensors)
        return Standing(
            recipe,
            _merged(self.scores, change.scores),
            _merged(self.scorer, change.scorer),
            self.lines if change.lines is None else change.lines,
            _merged(self.crossed, change.crossed),
        )


@dataclass(frozen=True)
class Change:
    """What differs between two standings; its size does not depend on the model's.

    `recipe` is given whole where more than tensors' expressions differ; `part` holds only those tensors. `lines` is
    None where they are the same. In the mappings, None marks an entry that is gone.
    """

    recipe: Recipe | None = None
    part: Recipe | None = None
    scores: Mapping[str, Any] = field(default_factory=dict)
    scorer: Mapping[str, Any] = field(default_factory=dict)
    lines: tuple[Recipe, ...] | None = None
    crossed: Mapping[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, without what has not changed."""
        recipes = {"recipe": self.recipe, "part": self.part}
        written: dict[str, Any] = {key: recipe.to_json() for key, recipe in recipes.items() if recipe is not None}
        if self.lines is not None:
            written["lines"] = [recipe.to_json() for recipe in self.lines]
        parts = {"scores": self.scores, "scorer": self.scorer, "crossed": self.crossed}
        return written | {key: part for key, part in parts.items() if part}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Change:
        """Read what `to_json` wrote."""
        recipe, part = (Recipe.from_json(data[key]) if key in data else None for key in ("recipe", "part"))
        lines = tuple(map(Recipe.from_json, data["lines"])) if "lines" in data else None
        scores, scorer, crossed = (dict(data.get(key, {})) for key in ("scores", "scorer", "crossed"))
        return cls(recipe, part, scores, scorer, lines, crossed)


@dataclass(frozen=True)
class RunEntry:
    """The first line of the log: what the run is made of."""

    header: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"entry": "run", "format": FORMAT, "header": self.header}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> RunEntry:
        """Read what `to_json` wrote. Raises InputError for another format."""
        if data["format"] != FORMAT:
            raise InputError(f"has format {data['format']}, but this version reads format {FORMAT}")
        return cls(dict(data["header"]))


@dataclass(frozen=True)
class StepEntry:
    """A step that was taken; `evaluations`, `elapsed_s` and `ledger_bytes` are the run's, this step included."""

    key: str
    outcome: Outcome
    evaluations: float = 0
    elapsed_s: float = 0.0
    ledger_bytes: int = 0
    change: Change = field(default_factory=Change)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        counts = {"evaluations": self.evaluations, "elapsed_s": self.elapsed_s, "ledger_bytes": self.ledger_bytes}
        outcome = asdict(self.outcome)
        return {"entry": "step", "key": self.key, "outcome": outcome, **counts, "change": self.change.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> StepEntry:
        """Read what `to_json` wrote."""
        counts = data["evaluations"], float(data["elapsed_s"]), int(data["ledger_bytes"])
        return cls(data["key"], Outcome(**data["outcome"]), *counts, Change.from_json(data["change"]))


@dataclass(frozen=True)
class ValuesEntry:
    """What the run records besides its steps: its status, the closing tables."""

    values: dict[str, Any]
    change: Change = field(default_factory=Change)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"entry": "values", "values": self.values, "change": self.change.to_json()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> ValuesEntry:
        """Read what `to_json` wrote."""
        return cls(dict(data["values"]), Change.from_json(data["change"]))


Entry = RunEntry | StepEntry | ValuesEntry
KINDS: dict[str, type[Entry]] = {"run": RunEntry, "step": StepEntry, "values": ValuesEntry}


def read_log(folder: Path, apply: Callable[[Entry], None]) -> tuple[int, str]:
    """Apply every entry of a run's log, and return how many bytes count, and the last line's seal.

    A last line cut off by a kill does not count. Raises InputError naming the file, and the line where it is damaged in
    any other way.
    """
    path = folder / STEPS
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}; {ADVICE}") from error
    *lines, rest = content.split(b"\n")
    if not lines:
        raise InputError(f"{path}: holds no whole line; {ADVICE}")
    end, seal = 0, ""
    for number, line in enumerate(lines, 1):
        where = f"{path}: line {number}"
        try:
            data = json.loads(line)
        except ValueError as error:
            if number == len(lines) > 1 and not rest:
                break
            raise InputError(f"{where}: is damaged: {error}; {ADVICE}") from error
        try:
            seal = _check_seal(line, seal) if isinstance(data, dict) else ""
            entry = parse(data)
            if isinstance(entry, RunEntry) != (number == 1):
                raise ValueError("the entry 'run' belongs in the first line, and only there")
            apply(entry)
        except InputError as error:
            raise InputError(f"{where}: {error}") from error
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{where}: is damaged: {reason}; {ADVICE}") from error
        end += len(line) + 1
    return end, seal


def _check_seal(line: bytes, before: str) -> str:
    """The line's seal. Raises ValueError where what it stands for, this line and all before it, was changed since."""
    found = SEAL.fullmatch(line)
    if found is None:
        raise ValueError("has no seal")
    _, seal = sealed(found[1] + b"}", before)
    if seal.encode() != found[2]:
        raise ValueError("it, or a line before it, was changed since it was written")
    return seal


def sealed(content: bytes, before: str) -> tuple[bytes, str]:
    """A line of the log (a JSON object) with its seal: xxh32 of the seal of the line before it and of the line."""
    content = content.rstrip(b"\n")
    seal = xxhash.xxh32(before.encode() + content).hexdigest()
    return content[:-1] + f', "seal": "{seal}"}}\n'.encode(), seal


def parse(data: Mapping[str, Any]) -> Entry:
    """The entry that `to_json` made this of."""
    if data["entry"] not in KINDS:
        raise InputError(f"unknown entry {show(data['entry'])}; it was written by a newer version")
    return KINDS[data["entry"]].from_json(data)


def json_line(data: Mapping[str, Any]) -> bytes:
    """One line of strict JSON."""
    return json.dumps(strict(data), ensure_ascii=False, allow_nan=False).encode() + b"\n"


def append(path: Path, content: bytes, at: int | None = None) -> None:
    """Append to a file and wait until it is on the disk. What a failed write left after byte `at` is removed."""
    try:
        with path.open("ab") as file:
            if at is not None:
                file.truncate(at)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise disk_error(path, error) from error


def strict(value: Any) -> Any:
    """The value with null for NaN and infinity, which are not valid JSON."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): strict(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(item) for item in value]
    return value


def disk_error(path: Path, error: OSError) -> OlmfastError:
    """The error of a disk that is full."""
    return OlmfastError(
        f"{path}: cannot be written: {error.strerror}; everything decided so far is saved; "
        "free some space and use --resume"
    )


def _have_same_tensors(one: Recipe, other: Recipe) -> bool:
    """Whether two recipes differ in tensors' expressions at most."""
    return one.tensors.keys() == other.tensors.keys() and replace(one, tensors=other.tensors) == other


def _difference(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, Any]:
    return {key: now.get(key) for key in {**before, **now} if before.get(key) != now.get(key)}


def _merged(before: Mapping[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in {**before, **change}.items() if value is not None}
