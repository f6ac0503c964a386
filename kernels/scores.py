"""What a search needs to know of each token's logits, without the logits.

    logit[t, v] = cap(scale * (hidden[t] . head[v] + bias[v]))          cap(x) = softcap * tanh(x / softcap)
    -> max over v, the lowest index that has it, log sum exp over v, logit[t, labels[t]]

Shapes: hidden (tokens, width), head (vocabulary, width), labels (tokens) -> four times (tokens,); all of them
may have K in front (K heads at once).
Precision: products of the inputs' dtype, accumulated in float32; everything after that in float32.
Bytes: the head once per block of tokens; 2 * tokens * vocabulary * width operations: bound by arithmetic from
some hundred tokens on. Memory O(tokens).
Deterministic: phase one reduces a fixed share of the vocabulary per program, phase two combines the shares in
their order. The shares depend on the vocabulary alone, so a token's result does not depend on its batch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from olmfast.kernels._dispatch import (
    LazyKernel,
    Tile,
    ceil_div,
    check_float,
    compute_dtype,
    dtype_name,
    fitting,
    interpreted,
    on_device,
    use_triton,
)

if TYPE_CHECKING:
    import triton.language as tl

# Block of logits on a CPU: (tokens, vocabulary).
CPU_BLOCK = (1024, 2048)
# Best first: 99 KB and more, then 64 KB. Wider tiles spill registers in the reductions over the vocabulary.
TILES = (Tile(128, 128, 64, 3, 8), Tile(64, 128, 64, 2, 4), Tile(64, 64, 32, 2, 4))
# Float32 products run on the ordinary units and need their registers.
FLOAT32_TILES = (Tile(64, 64, 32, 2, 4),)
MAX_SHARES = 64
COMBINE_BLOCK = 128
NO_LABEL = -100


class TokenScores(NamedTuple):
    """Each (tokens,), or (K, tokens) for K heads; float32 (float64 for float64 inputs), argmax int64."""

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
    """One head in plain torch, block by block; the vocabulary is the outer loop, so the head is read once."""
    n_tokens, n_vocabulary = hidden.shape[0], head_weight.shape[0]
    block_tokens, block_vocabulary = CPU_BLOCK
    dtype = compute_dtype(hidden.dtype)
    best = torch.full((n_tokens,), -torch.inf, dtype=dtype, device=hidden.device)
    argmax = torch.zeros(n_tokens, dtype=torch.int64, device=hidden.device)
    total, label_logit = torch.zeros_like(best), torch.full_like(best, torch.nan)
    hidden = hidden.to(dtype)
    for first in range(0, n_vocabulary, block_vocabulary):
        head = head_weight[first : first + block_vocabulary].to(dtype).T
        block_bias = bias[first : first + block_vocabulary].to(dtype) if bias is not None else None
        for start in range(0, n_tokens, block_tokens):
            part = slice(start, start + block_tokens)
            logits = _finish(hidden[part] @ head, block_bias, softcap, scale)
            running = TokenScores(best[part], argmax[part], total[part], label_logit[part])
            _fold(logits, first, labels[part], running)
    return TokenScores(best, argmax, best + total.log(), label_logit)


def _finish(logits: Tensor, bias: Tensor | None, softcap: float | None, scale: float | None) -> Tensor:
    if bias is not None:
        logits.add_(bias)
    if scale is not None:
        logits.mul_(scale)
    if softcap is not None:
        # The cap would hide an infinity: it becomes NaN first, which stays.
        logits.masked_fill_(logits.isinf(), torch.nan).div_(softcap).tanh_().mul_(softcap)
    return logits


def _fold(logits: Tensor, first: int, labels: Tensor, running: TokenScores) -> None:
    """Fold a block of logits (overwritten) into its tokens' running results (`logsumexp`: the sum so far)."""
    best, argmax, total, label_logit = running
    local = labels - first
    here = ((local >= 0) & (local < logits.shape[1])).nonzero()[:, 0]
    label_logit[here] = logits[here, local[here]]
    lowest, highest = logits.amin(dim=1), logits.amax(dim=1)
    # The position of the maximum is asked for only where a block holds a new one: seldom, after the first.
    risen = (highest > best).nonzero()[:, 0]
    rows = logits if risen.numel() == len(logits) else logits[risen]
    argmax[risen] = rows.argmax(dim=1) + first
    highest = torch.maximum(best, highest)
    total.mul_((best - highest).exp_()).add_(logits.sub_(highest[:, None]).exp_().sum(dim=1))
    # NaN and +inf have made the sum NaN; -inf would pass unseen.
    total.masked_fill_(lowest == -torch.inf, torch.nan)
    best.copy_(highest)


