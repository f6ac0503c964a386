"""The singular factors SVD-ES needs, canonical: W / max|W| = U @ diag(S) @ Vh with fixed signs.

Directions with S <= max(S) * max(rows, cols) * 2^-23 are dropped: they are rounding, not weight. Each column of U
has its entry of largest magnitude positive (the first of equals), so equal weights give equal factors.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from olmfast.kernels._dispatch import check_float, compute_dtype


class SvdFactors(NamedTuple):
    """u (rows, k), s (k,) descending, vh (k, cols) of weight / max|weight|."""

    u: Tensor
    s: Tensor
    vh: Tensor


def svd_factors(weight: Tensor, *, drop: bool = True) -> SvdFactors:
    """Singular value decomposition of `weight / max|weight|` in float32 (float64 for a float64 weight).

    Args:
        weight: (rows, cols), any float dtype and strides; not changed.
        drop: leave out the directions whose singular value is at most max(S) * max(rows, cols) * 2^-23.

    Returns:
        SvdFactors(u, s, vh); k = 0 for a weight of zeros.

    Raises:
        TypeError, ValueError: not a floating-point matrix, or not finite.
    """
    check_float("svd_factors", "weight", weight, 2)
    rows, cols = weight.shape
    matrix = weight.detach().to(compute_dtype(weight.dtype))
    peak = float(matrix.abs().amax()) if matrix.numel() else 0.0
    if not peak < float("inf"):
        raise ValueError("svd_factors: weight holds NaN or infinite values")
    if peak == 0.0:
        return SvdFactors(matrix.new_empty(rows, 0), matrix.new_empty(0), matrix.new_empty(0, cols))
    u, s, vh = torch.linalg.svd(matrix / peak, full_matrices=False)
    if drop:
        k = int((s > s[0] * (max(rows, cols) * 2.0**-23)).sum())
        u, s, vh = u[:, :k], s[:k], vh[:k]
    return _canonical(u, s, vh)


def _canonical(u: Tensor, s: Tensor, vh: Tensor) -> SvdFactors:
    entry = u.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(u.gather(0, entry) < 0, -1.0, 1.0).to(u.dtype)
    return SvdFactors((u * sign).contiguous(), s.contiguous(), (vh * sign.T).contiguous())
