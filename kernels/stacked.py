"""K linear layers at once.

    out[k] = x[k] @ W[k].T + b[k]          x of (tokens, in): shared by all K

Shapes: x (K, tokens, in) or (tokens, in), W (K, out, in), b (K, out) -> (K, tokens, out).
No Triton: the vendor's GEMM is the best there is. The shared form is one GEMM with K * out columns, which reads
x once; its result lies in memory as (tokens, K, out), so that what comes back is a view with those strides.
"""

from __future__ import annotations

import torch
from torch import Tensor

from olmfast.kernels._dispatch import check_apart, check_float, dtype_name, prepare_out, use_triton


@torch.no_grad()
def stacked_linear(
    x: Tensor, weights: Tensor, bias: Tensor | None = None, *, out: Tensor | None = None, impl: str = "auto"
) -> Tensor:
    """`x @ weights[k].T + bias[k]` for every k.

    Args:
        x: (tokens, in), shared by all k, or (K, tokens, in).
        weights: (K, out, in) of x's dtype. bias: (K, out).
        out: (K, tokens, out) of x's dtype, any strides.
        impl: 'auto' or 'torch'; there is no Triton kernel to ask for.

    Returns:
        (K, tokens, out); for shared x not contiguous, unless `out` is given.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or impl.
    """
    check_float("stacked_linear", "weights", weights, 3)
    check_float("stacked_linear", "x", x)
    k, n_out, n_in = weights.shape
    if x.dim() not in (2, 3) or x.shape[-1] != n_in or (x.dim() == 3 and x.shape[0] != k):
        raise ValueError(f"stacked_linear: x has shape {tuple(x.shape)}, weights {tuple(weights.shape)}")
    if bias is not None:
        check_float("stacked_linear", "bias", bias)
    if bias is not None and tuple(bias.shape) != (k, n_out):
        raise ValueError(f"stacked_linear: bias has shape {tuple(bias.shape)}, not {(k, n_out)}")
    others = [tensor for tensor in (weights, bias) if tensor is not None]
    for tensor in others:
        if tensor.dtype != x.dtype:
            raise TypeError(
                f"stacked_linear: x has dtype {dtype_name(x.dtype)}, weights and bias {dtype_name(tensor.dtype)}"
            )
    use_triton("stacked_linear", impl, (x, *others), ())
    if out is not None:
        prepare_out("stacked_linear", out, (k, x.shape[-2], n_out), x.dtype, x.device)
    check_apart("stacked_linear", out, {"x": x, "weights": weights, "bias": bias})
    if x.dim() == 3:
        result = torch.baddbmm(bias[:, None], x, weights.mT) if bias is not None else torch.bmm(x, weights.mT)
    else:
        flat_bias = bias.reshape(-1) if bias is not None else None
        flat = torch.nn.functional.linear(x, weights.reshape(k * n_out, n_in), flat_bias)
        result = flat.view(x.shape[0], k, n_out).transpose(0, 1)
    return result if out is None else out.copy_(result)
