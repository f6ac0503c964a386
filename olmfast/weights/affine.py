"""Tensors of which every vector is mapped by `A x + b`, and the numbers that A and b are."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, ClassVar

import torch

from olmfast.weights.chunks import Held, Operands, Piece, Readable, Scratch, chunk_size
from olmfast.weights.sources import Expression, Sources, expression_from_json
from olmfast.weights.task_vectors import in_rows


@dataclass(frozen=True)
class Given(Expression):
    """Numbers that somebody gave: all values of a tensor in order, or one that they all are."""

    key: ClassVar[str] = "given"
    values: tuple[float, ...]
    shape: tuple[int, ...]
    dtype: str = "float64"

    @property
    def parts(self) -> tuple[Expression, ...]:
        """None: the numbers are its own."""
        return ()

    def to_json(self) -> dict[str, Any]:
        """See `Expression.to_json`."""
        return {"given": list(self.values), "shape": list(self.shape), "dtype": self.dtype}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Given:
        """See `Expression.from_json`."""
        return cls(tuple(entry["given"]), tuple(entry["shape"]), entry["dtype"])

    def open(self, sources: Sources, memory: Scratch | None = None) -> Readable:  # noqa: ARG002
        """See `Expression.open`."""
        values = torch.tensor(self.values, dtype=torch.float64)
        if len(values) != prod(self.shape):
            values = values.expand(prod(self.shape))
        return Held(values.view(self.shape).to(getattr(torch, self.dtype)))

    @property
    def origin(self) -> str:
        """See `Expression.origin`."""
        return "given"


Factor = float | Expression  # one number, or an expression of shape (D,) or (D, D)


@dataclass(frozen=True)
class Affine(Expression):
    """`A x + b` for every vector x of a tensor along dimension `axis`, 0 or -1, which has D values.

    `scale` is A: one number, an expression of shape (D,), its diagonal, or one of shape (D, D), whose row i gives value
    i; `bias` is b: one number or an expression of shape (D,). Left out, they are 1 and 0. It is computed in float32, or
    in float64 where the tensor or `dtype` is, and rounded once, to `dtype` or to that of the tensor.
    """

    key: ClassVar[str] = "affine"
    of: Expression
    scale: Factor | None = None
    bias: Factor | None = None
    axis: int = -1
    dtype: str | None = None

    @property
    def parts(self) -> tuple[Expression, ...]:
        """The tensor and, behind it, the factors that are expressions."""
        return (self.of, *(factor for factor in (self.scale, self.bias) if isinstance(factor, Expression)))

    def to_json(self) -> dict[str, Any]:
        """See `Expression.to_json`."""

        def told(factor: Factor | None) -> Any:
            return factor.to_json() if isinstance(factor, Expression) else factor

        entry = {"affine": self.of.to_json(), "scale": told(self.scale), "bias": told(self.bias), "axis": self.axis}
        return entry if self.dtype is None else {**entry, "dtype": self.dtype}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Affine:
        """See `Expression.from_json`."""

        def read(factor: Any) -> Factor | None:
            return expression_from_json(factor) if isinstance(factor, Mapping) else factor

        of = expression_from_json(entry["affine"])
        return cls(of, read(entry["scale"]), read(entry["bias"]), entry["axis"], entry.get("dtype"))

    def open(self, sources: Sources, memory: Scratch | None = None) -> Readable:
        """See `Expression.open`. Where a whole A meets vectors along the first dimension, all is computed at once."""
        source = self.of.operand(sources)
        rounded = getattr(torch, self.dtype) if self.dtype else source.dtype
        dtype = torch.promote_types(torch.promote_types(source.dtype, rounded), torch.float32)
        operands = Operands([source], None, sources.device, dtype, memory)
        scale = _held(1.0 if self.scale is None else self.scale, operands, sources)
        bias = _held(0.0 if self.bias is None else self.bias, operands, sources)
        width = (source.shape or (1,))[self.axis]
        for name, factor in (("scale", scale), ("bias", bias)):
            if factor.shape not in ((), (width,), (width, width))[: 3 if name == "scale" else 2]:
                raise ValueError(f"{name}: has shape {list(factor.shape)}, for vectors of {width} values")
        if self.axis == -1 or len(source.shape) == 1:
            return _Mapped(operands, rounded, in_rows(_along_rows(operands, scale, bias), operands, operands.row))
        if scale.dim() < 2:
            return _Mapped(operands, rounded, in_rows(_by_row(operands, scale, bias), operands, operands.row))
        whole = operands.term(0, 0, operands.n_values).view(width, -1)
        mapped = torch.matmul(scale, whole).add_(bias.view(-1, 1) if bias.dim() else bias)
        return Held(mapped.to("cpu", rounded).view(source.shape))

    def held_bytes(self, sources: Sources) -> int:
        """See `Expression.held_bytes`. Factors are read whole, and so is what `open` computes at once."""
        inner = sum(part.held_bytes(sources) for part in self.parts)
        shapes = [part.open(sources).shape for part in self.parts]
        factors = sum(prod(shape) for shape in shapes[1:])
        at_once = isinstance(self.scale, Expression) and len(shapes[1]) == 2 and self.axis == 0
        return inner + 8 * (factors + (3 * prod(shapes[0]) if at_once else 0))

    @property
    def origin(self) -> str:
        """See `Expression.origin`."""
        return "scaled"


def _held(factor: Factor, operands: Operands, sources: Sources) -> torch.Tensor:
    """A factor in the dtype that is computed in, on the device; () for a number."""
    if isinstance(factor, Expression):
        return factor.value(sources).to(operands.device, operands.dtype)
    return torch.tensor(factor, dtype=operands.dtype, device=operands.device)


class _Mapped:
    """The values that a piece gives, rounded once to `dtype`."""

    def __init__(self, operands: Operands, dtype: torch.dtype, piece: Piece) -> None:
        self.shape, self.dtype = operands.shape, dtype
        self._step, self._piece = chunk_size(operands.device), piece

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """See `Readable`."""
        for begin in range(0, len(out), self._step):
            end = min(begin + self._step, len(out))
            values = self._piece(start + begin, start + end)
            out[begin:end].copy_(values if out.dtype == self.dtype else values.to(self.dtype))


def _along_rows(operands: Operands, scale: torch.Tensor, bias: torch.Tensor) -> Piece:
    """Every row is a vector."""

    def piece(start: int, stop: int) -> torch.Tensor:
        rows = operands.term(0, start, stop).view(-1, operands.row)
        mapped = rows.mul_(scale) if scale.dim() < 2 else torch.matmul(rows, scale.T)
        return mapped.add_(bias).view(-1)

    return piece


def _by_row(operands: Operands, scale: torch.Tensor, bias: torch.Tensor) -> Piece:
    """Every row holds one value of each vector."""

    def piece(start: int, stop: int) -> torch.Tensor:
        rows = operands.term(0, start, stop).view(-1, operands.row)
        here = slice(start // operands.row, start // operands.row + len(rows))
        for factor, act in ((scale, rows.mul_), (bias, rows.add_)):
            act(factor if factor.dim() == 0 else factor[here, None])
        return rows.view(-1)

    return piece
