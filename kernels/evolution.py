"""How evolution strategies step: offspring of a generation, and their coefficients along singular directions.

    lambda = max(4, int(4 + 3 ln n))
    c_j = sigma * max(std(S), 1e-10) * z_j * g_j        g_j = sqrt(max S / (S_j + 1e-10)), divided by mean(g)

z ~ N(0, 1). g is the inverse damping: large singular values get less. Shapes: S (k,), z (..., k) -> (..., k).
Source of lambda: Hansen, "The CMA Evolution Strategy: A Tutorial", arXiv 1604.00772, table 1.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from olmfast.kernels._dispatch import check_float, check_values, integer, number

MIN_SPREAD = TINY = 1e-10


def offspring_count(dimensions: int) -> int:
    """lambda = max(4, int(4 + 3 ln n)) offspring of something with n numbers to change.

    Raises:
        TypeError, ValueError: `dimensions` is not a whole number above 0.
    """
    if integer("offspring_count", "dimensions", dimensions) < 1:
        raise ValueError(f"offspring_count: dimensions is {dimensions}, not a number above 0")
    return max(4, int(4 + 3 * math.log(dimensions)))


@torch.no_grad()
def svd_coefficients(s: Tensor, sigma: float, draws: Tensor) -> Tensor:
    """What `svd_noise` takes as coefficients: draws of a normal distribution, scaled and inversely damped.

    Args:
        s: (k,), the singular values of `svd_factors`.
        sigma: step size, relative to the spread (unbiased standard deviation) of the singular values.
        draws: (k,) or (lambda, k) ~ N(0, 1), any float dtype.

    Returns:
        The shape of `draws`, float64, on its device.

    Raises:
        TypeError, ValueError: wrong type, dtype or shape, or a sigma that is not finite.
    """
    check_float("svd_coefficients", "s", s, 1)
    check_float("svd_coefficients", "draws", draws)
    check_values("svd_coefficients", "s", s)
    check_values("svd_coefficients", "draws", draws)
    if draws.dim() == 0 or draws.shape[-1] != len(s):
        raise ValueError(f"svd_coefficients: draws has shape {tuple(draws.shape)}, s {tuple(s.shape)}")
    step = number("svd_coefficients", "sigma", sigma)
    s = s.to(draws.device, torch.float64)
    spread = float(s.std(unbiased=True)) if len(s) > 1 else 0.0
    if not len(s):
        return draws.double()
    damping = torch.sqrt(s.max() / (s + TINY))
    return draws.double() * (step * max(spread, MIN_SPREAD)) * damping / damping.mean()
