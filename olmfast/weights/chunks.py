"""What a merge is made of, read a chunk at a time, so that no tensor is ever in memory as a whole."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import accumulate
from math import prod
from typing import Protocol, runtime_checkable

import torch

from olmfast import kernels
from olmfast.errors import show

Setting = bool | int | float | str | tuple[float, ...]  # of a merge

# Values in a chunk: on a CPU what its caches hold, on a GPU enough to be worth a launch. Task vectors, with their masks
# and sums, fill a dozen buffers, which a core's own cache holds only if each is smaller.
CHUNK, TASK_CHUNK, GPU_CHUNK = 1 << 19, 1 << 17, 1 << 26

# The values [start, stop) of a result, flat, in the dtype that is computed in; overwritten by the next call.
Piece = Callable[[int, int], torch.Tensor]


def chunk_size(device: torch.device, task_vectors: bool = False) -> int:
    """Values in a chunk on this device."""
    return GPU_CHUNK if device.type != "cpu" else TASK_CHUNK if task_vectors else CHUNK


@runtime_checkable
class IntoMemory(Protocol):
    """A piece that can do without the caller's chunks; see `fused.Fused`."""

    def fits(self, out: torch.Tensor) -> bool:
        """Whether it can fill `out`."""
        ...

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """See `Readable`."""
        ...


def chunked(n_values: int, step: int) -> Iterator[tuple[int, int]]:
    """(start, stop) of consecutive chunks of `step` values, the last of which may be shorter."""
    for start in range(0, n_values, step):
        yield start, min(start + step, n_values)


class Readable(Protocol):
    """A tensor that can be read a chunk at a time."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its values before they are converted."""
        ...

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Fill `out`, (m,) contiguous on the CPU, with the values from flat index `start` on, in out's dtype."""
        ...


class Held:
    """A tensor in memory."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.flat = tensor.detach().reshape(-1)
        self.shape = tuple(tensor.shape)
        self.dtype = tensor.dtype

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """See `Readable`."""
        out.copy_(self.flat[start : start + len(out)])


class RowsOf:
    """Rows of other tensors, stacked; see `expressions.Rows`.

    Raises ValueError if rows differ in shape, or do not exist.
    """

    def __init__(self, parts: Sequence[tuple[Readable | None, int, int]]) -> None:
        self.parts = list(parts)
        sources = [source for source, _, _ in parts if source is not None]
        if not sources:
            raise ValueError("rows: no tensor to take them from")
        for source, begin, end in parts:
            if source is not None and (source.shape[1:] != sources[0].shape[1:] or not begin <= end <= source.shape[0]):
                raise ValueError(f"rows {begin} to {end} of a tensor of shape {list(source.shape)}")
        self.width = prod(sources[0].shape[1:])
        self.ends = list(accumulate((end - begin) * self.width for _, begin, end in parts))
        self.shape = (self.ends[-1] // self.width, *sources[0].shape[1:])
        self.dtype = common_dtype(sources)

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """See `Readable`."""
        done, part = 0, bisect_right(self.ends, start)
        while done < len(out):
            source, begin, end = self.parts[part]
            first = start + done - (self.ends[part] - (end - begin) * self.width)
            target = out[done : done + self.ends[part] - start - done]
            if source is None:
                target.zero_()
            else:
                source.read_into(target, begin * self.width + first)
            done += len(target)
            part += 1


class Streamed:
    """The result of a merge, in the dtype it is meant for; prepared when it is first read."""

    def __init__(self, operands: Operands, prepare: Callable[[], Piece]) -> None:
        self.operands = operands
        self.shape, self.dtype = operands.shape, operands.result_dtype
        self._prepare = prepare
        self._piece: Piece | None = None

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """See `Readable`."""
        if self._piece is None:
            self._piece = self._prepare()
        if isinstance(self._piece, IntoMemory) and self._piece.fits(out):
            return self._piece.read_into(out, start)
        step = self.operands.step
        for begin in range(0, len(out), step):
            end = min(begin + step, len(out))
            values = self._piece(start + begin, start + end)
            out[begin:end].copy_(values if out.dtype == self.dtype else values.to(self.dtype))
        return None


def common_dtype(tensors: Sequence[Readable]) -> torch.dtype:
    """The narrowest dtype that holds the values of all of them."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class Scratch:
    """Memory that is reused from chunk to chunk and tensor to tensor, by one user at a time.

    The system provides new pages more slowly than a merge fills them.
    """

    def __init__(self) -> None:
        self._buffers: dict[object, torch.Tensor] = {}

    def take(self, name: object, n_values: int, dtype: torch.dtype, device: torch.device | str = "cpu") -> torch.Tensor:
        """(n_values,) that keeps its place from call to call; its values are whatever was left in it."""
        key = name, dtype, str(device)
        buffer = self._buffers.get(key)
        if buffer is None or buffer.numel() < n_values:  # len() of a tensor is ten times as slow
            self._buffers.pop(key, None)  # given back before more is taken
            self._buffers[key] = buffer = torch.empty(n_values, dtype=dtype, device=device)
        return buffer[:n_values]


