"""The kinds of expressions: a donor's tensor, a stored one, a merge, rows put together, a mean row."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch

from olmfast.weights.checkpoint import Tensor, TensorInfo
from olmfast.weights.chunks import Held, Operands, Readable, RowsOf, Scratch, Setting, Streamed
from olmfast.weights.methods import METHODS
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression, Sources, expression_from_json


class InFile(Expression):
    """A tensor whose bytes lie in a file."""

    @property
    def parts(self) -> tuple[Expression, ...]:
        """None: it is read as it is."""
        return ()

    @abstractmethod
    def info(self, sources: Sources) -> TensorInfo:
        """See `Expression.info`."""

    def open(self, sources: Sources, memory: Scratch | None = None) -> Readable:  # noqa: ARG002
        """See `Expression.open`."""
        return self.info(sources)

    def value(self, sources: Sources) -> torch.Tensor:
        """See `Expression.value`."""
        return self.info(sources).read()

    def places(self, sources: Sources) -> Iterator[TensorInfo]:
        """See `Expression.places`."""
        yield self.info(sources)


@dataclass(frozen=True)
class Copy(Expression):
    """The tensor of one donor, byte for byte."""

    key: ClassVar[str] = "copy"
    donor: str
    tensor: str

    def to_json(self) -> dict[str, Any]:
        """See `Expression.to_json`."""
        return {"copy": self.donor, "tensor": self.tensor}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Copy:
        """See `Expression.from_json`."""
        return cls(entry["copy"], entry["tensor"])

    @property
    def parts(self) -> tuple[Expression, ...]:
        """None: it is the donor's."""
        return ()

    def open(self, sources: Sources, memory: Scratch | None = None) -> Readable:  # noqa: ARG002
        """See `Expression.open`."""
        return self._tensor(sources).open()

    def value(self, sources: Sources) -> torch.Tensor:
        """See `Expression.value`."""
        return self._tensor(sources).read()

    def info(self, sources: Sources) -> TensorInfo | None:
        """See `Expression.info`."""
        return self._tensor(sources).in_file

    def places(self, sources: Sources) -> Iterator[TensorInfo]:
        """See `Expression.places`."""
        return self._tensor(sources).places()

    def held_bytes(self, sources: Sources) -> int:
        """See `Expression.held_bytes`."""
        return self._tensor(sources).held_bytes

    def _tensor(self, sources: Sources) -> Tensor:
        return sources.pool[self.donor].tensors[self.tensor]

    def identity(self, sources: Sources) -> str:
        """See `Expression.identity`."""
        return sources.pool[self.donor].digest(self.tensor)

    @property
    def origin(self) -> str:
        """See `Expression.origin`."""
        return f"copied from {self.donor}"


@dataclass(frozen=True)
class Stored(InFile):
    """A computed tensor kept in a safetensors file next to the record; `digest` is xxh3-128 of its bytes.

    With `place`, the part of the tensor that these indices select.
    """

    key: ClassVar[str] = "stored"
    file: str
    tensor: str
    digest: str
    place: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """See `Expression.to_json`."""
        entry = {"stored": self.file, "tensor": self.tensor, "digest": self.digest}
        return {**entry, "place": list(self.place)} if self.place else entry

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Stored:
        """See `Expression.from_json`."""
        return cls(entry["stored"], entry["tensor"], entry["digest"], tuple(entry.get("place", ())))

    def info(self, sources: Sources) -> TensorInfo:
        """See `Expression.info`. Its bytes are checked when it is first used."""
        return sources.stored(self.file, self.tensor, self.digest, self.place)

    def identity(self, sources: Sources) -> str:  # noqa: ARG002
        """See `Expression.identity`."""
        return self.digest


