"""Tensors of an adapted model: a model's own and what an adapter makes of them, computed a chunk at a time.

With a low-rank update W' = W + scale * B A, where W is (out, in), B (out, rank) and A (rank, in); what is stored the
other way round (an embedding, a Conv1D) is updated by its transpose. DoRA (arXiv 2402.09353) then scales each output
feature to a magnitude m: W' * m / |W'|. All of it in float32 (float64 if anything is float64), rounded once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path

import torch
import xxhash

from olmfast.weights.checkpoint import FLOATS, Tensor, TensorInfo
from olmfast.weights.chunks import CHUNK, Readable
from olmfast.weights.digests import DigestCache


@dataclass(frozen=True)
class Adapted(ABC):
    """A tensor that an adapter changes. It has the dtype, and where nothing else is said the shape, of `base`."""

    base: Tensor

    @property
    @abstractmethod
    def parts(self) -> tuple[TensorInfo, ...]:
        """What the adapter has for it."""

    @property
    def settings(self) -> tuple[float | bool | tuple[int, ...], ...]:
        """Numbers, besides its parts, that its values depend on."""
        return ()

    @abstractmethod
    def open(self) -> Readable:
        """See `Tensor.open`."""

    @property
    def name(self) -> str:
        """The base's name."""
        return self.base.name

    @property
    def file(self) -> Path:
        """The adapter's file."""
        return self.parts[0].file

    @property
    def dtype(self) -> torch.dtype:
        """The base's dtype."""
        return self.base.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The base's shape."""
        return self.base.shape

    @property
    def n_bytes(self) -> int:
        """See `Tensor.n_bytes`."""
        return prod(self.shape) * self.dtype.itemsize

    @property
    def held_bytes(self) -> int:
        """See `Tensor.held_bytes`: the adapter's part in the dtype that is computed in, and a few rows of the base."""
        row = self.shape[-1] if self.shape else 1
        rows = 4 * max(CHUNK, row)
        return (sum(prod(part.shape) for part in self.parts) + rows) * self.computed_in.itemsize + self.base.held_bytes

    @property
    def in_file(self) -> TensorInfo | None:
        """None: it is computed."""
        return None

    @property
    def computed_in(self) -> torch.dtype:
        """The dtype of the arithmetic."""
        wide = any(tensor.dtype == torch.float64 for tensor in (self.base, *self.parts))
        return torch.float64 if wide else torch.float32

    def places(self) -> Iterator[TensorInfo]:
        """See `Tensor.places`."""
        yield from self.base.places()
        yield from self.parts

    def read(self) -> torch.Tensor:
        """See `Tensor.read`."""
        out = torch.empty(prod(self.shape), dtype=self.dtype)
        self.open().read_into(out, 0)
        return out.view(self.shape)

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """See `Readable`; `open` keeps what several chunks need."""
        self.open().read_into(out, start)

    def known_digest(self, digests: DigestCache) -> str:
        """See `Tensor.known_digest`: of what it is computed from and how, so nothing is computed for it."""
        made_of = [tensor.known_digest(digests) for tensor in (self.base, *self.parts)]
        told = f"{type(self).__name__} {self.dtype} {self.shape} {self.settings} {made_of}"
        return xxhash.xxh3_128(told.encode()).hexdigest()


@dataclass(frozen=True)
class Replaced(Adapted):
    """The adapter's own tensor, of any shape, rounded to the dtype of the base's."""

    by: TensorInfo

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """See `Adapted`."""
        return (self.by,)

    @property
    def shape(self) -> tuple[int, ...]:
        """The adapter's shape."""
        return self.by.shape

    @property
    def held_bytes(self) -> int:
        """See `Tensor.held_bytes`: a chunk."""
        return CHUNK * self.by.dtype.itemsize

    def places(self) -> Iterator[TensorInfo]:
        """The adapter's alone."""
        yield self.by

    def open(self) -> Readable:
        """See `Tensor.open`."""
        return _Rounded(self, self.by)


@dataclass(frozen=True)
class RowsReplaced(Adapted):
    """Some rows are the adapter's: `rows` (n, ...) at `indices`, the last of equal ones."""

    rows: TensorInfo
    indices: tuple[int, ...]

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """See `Adapted`."""
        return (self.rows,)

    @property
    def settings(self) -> tuple[float | bool | tuple[int, ...], ...]:
        """See `Adapted`."""
        return (self.indices,)

    def open(self) -> Readable:
        """See `Tensor.open`."""
        return _WithRows(self)


@dataclass(frozen=True)
class Added(Adapted):
    """The adapter's vector times a number, added: a bias."""

    by: TensorInfo
    scale: float

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """See `Adapted`."""
        return (self.by,)

    @property
    def settings(self) -> tuple[float | bool | tuple[int, ...], ...]:
        """See `Adapted`."""
        return (self.scale,)

    def open(self) -> Readable:
        """See `Tensor.open`."""
        return _Sum(self)


@dataclass(frozen=True)
class LowRank(Adapted):
    """W + scale * B A, with `b` (out, rank) and `a` (rank, in); `transposed` says that the base is stored (in, out).

    `magnitude` (out,), where there is one, is what DoRA scales each output feature to.
    """

    a: TensorInfo
    b: TensorInfo
    scale: float
    transposed: bool = False
    magnitude: TensorInfo | None = None

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """See `Adapted`."""
        return (self.a, self.b) if self.magnitude is None else (self.a, self.b, self.magnitude)

    @property
    def settings(self) -> tuple[float | bool | tuple[int, ...], ...]:
        """See `Adapted`."""
        return (self.scale, self.transposed)

    def open(self) -> Readable:
        """See `Tensor.open`."""
        a, b = (part.read().to(self.computed_in) for part in (self.a, self.b))
        left, right = (a.T, b.T) if self.transposed else (b, a)
        magnitude = None if self.magnitude is None else self.magnitude.read().to(self.computed_in).flatten()
        return Product(self, self.base.open(), left, right, self.scale, magnitude=magnitude)


