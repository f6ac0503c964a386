"""The singular factors SVD-ES needs, canonical: W / max|W| = U @ diag(S) @ Vh with fixed signs.

Directions with S <= max(S) * max(rows, cols) * 2^-23 are dropped: they are rounding, not weight. Each column of U
has its entry of largest magnitude positive (the first of equals), so equal weights give equal factors.

Method 'gram' (for up to float32): with A the taller of W, W^T in float64, eigenvectors V and eigenvalues S^2 of
A^T A, then U = A V / S. Above the bound on S the float64 Gram matrix resolves S^2 far below float32's rounding; a
Newton-Schulz step U <- U (3 - U^T U) / 2 cleans U up where needed. Orthogonality and reconstruction are checked;
what fails is left to the library's own decomposition (method 'svd').
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from olmfast.kernels._dispatch import check_float, check_values, compute_dtype, flag

# Largest entry of |U^T U - 1| that needs no clean-up, that is accepted after it; relative error of U S Vh.
CLEAN, ORTHOGONAL, RECONSTRUCTED = 1e-7, 1e-6, 1e-6


class SvdFactors(NamedTuple):
    """u (rows, k), s (k,) descending, vh (k, cols) of weight / max|weight|."""

    u: Tensor
    s: Tensor
    vh: Tensor


@torch.no_grad()
def svd_factors(weight: Tensor, *, drop: bool = True, method: str = "auto") -> SvdFactors:
    """Singular value decomposition of `weight / max|weight|` in float32 (float64 for a float64 weight).

    Args:
        weight: (rows, cols), any float dtype and strides; not changed.
        drop: leave out the directions whose singular value is at most max(S) * max(rows, cols) * 2^-23.
        method: 'gram' (twenty times more accurate, needs float64 copies), 'svd' (torch.linalg.svd), or 'auto':
            'gram' on a GPU where it is accurate, 'svd' elsewhere (float64, null directions that are kept, CPU).

    Returns:
        SvdFactors(u, s, vh), contiguous, but that on a GPU vh is the transposed view of a contiguous V, as products
        on tensor cores read it; k = 0 for a weight of zeros.

    Raises:
        TypeError, ValueError: not a floating-point matrix, not finite, or unknown method.
        ArithmeticError: method 'gram' where it is not accurate enough.
    """
    check_float("svd_factors", "weight", weight, 2)
    check_values("svd_factors", "weight", weight)
    drop = flag("svd_factors", "drop", drop)
    if method not in ("auto", "gram", "svd"):
        raise ValueError(f"svd_factors: method is {method!r}; use 'auto', 'gram' or 'svd'")
    rows, cols = weight.shape
    matrix = weight.to(compute_dtype(weight.dtype))
    peak = float(matrix.abs().amax()) if matrix.numel() else 0.0
    if not peak < float("inf"):
        raise ValueError("svd_factors: weight holds NaN or infinite values")
    if peak == 0.0:
        return SvdFactors(matrix.new_empty(rows, 0), matrix.new_empty(0), matrix.new_empty(0, cols))
    matrix = matrix / peak
    # On a CPU the library's float32 decomposition is the quicker one.
    wanted = method == "gram" or (method == "auto" and matrix.device.type == "cuda")
    factors = _gram(matrix, drop) if wanted and matrix.dtype == torch.float32 else None
    if factors is None and method == "gram":
        raise ArithmeticError("svd_factors: method='gram' is not accurate here; use method='auto'")
    return _canonical(*(factors if factors is not None else svd_factors_ref(matrix, drop)))


def svd_factors_ref(matrix: Tensor, drop: bool) -> SvdFactors:
    """The library's decomposition."""
    # Of cuSOLVER's methods the one that leaves null directions orthogonal.
    driver = "gesvd" if matrix.device.type == "cuda" and torch.version.hip is None else None
    u, s, vh = torch.linalg.svd(matrix, full_matrices=False, driver=driver)
    k = _n_kept(s, matrix) if drop else len(s)
    return SvdFactors(u[:, :k], s[:k], vh[:k])


def _gram(matrix: Tensor, drop: bool) -> SvdFactors | None:
    """By way of the Gram matrix; None where the result does not pass its checks."""
    tall = (matrix if matrix.shape[0] >= matrix.shape[1] else matrix.T).double()
    squares, v = torch.linalg.eigh(tall.T @ tall)
    s = squares.flip(0).clamp_min(0.0).sqrt()
    k = _n_kept(s, matrix)
    if k < len(s) and not drop:
        return None
    dropped, s, v = s[k:], s[:k], v.flip(1)[:, :k]
    u = tall @ (v / s)
    excess = _excess(u)
    if float(excess.abs().amax()) > CLEAN:
        u = u - 0.5 * (u @ excess)
        if not float(_excess(u).abs().amax()) <= ORTHOGONAL:
            return None
    error = torch.linalg.vector_norm(tall.sub_((u * s) @ v.T))
    if not float(error) <= RECONSTRUCTED * float(s.norm()) + 2.0 * float(dropped.norm()):
        return None
    u, v = (u, v) if matrix.shape[0] >= matrix.shape[1] else (v, u)
    return SvdFactors(u.to(matrix.dtype), s.to(matrix.dtype), v.T.to(matrix.dtype))


def _excess(u: Tensor) -> Tensor:
    gram = u.T @ u
    gram.diagonal().sub_(1.0)
    return gram


def _n_kept(s: Tensor, matrix: Tensor) -> int:
    return int((s > s[0] * (max(matrix.shape) * 2.0**-23)).sum())


def _canonical(u: Tensor, s: Tensor, vh: Tensor) -> SvdFactors:
    if not len(s):
        return SvdFactors(u.contiguous(), s, vh.contiguous())
    entry = u.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(u.gather(0, entry) < 0, -1.0, 1.0).to(u.dtype)
    vh = vh * sign.T
    vh = vh.T.contiguous().T if vh.device.type == "cuda" else vh.contiguous()
    return SvdFactors((u * sign).contiguous(), s.contiguous(), vh)
