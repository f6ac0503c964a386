"""What a transformer block does between its products, each in one pass: norms, gated activations, rotary embeddings.

    rms_norm   normed = x * rsqrt(mean(x^2) + eps), in float32
               round(weight * round(normed))                    Llama, Qwen, Mistral
               round((offset + weight) * normed)                OLMo-2 (offset 0), Gemma (offset 1)
    gated      round(round(activation(gate)) * up)
    rotate     round(round(q * cos) + round(half(q) * sin)), half(q) = (-second half of q, first half)

Roundings stand where Transformers' modules have them, so that values do not depend on which of the two runs.

Shapes: x (..., cols), weight (cols,); gate and up (..., cols); q (batch, heads, width, size), k the same with heads of
its own, cos and sin (1 or batch, width, size). The result has the shape of x, of gate, of q and k.
Bytes: each operand once, the result once: bound by memory.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from olmfast.kernels._dispatch import (
    LazyKernel,
    ceil_div,
    check_float,
    dtype_name,
    flag,
    interpreted,
    launch,
    number,
    on_device,
    use_triton,
)

if TYPE_CHECKING:
    import triton.language as tl

NORM_BLOCK, GATED_BLOCK, ROTATE_BLOCK = 2048, 2048, 1024
# The longest row of a norm that one program holds.
MAX_COLS = 16_384
# Batches that one launch takes.
MAX_BATCH = 65_535
INFINITY = float("inf")
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu_tanh": partial(functional.gelu, approximate="tanh"),
    "gelu": functional.gelu,
}


@torch.no_grad()
def rms_norm_ref(x: Tensor, weight: Tensor, eps: float, offset: float, rounded_first: bool) -> Tensor:
    """The formula in plain torch, as Transformers' modules have it: float64 too is normed in float32."""
    wide = x.to(torch.float32)
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if rounded_first:
        return weight * normed.to(x.dtype)
    return (normed * (offset + weight.float() if offset else weight)).to(x.dtype)


