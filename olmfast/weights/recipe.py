"""A merged model as data: output tensor -> where its values come from. JSON in and out.

Everything that is saved, resumed or replayed is a recipe; it says nothing about files of the machine it was
made on except for refined tensors, which lie beside the report that names them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import xxhash

from olmfast.errors import InputError


@dataclass(frozen=True)
class Copy:
    """The tensor of one donor, byte for byte."""

    donor: str
    tensor: str


@dataclass(frozen=True)
class Stored:
    """A computed tensor kept in a safetensors file beside the report; `digest` is xxh3-128 of its bytes."""

    file: str
    tensor: str
    digest: str


Setting = bool | int | float | str | tuple[float, ...]


@dataclass(frozen=True)
class Merge:
    """What a method of `weights/methods.py` makes of its terms, which may be merges themselves.

    Its value is computed in float32 and rounded once, to the terms' dtype or to that of the setting `dtype`.
    `base` is what task vectors are taken from; `settings` are sorted by name.
    """

    method: str
    terms: tuple[Expression, ...]
    base: Expression | None = None
    settings: tuple[tuple[str, Setting], ...] = ()


@dataclass(frozen=True)
class Rows:
    """Rows of other tensors, one stretch under another: how a vocabulary is put together.

    Each part is (source, begin, end): rows begin to end of it, or as many rows of zeros where it is None.
    """

    parts: tuple[tuple[Expression | None, int, int], ...]


@dataclass(frozen=True)
class MeanRow:
    """The mean over all rows of a tensor, as a tensor of one row."""

    of: Expression


Expression = Copy | Stored | Merge | Rows | MeanRow


def merge(method: str, terms: Iterable[Expression], base: Expression | None = None, **settings: Setting) -> Merge:
    """A Merge with its settings in order."""
    return Merge(method, tuple(terms), base, tuple(sorted(settings.items())))


def leaves(expression: Expression) -> Iterator[Copy | Stored]:
    """The tensors in files that an expression is made of, however deep."""
    if isinstance(expression, (Copy, Stored)):
        yield expression
        return
    if isinstance(expression, Merge):
        parts = [*expression.terms, expression.base]
    elif isinstance(expression, Rows):
        parts = [source for source, _, _ in expression.parts]
    else:
        parts = [expression.of]
    for part in parts:
        if part is not None:
            yield from leaves(part)


@dataclass(frozen=True)
class Recipe:
    """The base (whose config and other files the result carries) and an expression per canonical tensor.

    `tensors` maps each canonical name to its expression. The result's dtype is each base tensor's own.
    """

    base: str
    tensors: Mapping[str, Expression]

    def with_values(self, values: Mapping[str, Expression]) -> Recipe:
        """The recipe with some tensors' expressions replaced."""
        return Recipe(self.base, {**self.tensors, **values})

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, readable back by `from_json`."""
        return {"base": self.base, "tensors": {name: _to_json(e) for name, e in self.tensors.items()}}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Recipe:
        """Read what `to_json` wrote. Raises InputError for an expression it does not know."""
        return cls(data["base"], {name: _from_json(entry) for name, entry in data["tensors"].items()})

    def digest(self) -> str:
        """xxh3-128 of the recipe's JSON: of one pool, equal digests make equal models."""
        return xxhash.xxh3_128(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()


def _to_json(expression: Expression) -> dict[str, Any]:
    if isinstance(expression, Copy):
        return {"copy": expression.donor, "tensor": expression.tensor}
    if isinstance(expression, Stored):
        return {"stored": expression.file, "tensor": expression.tensor, "digest": expression.digest}
    if isinstance(expression, Rows):
        return {"rows": [[source and _to_json(source), begin, end] for source, begin, end in expression.parts]}
    if isinstance(expression, MeanRow):
        return {"mean_row": _to_json(expression.of)}
    entry: dict[str, Any] = {"merge": expression.method, "terms": [_to_json(term) for term in expression.terms]}
    if expression.base is not None:
        entry["base"] = _to_json(expression.base)
    return {**entry, "settings": dict(expression.settings)}


def _from_json(entry: dict[str, Any]) -> Expression:
    if "copy" in entry:
        return Copy(entry["copy"], entry["tensor"])
    if "stored" in entry:
        return Stored(entry["stored"], entry["tensor"], entry["digest"])
    if "merge" in entry:
        base = _from_json(entry["base"]) if "base" in entry else None
        settings = {key: tuple(x) if isinstance(x, list) else x for key, x in entry["settings"].items()}
        return merge(entry["merge"], map(_from_json, entry["terms"]), base, **settings)
    if "rows" in entry:
        return Rows(tuple((source and _from_json(source), begin, end) for source, begin, end in entry["rows"]))
    if "mean_row" in entry:
        return MeanRow(_from_json(entry["mean_row"]))
    raise InputError(f"recipe: unknown expression {entry!r}; it was written by a newer version")


def digest_tensor(tensor: torch.Tensor) -> str:
    """xxh3-128 of a tensor's dtype, shape and bytes, as `Checkpoint.digest` computes it from a file."""
    values = tensor.detach().cpu().contiguous()
    state = xxhash.xxh3_128(f"{values.dtype} {tuple(values.shape)}".encode())
    if values.numel():
        state.update(values.view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()


def whole(donor: str, tensors: tuple[str, ...]) -> Recipe:
    """The recipe that is one donor, unchanged."""
    return Recipe(donor, {name: Copy(donor, name) for name in tensors})