@dataclass(frozen=True)
class Merge(Expression):
    """What a method of `weights/methods.py` makes of its terms, which may be merges themselves.

    Its value is computed in float32 and rounded once, to the terms' dtype or to that of the setting `dtype`.
    `base` is what task vectors are taken from; `settings` are sorted by name.
    """

    key: ClassVar[str] = "merge"
    method: str
    terms: tuple[Expression, ...]
    base: Expression | None = None
    settings: tuple[tuple[str, Setting], ...] = ()

    @property
    def parts(self) -> tuple[Expression, ...]:
        """The terms and, behind them, the base."""
        return self.terms if self.base is None else (*self.terms, self.base)

    def to_json(self) -> dict[str, Any]:
        """See `Expression.to_json`."""
        entry: dict[str, Any] = {"merge": self.method, "terms": [term.to_json() for term in self.terms]}
        if self.base is not None:
            entry["base"] = self.base.to_json()
        return {**entry, "settings": dict(self.settings)}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Merge:
        """See `Expression.from_json`."""
        base = expression_from_json(entry["base"]) if "base" in entry else None
        settings = {key: tuple(x) if isinstance(x, list) else x for key, x in entry["settings"].items()}
        return merge(entry["merge"], map(expression_from_json, entry["terms"]), base, **settings)

    def open(self, sources: Sources, memory: Scratch | None = None) -> Readable:
        """See `Expression.open`. Merges among its parts are computed whole."""
        base = self.base.operand(sources) if self.base is not None else None
        settings = dict(self.settings)
        dtype = getattr(torch, str(settings["dtype"])) if "dtype" in settings else None
        operands = Operands([term.operand(sources) for term in self.terms], base, sources.device, dtype, memory)
        method = METHODS[self.method]
        return Streamed(operands, lambda: method.prepare(operands, method.settings(settings)))

    def operand(self, sources: Sources) -> Readable:
        """See `Expression.operand`. What is wanted again soon is kept."""
        return Held(sources.kept(self))

    @property
    def origin(self) -> str:
        """See `Expression.origin`."""
        if self.method != "passthrough":
            return f"merged by {self.method}"
        settings = dict(self.settings)
        scales = settings.get("scale", ())
        scaled = isinstance(scales, tuple) and any(scale != 1.0 for scale in scales)
        return "scaled" if scaled or "dtype" not in settings else f"{self.terms[0].origin} in {settings['dtype']}"


@dataclass(frozen=True)
class Rows(Expression):
    """Rows of other tensors, stacked: how a vocabulary is put together.

    Each entry is (source, begin, end): rows begin to end of it, or as many rows of zeros where it is None.
    """

    key: ClassVar[str] = "rows"
    entries: tuple[tuple[Expression | None, int, int], ...]

    @property
    def parts(self) -> tuple[Expression, ...]:
        """The sources of rows."""
        return tuple(source for source, _, _ in self.entries if source is not None)

    def to_json(self) -> dict[str, Any]:
        """See `Expression.to_json`."""
        return {"rows": [[source and source.to_json(), begin, end] for source, begin, end in self.entries]}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Rows:
        """See `Expression.from_json`."""
        rows = ((source and expression_from_json(source), begin, end) for source, begin, end in entry["rows"])
        return cls(tuple(rows))

    def open(self, sources: Sources, memory: Scratch | None = None) -> Readable:  # noqa: ARG002
        """See `Expression.open`."""
        return RowsOf([(s.operand(sources) if s else None, begin, end) for s, begin, end in self.entries])

    @property
    def origin(self) -> str:
        """See `Expression.origin`."""
        return "put together of rows"


@dataclass(frozen=True)
class MeanRow(Expression):
    """The mean over all rows of a tensor, as a tensor of one row, summed in float64."""

    key: ClassVar[str] = "mean_row"
    of: Expression

    @property
    def parts(self) -> tuple[Expression, ...]:
        """The tensor."""
        return (self.of,)

    def to_json(self) -> dict[str, Any]:
        """See `Expression.to_json`."""
        return {"mean_row": self.of.to_json()}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> MeanRow:
        """See `Expression.from_json`."""
        return cls(expression_from_json(entry["mean_row"]))

    def open(self, sources: Sources, memory: Scratch | None = None) -> Readable:  # noqa: ARG002
        """See `Expression.open`."""
        tensor = self.of.operand(sources)
        width = prod(tensor.shape[1:])
        total, row = torch.zeros(width, dtype=torch.float64), torch.empty(width, dtype=torch.float64)
        for start in range(0, prod(tensor.shape), width):
            tensor.read_into(row, start)
            total += row
        return Held((total / tensor.shape[0]).to(tensor.dtype).view(1, *tensor.shape[1:]))


def merge(method: str, terms: Iterable[Expression], base: Expression | None = None, **settings: Setting) -> Merge:
    """A Merge with its settings in order."""
    return Merge(method, tuple(terms), base, tuple(sorted(settings.items())))


def whole(donor: str, tensors: Iterable[str]) -> Recipe:
    """The recipe that is one donor, unchanged."""
    return Recipe(donor, {name: Copy(donor, name) for name in tensors})
