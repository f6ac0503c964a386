"""Spherical interpolation of two tensors, each taken as one long vector.

    cos = <a, b> / (max(|a|, eps) max(|b|, eps)),  theta = arccos(cos)
    out = sin((1 - t) theta) / sin(theta) * a  +  sin(t theta) / sin(theta) * b
    |cos| > 0.9995 (nearly parallel):  out = (1 - t) a + t b

eps = 1e-8. The coefficients act on the vectors as they are, not on their directions (mergekit's convention).
Shapes: two tensors of one shape -> one of that shape.
Bytes: both inputs twice (products, then sum) and the result once: bound by memory. float32, one rounding.
Source: Shoemake, "Animating rotation with quaternion curves", SIGGRAPH 1985.
"""

from __future__ import annotations

from functools import partial
from struct import pack, unpack
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from olmfast.kernels._dispatch import (
    LazyKernel,
    ceil_div,
    check_alike,
    check_apart,
    check_float,
    compute_dtype,
    launch,
    number,
    on_device,
    prepare_out,
    use_triton,
)
from olmfast.kernels.summing import weighted_sum_ref

if TYPE_CHECKING:
    import triton.language as tl

EPSILON, PARALLEL = 1e-8, 0.9995
BLOCK, BLOCKS_PER_PROGRAM, N_WARPS = 2048, 8, 8
N_CHUNK = 1 << 18


def products_ref(a: Tensor, b: Tensor) -> Tensor:
    """<a, a>, <b, b>, <a, b> in float64: chunks in the compute dtype, their sums in float64."""
    dtype, n = compute_dtype(a.dtype), a.numel()
    sums = torch.zeros(3, dtype=torch.float64, device=a.device)
    for start in range(0, n, N_CHUNK):
        x, y = (tensor.view(-1)[start : start + N_CHUNK].to(dtype) for tensor in (a, b))
        sums += torch.stack((torch.dot(x, x), torch.dot(y, y), torch.dot(x, y)))
    return sums


def coefficients(products: Tensor, t: float) -> Tensor:
    """The factors of a and of b, (2,) float64, on the products' device; nothing is waited for."""
    aa, bb, ab = products.unbind()
    cos = ab / (aa.sqrt().clamp_min(EPSILON) * bb.sqrt().clamp_min(EPSILON))
    theta = cos.clamp(-1.0, 1.0).arccos()
    # Where sin is 0 the vectors are parallel and the other branch is taken.
    sine = theta.sin().clamp_min(1e-300)
    round_trip = torch.stack((((1.0 - t) * theta).sin() / sine, (t * theta).sin() / sine))
    return torch.where(cos.abs() > PARALLEL, torch.tensor((1.0 - t, t), dtype=torch.float64).to(cos.device), round_trip)


@LazyKernel
def _products_kernel(a_ptr, b_ptr, part_ptr, n_values, BLOCK: tl.constexpr, BLOCKS_PER_PROGRAM: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS_PER_PROGRAM)
    aa, bb, ab = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for i in tl.static_range(BLOCKS_PER_PROGRAM):
        offs = i * BLOCK + tl.arange(0, BLOCK)
        mask = offs < n_values - start
        a = tl.load(a_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
        aa += a * a
        bb += b * b
        ab += a * b
    at = part_ptr + tl.program_id(0) * 3
    tl.store(at, tl.sum(aa, axis=0))
    tl.store(at + 1, tl.sum(bb, axis=0))
    tl.store(at + 2, tl.sum(ab, axis=0))


@partial(LazyKernel, plain=("n_parts",))
def _coefficients_kernel(part_ptr, out_ptr, n_parts, t, EPSILON: tl.constexpr, PARALLEL: tl.constexpr,
                         BLOCK: tl.constexpr):  # fmt: skip
    # `coefficients` in one program; t comes as (t in float32, what is left of it).
    offs = tl.arange(0, BLOCK)
    aa, bb, ab = tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64), tl.zeros((BLOCK,), tl.float64)
    for start in range(0, n_parts, BLOCK):
        at, mask = part_ptr + (start + offs) * 3, start + offs < n_parts
        aa += tl.load(at, mask=mask, other=0.0).to(tl.float64)
        bb += tl.load(at + 1, mask=mask, other=0.0).to(tl.float64)
        ab += tl.load(at + 2, mask=mask, other=0.0).to(tl.float64)
    # Four equal values: what is computed with one is computed with a tensor.
    zeros = tl.zeros((4,), tl.float64)
    length_a, length_b = tl.sqrt(zeros + tl.sum(aa, axis=0)), tl.sqrt(zeros + tl.sum(bb, axis=0))
    cos = (zeros + tl.sum(ab, axis=0)) / (tl.maximum(length_a, EPSILON) * tl.maximum(length_b, EPSILON))
    parallel = tl.abs(cos) > PARALLEL
    x = tl.where(parallel, 0.0, cos)
    # arccos: Abramowitz and Stegun 4.4.45 (to 7e-5), then Newton's steps on cos(theta) = x.
    y = tl.abs(x)
    theta = tl.sqrt(1.0 - y) * (1.5707288 + y * (-0.2121144 + y * (0.0742610 - 0.0187293 * y)))
    theta = tl.where(x < 0, 3.141592653589793 - theta, theta)
    for _ in tl.static_range(3):
        theta += (tl.cos(theta) - x) / tl.sin(theta)
    wide = zeros + t[0] + t[1]
    part = tl.where(tl.arange(0, 4) == 0, 1.0 - wide, wide)
    factor = tl.where(parallel, part, tl.sin(part * theta) / tl.sin(theta))
    tl.store(out_ptr + tl.arange(0, 4), factor.to(tl.float32), mask=tl.arange(0, 4) < 2)