@LazyKernel
def _scores_kernel(
    h_ptr, w_ptr, bias_ptr, label_ptr, max_ptr, arg_ptr, sum_ptr, own_ptr,
    n_tokens, n_vocabulary, width, blocks_per_share, scale, softcap,
    h_head, h_token, h_at, w_head, w_row, w_at, bias_head, bias_at, label_head, label_at,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    share, head = tl.program_id(1), tl.program_id(2).to(tl.int64)
    offs_m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_k = tl.arange(0, BLOCK_K).to(tl.int64)
    mask_m = offs_m < n_tokens
    label = tl.load(label_ptr + head * label_head + offs_m * label_at, mask=mask_m, other=-1)
    best = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    own = tl.full((BLOCK_M,), float("nan"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    arg, bad = tl.zeros((BLOCK_M,), dtype=tl.int64), tl.zeros((BLOCK_M,), dtype=tl.int32)
    h_ptr += head * h_head
    w_ptr += head * w_head

    for i in range(blocks_per_share):
        first = (share * blocks_per_share + i).to(tl.int64) * BLOCK_N
        offs_n = first + tl.arange(0, BLOCK_N)
        mask_n = offs_n < n_vocabulary
        logits = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for start in range(0, width, BLOCK_K):
            at = start + offs_k
            mask_k = at < width
            h_at_ = h_ptr + offs_m[:, None] * h_token + at[None, :] * h_at
            w_at_ = w_ptr + offs_n[None, :] * w_row + at[:, None] * w_at
            h = tl.load(h_at_, mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            w = tl.load(w_at_, mask=mask_n[None, :] & mask_k[:, None], other=0.0)
            if WIDEN:
                h, w = h.to(tl.float32), w.to(tl.float32)
            logits = tl.dot(h, w, logits, input_precision=PRECISION)
        if HAS_BIAS:
            bias = tl.load(bias_ptr + head * bias_head + offs_n * bias_at, mask=mask_n, other=0.0)
            logits += bias.to(tl.float32)[None, :]
        if HAS_SCALE:
            logits *= scale
        # Looked at before the cap, which would hide an infinity.
        finite = tl.abs(logits) < float("inf")
        bad |= tl.max((mask_n[None, :] & (finite == 0)).to(tl.int32), axis=1)
        if HAS_CAP:
            # tanh by way of exp(-2 |x|), which cannot overflow.
            decay = tl.exp(-2.0 * tl.abs(logits / softcap))
            size = softcap * (1.0 - decay) / (1.0 + decay)
            logits = tl.where(logits < 0, -size, size)

        # A label past the vocabulary must not hit the tile's empty columns.
        hit = (offs_n[None, :] == label[:, None]) & mask_n[None, :]
        hit_logit = tl.sum(tl.where(hit, logits, 0.0), axis=1)
        own = tl.where(tl.max(hit.to(tl.int32), axis=1) > 0, hit_logit, own)
        logits = tl.where(mask_n[None, :], logits, float("-inf"))
        block_best, block_arg = tl.max(logits, axis=1, return_indices=True, return_indices_tie_break_left=True)
        arg = tl.where(block_best > best, first + block_arg, arg)
        highest = tl.maximum(best, block_best)
        total = total * tl.exp(best - highest) + tl.sum(tl.exp(logits - highest[:, None]), axis=1)
        best = highest

    at_out = (head * tl.num_programs(1) + share) * n_tokens + offs_m
    tl.store(max_ptr + at_out, best, mask=mask_m)
    tl.store(arg_ptr + at_out, arg, mask=mask_m)
    tl.store(sum_ptr + at_out, tl.where(bad > 0, float("nan"), total), mask=mask_m)
    tl.store(own_ptr + at_out, own, mask=mask_m)


@LazyKernel
def _combine_kernel(
    max_ptr, arg_ptr, sum_ptr, own_ptr, max_out, arg_out, lse_out, own_out, n_tokens, n_shares,
    BLOCK: tl.constexpr,
):  # fmt: skip
    head = tl.program_id(1).to(tl.int64)
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_tokens
    best = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    own = tl.full((BLOCK,), float("nan"), dtype=tl.float32)
    total, arg = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.int64)
    for share in range(n_shares):
        at = (head * n_shares + share) * n_tokens + offs
        share_best = tl.load(max_ptr + at, mask=mask, other=0.0)
        share_own = tl.load(own_ptr + at, mask=mask, other=0.0)
        # Strictly greater: of equal maxima the earlier share keeps its lower index.
        arg = tl.where(share_best > best, tl.load(arg_ptr + at, mask=mask, other=0), arg)
        highest = tl.maximum(best, share_best)
        share_total = tl.load(sum_ptr + at, mask=mask, other=0.0)
        total = total * tl.exp(best - highest) + share_total * tl.exp(share_best - highest)
        own = tl.where(share_own == share_own, share_own, own)
        best = highest
    at = head * n_tokens + offs
    tl.store(max_out + at, best, mask=mask)
    tl.store(arg_out + at, arg, mask=mask)
    tl.store(lse_out + at, best + tl.log(total), mask=mask)
    tl.store(own_out + at, own, mask=mask)


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
    """Max logit, argmax, logsumexp and label logit of each token; the logits never exist as a whole.

    Args:
        hidden: (tokens, width), or (K, tokens, width) for K heads. Any strides, any float dtype.
        head_weight: (vocabulary, width), or (K, vocabulary, width); hidden may then be shared by the heads.
        labels: (tokens,) or (K, tokens), integers; -100 marks a token without label (label logit NaN).
        bias: (vocabulary,) or (K, vocabulary), added to the product.
        scale: multiplies the logits, after the bias (Cohere). softcap: applied last (Gemma).
        check: raise on logits that are not finite and on labels outside the vocabulary. None: on a CPU yes,
            on a GPU no, because the answer would have to be waited for. Unchecked, `logsumexp` of such a
            token is NaN on every device (for a wrong label, `label_logit`): look when you wait anyway.
        impl: 'auto', 'triton' or 'torch'.

    Returns:
        TokenScores(max_logit, argmax, logsumexp, label_logit). Of equal maxima, the lowest index.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, label or impl.
        FloatingPointError: logits that are not finite, where checked.
    """
    n_heads = _check(hidden, head_weight, labels, bias, softcap)
    triton = use_triton("token_scores", impl, (hidden, head_weight))
    # One form from here on: (K, tokens, width), (K, vocabulary, width), (K, tokens), (K, vocabulary).
    k = n_heads if n_heads is not None else 1
    labels = labels.to(torch.int64).expand(k, -1)
    hidden = hidden if hidden.dim() == 3 else hidden.expand(k, -1, -1)
    head_weight = head_weight if head_weight.dim() == 3 else head_weight[None]
    bias = bias.expand(k, -1) if bias is not None else None
    if triton:
        scores = _launch(hidden, head_weight, labels, bias, softcap, scale)
    else:
        per_head = [
            token_scores_ref(
                hidden[i], head_weight[i], labels[i], bias[i] if bias is not None else None, softcap, scale
            )
            for i in range(k)
        ]
        scores = TokenScores(*(torch.stack(field) for field in zip(*per_head, strict=True)))
    if check or (check is None and hidden.device.type == "cpu"):
        _refuse(scores, labels, head_weight.shape[1])
    return scores if n_heads is not None else TokenScores(*(field[0] for field in scores))


def _launch(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    scale: float | None,
) -> TokenScores:
    (k, n_tokens, width), n_vocabulary, device = hidden.shape, head_weight.shape[1], hidden.device
    tiles = FLOAT32_TILES if hidden.dtype == torch.float32 else TILES
    tile = fitting(tiles, device, hidden.element_size())
    n_blocks = ceil_div(n_vocabulary, tile.block_n)
    per_share = ceil_div(n_blocks, MAX_SHARES)
    n_shares = ceil_div(n_blocks, per_share)
    tf32 = torch.backends.cuda.matmul.allow_tf32

    def fields(*shape: int) -> TokenScores:
        floats = [torch.empty(shape, dtype=torch.float32, device=device) for _ in range(3)]
        return TokenScores(floats[0], torch.empty(shape, dtype=torch.int64, device=device), *floats[1:])

    parts, scores = fields(k, n_shares, n_tokens), fields(k, n_tokens)
    if not n_tokens or not k:
        return scores
    bias_or_dummy = bias if bias is not None else hidden[:, 0]
    with on_device(hidden):
        _scores_kernel[(ceil_div(n_tokens, tile.block_m), n_shares, k)](
            hidden, head_weight, bias_or_dummy, labels, *parts,
            n_tokens, n_vocabulary, width, per_share,
            1.0 if scale is None else float(scale), 1.0 if softcap is None else float(softcap),
            *hidden.stride(), *head_weight.stride(), *bias_or_dummy.stride(), *labels.stride(),
            HAS_BIAS=bias is not None, HAS_SCALE=scale is not None, HAS_CAP=softcap is not None,
            PRECISION="tf32" if tf32 else "ieee", WIDEN=interpreted(),
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            num_stages=tile.n_stages, num_warps=tile.n_warps,
        )  # fmt: skip
        _combine_kernel[(ceil_div(n_tokens, COMBINE_BLOCK), k)](
            *parts, *scores, n_tokens, n_shares, BLOCK=COMBINE_BLOCK
        )
    return scores


def _check(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None
) -> int | None:
    """Number of stacked heads; None for the plain form."""
    check_float("token_scores", "hidden", hidden)
    check_float("token_scores", "head_weight", head_weight)
    h_shape, w_shape = tuple(hidden.shape), tuple(head_weight.shape)
    if len(w_shape) not in (2, 3) or len(h_shape) not in (2, len(w_shape)):
        raise ValueError(
            f"token_scores: hidden has shape {h_shape}, head_weight {w_shape}; use (tokens, width) with "
            "(vocabulary, width), both or only head_weight with K in front"
        )
    if h_shape[-1] != w_shape[-1] or (len(h_shape) == 3 and h_shape[0] != w_shape[0]):
        raise ValueError(f"token_scores: hidden has shape {h_shape}, head_weight {w_shape}")
    if w_shape[-2] == 0:
        raise ValueError("token_scores: head_weight has no rows")
    if hidden.dtype != head_weight.dtype:
        raise TypeError(
            f"token_scores: hidden has dtype {dtype_name(hidden.dtype)}, head_weight {dtype_name(head_weight.dtype)}"
        )
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"token_scores: labels have dtype {dtype_name(labels.dtype)}, not an integer")
    n_heads = w_shape[0] if len(w_shape) == 3 else None
    for name, tensor, length in (("labels", labels, h_shape[-2]), ("bias", bias, w_shape[-2])):
        if tensor is None:
            continue
        if tuple(tensor.shape) not in ((length,), (n_heads, length)):
            raise ValueError(f"token_scores: {name} has shape {tuple(tensor.shape)}, not ({length},)")
        if tensor.device != hidden.device:
            raise ValueError(f"token_scores: {name} is on {tensor.device}, hidden on {hidden.device}")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"token_scores: softcap is {softcap}, not a number > 0")
    return n_heads


def _refuse(scores: TokenScores, labels: Tensor, n_vocabulary: int) -> None:
    n_bad, n_tokens = int((~scores.logsumexp.isfinite()).sum()), scores.logsumexp.numel()
    if n_bad:
        raise FloatingPointError(f"token_scores: the logits of {n_bad} of {n_tokens} tokens are not finite")
    wrong = labels[((labels < 0) & (labels != NO_LABEL)) | (labels >= n_vocabulary)]
    if wrong.numel():
        raise ValueError(
            f"token_scores: label {int(wrong[0])} is outside the vocabulary of {n_vocabulary}; "
            f"use {NO_LABEL} for no label"
        )
