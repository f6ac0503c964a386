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

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from olmfast.kernels._dispatch import (
    LazyKernel,
    ceil_div,
    check_alike,
    compute_dtype,
    on_device,
    prepare_out,
    use_triton,
)
from olmfast.kernels.summing import launch_weighted_sum, weighted_sum_ref

if TYPE_CHECKING:
    import triton.language as tl

EPSILON, PARALLEL = 1e-8, 0.9995
BLOCK, BLOCKS_PER_PROGRAM = 2048, 8
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
    for i in range(BLOCKS_PER_PROGRAM):
        offs = start + i * BLOCK + tl.arange(0, BLOCK)
        mask = offs < n_values
        a = tl.load(a_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        aa += a * a
        bb += b * b
        ab += a * b
    at = part_ptr + tl.program_id(0) * 3
    tl.store(at, tl.sum(aa, axis=0))
    tl.store(at + 1, tl.sum(bb, axis=0))
    tl.store(at + 2, tl.sum(ab, axis=0))


def _products(a: Tensor, b: Tensor) -> Tensor:
    n_programs = ceil_div(a.numel(), BLOCK * BLOCKS_PER_PROGRAM)
    parts = torch.empty((n_programs, 3), dtype=torch.float32, device=a.device)
    with on_device(a):
        _products_kernel[(n_programs,)](
            a, b, parts, a.numel(), BLOCK=BLOCK, BLOCKS_PER_PROGRAM=BLOCKS_PER_PROGRAM, num_warps=8
        )
    return parts.sum(dim=0, dtype=torch.float64)


def slerp(a: Tensor, b: Tensor, t: float, *, out: Tensor | None = None, impl: str = "auto") -> Tensor:
    """The point at `t` on the arc from `a` (t=0) to `b` (t=1), in float32, rounded once to a's dtype.

    Args:
        a, b: equal shapes, floating point, any strides (not contiguous: copied first). Mixed dtypes are
            handled by torch.
        t: any number; 0..1 interpolates.
        out: same shape, dtype of `a`, any strides; may be `a` or `b`.
        impl: 'auto', 'triton' or 'torch'.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or impl.
    """
    check_alike("slerp", (a, b))
    triton = use_triton("slerp", impl, (a, b), mixed=False)
    out = prepare_out("slerp", out, a.shape, a.dtype, a.device)
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    a, b = a.contiguous(), b.contiguous()
    if not a.numel():
        return out
    if triton:
        launch_weighted_sum((a, b), coefficients(_products(a, b), t).to(torch.float32), 1.0, target)
    else:
        weighted_sum_ref((a, b), coefficients(products_ref(a, b), t).tolist(), 1.0, target)
    return out if target is out else out.copy_(target)
