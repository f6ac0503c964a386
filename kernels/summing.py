"""n-way weighted sum in one pass: each input is read once, the sum is kept in float32 and rounded once.

    out = round(sum_i w_i * T_i)                normalize=True: divided by sum_i w_i

Shapes: n tensors of one shape -> one of that shape.
Bytes: n inputs and the result, once: bound by memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from olmfast.kernels._dispatch import (
    LazyKernel,
    ceil_div,
    check_alike,
    check_apart,
    compute_dtype,
    flag,
    launch,
    numbers,
    on_device,
    prepare_out,
    use_triton,
)

if TYPE_CHECKING:
    import triton.language as tl

BLOCK, N_WARPS = 2048, 8
# Values summed at a time on a CPU: the float32 sum stays in the cache.
N_CHUNK = 1 << 20


def weighted_sum_ref(tensors: Sequence[Tensor], weights: Sequence[float], divisor: float, out: Tensor) -> Tensor:
    """The formula in plain torch, a chunk at a time, into `out`; all contiguous."""
    dtype = compute_dtype(out.dtype)
    target, flat = out.view(-1), [tensor.view(-1) for tensor in tensors]
    direct = out.dtype == dtype and all(out.data_ptr() != tensor.data_ptr() for tensor in tensors)
    buffer = torch.empty(0 if direct else min(N_CHUNK, out.numel()), dtype=dtype, device=out.device)
    for start in range(0, target.numel(), N_CHUNK):
        stop = min(start + N_CHUNK, target.numel())
        # Straight into the result where it can hold the sum and no input is overwritten early.
        total = target[start:stop] if direct else buffer[: stop - start]
        torch.mul(flat[0][start:stop].to(dtype), weights[0], out=total)
        for tensor, weight in zip(flat[1:], weights[1:], strict=True):
            total.add_(tensor[start:stop].to(dtype), alpha=weight)
        if divisor != 1.0:
            total.div_(divisor)
        if not direct:
            target[start:stop].copy_(total)
    return out


@LazyKernel
def _weighted_sum_kernel(x_ptrs, weights, out_ptr, n_values, divisor, DIVIDES: tl.constexpr, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < n_values - start
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in tl.static_range(len(x_ptrs)):
        x = tl.load(x_ptrs[i] + start + offs, mask=mask, other=0.0).to(tl.float32)
        total += x * weights[i]
    if DIVIDES:
        total /= divisor
    tl.store(out_ptr + start + offs, total.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(tensors: Sequence[Tensor], weights: Sequence[float], divisor: float, out: Tensor) -> None:
    """The kernel on contiguous tensors of one dtype."""
    if out.numel():
        with on_device(out):
            launch(
                _weighted_sum_kernel, (ceil_div(out.numel(), BLOCK),),
                tuple(tensors), tuple(weights), out, out.numel(), divisor,
                DIVIDES=divisor != 1.0, BLOCK=BLOCK, num_warps=N_WARPS,
            )  # fmt: skip


@torch.no_grad()
def weighted_sum(
    tensors: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    *,
    normalize: bool = False,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`sum_i weights[i] * tensors[i]` in float32 (float64 for float64), rounded once to the first's dtype.

    Args:
        tensors: at least one, equal shapes, floating point, any strides (those that are not contiguous are
            copied first). Mixed dtypes are summed by torch.
        weights: one number per tensor.
        normalize: divide by the sum of the weights.
        out: same shape, dtype of the first tensor, any strides; may be one of the tensors.
        impl: 'auto', 'triton' or 'torch'.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device, number of weights; weights that are not finite, or sum
            to 0 where they are to be divided by; or an `out` that overlaps an input without being it.
    """
    tensors = check_alike("weighted_sum", tensors)
    normalize = flag("weighted_sum", "normalize", normalize)
    factors = numbers("weighted_sum", "weights", weights, compute_dtype(tensors[0].dtype))
    if len(factors) != len(tensors):
        raise ValueError(f"weighted_sum: {len(factors)} weights for {len(tensors)} tensors")
    # Added up in the dtype of the sum, as whoever divides tensor by tensor does.
    divisor = float(torch.tensor(factors, dtype=compute_dtype(tensors[0].dtype)).sum()) if normalize else 1.0
    if divisor == 0.0:
        raise ValueError("weighted_sum: the weights sum to 0; use normalize=False")
    first = tensors[0]
    triton = use_triton("weighted_sum", impl, tensors, mixed=False)
    out = prepare_out("weighted_sum", out, first.shape, first.dtype, first.device)
    check_apart("weighted_sum", out, {f"tensors[{i}]": one for i, one in enumerate(tensors)}, in_place=True)
    target = out if out.is_contiguous() else torch.empty_like(out, memory_format=torch.contiguous_format)
    tensors = [tensor.contiguous() for tensor in tensors]
    if triton:
        _launch(tensors, factors, divisor, target)
    else:
        weighted_sum_ref(tensors, factors, divisor, target)
    return out if target is out else out.copy_(target)
