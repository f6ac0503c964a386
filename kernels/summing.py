"""n-way weighted sum in one pass: each input is read once, the sum is kept in float32 and rounded once.

    out = round(sum_i w_i * T_i)            normalize=True: divided by sum_i w_i
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from olmfast.kernels._dispatch import check_float, choose, compute_dtype, prepare_out


def weighted_sum_ref(tensors: Sequence[Tensor], weights: Tensor, *, divisor: float, out: Tensor) -> Tensor:
    """The formula in plain torch, a stretch at a time: the float32 sum stays in the cache."""
    dtype = compute_dtype(tensors[0].dtype)
    factors = [float(weight) for weight in weights]
    if not all(tensor.is_contiguous() for tensor in (*tensors, out)):
        total = tensors[0].to(dtype) * factors[0]
        for tensor, factor in zip(tensors[1:], factors[1:], strict=True):
            total.add_(tensor.to(dtype), alpha=factor)
        return out.copy_(total if divisor == 1.0 else total.div_(divisor))
    flat, target = [tensor.view(-1) for tensor in tensors], out.view(-1)
    n_values = 1 << 18
    for start in range(0, target.numel(), n_values):
        total = flat[0][start : start + n_values].to(dtype) * factors[0]
        for tensor, factor in zip(flat[1:], factors[1:], strict=True):
            total.add_(tensor[start : start + n_values].to(dtype), alpha=factor)
        target[start : start + n_values].copy_(total if divisor == 1.0 else total.div_(divisor))
    return out


def weighted_sum(
    tensors: Sequence[Tensor],
    weights: Sequence[float] | Tensor,
    *,
    normalize: bool = False,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`sum_i weights[i] * tensors[i]` in float32 (float64 for float64), rounded once to the first one's dtype.

    Args:
        tensors: at least one, equal shapes, floating point; any strides.
        weights: one number per tensor.
        normalize: divide by the sum of the weights.
        out: same shape, dtype of the first tensor; may be one of the tensors.
        impl: 'auto', 'triton' or 'torch'.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, number of weights, or weights that sum to 0 where they
            are to be divided by.
    """
    tensors = list(tensors)
    if not tensors:
        raise ValueError("weighted_sum: no tensors")
    for i, tensor in enumerate(tensors):
        check_float("weighted_sum", f"tensors[{i}]", tensor)
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"weighted_sum: tensors[{i}] has shape {tuple(tensor.shape)}, tensors[0] has {tuple(tensors[0].shape)}"
            )
    factors = torch.as_tensor(weights, dtype=torch.float64, device="cpu").reshape(-1)
    if factors.numel() != len(tensors):
        raise ValueError(f"weighted_sum: {factors.numel()} weights for {len(tensors)} tensors")
    divisor = float(factors.sum()) if normalize else 1.0
    if divisor == 0.0:
        raise ValueError("weighted_sum: the weights sum to 0; use normalize=False")
    out = prepare_out("weighted_sum", out, tuple(tensors[0].shape), tensors[0])
    choose("weighted_sum", impl, tensors)
    return weighted_sum_ref(tensors, factors, divisor=divisor, out=out)
