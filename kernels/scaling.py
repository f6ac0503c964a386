"""Norm-ES offspring of one weight: every row scaled by a factor of its own, all offspring in one pass.

    offspring_j[r, :] = round(W[r, :] * exp(log_scale[j, r]))       (axis=1: columns take the place of rows)

which is D * m' of norm-ES (m the row norms, D = W / m, log m' = log m + log_scale) without its two roundings.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmfast.kernels._dispatch import check_float, choose, compute_dtype, prepare_out


def row_scale_ref(weight: Tensor, log_scale: Tensor, *, axis: int, out: Tensor) -> Tensor:
    """The formula in plain torch, a stretch of the weight at a time: it is read once for all offspring."""
    dtype = compute_dtype(weight.dtype)
    scale = log_scale.to(dtype).exp()
    rows, cols = weight.shape
    n_rows = min(rows, max(1, (1 << 18) // max(cols, 1)))
    for start in range(0, rows, n_rows):
        part = weight[start : start + n_rows].to(dtype)
        for j in range(scale.shape[0]):
            factor = scale[j] if axis == 1 else scale[j, start : start + n_rows, None]
            torch.mul(part, factor, out=out[j, start : start + n_rows])
    return out


def row_scale(
    weight: Tensor, log_scale: Tensor, *, axis: int = 0, out: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """`weight * exp(log_scale_j)` along `axis` for each row j of `log_scale`, rounded once to the weight's dtype.

    Args:
        weight: (rows, cols), bfloat16, float16, float32 or float64; any strides.
        log_scale: (lambda, weight.shape[axis]), any float dtype.
        axis: the dimension of the weight that counts its rows: 0 for Linear, 1 for Conv1D (stored transposed).
        out: (lambda, rows, cols) of the weight's dtype, any strides; must not overlap the inputs.
        impl: 'auto', 'triton' or 'torch'.

    Returns:
        (lambda, rows, cols) in the weight's dtype. Zeros give the weight bit for bit; rows of zeros stay zeros.

    Raises:
        TypeError, ValueError: wrong dtype, shape, axis, device or impl.
    """
    check_float("row_scale", "weight", weight, 2)
    check_float("row_scale", "log_scale", log_scale, 2)
    if axis not in (0, 1, -1, -2):
        raise ValueError(f"row_scale: axis is {axis}; use 0, or 1 for weights stored transposed")
    axis %= 2
    if log_scale.shape[1] != weight.shape[axis]:
        raise ValueError(
            f"row_scale: log_scale has shape {tuple(log_scale.shape)}, "
            f"weight has {weight.shape[axis]} entries along axis {axis}"
        )
    out = prepare_out("row_scale", out, (log_scale.shape[0], *weight.shape), weight)
    choose("row_scale", impl, (weight, log_scale))
    return row_scale_ref(weight, log_scale, axis=axis, out=out)