@torch.no_grad()
def gated_ref(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """The formula in plain torch."""
    return ACTIVATIONS[activation](gate) * up


@torch.no_grad()
def rotate_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The formula in plain torch."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return (x * cos[:, None] + turned * sin[:, None]).to(x.dtype)


# The compiler may join no product and sum: torch, which has them apart, rounds both.
_launch = partial(launch, enable_fp_fusion=False)


@LazyKernel
def _rms_norm_kernel(
    x_ptr, weight_ptr, out_ptr, rows, cols, x_row, eps, inverse, offset,
    ROUNDED_FIRST: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr,
):  # fmt: skip
    offs_r = tl.program_id(0).to(tl.int64) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    offs_c = tl.arange(0, BLOCK_COLS)[None, :]
    mask_c = offs_c < cols
    mask = (offs_r < rows) & mask_c
    x = tl.load(x_ptr + offs_r * x_row + offs_c, mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + offs_c, mask=mask_c, other=0.0).to(tl.float32)
    normed = x * tl.rsqrt(tl.sum(x * x, axis=1, keep_dims=True) * inverse + eps)
    if ROUNDED_FIRST:
        normed = weight * normed.to(out_ptr.dtype.element_ty).to(tl.float32)
    else:
        normed = normed * (offset + weight)
    tl.store(out_ptr + offs_r * cols + offs_c, normed.to(out_ptr.dtype.element_ty), mask=mask)


@LazyKernel
def _gated_kernel(
    gate_ptr, up_ptr, out_ptr, cols, n_blocks, gate_row, up_row,
    ACTIVATION: tl.constexpr, PLAIN: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = (tl.program_id(0) // n_blocks).to(tl.int64)
    start = (tl.program_id(0) % n_blocks).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < cols - start
    x = tl.load(gate_ptr + row * gate_row + start + offs, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + row * up_row + start + offs, mask=mask, other=0.0).to(tl.float32)
    if ACTIVATION == "silu":
        # The functions and divisions of torch's kernels: those of tl itself are quicker and less exact.
        x = tl.div_rn(x, 1.0 + (tl.exp(-x) if PLAIN else tl.extra.libdevice.exp(-x)))
    elif ACTIVATION == "gelu_tanh":
        inner = 0.7978845608028654 * tl.fma(x * x * x, 0.044715, x)
        x = 0.5 * x * (1.0 + (1.0 - 2.0 / (1.0 + tl.exp(2.0 * inner)) if PLAIN else tl.extra.libdevice.tanh(inner)))
    else:
        x = x * 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))
    dtype = out_ptr.dtype.element_ty
    tl.store(out_ptr + row * cols + start + offs, (x.to(dtype).to(tl.float32) * up).to(dtype), mask=mask)


@LazyKernel
def _rotate_rows(
    x_ptr, cos_ptr, sin_ptr, out_ptr, block, width, heads, x_head, x_at, cos_at, sin_at, out_head, out_at,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    """Rows `block` * BLOCK_ROWS and on of one batch, a row a head of a token; tokens are the slower."""
    rows = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    offs = tl.arange(0, BLOCK_HALF)[None, :]
    mask = (rows < width * heads) & (offs < HALF)
    at, head = (rows // heads).to(tl.int64), (rows % heads).to(tl.int64)
    x_ptr += at * x_at + head * x_head + offs
    cos_ptr += at * cos_at + offs
    sin_ptr += at * sin_at + offs
    out_ptr += at * out_at + head * out_head + offs
    first = tl.load(x_ptr, mask=mask, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + HALF, mask=mask, other=0.0).to(tl.float32)
    cos, sin = tl.load(cos_ptr, mask=mask, other=0.0), tl.load(sin_ptr, mask=mask, other=0.0)
    # A product is rounded to the wider dtype of its two, that of cos and sin.
    left, right = (first * cos.to(tl.float32)).to(cos.dtype), (second * sin.to(tl.float32)).to(cos.dtype)
    # A difference, for -x is 0 - x to Triton, which turns -0 into 0.
    tl.store(out_ptr, (left.to(tl.float32) - right.to(tl.float32)).to(out_ptr.dtype.element_ty), mask=mask)
    cos, sin = tl.load(cos_ptr + HALF, mask=mask, other=0.0), tl.load(sin_ptr + HALF, mask=mask, other=0.0)
    left, right = (second * cos.to(tl.float32)).to(cos.dtype), (first * sin.to(tl.float32)).to(cos.dtype)
    tl.store(out_ptr + HALF, (left.to(tl.float32) + right.to(tl.float32)).to(out_ptr.dtype.element_ty), mask=mask)


@LazyKernel
def _rotate_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr, width, q_heads, k_heads, q_blocks,
    q_batch, q_head, q_at, k_batch, k_head, k_at, cos_batch, cos_at, sin_batch, sin_at,
    q_out_batch, q_out_head, q_out_at, k_out_batch, k_out_head, k_out_at,
    HALF: tl.constexpr, BLOCK_HALF: tl.constexpr, BLOCK_ROWS: tl.constexpr,
):  # fmt: skip
    block, batch = tl.program_id(0), tl.program_id(1).to(tl.int64)
    cos_ptr += batch * cos_batch
    sin_ptr += batch * sin_batch
    if block < q_blocks:
        _rotate_rows(
            q_ptr + batch * q_batch, cos_ptr, sin_ptr, q_out_ptr + batch * q_out_batch, block, width, q_heads,
            q_head, q_at, cos_at, sin_at, q_out_head, q_out_at, HALF, BLOCK_HALF, BLOCK_ROWS,
        )  # fmt: skip
    else:
        _rotate_rows(
            k_ptr + batch * k_batch, cos_ptr, sin_ptr, k_out_ptr + batch * k_out_batch, block - q_blocks, width,
            k_heads, k_head, k_at, cos_at, sin_at, k_out_head, k_out_at, HALF, BLOCK_HALF, BLOCK_ROWS,
        )  # fmt: skip


def _finite(where: str, name: str, value: float) -> float:
    return value if type(value) is float and -INFINITY < value < INFINITY else number(where, name, value)


def _check_same_dtype(where: str, first: str, dtype: torch.dtype, name: str, tensor: Tensor) -> None:
    if tensor.dtype != dtype:
        raise TypeError(f"{where}: {name} has dtype {dtype_name(tensor.dtype)}, {first} has {dtype_name(dtype)}")


def _flat(x: Tensor) -> Tensor:
    """(rows, cols), each row in one piece; a view where strides allow it."""
    return (x if x.stride(-1) == 1 else x.contiguous()).reshape(-1, x.shape[-1])


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    *,
    offset: float = 0.0,
    rounded_first: bool = True,
    impl: str = "auto",
) -> Tensor:
    """`weight * x / rms(x)` over the last dimension, with the roundings of Transformers' modules.

    The norm is computed in float32, for float64 too. The kernel's mean may differ from torch's in its last bit, as sums
    in another order do.

    Args:
        x: (..., cols), bfloat16, float16, float32 or float64; any strides.
        weight: (cols,) of x's dtype.
        eps: added to the mean square.
        offset: added to the weight, in float32; 1 for Gemma.
        rounded_first: round the normed values to x's dtype before the product, as Llama does; not with an offset.
        impl: 'auto', 'triton' or 'torch'. Rows of more than 16,384 values are torch's.

    Returns:
        The shape and dtype of x. Where x lies in one piece, its rows too, so does the result, in the same order.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or impl; numbers that are not finite; an offset with
            `rounded_first`.
    """
    check_float("rms_norm", "x", x)
    check_float("rms_norm", "weight", weight, 1)
    if not x.dim() or weight.shape[0] != x.shape[-1]:
        raise ValueError(f"rms_norm: weight has shape {tuple(weight.shape)}, x has {tuple(x.shape)}")
    _check_same_dtype("rms_norm", "x", x.dtype, "weight", weight)
    eps, offset = _finite("rms_norm", "eps", eps), _finite("rms_norm", "offset", offset)
    rounded_first = flag("rms_norm", "rounded_first", rounded_first)
    if offset and rounded_first:
        raise ValueError(f"rms_norm: offset is {offset} and rounded_first is set; use rounded_first=False")
    triton = use_triton("rms_norm", impl, (x, weight))
    cols = x.shape[-1]
    if triton and cols > MAX_COLS:
        if impl == "triton":
            raise ValueError(
                f"rms_norm: impl='triton' cannot run: rows of {cols} values, more than {MAX_COLS}; use impl='auto'"
            )
        triton = False
    if not triton:
        return rms_norm_ref(x, weight, eps, offset, rounded_first)
    out = torch.empty_like(x)
    n_values = x.numel()
    if not n_values:
        return out
    row = cols
    if x.stride() != out.stride() or x.stride(-1) != 1:
        # With gaps, or its rows not in one piece.
        x, out = _flat(x), torch.empty_like(x, memory_format=torch.contiguous_format)
        row = x.stride(0)
    if weight.stride(0) != 1:
        weight = weight.contiguous()
    rows = n_values // cols
    block_cols = max(1 << (cols - 1).bit_length(), 16)
    block_rows = max(NORM_BLOCK // block_cols, 1)
    with on_device(x):
        _launch(
            _rms_norm_kernel, (ceil_div(rows, block_rows),), x, weight, out, rows, cols, row, eps, 1.0 / cols, offset,
            ROUNDED_FIRST=rounded_first, BLOCK_ROWS=block_rows, BLOCK_COLS=block_cols,
            num_warps=max(4, min(16, block_cols // 512)),
        )  # fmt: skip
    return out


def gated(gate: Tensor, up: Tensor, activation: str, *, impl: str = "auto") -> Tensor:
    """`activation(gate) * up`: the activation in float32, rounded, and the product of it rounded, as torch does apart.

    Args:
        gate: (..., cols), bfloat16, float16, float32 or float64; any strides, such as those of a part of one product.
        up: shape and dtype of gate; any strides.
        activation: 'silu', 'gelu_tanh' or 'gelu'.
        impl: 'auto', 'triton' or 'torch'.

    Returns:
        The shape and dtype of gate. The kernel's activation may differ from torch's in the last bits of float32.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, activation, device or impl.
    """
    check_float("gated", "gate", gate)
    check_float("gated", "up", up)
    if gate.shape != up.shape:
        raise ValueError(f"gated: up has shape {tuple(up.shape)}, gate has {tuple(gate.shape)}")
    _check_same_dtype("gated", "gate", gate.dtype, "up", up)
    if not isinstance(activation, str):
        raise TypeError(f"gated: activation is of type {type(activation).__name__}, not a string")
    if activation not in ACTIVATIONS:
        raise ValueError(f"gated: activation is {activation!r}; use {', '.join(map(repr, ACTIVATIONS))}")
    if not use_triton("gated", impl, (gate, up)):
        return gated_ref(gate, up, activation)
    out = torch.empty_like(gate, memory_format=torch.contiguous_format)
    cols = gate.numel()
    if not cols:
        return out
    rows = 1
    gate_row = up_row = 0
    if not (gate.is_contiguous() and up.is_contiguous()):
        # With gaps: row by row.
        gate, up = _flat(gate), _flat(up)
        rows, cols = gate.shape
        gate_row, up_row = gate.stride(0), up.stride(0)
    block = min(max(1 << (cols - 1).bit_length(), 256), GATED_BLOCK)
    n_blocks = ceil_div(cols, block)
    with on_device(gate):
        _launch(
            _gated_kernel, (rows * n_blocks,), gate, up, out, cols, n_blocks, gate_row, up_row,
            ACTIVATION=activation, PLAIN=interpreted(), BLOCK=block, num_warps=max(block // 256, 2),
        )  # fmt: skip
    return out


def rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, impl: str = "auto") -> tuple[Tensor, Tensor]:
    """Rotary embedding of queries and keys, a value turned with the one half a head away: Transformers', of Llama.

    Args:
        q: (batch, heads, width, size), bfloat16, float16, float32 or float64; size even; any strides, usually a
            transposed view of (batch, width, heads, size).
        k: (batch, key heads, width, size) of q's dtype; any strides.
        cos: (1 or batch, width, size) of q's dtype, or float32: then nothing is rounded but the result, as in OLMo-2.
        sin: shape and dtype of cos; any strides.
        impl: 'auto', 'triton' or 'torch'.

    Returns:
        (q', k') in shape and dtype of q and k, bit for bit what torch gives, and as torch lays it out where heads are
        in one piece: a transposed view gives one.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or impl.
    """
    check_float("rotate", "q", q, 4)
    check_float("rotate", "k", k, 4)
    check_float("rotate", "cos", cos, 3)
    check_float("rotate", "sin", sin, 3)
    batch, q_heads, width, size = q.shape
    k_heads = k.shape[1]
    if size % 2:
        raise ValueError(f"rotate: q has shape {tuple(q.shape)}; its last dimension is not even")
    if k.shape[0] != batch or k.shape[2] != width or k.shape[3] != size:
        raise ValueError(f"rotate: k has shape {tuple(k.shape)}, q has {tuple(q.shape)}")
    if cos.shape[1] != width or cos.shape[2] != size or cos.shape[0] not in (1, batch):
        raise ValueError(f"rotate: cos has shape {tuple(cos.shape)}, q has {tuple(q.shape)}")
    if sin.shape != cos.shape:
        raise ValueError(f"rotate: sin has shape {tuple(sin.shape)}, cos has {tuple(cos.shape)}")
    _check_same_dtype("rotate", "q", q.dtype, "k", k)
    if cos.dtype != torch.float32:
        _check_same_dtype("rotate", "q", q.dtype, "cos", cos)
    _check_same_dtype("rotate", "cos", cos.dtype, "sin", sin)
    triton = use_triton("rotate", impl, (q, k, cos, sin))
    if triton and batch > MAX_BATCH:
        if impl == "triton":
            raise ValueError(
                f"rotate: impl='triton' cannot run: a batch of {batch}, more than {MAX_BATCH}; use impl='auto'"
            )
        triton = False
    if not triton or not q.numel() or not k.numel():
        return rotate_ref(q, cos, sin), rotate_ref(k, cos, sin)
    q_out, k_out = torch.empty_like(q), torch.empty_like(k)
    q_batch, q_head, q_at, q_last = q.stride()
    k_batch, k_head, k_at, k_last = k.stride()
    cos_batch, cos_at, cos_last = cos.stride()
    sin_batch, sin_at, sin_last = sin.stride()
    q_out_batch, q_out_head, q_out_at, q_out_last = q_out.stride()
    k_out_batch, k_out_head, k_out_at, k_out_last = k_out.stride()
    if not q_last == k_last == cos_last == sin_last == q_out_last == k_out_last == 1:
        return rotate(q.contiguous(), k.contiguous(), cos.contiguous(), sin.contiguous(), impl=impl)
    if cos.shape[0] == 1:
        cos_batch = sin_batch = 0
    half = size // 2
    block_half = max(1 << (half - 1).bit_length(), 8)
    block_rows = max(ROTATE_BLOCK // block_half, 1)
    q_blocks = ceil_div(width * q_heads, block_rows)
    with on_device(q):
        _launch(
            _rotate_kernel, (q_blocks + ceil_div(width * k_heads, block_rows), batch),
            q, k, cos, sin, q_out, k_out, width, q_heads, k_heads, q_blocks,
            q_batch, q_head, q_at, k_batch, k_head, k_at, cos_batch, cos_at, sin_batch, sin_at,
            q_out_batch, q_out_head, q_out_at, k_out_batch, k_out_head, k_out_at,
            HALF=half, BLOCK_HALF=block_half, BLOCK_ROWS=block_rows, num_warps=4,
        )  # fmt: skip
    return q_out, k_out