class _Reading:
    """What is read of an adapted tensor: its shape and dtype, and values rounded to that dtype."""

    def __init__(self, tensor: Adapted) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype

    def put(self, values: torch.Tensor, out: torch.Tensor) -> None:
        """Copy computed values, rounded once to the tensor's dtype, to where they are wanted."""
        out.copy_(values if out.dtype == self.dtype else values.to(self.dtype))


class _Rounded(_Reading):
    def __init__(self, tensor: Adapted, by: TensorInfo) -> None:
        super().__init__(tensor)
        self.by = by

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """See `Readable`."""
        for begin in range(0, len(out), CHUNK):
            part = out[begin : begin + CHUNK]
            values = torch.empty(len(part), dtype=self.by.dtype)
            self.by.read_into(values, start + begin)
            self.put(values, part)


class _WithRows(_Reading):
    def __init__(self, tensor: RowsReplaced) -> None:
        super().__init__(tensor)
        self.base, self.width = tensor.base.open(), prod(tensor.shape[1:])
        self.rows = tensor.rows.read().reshape(len(tensor.indices), -1)
        self.place = sorted({row: i for i, row in enumerate(tensor.indices)}.items())

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """See `Readable`."""
        self.base.read_into(out, start)
        for row, i in self.place[bisect_left(self.place, (start // self.width, 0)) :]:
            first = row * self.width - start
            begin, end = max(first, 0), min(first + self.width, len(out))
            if begin >= end:
                return
            self.put(self.rows[i, begin - first : end - first], out[begin:end])


class _Sum(_Reading):
    def __init__(self, tensor: Added) -> None:
        super().__init__(tensor)
        self.base, self.dtype_of_sum = tensor.base.open(), tensor.computed_in
        self.added = tensor.by.read().to(self.dtype_of_sum).flatten() * tensor.scale

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """See `Readable`."""
        values = torch.empty(len(out), dtype=self.dtype_of_sum)
        self.base.read_into(values, start)
        self.put(values.add_(self.added[start : start + len(out)]), out)


class Product(_Reading):
    """W + scale * left right, by blocks of whole rows that always begin at the same rows, so that values do not depend
    on who reads them.

    W is what `base` holds from `offset` on, as many values as `left` (rows, rank) and `right` (rank, columns) make.
    """

    def __init__(
        self,
        tensor: Adapted,
        base: Readable,
        left: torch.Tensor,
        right: torch.Tensor,
        scale: float,
        offset: int = 0,
        magnitude: torch.Tensor | None = None,
    ) -> None:
        super().__init__(tensor)
        self.base, self.left, self.right, self.scale, self.offset = base, left, right, scale, offset
        self.n_rows, self.n_columns = left.shape[0], right.shape[1]
        self.step = max(1, CHUNK // max(1, self.n_columns))
        self.memory = torch.empty(min(self.step, self.n_rows) * self.n_columns, dtype=left.dtype)
        self.magnitude = magnitude
        self.transposed = isinstance(tensor, LowRank) and tensor.transposed
        self.by_column: torch.Tensor | None = None  # DoRA's factors, where output features are columns
        self.block, self.values = -1, self.memory  # what was computed last

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """See `Readable`."""
        if self.magnitude is not None and self.transposed and self.by_column is None:
            self.by_column = self._magnitude_by_norm(self._column_norms())
        done, size = 0, self.step * self.n_columns
        while done < len(out):
            block, first = divmod(start + done, size)
            values = self._scaled(block).flatten()[first : first + len(out) - done]
            self.put(values, out[done : done + len(values)])
            done += len(values)

    def _scaled(self, block: int) -> torch.Tensor:
        """Rows of W', scaled to DoRA's magnitudes if there are any."""
        if block != self.block:
            self.values, self.block = self._sum(block), block
            begin = block * self.step
            if self.by_column is not None:
                self.values.mul_(self.by_column)
            elif self.magnitude is not None:
                norms = torch.linalg.vector_norm(self.values, dim=1, dtype=torch.float64)
                own = self._magnitude_by_norm(norms, begin)
                self.values.mul_(own.unsqueeze(1))
        return self.values

    def _sum(self, block: int) -> torch.Tensor:
        """(rows, columns): W + scale * left right."""
        begin, end = block * self.step, min((block + 1) * self.step, self.n_rows)
        values = self.memory[: (end - begin) * self.n_columns]
        self.base.read_into(values, self.offset + begin * self.n_columns)
        values = values.view(end - begin, self.n_columns)
        return values.addmm_(self.left[begin:end], self.right, alpha=self.scale)

    def _column_norms(self) -> torch.Tensor:
        """(columns,), float64."""
        total = torch.zeros(self.n_columns, dtype=torch.float64)
        for block in range(-(-self.n_rows // self.step)):
            total += self._sum(block).double().square_().sum(dim=0)
        self.block = -1  # its memory has been used
        return total.sqrt_()

    def _magnitude_by_norm(self, norms: torch.Tensor, begin: int = 0) -> torch.Tensor:
        """Magnitude / norm of the output features from `begin` on."""
        assert self.magnitude is not None
        return (self.magnitude[begin : begin + len(norms)].double() / norms).to(self.magnitude.dtype)


def replaced(base: Tensor, by: TensorInfo) -> Tensor:
    """The adapter's tensor in the base's dtype: where it lies, if it has that dtype."""
    return by if by.dtype == base.dtype or by.dtype not in FLOATS else Replaced(base, by)
