"""Pieces of a merge that the engine computes in one pass, from the bytes in the files to the bytes of the result.

It does what torch would do, in the same order and with the same rounding, in csrc/combine.cpp: on a CPU, where values
are float32, float16 or bfloat16. What it cannot read from a file it takes from memory, where it has been computed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from olmfast import _shards
from olmfast.weights.checkpoint import DTYPE_NAMES, TensorInfo, reading
from olmfast.weights.chunks import Operands, Piece, Readable

COMPUTED = (torch.float32, torch.float16, torch.bfloat16)
LARGEST = torch.finfo(torch.float32).max
# Magnitudes that are counted at a time.
COUNTED = 1 << 18


@dataclass(frozen=True)
class Fused(ABC):
    """A `Piece` that can also put its values into the result's memory itself."""

    operands: Operands

    @abstractmethod
    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """See `Piece`; by torch, which is the reference."""

    @abstractmethod
    def fill(self, start: int, stop: int, target: _shards.Target) -> None:
        """Put the values [start, stop) into `target`."""

    @property
    @abstractmethod
    def read(self) -> Sequence[Readable]:
        """What it reads."""

    @property
    def in_memory(self) -> bool:
        """Whether any of it has to be read into memory first."""
        return not all(map(is_read_directly, self.read))

    def fits(self, out: torch.Tensor) -> bool:
        """Whether it can fill `out`."""
        operands = self.operands
        return operands.device.type == "cpu" and out.dtype in COMPUTED and operands.result_dtype in COMPUTED

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """See `Readable`."""
        n = out.numel()
        step = self.operands.step if self.in_memory else max(n, 1)
        for begin in range(0, n, step):
            part = out[begin : begin + step]
            capacity = part.numel() * part.itemsize
            rounded = DTYPE_NAMES[self.operands.result_dtype]
            target = _shards.Target(part.numel(), part.data_ptr(), capacity, DTYPE_NAMES[out.dtype], rounded)
            self.fill(start + begin, start + begin + part.numel(), target)


@dataclass(frozen=True)
class Sum(Fused):
    """of_base * base + sum_i weights[i] * term_i, divided by the sum of the weights if requested."""

    weights: Sequence[float]
    of_base: float = 0.0
    normalize: bool = False

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """See `Piece`."""
        return self.operands.combined(self.weights, self.of_base, start, stop, self.normalize)

    @property
    def read(self) -> Sequence[Readable]:
        """The terms, and the base if it counts."""
        base = self.operands.base
        return [base, *self.operands.terms] if base is not None and self.of_base else self.operands.terms

    def fits(self, out: torch.Tensor) -> bool:
        """Torch says what is wrong with a weight that is no finite float32."""
        weights = [self.of_base, *self.weights]
        return super().fits(out) and all(abs(weight) <= LARGEST for weight in weights)

    def fill(self, start: int, stop: int, target: _shards.Target) -> None:
        """See `Fused`."""
        weights = list(self.weights) if len(self.read) == len(self.weights) else [self.of_base, *self.weights]
        parts = [operand(self.operands, tensor, i, start, stop) for i, tensor in enumerate(self.read)]
        for part, weight in zip(parts, weights, strict=True):
            part.weight = weight
        divisor = float(torch.tensor(weights, dtype=torch.float32).sum()) if self.normalize else 1.0
        with reading():
            _shards.combine(parts, divisor, target)


@dataclass(frozen=True)
class RowSum(Fused):
    """What moves, the first operand, plus the others' differences from the base by `numbers` (terms, rows) float32.

    `plain` gives the same by torch, but for the bits of NaN.
    """

    plain: Piece
    numbers: torch.Tensor

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """See `Piece`."""
        return self.plain(start, stop)

    @property
    def read(self) -> Sequence[Readable]:
        """The terms, and the base if there is one."""
        base = self.operands.base
        return self.operands.terms if base is None else [*self.operands.terms, base]

    def fill(self, start: int, stop: int, target: _shards.Target) -> None:
        """See `Fused`."""
        moving, *terms = (operand(self.operands, term, i, start, stop) for i, term in enumerate(self.operands.terms))
        base = self.operands.base
        of_base = None if base is None else operand(self.operands, base, "base", start, stop)
        with reading():
            _shards.combine_by_row(
                moving, of_base, terms, self.numbers.data_ptr(), self.numbers.shape[1], self.operands.row, start, target
            )


def is_read_directly(tensor: Readable) -> bool:
    """Whether the engine can compute from the tensor's bytes in its file."""
    return isinstance(tensor, TensorInfo) and tensor.dtype in COMPUTED


def operand(operands: Operands, tensor: Readable, name: object, start: int, stop: int) -> _shards.Operand:
    """Values [start, stop) of one of the operands, rounded as `Operands` rounds: in the file, or read under a name."""
    if not (isinstance(tensor, TensorInfo) and tensor.dtype in COMPUTED):
        return in_memory(operands.read(tensor, name, start, stop))
    result = operands.result_dtype
    rounds = torch.promote_types(tensor.dtype, result) != result
    place = tensor.offset + start * tensor.dtype.itemsize
    return _shards.Operand(tensor.shard, place, DTYPE_NAMES[tensor.dtype], DTYPE_NAMES[result] if rounds else "F32")


def in_memory(values: torch.Tensor) -> _shards.Operand:
    """Contiguous float32 values, which have to stay where they are while the engine reads them."""
    return _shards.Operand(None, values.data_ptr(), "F32")


# Of the magnitudes [start, stop), as integers: how many are above `high`, from `high` on, above `low`, from `low` on,
# and those between the two.
Counting = Callable[[int, int, int, int], tuple[int, int, int, int, torch.Tensor]]


def counting(operands: Operands, i: int) -> Counting | None:
    """How the magnitudes of term i, or of its difference from the base, are counted; None where torch has to."""
    term, base = operands.terms[i], operands.base
    readable = is_read_directly(term) and (base is None or is_read_directly(base))
    if operands.device.type != "cpu" or operands.result_dtype not in COMPUTED or not readable:
        return None

    def count(start: int, stop: int, low: int, high: int) -> tuple[int, int, int, int, torch.Tensor]:
        of_term = operand(operands, term, i, start, stop)
        of_base = None if base is None else operand(operands, base, "base", start, stop)
        with reading():
            above, from_high, over, from_low, between = _shards.count_magnitudes(
                of_term, of_base, stop - start, low, high
            )
        found = torch.frombuffer(between, dtype=torch.int32) if between else torch.empty(0, dtype=torch.int32)
        return above, from_high, over, from_low, found

    return count
