"""What a merge is made of, read a stretch at a time, so that no tensor need ever be in memory as a whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from math import prod
from typing import Protocol

import torch

from olmfast import kernels
from olmfast.weights.recipe import Setting

# Values at a time on a CPU: what its caches hold. On a GPU a stretch has to be worth a launch.
STRETCH, GPU_STRETCH = 1 << 18, 1 << 26

# The values [start, stop) of a result, flat, in the dtype that is computed in; overwritten by the next call.
Piece = Callable[[int, int], torch.Tensor]


class Readable(Protocol):
    """A tensor that can be read a stretch at a time."""

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


def common_dtype(tensors: Sequence[Readable]) -> torch.dtype:
    """The narrowest dtype that holds the values of all of them."""
    dtype = tensors[0].dtype
    for tensor in tensors[1:]:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


class Operands:
    """The terms of one merge and the base that task vectors are taken from, all of one shape.

    Stretches come as (m,) tensors of `dtype`, float32 or (if any of them is float64) float64, on `device`. They
    are the reader's to change, and are overwritten when the same term is read again.

    Raises ValueError if shapes differ.
    """

    def __init__(
        self, terms: Sequence[Readable], base: Readable | None = None, device: torch.device | str = "cpu"
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
        self.result_dtype = common_dtype(every)
        self.dtype = torch.float64 if self.result_dtype == torch.float64 else torch.float32
        self._buffers: dict[object, torch.Tensor] = {}

    def __len__(self) -> int:
        return len(self.terms)

    def stretches(self, whole: int = 1) -> Iterator[tuple[int, int]]:
        """(start, stop) of consecutive stretches; none ends within `whole` consecutive values."""
        step = (STRETCH if self.device.type == "cpu" else GPU_STRETCH) // whole * whole or whole
        for start in range(0, self.n_values, step):
            yield start, min(start + step, self.n_values)

    @property
    def row(self) -> int:
        """Values in a row: along the last dimension."""
        return self.shape[-1] if self.shape else 1

    def scratch(self, name: object, n_values: int) -> torch.Tensor:
        """(n_values,) of memory that keeps its place from call to call, on the device."""
        return self._buffer(name, n_values, self.device)

    def term(self, i: int, start: int, stop: int) -> torch.Tensor:
        """Values [start, stop) of term i."""
        return self._read(self.terms[i], i, start, stop)

    def from_base(self, start: int, stop: int) -> torch.Tensor:
        """Values [start, stop) of the base. Raises ValueError if there is none."""
        if self.base is None:
            raise ValueError("the method needs a base")
        return self._read(self.base, "base", start, stop)

    def delta(self, i: int, start: int, stop: int, base: torch.Tensor | None = None) -> torch.Tensor:
        """Values [start, stop) of term i minus the base's, which may be given if they have been read."""
        values = self.term(i, start, stop)
        if self.base is None:
            return values
        return values.sub_(self.from_base(start, stop) if base is None else base)

    def combined(self, weights: Sequence[float], of_base: float, start: int, stop: int) -> torch.Tensor:
        """of_base * base + sum_i weights[i] * term_i."""
        terms = [self.term(i, start, stop) for i in range(len(self))]
        if self.base is not None and of_base:
            terms, weights = [self.from_base(start, stop), *terms], [of_base, *weights]
        return kernels.weighted_sum(terms, weights, out=self.scratch("combined", stop - start))

    def gram(self) -> torch.Tensor:
        """(n, n) float64 on the CPU: the scalar products of the terms, or of their differences from the base."""
        total = torch.zeros((len(self), len(self)), dtype=torch.float64)
        for start, stop in self.stretches():
            base = self.from_base(start, stop) if self.base is not None else None
            rows = self.scratch("gram", len(self) * (stop - start)).view(len(self), -1)
            for i in range(len(self)):
                rows[i] = self.delta(i, start, stop, base)
            for i in range(len(self)):
                total[i, i:] += (rows[i:] @ rows[i]).to("cpu", torch.float64)
        return total + total.triu(1).T

    def _read(self, tensor: Readable, name: object, start: int, stop: int) -> torch.Tensor:
        out = self._buffer(name, stop - start, torch.device("cpu"))
        tensor.read_into(out, start)
        return out.to(self.device)

    def _buffer(self, name: object, n_values: int, device: torch.device) -> torch.Tensor:
        buffer = self._buffers.get((name, device))
        if buffer is None or len(buffer) < n_values:
            self._buffers[name, device] = buffer = torch.empty(n_values, dtype=self.dtype, device=device)
        return buffer[:n_values]


class Settings:
    """A merge's settings, with the defaults of its method. Raises TypeError for a value of the wrong kind."""

    def __init__(self, given: Mapping[str, Setting], defaults: Mapping[str, Setting | None]) -> None:
        self._values = {**{k: v for k, v in defaults.items() if v is not None}, **given}

    def number(self, name: str, default: float) -> float:
        """One number."""
        value = self._values.get(name, default)
        if isinstance(value, (str, tuple)):
            raise TypeError(f"{name}: expected a number, got {value!r}")
        return float(value)

    def each(self, name: str, i: int) -> float:
        """The number of term i; one number stands for all."""
        value = self._values[name]
        return value[i] if isinstance(value, tuple) else self.number(name, 0.0)

    def flag(self, name: str, default: bool) -> bool:
        """True or false."""
        return bool(self._values.get(name, default))

    def integer(self, name: str, default: int) -> int:
        """A whole number."""
        value = self._values.get(name, default)
        if not isinstance(value, int):
            raise TypeError(f"{name}: expected a whole number, got {value!r}")
        return value

    def text(self, name: str, default: str) -> str:
        """A word."""
        return str(self._values.get(name, default))
