"""SVD-ES offspring of one weight: noise along its singular directions, without the noise tensor.

    offspring_j = round(W * exp(clamp((U * c_j) @ Vh, -clamp, clamp)))      elementwise, j = 0..lambda-1

Shapes: W (rows, cols), U (rows, k), Vh (k, cols), c (lambda, k) -> (lambda, rows, cols).
Precision: the product accumulates in float32 whatever its operands are; exp and the product with W are float32;
one rounding to W's dtype.
Bytes: W and the result once per offspring, U and Vh once per row of tiles. 2 * lambda * rows * cols * k
operations: bound by arithmetic for any k worth having.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from olmfast.kernels._dispatch import (
    LazyKernel,
    Tile,
    ceil_div,
    check_float,
    compute_dtype,
    fitting,
    interpreted,
    on_device,
    prepare_out,
    use_triton,
)

if TYPE_CHECKING:
    import triton.language as tl

PRECISIONS = ("ieee", "tf32", "bf16")
# Best first: Hopper and A100, then 99 KB (Ada, consumer Ampere), then 64 KB.
TILES = (Tile(128, 256, 32, 3, 8), Tile(128, 128, 32, 3, 8), Tile(128, 64, 32, 2, 4), Tile(64, 64, 32, 2, 4))
# Values of noise computed at a time on a CPU: all the noise there ever is, in float32.
N_CHUNK = 1 << 22


def svd_noise_ref(weight: Tensor, u: Tensor, vh: Tensor, coefficients: Tensor, *, clamp: float, out: Tensor) -> Tensor:
    """The formula in plain torch, a chunk of rows at a time, into `out`.

    The shape of each product depends on the weight alone, so an offspring's bytes do not depend on how many
    offspring are asked for in one call.
    """
    rows, cols = weight.shape
    dtype = compute_dtype(weight.dtype)
    u, vh, coefficients = u.to(dtype), vh.to(dtype).contiguous(), coefficients.to(dtype)
    # Chunks of about equal length: a short last one would waste a product.
    n_rows = ceil_div(rows, max(1, ceil_div(rows, max(128, N_CHUNK // max(cols, 1))))) or 1
    for start in range(0, rows, n_rows):
        part = weight[start : start + n_rows].to(dtype)
        u_part = u[start : start + n_rows].contiguous()
        scaled, noise = torch.empty_like(u_part), torch.empty_like(part)
        for j, row in enumerate(coefficients):
            torch.mul(u_part, row, out=scaled)
            torch.mm(scaled, vh, out=noise)
            noise.clamp_(-clamp, clamp).exp_()
            target = out[j, start : start + n_rows]
            if target.dtype == dtype and target.is_contiguous():
                torch.mul(part, noise, out=target)
            else:
                target.copy_(noise.mul_(part))
    return out


@LazyKernel
def _svd_noise_kernel(
    w_ptr, u_ptr, vh_ptr, c_ptr, out_ptr, rows, cols, k, clamp,
    w_row, w_col, u_row, u_k, vh_k, vh_col, c_row, c_k, out_j, out_row, out_col,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Tiles in groups of GROUP rows: neighbours share U and Vh in the L2 cache.
    n_tiles_m, n_tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N)
    tile, j = tl.program_id(0), tl.program_id(1).to(tl.int64)
    group = tile // (GROUP * n_tiles_n)
    group_rows = tl.minimum(n_tiles_m - group * GROUP, GROUP)
    tile_m = group * GROUP + (tile % (GROUP * n_tiles_n)) % group_rows
    tile_n = (tile % (GROUP * n_tiles_n)) // group_rows
    offs_m = tile_m.to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_n = tile_n.to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m, mask_n = offs_m < rows, offs_n < cols

    noise = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        at = start + offs_k
        mask_k = at < k
        c = tl.load(c_ptr + j * c_row + at * c_k, mask=mask_k, other=0.0).to(tl.float32)
        a_at = u_ptr + offs_m[:, None] * u_row + at[None, :] * u_k
        b_at = vh_ptr + at[:, None] * vh_k + offs_n[None, :] * vh_col
        a = tl.load(a_at, mask=mask_m[:, None] & mask_k[None, :], other=0.0).to(tl.float32) * c[None, :]
        b = tl.load(b_at, mask=mask_k[:, None] & mask_n[None, :], other=0.0)
        if PRECISION == "bf16":
            a, b = a.to(tl.bfloat16), b.to(tl.bfloat16)
        if PRECISION != "bf16" or WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        noise = tl.dot(a, b, noise, input_precision="tf32" if PRECISION == "tf32" else "ieee")

    # A NaN in U, Vh or c must come out as NaN, not as the bound.
    noise = tl.minimum(noise, clamp, propagate_nan=tl.PropagateNan.ALL)
    noise = tl.maximum(noise, -clamp, propagate_nan=tl.PropagateNan.ALL)
    mask = mask_m[:, None] & mask_n[None, :]
    w = tl.load(w_ptr + offs_m[:, None] * w_row + offs_n[None, :] * w_col, mask=mask, other=0.0).to(tl.float32)
    out_at = out_ptr + j * out_j + offs_m[:, None] * out_row + offs_n[None, :] * out_col
    tl.store(out_at, (w * tl.exp(noise)).to(out_ptr.dtype.element_ty), mask=mask)


def svd_noise(
    weight: Tensor,
    u: Tensor,
    vh: Tensor,
    coefficients: Tensor,
    *,
    clamp: float = 3.0,
    precision: str = "tf32",
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`weight * exp(clamp((u * c) @ vh))` for each row c of `coefficients`, rounded once to weight's dtype.

    The step of SVD-ES: a perturbation along the singular directions, multiplied onto the weight.

    Args:
        weight: (rows, cols), bfloat16, float16, float32 or float64; any strides.
        u: (rows, k). vh: (k, cols). coefficients: (lambda, k). Any float dtype and strides; k may be 0.
        clamp: bound of the exponent on both sides.
        precision: of the product's operands on a GPU: 'ieee' (float32), 'tf32' (relative error of the noise
            about 3e-4) or 'bf16' (about 3e-3). Torch computes in float32 (float64 for a float64 weight).
        out: (lambda, rows, cols) of the weight's dtype, any strides; must not overlap the inputs.
        impl: 'auto', 'triton' or 'torch'.

    Returns:
        (lambda, rows, cols) in the weight's dtype. A row of zero coefficients gives the weight bit for bit.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, precision or impl.
    """
    _check(weight, u, vh, coefficients, clamp, precision)
    shape = (coefficients.shape[0], *weight.shape)
    triton = use_triton("svd_noise", impl, (weight, u, vh, coefficients))
    out = prepare_out("svd_noise", out, shape, weight.dtype, weight.device)
    if not triton:
        return svd_noise_ref(weight, u, vh, coefficients, clamp=clamp, out=out)
    if not out.numel():
        return out
    if precision == "bf16":
        u, vh = u.to(torch.bfloat16), vh.to(torch.bfloat16)
    rows, cols = weight.shape
    # Float32 products run on the ordinary units, whose registers the widest tile would overflow.
    tiles = TILES[1:] if precision == "ieee" else TILES
    tile = fitting(tiles, weight.device, max(u.element_size(), vh.element_size()))
    grid = (ceil_div(rows, tile.block_m) * ceil_div(cols, tile.block_n), shape[0])
    with on_device(weight):
        _svd_noise_kernel[grid](
            weight, u, vh, coefficients, out, rows, cols, u.shape[1], float(clamp),
            *weight.stride(), *u.stride(), *vh.stride(), *coefficients.stride(), *out.stride(),
            PRECISION=precision, WIDEN=interpreted(), GROUP=8,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            num_stages=tile.n_stages, num_warps=tile.n_warps,
        )  # fmt: skip
    return out


def _check(weight: Tensor, u: Tensor, vh: Tensor, coefficients: Tensor, clamp: float, precision: str) -> None:
    for name, tensor in (("weight", weight), ("u", u), ("vh", vh), ("coefficients", coefficients)):
        check_float("svd_noise", name, tensor, 2)
    (rows, cols), k = weight.shape, coefficients.shape[1]
    if tuple(u.shape) != (rows, k):
        raise ValueError(f"svd_noise: u has shape {tuple(u.shape)}, weight has {rows} rows and k is {k}")
    if tuple(vh.shape) != (k, cols):
        raise ValueError(f"svd_noise: vh has shape {tuple(vh.shape)}, weight has {cols} columns and k is {k}")
    if not clamp >= 0:
        raise ValueError(f"svd_noise: clamp is {clamp}, not a number >= 0")
    if precision not in PRECISIONS:
        raise ValueError(f"svd_noise: precision is {precision!r}; use 'ieee', 'tf32' or 'bf16'")
