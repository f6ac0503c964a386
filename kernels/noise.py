"""SVD-ES offspring of one weight: multiplicative noise along its singular directions, without the noise tensor.

    offspring_j = round(W * exp(clamp((U * c_j) @ Vh, -clamp, clamp)))      elementwise, j = 0..lambda-1

Shapes: W (rows, cols), U (rows, k), Vh (k, cols), c (lambda, k) -> (lambda, rows, cols).
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmfast.kernels._dispatch import check_float, choose, compute_dtype, prepare_out

PRECISIONS = ("ieee", "tf32", "bf16")


def svd_noise_ref(weight: Tensor, u: Tensor, vh: Tensor, coefficients: Tensor, *, clamp: float, out: Tensor) -> Tensor:
    """The formula in plain torch, a stretch of rows at a time: the noise buffer stays in the cache.

    The shape of each product depends on the weight alone, so an offspring's bytes do not depend on how many
    offspring are asked for in one call.
    """
    rows, cols = weight.shape
    dtype = compute_dtype(weight.dtype)
    u, vh, coefficients = u.to(dtype), vh.to(dtype).contiguous(), coefficients.to(dtype)
    n_rows = min(rows, max(128, (1 << 20) // max(cols, 1)))
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


def svd_noise(
    weight: Tensor,
    u: Tensor,
    vh: Tensor,
    coefficients: Tensor,
    *,
    clamp: float = 3.0,
    precision: str = "tf32",
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """`weight * exp(clamp((u * c) @ vh))` for each row c of `coefficients`, rounded once to the weight's dtype.

    Args:
        weight: (rows, cols), bfloat16, float16, float32 or float64; any strides.
        u: (rows, k). vh: (k, cols). coefficients: (lambda, k). Any float dtype; k may be 0.
        clamp: bound of the exponent on both sides.
        precision: of the product on a GPU: 'ieee' (float32), 'tf32' (error of the noise about 3e-4), 'bf16'
            (about 3e-3). Torch on a CPU always computes in float32 (float64 for a float64 weight).
        out: (lambda, rows, cols) of the weight's dtype, any strides; must not overlap the inputs.
        impl: 'auto', 'triton' or 'torch'.

    Returns:
        (lambda, rows, cols) in the weight's dtype. A row of zero coefficients gives the weight bit for bit.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, precision or impl.
    """
    _check(weight, u, vh, coefficients, clamp, precision)
    out = prepare_out("svd_noise", out, (coefficients.shape[0], *weight.shape), weight)
    choose("svd_noise", impl, (weight, u, vh, coefficients))
    return svd_noise_ref(weight, u, vh, coefficients, clamp=clamp, out=out)


def _check(weight: Tensor, u: Tensor, vh: Tensor, coefficients: Tensor, clamp: float, precision: str) -> None:
    for name, tensor in (("weight", weight), ("u", u), ("vh", vh), ("coefficients", coefficients)):
        check_float("svd_noise", name, tensor, 2)
    (rows, cols), k = weight.shape, coefficients.shape[1]
    if tuple(u.shape) != (rows, k):
        raise ValueError(f"svd_noise: u has shape {tuple(u.shape)}, weight has {rows} rows and k is {k}")
    if tuple(vh.shape) != (k, cols):
        raise ValueError(f"svd_noise: vh has shape {tuple(vh.shape)}, weight has {cols} columns and k is {k}")
    if not clamp >= 0:
        raise ValueError(f"svd_noise: clamp is {clamp}, not a number >= 0")
    if precision not in PRECISIONS:
        raise ValueError(f"svd_noise: precision is {precision!r}; use 'ieee', 'tf32' or 'bf16'")
