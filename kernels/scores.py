"""What a search needs to know of each token's logits, without the logits.

    logit[t, v] = cap(scale * (hidden[t] . head[v] + bias[v]))          cap(x) = softcap * tanh(x / softcap)
    -> max over v, the lowest index that has it, log sum exp over v, logit[t, labels[t]]

Shapes: hidden (tokens, width), head (vocabulary, width), labels (tokens) -> four times (tokens,); all of them
may have K in front (K heads at once).
Precision: products of the inputs' dtype, accumulated in float32; everything after that in float32.
Bytes: the head once per block of tokens; 2 * tokens * vocabulary * width operations: bound by arithmetic from
some hundred tokens on. Memory O(tokens).
Deterministic: phase one reduces a fixed share of the vocabulary per program, phase two combines the shares always
in the same way. The shares depend on the vocabulary alone, so a token's result does not depend on its batch.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from olmfast.kernels._dispatch import (
    LazyKernel,
    Tile,
    ceil_div,
    check_float,
    check_strided,
    check_values,
    compute_dtype,
    descriptor,
    dtype_name,
    fitting,
    flag,
    interpreted,
    launch,
    number,
    on_device,
    takes_descriptors,
    use_triton,
)

if TYPE_CHECKING:
    import triton.language as tl

# Block of logits on a CPU: (tokens, vocabulary).
CPU_BLOCK = (1024, 2048)
PRECISIONS = ("ieee", "tf32", "tf32x3")
# Best first: 99 KB and more, then 64 KB.
TILES = (Tile(128, 128, 64, 3, 8), Tile(64, 128, 64, 2, 4), Tile(64, 64, 32, 2, 4))
# The parts of float32 take registers, on the ordinary units the products do.
FLOAT32_TILES = (Tile(128, 64, 32, 3, 8), Tile(64, 64, 32, 2, 8))
IEEE_TILES = (Tile(64, 128, 16, 3, 8),)
# Hopper: tokens, vocabulary, stages and warps of tensor copies, 128 bytes of width at a time; where logits are changed
# in several ways, less fits the registers.
HOPPER, HOPPER_CHANGED = (128, 256, 3, 8), (128, 128, 4, 8)
HOPPER_FLOAT32 = Tile(128, 128, 32, 3, 8)
# Shares of the vocabulary for tiles of 256, and as many more for narrower ones: with few tokens, a multiprocessor each.
MAX_SHARES = 132
COMBINE_BLOCK = 16
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
def _scores_fold(
    logits, first, label, best, arg, total, own, bad, bias_ptr, bias_at, n_vocabulary, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr, TAIL: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    # A block of logits, folded into what is known of its tokens.
    offs_n = first + tl.arange(0, BLOCK_N)
    mask_n = offs_n < n_vocabulary
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_n.to(tl.int64) * bias_at, mask=mask_n, other=0.0)
        logits += bias.to(tl.float32)[None, :]
    if HAS_SCALE:
        logits *= scale
    if HAS_CAP:
        # Checked before the cap, which would hide an infinity.
        finite = tl.abs(logits) < float("inf")
        bad |= tl.max((mask_n[None, :] & (finite == 0)).to(tl.int32), axis=1)
        # tanh by way of exp(-2 |x|), which cannot overflow.
        decay = tl.exp(-2.0 * tl.abs(logits / softcap))
        size = softcap * (1.0 - decay) / (1.0 + decay)
        logits = tl.where(logits < 0, -size, size)
    else:
        # NaN and +inf make the sum NaN; -inf would pass unseen.
        valid = tl.where(mask_n[None, :], logits, 0.0) if TAIL else logits
        bad |= (tl.min(valid, axis=1) == float("-inf")).to(tl.int32)
    if TAIL:
        logits = tl.where(mask_n[None, :], logits, float("-inf"))
    here = (label >= first) & (label < first + BLOCK_N)
    if tl.max(here.to(tl.int32), axis=0) > 0:
        hit = offs_n[None, :] == label[:, None]
        own = tl.where(here, tl.sum(tl.where(hit, logits, 0.0), axis=1), own)
    block_best = tl.max(logits, axis=1)
    # The first of equals; cheaper than a maximum that carries its index along.
    block_arg = tl.min(tl.where(logits == block_best[:, None], offs_n[None, :], 0x7FFFFFFF), axis=1)
    arg = tl.where(block_best > best, block_arg, arg)
    highest = tl.maximum(best, block_best)
    total = total * tl.exp(best - highest) + tl.sum(tl.exp(logits - highest[:, None]), axis=1)
    return highest, arg, total, own, bad


@partial(LazyKernel, plain=("n_tokens", "n_shares", "blocks_per_share"))
def _scores_kernel(
    h_ptr, w_ptr, bias_ptr, label_ptr, part_ptr,
    n_tokens, n_vocabulary, width, n_shares, blocks_per_share, scale, softcap,
    h_head, h_token, w_head, w_row, bias_head, bias_at, label_head, label_at,
    HAS_BIAS: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_CAP: tl.constexpr, TAIL: tl.constexpr,
    PRECISION: tl.constexpr, WIDEN: tl.constexpr, BY_COPIES: tl.constexpr, EVEN: tl.constexpr, GROUP: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    # Tokens in groups of GROUP blocks: neighbours share what they read in the L2 cache.
    tile, head = tl.program_id(0), tl.program_id(1)
    group = tile // (GROUP * n_shares)
    group_size = tl.minimum(tl.cdiv(n_tokens, BLOCK_M) - group * GROUP, GROUP)
    token = (group * GROUP + (tile % (GROUP * n_shares)) % group_size) * BLOCK_M
    share = (tile % (GROUP * n_shares)) // group_size
    offs_m, offs_n, offs_k = token + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_K)
    mask_m = offs_m < n_tokens
    label = tl.load(label_ptr + head.to(tl.int64) * label_head + offs_m * label_at, mask=mask_m, other=-1)
    # A label past the vocabulary must not hit the tile's empty columns.
    label = tl.where(label < n_vocabulary, tl.maximum(label, -1), -1).to(tl.int32)
    best = tl.full((BLOCK_M,), float("-inf"), dtype=tl.float32)
    own = tl.full((BLOCK_M,), float("nan"), dtype=tl.float32)
    total = tl.zeros((BLOCK_M,), dtype=tl.float32)
    arg, bad = tl.zeros((BLOCK_M,), dtype=tl.int32), tl.zeros((BLOCK_M,), dtype=tl.int32)
    bias_ptr += head.to(tl.int64) * bias_head
    first_block = share * blocks_per_share
    for i in range(first_block, tl.minimum(first_block + blocks_per_share, tl.cdiv(n_vocabulary, BLOCK_N))):
        first = i * BLOCK_N
        logits = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        if BY_COPIES:
            # Heads lie below each other: strides are numbers of rows.
            for start in range(0, width, BLOCK_K):
                h, w = h_ptr.load([head * h_head + token, start]), w_ptr.load([head * w_head + first, start])
                logits = tl.dot(h, w.T, logits, input_precision=PRECISION)
        else:
            # Past the edge other rows are read; what comes of them is masked, or not stored.
            h_row = head.to(tl.int64) * h_head + (offs_m % n_tokens).to(tl.int64) * h_token
            w_col = head.to(tl.int64) * w_head + ((first + offs_n) % n_vocabulary).to(tl.int64) * w_row
            h_at, w_at = h_ptr + h_row[:, None] + offs_k[None, :], w_ptr + w_col[None, :] + offs_k[:, None]
            for start in range(0, width, BLOCK_K):
                if EVEN:
                    h, w = tl.load(h_at), tl.load(w_at)
                else:
                    mask_k = offs_k < width - start
                    h = tl.load(h_at, mask=mask_k[None, :], other=0.0)
                    w = tl.load(w_at, mask=mask_k[:, None], other=0.0)
                if WIDEN:
                    h, w = h.to(tl.float32), w.to(tl.float32)
                logits = tl.dot(h, w, logits, input_precision=PRECISION)
                h_at += BLOCK_K
                w_at += BLOCK_K
        best, arg, total, own, bad = _scores_fold(
            logits, first, label, best, arg, total, own, bad, bias_ptr, bias_at, n_vocabulary, scale, softcap,
            HAS_BIAS, HAS_SCALE, HAS_CAP, TAIL, BLOCK_N,
        )  # fmt: skip

    at_out = part_ptr + (head.to(tl.int64) * n_shares + share) * n_tokens + offs_m
    step = tl.num_programs(1).to(tl.int64) * n_shares * n_tokens
    tl.store(at_out, best, mask=mask_m)
    tl.store(at_out + step, arg.to(tl.float32, bitcast=True), mask=mask_m)
    tl.store(at_out + 2 * step, tl.where(bad > 0, float("nan"), total), mask=mask_m)
    tl.store(at_out + 3 * step, own, mask=mask_m)


@partial(LazyKernel, plain=("n_tokens", "n_shares"))
def _combine_kernel(part_ptr, out_ptr, arg_out, n_tokens, n_shares, SHARES: tl.constexpr, BLOCK: tl.constexpr):
    head = tl.program_id(1).to(tl.int64)
    offs, shares = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, SHARES)
    mask = offs < n_tokens
    both = (shares < n_shares)[:, None] & mask[None, :]
    at = part_ptr + (head * n_shares + shares)[:, None] * n_tokens + offs[None, :]
    step = tl.num_programs(1).to(tl.int64) * n_shares * n_tokens
    share_best = tl.load(at, mask=both, other=float("-inf"))
    share_arg = tl.load(at + step, mask=both, other=0.0).to(tl.int32, bitcast=True)
    share_total = tl.load(at + 2 * step, mask=both, other=0.0)
    share_own = tl.load(at + 3 * step, mask=both, other=float("nan"))
    best = tl.max(share_best, axis=0)
    # Of equal maxima the lowest index.
    arg = tl.min(tl.where(share_best == best[None, :], share_arg, 0x7FFFFFFF), axis=0)
    total = tl.sum(share_total * tl.exp(share_best - best[None, :]), axis=0)
    known = share_own == share_own
    own = tl.sum(tl.where(known, share_own, 0.0), axis=0)
    own = tl.where(tl.max(known.to(tl.int32), axis=0) > 0, own, float("nan"))
    at, step = head * n_tokens + offs, tl.num_programs(1).to(tl.int64) * n_tokens
    # Where all is NaN there is no maximum: some index.
    tl.store(arg_out + at, tl.where(arg == 0x7FFFFFFF, 0, arg).to(tl.int64), mask=mask)
    tl.store(out_ptr + at, best, mask=mask)
    tl.store(out_ptr + step + at, best + tl.log(total), mask=mask)
    tl.store(out_ptr + 2 * step + at, own, mask=mask)


@torch.no_grad()
def token_scores(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    scale: float | None = None,
    precision: str | None = None,
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
        precision: of the products of float32 inputs in the kernel: 'ieee', 'tf32', or 'tf32x3' (three products of
            TF32 parts, as exact as float32's own sums and several times as fast). None: 'tf32' where
            torch.backends.cuda.matmul.allow_tf32 is set, else 'tf32x3'.
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
    check = None if check is None else flag("token_scores", "check", check)
    softcap = None if softcap is None else number("token_scores", "softcap", softcap)
    scale = None if scale is None else number("token_scores", "scale", scale)
    if precision is None:
        precision = "tf32" if torch.backends.cuda.matmul.allow_tf32 else "tf32x3"
    if precision not in PRECISIONS:
        raise ValueError(f"token_scores: precision is {precision!r}; use 'ieee', 'tf32' or 'tf32x3'")
    triton = use_triton("token_scores", impl, (hidden, head_weight))
    # One form from here on: (K, tokens, width), (K, vocabulary, width), (K, tokens), (K, vocabulary).
    k = n_heads if n_heads is not None else 1
    labels = labels.to(torch.int64).expand(k, -1)
    hidden = hidden if hidden.dim() == 3 else hidden.expand(k, -1, -1)
    head_weight = head_weight if head_weight.dim() == 3 else head_weight[None]
    bias = bias.expand(k, -1) if bias is not None else None
    if triton:
        scores = _launch(hidden, head_weight, labels, bias, softcap, scale, precision)
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
    precision: str,
) -> TokenScores:
    (k, n_tokens, width), n_vocabulary, device = hidden.shape, head_weight.shape[1], hidden.device
    element = hidden.element_size()
    ordinary = hidden.dtype == torch.float32 and precision == "ieee"
    exact = hidden.dtype == torch.float32 and precision == "tf32x3"  # needs registers for the parts
    by_copies = not ordinary and not exact and takes_descriptors(device, hidden, head_weight)
    # Heads that do not lie below each other have no descriptor.
    by_copies = by_copies and hidden.stride(0) in (0, n_tokens * hidden.stride(1)) and head_weight[0].is_contiguous()
    by_copies = by_copies and hidden[0].is_contiguous() and head_weight.is_contiguous()
    if by_copies:
        n_changes = sum(change is not None for change in (bias, softcap, scale))
        block_m, block_n, n_stages, n_warps = HOPPER if n_changes < 2 else HOPPER_CHANGED
        tile = Tile(block_m, block_n, 128 // element, n_stages, n_warps)
    elif exact and takes_descriptors(device):
        tile = HOPPER_FLOAT32
    else:
        tiles = IEEE_TILES if ordinary else FLOAT32_TILES if hidden.dtype == torch.float32 else TILES
        tile = fitting(tiles, device, element)
    n_blocks = ceil_div(n_vocabulary, tile.block_n)
    per_share = ceil_div(n_blocks, MAX_SHARES * 256 // tile.block_n)
    n_shares = ceil_div(n_blocks, per_share)

    # Of each share, then of all of them together: greatest logit, its index, sum or logarithm of it, the label's logit.
    parts = torch.empty((4, k, n_shares, n_tokens), dtype=torch.float32, device=device)
    floats = torch.empty((3, k, n_tokens), dtype=torch.float32, device=device)
    scores = TokenScores(floats[0], torch.empty((k, n_tokens), dtype=torch.int64, device=device), floats[1], floats[2])
    if not n_tokens or not k:
        return scores
    if not by_copies:
        hidden, head_weight = (x if x.stride(-1) == 1 else x.contiguous() for x in (hidden, head_weight))
    bias_or_dummy = bias if bias is not None else hidden[:, 0]
    h, w, h_head, w_head = hidden, head_weight, hidden.stride(0), head_weight.stride(0)
    if by_copies:
        h = descriptor((hidden if h_head else hidden[:1]).flatten(0, 1), (tile.block_m, tile.block_k))
        w = descriptor(head_weight.flatten(0, 1), (tile.block_n, tile.block_k))
        h_head, w_head = n_tokens if h_head else 0, n_vocabulary
    with on_device(hidden):
        launch(
            _scores_kernel, (ceil_div(n_tokens, tile.block_m) * n_shares, k),
            h, w, bias_or_dummy, labels, parts, n_tokens, n_vocabulary, width, n_shares, per_share,
            1.0 if scale is None else float(scale), 1.0 if softcap is None else float(softcap),
            h_head, hidden.stride(1), w_head, head_weight.stride(1), *bias_or_dummy.stride(), *labels.stride(),
            HAS_BIAS=bias is not None, HAS_SCALE=scale is not None, HAS_CAP=softcap is not None,
            TAIL=n_vocabulary % tile.block_n != 0, PRECISION="ieee" if interpreted() else precision,
            WIDEN=interpreted(), BY_COPIES=by_copies, EVEN=width % tile.block_k == 0, GROUP=8,
            BLOCK_M=tile.block_m, BLOCK_N=tile.block_n, BLOCK_K=tile.block_k,
            num_stages=tile.n_stages, num_warps=tile.n_warps,
        )  # fmt: skip
        launch(
            _combine_kernel, (ceil_div(n_tokens, COMBINE_BLOCK), k),
            parts, floats, scores.argmax, n_tokens, n_shares,
            SHARES=1 << (n_shares - 1).bit_length(), BLOCK=COMBINE_BLOCK,
        )  # fmt: skip
    return scores


def _check(
    hidden: Tensor, head_weight: Tensor, labels: Tensor, bias: Tensor | None, softcap: float | None
) -> int | None:
    """Number of stacked heads; None for the plain form."""
    check_float("token_scores", "hidden", hidden)
    check_float("token_scores", "head_weight", head_weight)
    check_strided("token_scores", "labels", labels)
    check_values("token_scores", "hidden", hidden)
    if bias is not None:
        check_float("token_scores", "bias", bias)
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
    if softcap is not None and not number("token_scores", "softcap", softcap) > 0:
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
