"""Tensors that move along task vectors row by row: each row, an output of its layer, has coefficients of its own."""

from __future__ import annotations

from base64 import b64decode, b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch

from olmfast.weights.chunks import Operands, Piece, Readable, Scratch, Streamed
from olmfast.weights.fused import RowSum
from olmfast.weights.sources import Expression, Sources, expression_from_json
from olmfast.weights.task_vectors import in_rows


@dataclass(frozen=True)
class ByRow(Expression):
    """`of + sum_i c_i[r] (term_i - base)` for every row r; without a base, `c_i[r] term_i`.

    Rows are counted along `axis`, 0 or 1, of tensors of two dimensions. `coefficients` are the bytes of (terms, rows)
    little-endian float32. It is computed in float32, or float64 where a tensor is, and rounded once.
    """

    key: ClassVar[str] = "by_row"
    of: Expression
    terms: tuple[Expression, ...]
    base: Expression | None
    coefficients: bytes
    axis: int = 0

    @property
    def parts(self) -> tuple[Expression, ...]:
        """What moves, the terms and, behind them, the base."""
        return (self.of, *self.terms) if self.base is None else (self.of, *self.terms, self.base)

    def to_json(self) -> dict[str, Any]:
        """See `Expression.to_json`. Coefficients are in base64."""
        entry: dict[str, Any] = {"by_row": self.of.to_json(), "terms": [term.to_json() for term in self.terms]}
        if self.base is not None:
            entry["base"] = self.base.to_json()
        return {**entry, "coefficients": b64encode(self.coefficients).decode(), "axis": self.axis}

    @classmethod
    def from_json(cls, entry: Mapping[str, Any]) -> ByRow:
        """See `Expression.from_json`."""
        base = expression_from_json(entry["base"]) if "base" in entry else None
        terms = tuple(map(expression_from_json, entry["terms"]))
        return cls(expression_from_json(entry["by_row"]), terms, base, b64decode(entry["coefficients"]), entry["axis"])

    @property
    def numbers(self) -> torch.Tensor:
        """The coefficients, (terms, rows) float32."""
        return torch.from_numpy(np.frombuffer(self.coefficients, "<f4").astype(np.float32)).view(len(self.terms), -1)

    def plus(self, numbers: torch.Tensor) -> ByRow:
        """With (terms, rows) added to its coefficients."""
        return by_row(self.of, self.terms, self.base, self.numbers + numbers, self.axis)

    def open(self, sources: Sources, memory: Scratch | None = None) -> Readable:
        """See `Expression.open`. Raises ValueError for tensors that have not two dimensions or other rows."""
        base = self.base.operand(sources) if self.base is not None else None
        terms = [part.operand(sources) for part in (self.of, *self.terms)]
        operands, numbers = Operands(terms, base, sources.device, None, memory), self.numbers
        if len(operands.shape) != 2 or operands.shape[self.axis] != numbers.shape[1]:
            raise ValueError(f"coefficients of {numbers.shape[1]} rows for a tensor of shape {list(operands.shape)}")
        factors = numbers.to(operands.device, operands.dtype)
        plain = in_rows(_piece(operands, factors, self.axis), operands, operands.row)
        return Streamed(operands, lambda: RowSum(operands, plain, numbers) if self.axis == 0 else plain)

    @property
    def origin(self) -> str:
        """See `Expression.origin`."""
        return "merged row by row"


def by_row(
    of: Expression, terms: Sequence[Expression], base: Expression | None, numbers: torch.Tensor, axis: int
) -> ByRow:
    """A ByRow with coefficients (terms, rows) of any dtype, which are rounded to float32."""
    return ByRow(of, tuple(terms), base, numbers.to("cpu", torch.float32).numpy().astype("<f4").tobytes(), axis)


def _piece(operands: Operands, factors: torch.Tensor, axis: int) -> Piece:
    """Values of whole rows as they are stored."""

    def piece(start: int, stop: int) -> torch.Tensor:
        total = operands.term(0, start, stop).view(-1, operands.row)
        base = operands.from_base(start, stop) if operands.base is not None else None
        here = slice(start // operands.row, start // operands.row + len(total))
        for i, own in enumerate(factors, 1):
            moved = operands.delta(i, start, stop, base).view_as(total)
            total.add_(moved.mul_(own[here, None] if axis == 0 else own))
        return total.view(-1)

    return piece
