"""Norm-ES offspring of one weight: each row scaled by a factor of its own, all offspring in one pass.

    offspring_j[r, :] = round(W[r, :] * exp(log_scale[j, r]))       (axis=1: columns take the place of rows)

which is D * m' of norm-ES (m the row norms, D = W / m, log m' = log m + log_scale) without its two roundings.

Shapes: W (rows, cols), log_scale (lambda, rows) -> (lambda, rows, cols). float32 throughout, one rounding.
Bytes: W once for all offspring, the result once: bound by memory, lambda + 1 times the weight.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from olmfast.kernels._dispatch import (
    LazyKernel,
    ceil_div,
    check_apart,
    check_float,
    compute_dtype,
    integer,
    launch,
    on_device,
    prepare_out,
    use_triton,
)

if TYPE_CHECKING:
    import triton.language as tl

BLOCK, MIN_COLS = 4096, 512
# Values handled at a time on a CPU: the float32 copy of the weight stays in the cache.
N_CHUNK = 1 << 20


def row_scale_ref(weight: Tensor, log_scale: Tensor, *, axis: int, out: Tensor) -> Tensor:
    """The formula in plain torch, a chunk of the weight at a time, into `out`."""
    dtype = compute_dtype(weight.dtype)
    scale = log_scale.to(dtype).exp()
    rows, cols = weight.shape
    n_rows = max(1, min(rows, N_CHUNK // max(cols, 1)))
    for start in range(0, rows, n_rows):
        part = weight[start : start + n_rows].to(dtype)
        for j in range(scale.shape[0]):
            factor = scale[j] if axis == 1 else scale[j, start : start + n_rows, None]
            torch.mul(part, factor, out=out[j, start : start + n_rows])
    return out


@partial(LazyKernel, plain=("n_offspring",))
def _row_scale_kernel(
    w_ptr, s_ptr, out_ptr, rows, cols, n_offspring,
    w_row, w_col, s_row, s_at, out_j, out_row, out_col,
    AXIS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    offs_c = tl.program_id(1).to(tl.int64) * BLOCK_COLS + tl.arange(0, BLOCK_COLS)
    mask_r, mask_c = offs_r < rows, offs_c < cols
    mask = mask_r[:, None] & mask_c[None, :]
    w = tl.load(w_ptr + offs_r[:, None] * w_row + offs_c[None, :] * w_col, mask=mask, other=0.0).to(tl.float32)
    out_at = out_ptr + offs_r[:, None] * out_row + offs_c[None, :] * out_col
    for j in range(n_offspring):
        if AXIS == 0:
            s = tl.load(s_ptr + j * s_row + offs_r * s_at, mask=mask_r, other=0.0).to(tl.float32)[:, None]
        else:
            s = tl.load(s_ptr + j * s_row + offs_c * s_at, mask=mask_c, other=0.0).to(tl.float32)[None, :]
        tl.store(out_at, (w * tl.exp(s)).to(out_ptr.dtype.element_ty), mask=mask)
        # A running pointer: j * out_j could pass 2^31.
        out_at += out_j


@torch.no_grad()
def row_scale(
    weight: Tensor, log_scale: Tensor, *, axis: int = 0, out: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """`weight * exp(log_scale_j)` along `axis` for each row j of `log_scale`, rounded once to weight's dtype.

    Args:
        weight: (rows, cols), bfloat16, float16, float32 or float64; any strides. Or (n, rows, cols), a batch of
            matrices such as experts; log_scale is then (lambda, n, rows or columns).
        log_scale: (lambda, weight.shape[axis]), any float dtype and strides.
        axis: dimension of the weight that counts its rows: 0 for Linear, 1 for Conv1D (stored transposed).
        out: (lambda, *weight.shape) of the weight's dtype, any strides; must not overlap the inputs.
        impl: 'auto', 'triton' or 'torch'.

    Returns:
        (lambda, *weight.shape) in the weight's dtype. Zeros give the weight bit for bit; zero rows stay zero.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, axis, device or impl, or an `out` that overlaps an input.
    """
    check_float("row_scale", "weight", weight)
    check_float("row_scale", "weight", weight, 3 if weight.dim() == 3 else 2)
    check_float("row_scale", "log_scale", log_scale, weight.dim())
    axis = integer("row_scale", "axis", axis)
    if axis not in (0, 1, -1, -2):
        raise ValueError(f"row_scale: axis is {axis}; use 0, or 1 for weights stored transposed")
    axis %= 2
    *batch, rows, cols = weight.shape
    if tuple(log_scale.shape[1:]) != (*batch, (rows, cols)[axis]):
        each = f"{batch[0]} matrices of " if batch else ""
        raise ValueError(
            f"row_scale: log_scale has shape {tuple(log_scale.shape)}, "
            f"weight has {each}{(rows, cols)[axis]} entries along axis {axis}"
        )
    shape = (log_scale.shape[0], *weight.shape)
    triton = use_triton("row_scale", impl, (weight, log_scale))
    out = prepare_out("row_scale", out, shape, weight.dtype, weight.device)
    check_apart("row_scale", out, {"weight": weight, "log_scale": log_scale})
    if batch:
        for i, matrix in enumerate(weight):
            row_scale(matrix, log_scale[:, i], axis=axis, out=out[:, i], impl=impl)
        return out
    if not triton:
        return row_scale_ref(weight, log_scale, axis=axis, out=out)
    if out.numel():
        _launch(weight, log_scale, axis, out)
    return out


def _launch(weight: Tensor, log_scale: Tensor, axis: int, out: Tensor) -> None:
    if out.stride(1) < out.stride(2):
        # Stored the other way round: walk along the memory.
        weight, out, axis = weight.T, out.transpose(1, 2), 1 - axis
    rows, cols = weight.shape
    # As wide as the weight is, so that a program writes in one piece.
    block_cols = min(max(1 << (cols - 1).bit_length(), MIN_COLS), BLOCK)
    block_rows = BLOCK // block_cols
    with on_device(weight):
        launch(
            _row_scale_kernel, (ceil_div(rows, block_rows), ceil_div(cols, block_cols)),
            weight, log_scale, out, rows, cols, out.shape[0],
            *weight.stride(), *log_scale.stride(), *out.stride(),
            AXIS=axis, BLOCK_ROWS=block_rows, BLOCK_COLS=block_cols, num_warps=4,
        )  # fmt: skip
