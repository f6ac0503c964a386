"""SVD-ES offspring of one weight: noise along its singular directions, without the noise tensor.

    offspring_j = round(W * exp(clamp((U * c_j) @ Vh, -clamp, clamp)))      elementwise, j = 0..lambda-1

Shapes: W (rows, cols), U (rows, k), Vh (k, cols), c (lambda, k) -> (lambda, rows, cols).
Precision: the product accumulates in float32 whatever its operands are; exp and the product with W are float32;
one rounding to W's dtype.
Bytes: W and the result once per offspring, U and Vh once per row of tiles; the smaller of U and Vh, times c, is
written once per offspring. 2 * lambda * rows * cols * k operations: bound by arithmetic for any k worth having.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from olmfast.kernels._dispatch import (
    LazyKernel,
    Tile,
    ceil_div,
    check_apart,
    check_float,
    compute_dtype,
    descriptor,
    fitting,
    interpreted,
    launch,
    on_device,
    prepare_out,
    takes_descriptors,
    use_triton,
    wide_number,
)

if TYPE_CHECKING:
    import triton.language as tl

PRECISIONS = ("ieee", "tf32", "bf16")
# Best first: A100, then 99 KB (Ada, consumer Ampere), then 64 KB.
TILES = (Tile(128, 256, 32, 3, 8), Tile(128, 128, 32, 3, 8), Tile(128, 64, 32, 2, 4), Tile(64, 64, 32, 2, 4))
# Float32 products run on the ordinary units, whose registers the widest tile would overflow.
IEEE_TILES = TILES[1:]
# Hopper, by tensor copies: rows, columns, stages and warps; 128 bytes of k at a time.
HOPPER = (128, 256, 3, 8)
# Rows and columns that are scaled at a time; bytes of the operand that is scaled for offspring of one launch.
SCALED_BLOCK, CHUNK_BYTES = (32, 128), 1 << 28
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


@partial(LazyKernel, plain=("n_offspring",))
def _scaled_kernel(
    x_ptr, c_ptr, out_ptr, n, k, k_padded, n_offspring, x_row, x_k, c_row, c_k, out_j, out_row, out_k,
    ROUND: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Each row of x (n, k) times each row of c, zeros from k to k_padded: read once, written n_offspring times.
    rows = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    at = tl.program_id(1).to(tl.int64) * BLOCK_K + tl.arange(0, BLOCK_K)
    inside, mask_k = rows[:, None] < n, at < k
    x_at = x_ptr + rows[:, None] * x_row + at[None, :] * x_k
    x = tl.load(x_at, mask=inside & mask_k[None, :], other=0.0).to(tl.float32)
    out_at = out_ptr + rows[:, None] * out_row + at[None, :] * out_k
    for j in range(n_offspring):
        c = tl.load(c_ptr + j * c_row + at * c_k, mask=mask_k, other=0.0).to(tl.float32)
        scaled = x * c[None, :]
        if ROUND:
            # To the nearest number of TF32: the tensor cores would cut it off, which doubles the error. Not NaN,
            # whose bits might carry over into a sign.
            rounded = ((scaled.to(tl.int32, bitcast=True) + 0x1000) & -0x2000).to(tl.float32, bitcast=True)
            scaled = tl.where(scaled == scaled, rounded, scaled)
        tl.store(out_at, scaled.to(out_ptr.dtype.element_ty), mask=inside & (at < k_padded)[None, :])
        # A running pointer: j * out_j could pass 2^31.
        out_at += out_j


@LazyKernel
def _noise_place(tile, rows, cols, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    # Tiles in groups of GROUP rows: neighbours share what they read in the L2 cache.
    n_tiles_m, n_tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(cols, BLOCK_N)
    group = tile // (GROUP * n_tiles_n)
    group_rows = tl.minimum(n_tiles_m - group * GROUP, GROUP)
    return group * GROUP + (tile % (GROUP * n_tiles_n)) % group_rows, (tile % (GROUP * n_tiles_n)) // group_rows


@LazyKernel
def _noise_finish(noise, w_ptr, out_ptr, offs_m, offs_n, rows, cols, clamp, w_row, w_col, out_row, out_col):
    mask_m, mask_n = offs_m < rows, offs_n < cols
    mask = mask_m[:, None] & mask_n[None, :]
    offs_m, offs_n = offs_m.to(tl.int64), offs_n.to(tl.int64)
    w = tl.load(w_ptr + offs_m[:, None] * w_row + offs_n[None, :] * w_col, mask=mask, other=0.0).to(tl.float32)
    # A NaN in U, Vh or c must come out as NaN, not as the bound.
    noise = tl.minimum(noise, clamp, propagate_nan=tl.PropagateNan.ALL)
    noise = tl.maximum(noise, -clamp, propagate_nan=tl.PropagateNan.ALL)
    out_at = out_ptr + offs_m[:, None] * out_row + offs_n[None, :] * out_col
    tl.store(out_at, (w * tl.exp(noise)).to(out_ptr.dtype.element_ty), mask=mask)


@LazyKernel
def _svd_noise_kernel(
    w_ptr, a_ptr, b_ptr, out_ptr, rows, cols, k, clamp,
    w_row, w_col, a_j, a_row, b_j, b_k, b_col, out_j, out_row, out_col,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # a (rows, k), b (k, cols), one of them for each offspring; k is a multiple of BLOCK_K.
    j = tl.program_id(1).to(tl.int64)
    tile_m, tile_n = _noise_place(tl.program_id(0), rows, cols, GROUP, BLOCK_M, BLOCK_N)
    offs_m, offs_n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    # Past the edge other rows are read, and their noise is not written: no masks in the loop.
    a_at = a_ptr + j * a_j + (offs_m % rows).to(tl.int64)[:, None] * a_row + offs_k[None, :]
    b_at = b_ptr + j * b_j + (offs_n % cols).to(tl.int64)[None, :] * b_col + offs_k[:, None] * b_k
    noise = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for _ in range(0, k, BLOCK_K):
        a, b = tl.load(a_at), tl.load(b_at)
        if WIDEN:
            a, b = a.to(tl.float32), b.to(tl.float32)
        noise = tl.dot(a, b, noise, input_precision=PRECISION)
        a_at += BLOCK_K
        b_at += BLOCK_K * b_k
    _noise_finish(noise, w_ptr, out_ptr + j * out_j, offs_m, offs_n, rows, cols, clamp, w_row, w_col, out_row, out_col)


@LazyKernel
def _svd_noise_hopper_kernel(
    w_ptr, a, b, out_ptr, rows, cols, k, clamp, w_row, w_col, a_rows, b_rows, out_j, out_row, out_col,
    PRECISION: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # The same by tensor copies: a and b describe (rows, k) and (cols, k), the offspring's below each other.
    j = tl.program_id(1)
    tile_m, tile_n = _noise_place(tl.program_id(0), rows, cols, GROUP, BLOCK_M, BLOCK_N)
    a_at, b_at = j * a_rows + tile_m * BLOCK_M, j * b_rows + tile_n * BLOCK_N
    noise = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for start in range(0, k, BLOCK_K):
        noise = tl.dot(a.load([a_at, start]), b.load([b_at, start]).T, noise, input_precision=PRECISION)
    # In halves: a whole tile with its weights overflows the registers.
    left, right = tl.split(tl.permute(tl.reshape(noise, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
    offs_m, offs_n = tile_m * BLOCK_M + tl.arange(0, BLOCK_M), tile_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)
    out_ptr += j.to(tl.int64) * out_j
    _noise_finish(left, w_ptr, out_ptr, offs_m, offs_n, rows, cols, clamp, w_row, w_col, out_row, out_col)
    offs_n += BLOCK_N // 2
    _noise_finish(right, w_ptr, out_ptr, offs_m, offs_n, rows, cols, clamp, w_row, w_col, out_row, out_col)


def _launch(
    weight: Tensor, u: Tensor, vh: Tensor, coefficients: Tensor, clamp: float, precision: str, out: Tensor
) -> None:
    (rows, cols), k, n_offspring, device = weight.shape, u.shape[1], coefficients.shape[0], weight.device
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    element, ordinary = dtype.itemsize, precision == "ieee"
    by_copies = not ordinary and k > 0 and takes_descriptors(device)
    hopper = Tile(*HOPPER[:2], 128 // element, *HOPPER[2:])
    tile = hopper if by_copies else fitting(IEEE_TILES if ordinary else TILES, device, element)
    k_padded = ceil_div(k, tile.block_k) * tile.block_k

    def scaled(x: Tensor, c: Tensor, memory: Tensor) -> Tensor:
        launch(
            _scaled_kernel, (ceil_div(len(x), SCALED_BLOCK[0]), max(1, ceil_div(k_padded, SCALED_BLOCK[1]))),
            x, c, memory, len(x), k, k_padded, len(c), *x.stride(), *c.stride(), *memory.stride(),
            ROUND=precision == "tf32", BLOCK_ROWS=SCALED_BLOCK[0], BLOCK_K=SCALED_BLOCK[1],
        )  # fmt: skip
        return memory[: len(c)]

    # The smaller operand is scaled, once for each offspring; both get rows in one piece, of whole blocks. Products in
    # float32 run on the ordinary units: they read Vh row by row, and are fed by wider loads so.
    scales_u = rows < cols and not ordinary
    small, large = (u, vh.T) if scales_u else (vh.T, u)
    once = torch.ones((), dtype=torch.float32, device=device).expand(1, k)
    large = scaled(large, once, torch.empty((1, len(large), k_padded), dtype=dtype, device=device))
    n_at_once = min(n_offspring, max(1, CHUNK_BYTES // max(1, len(small) * k_padded * element)))
    shape = (n_at_once, k_padded, len(small)) if ordinary else (n_at_once, len(small), k_padded)
    memory = torch.empty(shape, dtype=dtype, device=device)
    memory = memory.mT if ordinary else memory
    constants = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "BLOCK_K": tile.block_k,
                 "num_stages": tile.n_stages, "num_warps": tile.n_warps}  # fmt: skip
    n_tiles = ceil_div(rows, tile.block_m) * ceil_div(cols, tile.block_n)
    for start in range(0, n_offspring, n_at_once):
        c, target = coefficients[start : start + n_at_once], out[start : start + n_at_once]
        many = scaled(small, c, memory)
        a, b = (many, large) if scales_u else (large, many)
        # The next offspring's operand is as far as this; the shared one is the same for all.
        if by_copies:
            launch(
                _svd_noise_hopper_kernel, (n_tiles, len(c)), weight,
                descriptor(a.flatten(0, 1), (tile.block_m, tile.block_k)),
                descriptor(b.flatten(0, 1), (tile.block_n, tile.block_k)),
                target, rows, cols, k_padded, clamp, *weight.stride(),
                rows if scales_u else 0, 0 if scales_u else cols, *target.stride(),
                PRECISION="tf32", GROUP=8, **constants,
            )  # fmt: skip
            continue
        launch(
            _svd_noise_kernel, (n_tiles, len(c)),
            weight, a, b, target, rows, cols, k_padded, clamp, *weight.stride(),
            a.stride(0) if scales_u else 0, a.stride(1), 0 if scales_u else b.stride(0), b.stride(2), b.stride(1),
            *target.stride(),
            PRECISION="ieee" if ordinary else "tf32", WIDEN=interpreted(), GROUP=8, **constants,
        )  # fmt: skip


@torch.no_grad()
def svd_noise(
    weight: Tensor,
    u: Tensor,
    vh: Tensor,
    coefficients: Tensor,
    *,
    clamp: float = 3.0,
    precision: str | None = None,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`weight * exp(clamp((u * c) @ vh))` for each row c of `coefficients`, rounded once to weight's dtype.

    The step of SVD-ES: a perturbation along the singular directions, multiplied onto the weight.

    Args:
        weight: (rows, cols), bfloat16, float16, float32 or float64; any strides. Or (n, rows, cols), a batch of
            n matrices such as experts, each with factors of its own: u (n, rows, k), vh (n, k, cols), and
            coefficients (lambda, n, k), or (lambda, k) for all.
        u: (rows, k). vh: (k, cols). coefficients: (lambda, k). Any float dtype and strides; k may be 0.
        clamp: bound of the exponent on both sides.
        precision: of the product's operands on a GPU: 'ieee' (float32), 'tf32' (relative error of the noise
            about 3e-4) or 'bf16' (about 3e-3). None: 'bf16' for a bfloat16 weight, whose rounding is larger, else
            'tf32'. Torch computes in float32 (float64 for a float64 weight).
        out: (lambda, *weight.shape) of the weight's dtype, any strides; must not overlap the inputs.
        impl: 'auto', 'triton' or 'torch'.

    Returns:
        (lambda, *weight.shape) in the weight's dtype. A row of zero coefficients gives the weight bit for bit.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device, precision or impl, or an `out` that overlaps an input.
    """
    check_float("svd_noise", "weight", weight)
    if precision is None:
        precision = "bf16" if weight.dtype == torch.bfloat16 else "tf32"
    inputs = {"weight": weight, "u": u, "vh": vh, "coefficients": coefficients}
    _check(inputs, clamp, precision)
    clamp = min(float(clamp), torch.finfo(compute_dtype(weight.dtype)).max)  # no bound either way
    shape = (coefficients.shape[0], *weight.shape)
    triton = use_triton("svd_noise", impl, (weight, u, vh, coefficients))
    out = prepare_out("svd_noise", out, shape, weight.dtype, weight.device)
    check_apart("svd_noise", out, inputs)
    if weight.dim() == 3:
        for i, matrix in enumerate(weight):
            own = coefficients if coefficients.dim() == 2 else coefficients[:, i]
            svd_noise(matrix, u[i], vh[i], own, clamp=clamp, precision=precision, out=out[:, i], impl=impl)
        return out
    if not triton:
        return svd_noise_ref(weight, u, vh, coefficients, clamp=clamp, out=out)
    if not out.numel():
        return out
    with on_device(weight):
        _launch(weight, u, vh, coefficients, clamp, precision, out)
    return out


