"""What an expression is, and where expressions find what they are made of."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, ClassVar

import torch
import xxhash

from olmfast import kernels
from olmfast.errors import InputError, OlmfastError
from olmfast.weights.checkpoint import TensorInfo, prefetch, read_header
from olmfast.weights.chunks import Readable, Scratch
from olmfast.weights.pool import Pool


class Expression(ABC):
    """What one tensor is worth: small, immutable, hashable and picklable, so that it can be sent anywhere.

    One kind of expression is one class, and nothing else has to know of it. `key`, the first key of its entry, marks
    it in JSON. Its values are the same bytes wherever and however often they are computed.
    """

    key: ClassVar[str]
    kinds: ClassVar[dict[str, type[Expression]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "key" in cls.__dict__:
            Expression.kinds[cls.key] = cls

    @property
    def is_transient(self) -> bool:
        """Whether its values are kept in a file once they are chosen: those that are costly to compute alike."""
        return any(part.is_transient for part in self.parts)

    @property
    @abstractmethod
    def parts(self) -> tuple[Expression, ...]:
        """The expressions it is directly made of."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, `key` first, readable back by `from_json`."""

    @classmethod
    @abstractmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Expression:
        """Read what `to_json` wrote."""

    @abstractmethod
    def open(self, sources: Sources, memory: Scratch | None = None) -> Readable:
        """Its values, to be read a chunk at a time.

        What is opened with the same `memory` must be read one after the other. Raises ValueError or TypeError for
        shapes or settings that do not fit.
        """

    def value(self, sources: Sources) -> torch.Tensor:
        """The whole tensor on the CPU, in the dtype it is or would be saved with; not the caller's to change."""
        readable = self.open(sources)
        out = torch.empty(prod(readable.shape), dtype=readable.dtype)
        readable.read_into(out, 0)
        return out.view(readable.shape)

    @classmethod
    def stack(cls, several: Sequence[Expression], sources: Sources) -> torch.Tensor | None:  # noqa: ARG003
        """(K, *shape) of K expressions of this class at once, on any device; None where nothing is gained by it."""
        return None

    def operand(self, sources: Sources) -> Readable:
        """Its values as a part of another expression, which may read them several times."""
        return self.open(sources)

    def info(self, sources: Sources) -> TensorInfo | None:  # noqa: ARG002
        """Where its bytes lie in a file, if they do."""
        return None

    def places(self, sources: Sources) -> Iterator[TensorInfo]:
        """Every tensor of a file that it is made of, however deep."""
        for part in self.parts:
            yield from part.places(sources)

    def held_bytes(self, sources: Sources) -> int:
        """Bytes that its donors' tensors keep in memory while it is read a chunk at a time."""
        return sum(part.held_bytes(sources) for part in self.parts)

    def identity(self, sources: Sources) -> str:
        """A digest that says, without computing anything, whether two expressions are worth the same bytes.

        Equal digests, equal bytes. The other way round it holds for tensors that lie in a file; bytes that were
        computed in different ways may be equal all the same.
        """

        def told(value: object) -> object:
            if isinstance(value, list):
                return [told(item) for item in value]
            if isinstance(value, dict) and next(iter(value), None) in Expression.kinds:
                return expression_from_json(value).identity(sources)
            return value

        entry = {name: told(value) for name, value in self.to_json().items()}
        return xxhash.xxh3_128(str(entry).encode()).hexdigest()

    @property
    def origin(self) -> str:
        """Where a tensor of this expression comes from, in the words of the closing line."""
        return "computed"


def expression_from_json(entry: Mapping[str, Any]) -> Expression:
    """The expression that an entry describes. Raises InputError for an unknown kind."""
    kind = Expression.kinds.get(next(iter(entry), ""))
    if kind is None:
        raise InputError(f"recipe: unknown expression {str(entry)[:300]}; it was written by a newer version")
    return kind.from_json(entry)


