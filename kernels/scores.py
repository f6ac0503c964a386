"""What a search needs to know of each token's logits, without the logits.

    logit[t, v] = softcap_to(scale * (hidden[t] . head[v] + bias[v]))      softcap_to(x) = softcap * tanh(x / softcap)
    -> max over v, its lowest index, log sum exp over v, logit[t, labels[t]]
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from olmfast.kernels._dispatch import check_float, choose, compute_dtype

N_TOKENS, N_VOCABULARY = 1024, 2048
NO_LABEL = -100


class TokenScores(NamedTuple):
    """Each (tokens,), or (K, tokens) for K heads; float32 (float64 for float64 input), argmax int64."""

    max_logit: Tensor
    argmax: Tensor
    logsumexp: Tensor
    label_logit: Tensor


def token_scores_ref(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float | None,
) -> TokenScores:
    """One head in plain torch, block by block of (tokens, vocabulary); the vocabulary is the outer loop."""
    n_tokens, n_vocabulary = hidden.shape[0], head_weight.shape[0]
    dtype = compute_dtype(hidden.dtype)
    best = torch.full((n_tokens,), -torch.inf, dtype=dtype, device=hidden.device)
    argmax = torch.zeros(n_tokens, dtype=torch.int64, device=hidden.device)
    total, label_logit = torch.zeros_like(best), torch.full_like(best, torch.nan)
    hidden = hidden.to(dtype)
    for first in range(0, n_vocabulary, N_VOCABULARY):
        head = head_weight[first : first + N_VOCABULARY].to(dtype).T
        for start in range(0, n_tokens, N_TOKENS):
            part = slice(start, start + N_TOKENS)
            logits = hidden[part] @ head
            _finish(logits, bias[first : first + N_VOCABULARY] if bias is not None else None, softcap, scale)
            _take_in(logits, first, labels[part], best[part], argmax[part], total[part], label_logit[part])
    return TokenScores(best, argmax, best + total.log(), label_logit)


def _finish(logits: Tensor, bias: Tensor | None, softcap: float | None, scale: float | None) -> None:
    if bias is not None:
        logits.add_(bias)
    if scale is not None:
        logits.mul_(scale)
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)


def _take_in(
    logits: Tensor, first: int, labels: Tensor, best: Tensor, argmax: Tensor, total: Tensor, label_logit: Tensor
) -> None:
    """Fold one block of logits (overwritten) into the running results of its tokens."""
    local = labels - first
    here = (local >= 0) & (local < logits.shape[1])
    picked = logits.gather(1, local.clamp(0, logits.shape[1] - 1)[:, None])[:, 0]
    label_logit.copy_(torch.where(here, picked, label_logit))
    lowest = logits.amin(dim=1)
    block_best, block_argmax = logits.max(dim=1)
    argmax.copy_(torch.where(block_best > best, block_argmax + first, argmax))
    peak = torch.maximum(best, block_best)
    total.mul_((best - peak).exp()).add_(logits.sub_(peak[:, None]).exp_().sum(dim=1))
    # -inf would pass unseen through the sum: it poisons the token instead.
    total.masked_fill_(lowest == -torch.inf, torch.nan)
    best.copy_(peak)


def token_scores(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    check: bool | None = None,
    impl: str = "auto",
) -> TokenScores:
    """Max logit, argmax, logsumexp and label logit of each token; logits never exist as a whole.

    Args:
        hidden: (tokens, width), or (K, tokens, width) for K heads.
        head_weight: (vocabulary, width), or (K, vocabulary, width); hidden may then be shared.
        labels: (tokens,) or (K, tokens), integers; -100 marks a token without label (its label logit is NaN).
        bias: (vocabulary,) or (K, vocabulary), added to the product.
        softcap: Gemma's cap; applied last. scale: Cohere's logit scale; applied after the bias.
        check: raise for logits that are not finite and for labels outside the vocabulary. None: on a CPU yes, on
            a GPU no, because the answer would have to be waited for. Unchecked, `logsumexp` of such a token is
            NaN, on every device (a wrong label: its label logit), so that the caller can look when it syncs.
        impl: 'auto', 'triton' or 'torch'.

    Returns:
        TokenScores. Equal maxima: the lowest index.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device or impl. FloatingPointError: logits that are not finite.
    """
    n_heads = _check(hidden, head_weight, labels, bias, softcap)
    choose("token_scores", impl, (hidden, head_weight))
    check = hidden.device.type == "cpu" if check is None else check
    labels = labels.to(torch.int64)
    if n_heads is None:
        scores = token_scores_ref(hidden, head_weight, labels, bias, softcap, scale)
    else:
        per_head = [
            token_scores_ref(
                hidden[i] if hidden.dim() == 3 else hidden,
                head_weight[i],
                labels[i] if labels.dim() == 2 else labels,
                bias[i] if bias is not None and bias.dim() == 2 else bias,
                softcap,
                scale,
            )
            for i in range(n_heads)
        ]
        scores = TokenScores(*(torch.stack(field) for field in zip(*per_head, strict=True)))
    if check:
        _refuse(scores, labels, head_weight.shape[-2])
    return scores


def _check(hidden: Tensor, head_weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None) -> int | None:
    """Number of stacked heads; None for the plain form."""
    check_float("token_scores", "hidden", hidden)
    check_float("token_scores", "head_weight", head_weight)
    if head_weight.dim() not in (2, 3) or hidden.dim() not in (2, head_weight.dim()):
        raise ValueError(
            f"token_scores: hidden has shape {tuple(hidden.shape)}, head_weight {tuple(head_weight.shape)}; "
            "use (tokens, width) with (vocabulary, width), or either with K in front where the head has it"
        )
    n_heads = head_weight.shape[0] if head_weight.dim() == 3 else None
    if hidden.shape[-1] != head_weight.shape[-1]:
        raise ValueError(f"token_scores: hidden has width {hidden.shape[-1]}, head_weight {head_weight.shape[-1]}")
    if head_weight.shape[-2] == 0:
        raise ValueError("token_scores: head_weight has no rows")
    if hidden.dtype != head_weight.dtype:
        raise TypeError(f"token_scores: hidden is {hidden.dtype}, head_weight {head_weight.dtype}")
    if labels.is_floating_point() or labels.dtype == torch.bool:
        raise TypeError(f"token_scores: labels have dtype {labels.dtype}, not an integer")
    shapes: dict[str, tuple[Tensor | None, int]] = {
        "labels": (labels, hidden.shape[-2]),
        "bias": (bias, head_weight.shape[-2]),
    }
    for name, (tensor, length) in shapes.items():
        if tensor is not None and tuple(tensor.shape) not in ((length,), (n_heads, length)):
            raise ValueError(f"token_scores: {name} has shape {tuple(tensor.shape)}, not ({length},)")
    if hidden.dim() == 3 and hidden.shape[0] != n_heads:
        raise ValueError(f"token_scores: hidden has {hidden.shape[0]} stacks, head_weight {n_heads}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"token_scores: softcap is {softcap}, not a number > 0")
    return n_heads


def _refuse(scores: TokenScores, labels: Tensor, n_vocabulary: int) -> None:
    n_bad = int((~scores.logsumexp.isfinite()).sum())
    if n_bad:
        raise FloatingPointError(f"token_scores: logits of {n_bad} of {scores.logsumexp.numel()} tokens are not finite")
    wrong = labels[((labels < 0) & (labels != NO_LABEL)) | (labels >= n_vocabulary)]
    if wrong.numel():
        raise ValueError(
            f"token_scores: label {int(wrong[0])} is outside the vocabulary of {n_vocabulary}; use -100 for no label"
        )