class Operands:
    """The terms of one merge and the base that task vectors are taken from, all of one shape.

    Results are meant for `dtype`, the common dtype of all if none is given; what is wider is rounded to it first.

    Chunks come as (m,) tensors of `dtype`, float32 or (if any of them is float64) float64, on `device`. They
    are the reader's to change, and are overwritten when the same term is read again. They lie in `memory`, which
    Operands may share whose use does not overlap.

    Raises ValueError if shapes differ.
    """

    def __init__(
        self,
        terms: Sequence[Readable],
        base: Readable | None = None,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        memory: Scratch | None = None,
    ) -> None:
        self.terms = list(terms)
        self.base = base
        self.device = torch.device(device)
        every = [*self.terms, base] if base is not None else self.terms
        self.shape = every[0].shape
        for other in every:
            if other.shape != self.shape:
                raise ValueError(f"shapes differ: {list(self.shape)} and {list(other.shape)}")
        self.n_values = prod(self.shape)
        self.result_dtype = dtype or common_dtype(every)
        self.dtype = torch.float64 if self.result_dtype == torch.float64 else torch.float32
        self.step = chunk_size(self.device, task_vectors=base is not None)
        self._memory = memory or Scratch()

    def __len__(self) -> int:
        return len(self.terms)

    def chunks(self, whole: int = 1) -> Iterator[tuple[int, int]]:
        """(start, stop) of consecutive chunks; none ends within `whole` consecutive values."""
        yield from chunked(self.n_values, self.step // whole * whole or whole)

    @property
    def row(self) -> int:
        """Values in a row: along the last dimension."""
        return self.shape[-1] if self.shape else 1

    def scratch(self, name: object, n_values: int) -> torch.Tensor:
        """(n_values,) of memory that keeps its place from call to call, on the device."""
        return self._memory.take(name, n_values, self.dtype, self.device)

    def term(self, i: int, start: int, stop: int) -> torch.Tensor:
        """Values [start, stop) of term i."""
        return self.read(self.terms[i], i, start, stop)

    def from_base(self, start: int, stop: int) -> torch.Tensor:
        """Values [start, stop) of the base. Raises ValueError if there is none."""
        return self.read(self.needed_base, "base", start, stop)

    @property
    def needed_base(self) -> Readable:
        """The base. Raises ValueError if there is none."""
        if self.base is None:
            raise ValueError("the method needs a base")
        return self.base

    def delta(self, i: int, start: int, stop: int, base: torch.Tensor | None = None) -> torch.Tensor:
        """Values [start, stop) of term i minus the base's, which may be given if they have been read."""
        values = self.term(i, start, stop)
        if self.base is None:
            return values
        return values.sub_(self.from_base(start, stop) if base is None else base)

    def combined(
        self, weights: Sequence[float], of_base: float, start: int, stop: int, normalize: bool = False
    ) -> torch.Tensor:
        """of_base * base + sum_i weights[i] * term_i, divided by the sum of the weights if requested."""
        terms = [self.term(i, start, stop) for i in range(len(self))]
        if self.base is not None and of_base:
            terms, weights = [self.from_base(start, stop), *terms], [of_base, *weights]
        out = self.scratch("combined", stop - start)
        return kernels.weighted_sum(terms, weights, normalize=normalize, out=out)

    def gram(self) -> torch.Tensor:
        """(n, n) float64 on the CPU: the scalar products of the terms, or of their differences from the base."""
        total = torch.zeros((len(self), len(self)), dtype=torch.float64)
        for start, stop in self.chunks():
            base = self.from_base(start, stop) if self.base is not None else None
            rows = self.scratch("gram", len(self) * (stop - start)).view(len(self), -1)
            for i in range(len(self)):
                rows[i] = self.delta(i, start, stop, base)
            for i in range(len(self)):
                total[i, i:] += (rows[i:] @ rows[i]).to("cpu", torch.float64)
        return total + total.triu(1).T

    def read(self, tensor: Readable, name: object, start: int, stop: int) -> torch.Tensor:
        """Values [start, stop) of a tensor, in memory that `name` stands for."""
        out = self._memory.take(name, stop - start, self.dtype)
        tensor.read_into(out, start)
        if torch.promote_types(tensor.dtype, self.result_dtype) != self.result_dtype:
            out.copy_(out.to(self.result_dtype))
        return out.to(self.device)


class Settings:
    """A merge's settings, with the defaults of its method. Raises TypeError for a value of the wrong kind."""

    def __init__(self, given: Mapping[str, Setting], defaults: Mapping[str, Setting | None]) -> None:
        self._values = {**{k: v for k, v in defaults.items() if v is not None}, **given}

    def number(self, name: str, default: float) -> float:
        """One number."""
        value = self._values.get(name, default)
        if isinstance(value, (str, tuple)):
            raise TypeError(f"{name}: expected a number, got {show(value)}")
        return float(value)

    def each(self, name: str, i: int) -> float:
        """The number of term i; a single number applies to all."""
        value = self._values[name]
        return value[i] if isinstance(value, tuple) else self.number(name, 0.0)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        return bool(self._values.get(name, default))

    def integer(self, name: str, default: int) -> int:
        """A whole number."""
        value = self._values.get(name, default)
        if not isinstance(value, int):
            raise TypeError(f"{name}: expected a whole number, got {show(value)}")
        return value

    def text(self, name: str, default: str) -> str:
        """A word."""
        return str(self._values.get(name, default))