def leaves(expression: Expression) -> Iterator[Expression]:
    """The expressions without parts, such as tensors in files, that an expression is made of, however deep."""
    if not expression.parts:
        yield expression
    for part in expression.parts:
        yield from leaves(part)


@dataclass
class Parent:
    """The weight that a generation starts from: (rows, cols) in its stored dtype, on the search's device."""

    weight: torch.Tensor

    @cached_property
    def factors(self) -> kernels.SvdFactors:
        """Singular factors of weight / max|weight|; computed once per parent."""
        return kernels.svd_factors(self.weight.to(torch.promote_types(self.weight.dtype, torch.float32)))


class Sources:
    """The donors and the folder of stored tensors that expressions refer to.

    The values of expressions that were wanted last are kept, `memory` bytes of them. `device` is where what is read a
    chunk at a time is computed, `evolve_on` where the parents of offspring lie.
    """

    def __init__(
        self,
        pool: Pool,
        folder: Path,
        memory: int = 0,
        device: torch.device | str = "cpu",
        evolve_on: torch.device | str = "cpu",
    ) -> None:
        self.pool, self.folder, self.memory = pool, folder, memory
        self.device, self.evolve_on = torch.device(device), torch.device(evolve_on)
        self._opened: dict[tuple[str, str, str, tuple[int, ...]], TensorInfo] = {}
        self._kept: OrderedDict[Expression, torch.Tensor] = OrderedDict()
        self._n_kept = 0
        self._parent: tuple[tuple[Expression, torch.dtype], Parent] | None = None
        self._reader = ThreadPoolExecutor(1, "prefetch")

    def value(self, expression: Expression) -> torch.Tensor:
        """The tensor on the CPU, in the dtype it is or would be saved with. It is not the caller's to change."""
        return expression.value(self)

    def kept(self, expression: Expression) -> torch.Tensor:
        """The expression's value, computed unless it is among those kept."""
        if expression in self._kept:
            self._kept.move_to_end(expression)
            return self._kept[expression]
        value = self.value(expression)
        self._kept[expression] = value
        self._n_kept += value.nbytes
        while self._n_kept > self.memory:
            self._n_kept -= self._kept.popitem(last=False)[1].nbytes
        return value

    def is_kept(self, expression: Expression) -> bool:
        """Whether its value is there without being computed."""
        return expression in self._kept

    def parent(self, expression: Expression, dtype: torch.dtype) -> Parent:
        """The weight that offspring descend from, rounded to `dtype`; the last one is kept with its factors."""
        key = (expression, dtype)
        if self._parent is None or self._parent[0] != key:
            self._parent = None  # given back before more is taken
            self._parent = (key, Parent(self.value(expression).to(dtype).to(self.evolve_on)))
        return self._parent[1]

    def release_parent(self) -> None:
        """Give back the memory of the parent kept."""
        self._parent = None

    def stored(self, file: str, tensor: str, digest: str, place: tuple[int, ...] = ()) -> TensorInfo:
        """Where a refined tensor is stored, or the part of it at `place`.

        Raises OlmfastError if its bytes are not those of the digest.
        """
        key = (file, tensor, digest, place)
        if key not in self._opened:
            path = self.folder / file
            info = next((info.at(place) for info in read_header(path) if info.name == tensor), None)
            if info is None or info.digest() != digest:
                raise OlmfastError(f"{path}: {tensor}: the bytes have changed since they were stored")
            # A file that a later one has replaced stays on the disk for as long as it is mapped.
            self._opened = {k: i for k, i in self._opened.items() if k[1] != tensor or (self.folder / k[0]).exists()}
            self._opened[key] = info
        return self._opened[key]

    def prefetch(self, expressions: Iterable[Expression]) -> None:
        """Have a thread read from disk the unchanged bytes that will be wanted next; returns at once."""
        infos = [info for expression in expressions if (info := expression.info(self)) is not None]
        if infos:
            self._reader.submit(prefetch, infos)
