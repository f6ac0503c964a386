"""The report of the original OLM: its decisions, as the first steps of a run."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, ValidationError

from olmfast.config.loading import explain
from olmfast.errors import InputError, show, told
from olmfast.search.log import STEPS, Outcome
from olmfast.search.record import REPORT
from olmfast.weights.expressions import Copy, whole
from olmfast.weights.files import read_text
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe


def read_report(path: Path) -> dict[str, Any]:
    """A `merge_report.json`, of the original tool or ours, which has the key `olmfast`.

    Raises InputError for one that cannot be read or is not a merge report.
    """
    try:
        data = json.loads(read_text(path))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read: {told(error)}") from error
    keys = ("base_model", "boundary_layers", "layers", "tensors", "olmfast")
    parts = [data.get(key, {}) for key in keys] if isinstance(data, dict) else [None]
    if not any(part != {} for part in parts) or not all(isinstance(part, dict) for part in parts):
        raise InputError(f"{path}: is not a merge report")
    return dict(data)


def read_other(path: Path) -> dict[str, Any]:
    """The original tool's report at a path, to begin a run from. Raises InputError for one of ours."""
    data = read_report(path)
    if "olmfast" in data:
        raise InputError(
            f"{path}: is a report of olmfast's own; --resume continues it in its folder, and olmfast rebuild makes its "
            "model"
        )
    return data


def read_original(folder: Path) -> dict[str, Any] | None:
    """The original tool's report in a folder; None where there is no report, or it is ours and has its log.

    Raises InputError for one that cannot be read, is not a merge report, or is ours and has lost its log.
    """
    path = folder / REPORT
    if not path.is_file() or (folder / STEPS).is_file():
        return None
    data = read_report(path)
    if "olmfast" in data:
        raise InputError(
            f"{folder / STEPS}: is missing, and {REPORT} alone cannot be continued; put it back, or use --overwrite "
            "to start anew"
        )
    return data


class _Named(BaseModel):
    """What the report says of base and boundary."""

    name: str | None = None


class _Chosen(BaseModel):
    """What it says of a layer or a tensor."""

    best_model: str | None = None


class _Report(BaseModel):
    """The keys of the original tool's report that are read; it may hold others."""

    base_model: _Named = _Named()
    boundary_layers: _Named = _Named()
    layers: dict[Annotated[int, Field(ge=0, lt=2**31)], _Chosen] = {}
    tensors: dict[str, _Chosen] = {}


@dataclass(frozen=True)
class Choices:
    """The decisions in a report of the original tool: donors by block, and by module's name."""

    base: str | None
    boundary: str | None
    layers: dict[int, str]
    tensors: dict[str, str]

    @classmethod
    def read(cls, data: dict[str, Any]) -> Choices:
        """The decisions as they stand there. Raises InputError for a report of another shape."""
        try:
            report = _Report.model_validate(data)
        except ValidationError as error:
            faults = explain(REPORT, error.errors(), lambda _: ())
            raise InputError(f"{REPORT}: is not a merge report of the original's shape\n{faults}") from error
        layers = {i: entry.best_model for i, entry in report.layers.items() if entry.best_model}
        tensors = {
            name.removesuffix(".weight").removesuffix(".bias"): entry.best_model
            for name, entry in report.tensors.items()
            if entry.best_model
        }
        return cls(report.base_model.name or None, report.boundary_layers.name or None, layers, tensors)

    @property
    def donors(self) -> list[str]:
        """The donors that are named, each once."""
        named = [self.base, self.boundary, *self.layers.values(), *self.tensors.values()]
        return list(dict.fromkeys(name for name in named if name is not None))

    def recipe(self, pool: Pool) -> tuple[Recipe, dict[str, Outcome]]:
        """What they make of the pool, and each as a step that has been taken.

        Raises InputError naming a donor, block or tensor of the report that the pool does not have.
        """
        for name in self.donors:
            if name not in pool.names:
                raise InputError(f"{REPORT}: names the donor {show(name)}, which is not in models")
        base = self.base or pool.names[0]
        recipe, outcomes = whole(base, pool.tensors), dict[str, Outcome]()
        for key, stage, unit, donor, tensors in self._taken(pool):
            recipe = recipe.with_values({name: Copy(donor, name) for name in tensors})
            outcomes[key] = Outcome(stage, unit, donor, changed=donor != base, metrics={})
        return recipe, outcomes

    def _taken(self, pool: Pool) -> Iterator[tuple[str, str, str, str, tuple[str, ...]]]:
        """Key, stage, unit, donor and tensors of each step."""
        architecture = pool.architecture
        if self.boundary:
            tensors = architecture.boundary_unit(pool.tensors).tensors
            yield "boundary", "boundary", "boundary", self.boundary, tensors
        for block, donor in self.layers.items():
            tensors = architecture.window_unit(pool.tensors, [block]).tensors
            if not tensors:
                raise InputError(f"{REPORT}: names block {block}; the models have 0 to {architecture.n_blocks - 1}")
            yield f"layers/{block}", "layers", str(block), donor, tensors
        for name, donor in self.tensors.items():
            tensors = tuple(tensor for tensor in pool.tensors if tensor.startswith(f"{name}."))
            is_tied_head = pool.tied and architecture.family.head.startswith(f"{name}.")
            if not tensors and not is_tied_head:
                raise InputError(f"{REPORT}: names the tensor {show(name)}, which the models do not have")
            yield f"tensors/{name}", "tensors", name, donor, tensors