@LazyKernel
def _arc_kernel(a_ptr, b_ptr, factor_ptr, out_ptr, n_values, BLOCK: tl.constexpr):
    # From the end: what the products read last is still in the L2 cache.
    start = (tl.num_programs(0) - 1 - tl.program_id(0)).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < n_values - start
    a = tl.load(a_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
    total = a * tl.load(factor_ptr) + b * tl.load(factor_ptr + 1)
    tl.store(out_ptr + start + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(a: Tensor, b: Tensor, t: float, out: Tensor) -> None:
    n_values = a.numel()
    n_programs = ceil_div(n_values, BLOCK * BLOCKS_PER_PROGRAM)
    memory = torch.empty(4 + 3 * n_programs, dtype=torch.float32, device=a.device)
    factors, parts = memory[:2], memory[4:]
    high = _float32(t)
    with on_device(a):
        launch(
            _products_kernel, (n_programs,),
            a, b, parts, n_values, BLOCK=BLOCK, BLOCKS_PER_PROGRAM=BLOCKS_PER_PROGRAM, num_warps=N_WARPS,
        )  # fmt: skip
        launch(
            _coefficients_kernel, (1,),
            parts, factors, n_programs, (high, t - high), EPSILON=EPSILON, PARALLEL=PARALLEL, BLOCK=1024, num_warps=4,
        )  # fmt: skip
        launch(_arc_kernel, (ceil_div(n_values, BLOCK),), a, b, factors, out, n_values, BLOCK=BLOCK, num_warps=N_WARPS)


def _float32(x: float) -> float:
    """The nearest number of 32 bits."""
    return float(unpack("f", pack("f", x))[0])


@torch.no_grad()
def slerp(a: Tensor, b: Tensor, t: float, *, out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """The point at `t` on the arc from `a` (t=0) to `b` (t=1), in float32, rounded once to a's dtype.

    Args:
        a, b: equal shapes, floating point, any strides (not contiguous: copied first). Mixed dtypes are
            handled by torch. With three dimensions a batch of matrices, such as experts, each with an arc of its own.
        t: any number; 0..1 interpolates.
        out: same shape, dtype of `a`, any strides; may be `a` or `b`.
        impl: 'auto', 'triton' or 'torch'.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device or impl, a `t` that is not finite, or an `out` that
            overlaps an input without being it.
    """
    check_float("slerp", "a", a)
    check_float("slerp", "b", b)
    check_alike("slerp", (a, b))
    t = number("slerp", "t", t)
    triton = use_triton("slerp", impl, (a, b), mixed=False)
    out = prepare_out("slerp", out, a.shape, a.dtype, a.device)
    check_apart("slerp", out, {"a": a, "b": b}, in_place=True)
    if a.dim() == 3:
        for i in range(len(a)):
            slerp(a[i], b[i], t, out=out[i], impl=impl)
        return out
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    a, b = a.contiguous(), b.contiguous()
    if not a.numel():
        return out
    if triton:
        _launch(a, b, t, target)
    else:
        weighted_sum_ref((a, b), coefficients(products_ref(a, b), t).tolist(), 1.0, target)
    return out if target is out else out.copy_(target)
