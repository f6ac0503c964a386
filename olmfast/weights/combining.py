"""Methods whose result is a weighted sum: all they have to know of the tensors are scalar products.

One pass over the terms gives their Gram matrix (or that of their differences from the base), a few numbers make
weights of it, a second pass sums. Each function here takes the (n, n) float64 Gram matrix to n weights; with a
base they are weights of the differences.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def nuslerp_weights(gram: torch.Tensor, t: float) -> list[float]:
    """sin((1 - t) theta) / sin(theta) and sin(t theta) / sin(theta); 1 - t and t where the two are parallel.

    Norms count as at least 1e-7, and 1 - cos^2 <= 1e-16 as parallel, as in mergekit's NuSLERP.
    """
    norms = gram.diagonal().sqrt().clamp_min(1e-7)
    return nuslerp_factors(gram[0, 1] / (norms[0] * norms[1]), t).tolist()


def nuslerp_factors(cos: torch.Tensor, t: float) -> torch.Tensor:
    """(2, ...) factors for cosines of any shape."""
    cos = cos.clamp(-1.0, 1.0)
    parallel = 1 - cos.square() <= 1e-16
    theta = torch.where(parallel, torch.zeros_like(cos), cos).acos()
    sine = theta.sin()
    curved = torch.stack((((1 - t) * theta).sin() / sine, (t * theta).sin() / sine))
    straight = torch.stack((torch.full_like(cos, 1 - t), torch.full_like(cos, t)))
    return torch.where(parallel, straight, curved)


def multislerp_weights(gram: torch.Tensor, weights: Sequence[float], eps: float) -> list[float]:
    """Barycentric interpolation on the sphere: the tangent space is that of the weighted mean of directions.

    Directions u_i = x_i / (|x_i| + eps), mean m = sum w_i u_i / |sum w_i u_i|, tangent v = sum w_i (u_i - <u_i, m> m),
    result = (m cos(|v| + eps) + v sin(|v| + eps) / (|v| + eps)) * sum w_i |x_i|.
    Raises ValueError where the weighted directions cancel; two terms are then summed by their weights alone.
    """
    if len(weights) == 1:
        return [1.0]
    w = torch.tensor(weights, dtype=torch.float64)
    norms = gram.diagonal().sqrt()
    unit = gram / ((norms + eps)[:, None] * (norms + eps))
    length = (w @ unit @ w).clamp_min(0).sqrt()
    if length < eps:
        if len(weights) == 2:
            return w.tolist()
        raise ValueError("multislerp: the weighted directions cancel each other; use other weights")
    mean = w / length
    tangent = w - (w @ (unit @ mean)) * mean
    angle = (tangent @ unit @ tangent).clamp_min(0).sqrt() + eps
    on_units = mean * angle.cos() + tangent * (angle.sin() / angle)
    return (on_units * (norms @ w) / (norms + eps)).tolist()


def karcher_weights(gram: torch.Tensor, max_iter: int, tol: float) -> list[float]:
    """The Karcher mean of the directions, times the mean length: a fixed-point iteration in the span of the terms.

    Each step takes the mean of the logarithm maps theta_i / sin(theta_i) * (u_i - cos(theta_i) m) and moves m along
    it; at most `max_iter` steps, or until a step is shorter than `tol`. Terms shorter than `tol` have no direction.
    Source: Karcher, "Riemannian center of mass and mollifier smoothing", 1977.
    """
    n = len(gram)
    if n == 1:
        return [1.0]
    norms = gram.diagonal().sqrt()
    valid = norms > tol
    if not bool(valid.any()):
        return [0.0] * n
    safe = torch.where(valid, norms, torch.ones_like(norms))
    unit = gram / (safe[:, None] * safe) * (valid[:, None] & valid)
    share = valid.double() / valid.sum()
    mean = share.clone()
    length = (mean @ unit @ mean).clamp_min(0).sqrt()
    mean = mean / length if length >= tol else torch.eye(n, dtype=torch.float64)[int(valid.nonzero()[0])]
    for _ in range(max_iter):
        cos = (unit @ mean).clamp(-1.0, 1.0)
        theta = cos.arccos()
        pull = torch.where(
            valid & (theta >= tol), share * theta / theta.sin().clamp_min(1e-300), torch.zeros_like(theta)
        )
        tangent = pull - (pull @ cos) * mean
        step = (tangent @ unit @ tangent).clamp_min(0).sqrt()
        if step < tol:
            break
        mean = step.cos() * mean + step.sin() * tangent / step
        length = (mean @ unit @ mean).clamp_min(0).sqrt()
        if length > tol:
            mean = mean / length
    return (mean * valid * norms.mean() / safe).tolist()


def model_stock_weights(gram: torch.Tensor) -> list[float]:
    """t / n for each term, t = n cos / (1 + (n - 1) cos), cos the mean cosine of the differences from the base.

    Products of norms count as at least 1e-6; where the divisor vanishes the base stays.
    Source: Jang et al., "Model Stock", arXiv 2403.19522.
    """
    norms, n = gram.diagonal().sqrt(), len(gram)
    pairs = torch.triu_indices(n, n, 1)
    products = (norms[pairs[0]] * norms[pairs[1]]).clamp_min(1e-6)
    cos = (gram[pairs[0], pairs[1]] / products).clamp(-1, 1)
    return [float(model_stock_share(cos.mean(), n)) / n] * n


def model_stock_share(cos: torch.Tensor, n: int) -> torch.Tensor:
    """The share t of the terms' mean, for mean cosines of any shape."""
    divisor = 1 + (n - 1) * cos
    singular = divisor.abs() < 1e-6
    return torch.where(singular, torch.zeros_like(cos), n * cos / torch.where(singular, torch.ones_like(cos), divisor))


def normalised(weights: Sequence[float]) -> tuple[list[float], float]:
    """The weights and their sum in float32, as a result is divided by it. Raises ValueError where it is 0."""
    total = float(torch.tensor([list(weights)], dtype=torch.float32).sum(dim=1))
    if total == 0 or not math.isfinite(total):
        raise ValueError(f"the weights {list(weights)} sum to {total:g} and cannot be normalised; use normalize: false")
    return list(weights), total
