"""Methods that treat each row, or each column, of a matrix as a vector of its own."""

from __future__ import annotations

from math import prod

import torch

from olmfast.weights.chunks import Operands, Piece, Settings
from olmfast.weights.combining import model_stock_share, nuslerp_factors
from olmfast.weights.task_vectors import in_rows


def nuslerp_by_row(operands: Operands, t: float) -> Piece:
    """See `combining.nuslerp_weights`, for the vectors along the last dimension."""
    row = operands.row

    def piece(start: int, stop: int) -> torch.Tensor:
        x, y = (operands.delta(i, start, stop).view(-1, row) for i in (0, 1))
        cos = (x * y).sum(-1, keepdim=True) / (_length(x) * _length(y))
        first, second = nuslerp_factors(cos, t)
        return _onto_base(operands, (first * x + second * y).view(-1), start, stop)

    return in_rows(piece, operands, row)


def nuslerp_by_column(operands: Operands, t: float) -> Piece:
    """The same for the vectors along the first dimension, whose products are summed in a pass of their own."""
    width = prod(operands.shape[1:])
    products = torch.zeros((3, width), dtype=torch.float64, device=operands.device)
    for start, stop in operands.chunks(width):
        x, y = (operands.delta(i, start, stop).view(-1, width) for i in (0, 1))
        for k, (a, b) in enumerate(((x, x), (y, y), (x, y))):
            products[k] += (a * b).sum(0)
    lengths = products[:2].sqrt().clamp_min(1e-7)
    first, second = nuslerp_factors(products[2] / (lengths[0] * lengths[1]), t).to(operands.dtype)

    def piece(start: int, stop: int) -> torch.Tensor:
        x, y = (operands.delta(i, start, stop).view(-1, width) for i in (0, 1))
        return _onto_base(operands, (first * x + second * y).view(-1), start, stop)

    return in_rows(piece, operands, width)


def model_stock_by_row(operands: Operands, _: Settings) -> Piece:
    """See `combining.model_stock_weights`, with a share for each row."""
    row, n = operands.row, len(operands)

    def piece(start: int, stop: int) -> torch.Tensor:
        base = operands.from_base(start, stop)
        rows = torch.stack([operands.delta(i, start, stop, base).view(-1, row) for i in range(n)])
        lengths = torch.linalg.vector_norm(rows, dim=-1)
        cosines = [
            ((rows[i] * rows[j]).sum(-1) / (lengths[i] * lengths[j]).clamp_min(1e-6)).clamp(-1, 1)
            for i in range(n)
            for j in range(i + 1, n)
        ]
        share = model_stock_share(torch.stack(cosines).mean(0), n)[:, None]
        merged: torch.Tensor = base.add_((share * rows.mean(0)).view(-1))
        return merged

    return in_rows(piece, operands, row)


def _length(x: torch.Tensor) -> torch.Tensor:
    length: torch.Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return length.clamp_min(1e-7)


def _onto_base(operands: Operands, merged: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    return merged if operands.base is None else merged.add_(operands.from_base(start, stop))