def _check(inputs: Mapping[str, Tensor], clamp: float, precision: str) -> None:
    weight, u, vh, coefficients = inputs.values()
    n_dims = 3 if weight.dim() == 3 else 2
    for name, tensor in inputs.items():
        shared = name == "coefficients" and isinstance(tensor, Tensor) and tensor.dim() == 2
        check_float("svd_noise", name, tensor, 2 if shared else n_dims)
    *batch, rows, cols = weight.shape
    k = coefficients.shape[-1]
    if coefficients.dim() == 3 and coefficients.shape[1] != batch[0]:
        raise ValueError(f"svd_noise: coefficients has shape {tuple(coefficients.shape)}, weight {tuple(weight.shape)}")
    if tuple(u.shape) != (*batch, rows, k):
        raise ValueError(f"svd_noise: u has shape {tuple(u.shape)}, weight has {rows} rows and k is {k}")
    if tuple(vh.shape) != (*batch, k, cols):
        raise ValueError(f"svd_noise: vh has shape {tuple(vh.shape)}, weight has {cols} columns and k is {k}")
    if not wide_number("svd_noise", "clamp", clamp) >= 0:
        raise ValueError(f"svd_noise: clamp is {clamp}, not a number >= 0")
    if precision not in PRECISIONS:
        raise ValueError(f"svd_noise: precision is {precision!r}; use 'ieee', 'tf32' or 'bf16'")
