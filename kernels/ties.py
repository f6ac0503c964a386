"""TIES: trim each task vector to its largest entries, elect a sign per entry, average those that agree.

    delta_i = T_i - base                                        (base=None: T_i is the task vector itself)
    trim:   keep the k = max(1, int(density_i * n)) entries of largest |delta_i| (none for a density of 0), others
            become 0;
            of equal magnitudes at the threshold the lowest flat indices are kept
    elect:  sign = + where sum_i w_i delta_i >= 0, else -
    merge:  m = sum of w_i delta_i that have the sign; normalize: divided by the sum of their w_i
    out = round(base + scale * m)

Shapes: n tensors of one shape, base of that shape -> one of that shape. float32, one rounding.
The threshold is exact and found without a sort: |delta| orders like its bit pattern. On a GPU a sample says between
which bounds the k-th largest lies; a histogram of what lies between says in which bin, and one of that bin's members
goes on from there. On a CPU see `magnitudes`.
Bytes: inputs once per pass (GPU: mostly two, one more to count equals where not all of them are kept, and the merge;
CPU: one and the merge), the result once: bound by memory.
Source: Yadav et al., "TIES-Merging", arXiv 2306.01708.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import ceil
from numbers import Real
from struct import pack, unpack
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from olmfast.kernels._dispatch import (
    LazyKernel,
    ceil_div,
    check_alike,
    check_apart,
    check_float,
    compute_dtype,
    flag,
    launch,
    number,
    numbers,
    on_device,
    prepare_out,
    sent,
    use_triton,
)
from olmfast.kernels.magnitudes import EVERYTHING, NOTHING, Keys, Threshold, thresholds

if TYPE_CHECKING:
    import triton.language as tl

N_CHUNK = 1 << 18  # values handled at a time on a CPU
# On a GPU: values of a program's step, steps of a program.
BLOCK, BLOCKS_PER_PROGRAM = 2048, 16
# A sample of SAMPLE values bounds the threshold, ERRORS standard errors to either side; each pass divides what lies
# between by 2^BITS: mostly two passes find it, and N_PASSES where the sample misleads (then 31 bits are left). Counters
# stand COPIES times, and up to FEW keys are counted in registers: else programs would wait for each other.
SAMPLE, ERRORS, BITS, N_PASSES, FEW, COPIES = 8192, 5, 12, 4, 64, 8
N_BINS = 1 << BITS
# Sums of weights smaller than this are not divided by.
TINY = 1e-8


class _Job(NamedTuple):
    tensors: list[Tensor]
    weights: list[float]
    n_kept: list[int]
    base: Tensor | None
    normalize: bool
    scale: float


def _delta_ref(job: _Job, i: int, start: int, stop: int, dtype: torch.dtype) -> Tensor:
    delta = job.tensors[i].view(-1)[start:stop].to(dtype, copy=True)
    return delta if job.base is None else delta.sub_(job.base.view(-1)[start:stop].to(dtype))


def _kept_ref(job: _Job, i: int, chunks: list[tuple[int, int]], dtype: torch.dtype) -> Threshold:
    n, k = job.tensors[i].numel(), job.n_kept[i]
    if k in (0, n):
        return EVERYTHING if k else NOTHING
    deltas = Keys(lambda start, stop: _delta_ref(job, i, start, stop, dtype), chunks)
    return thresholds(deltas, [k], dtype)[0]


def ties_merge_ref(job: _Job, out: Tensor) -> Tensor:
    """The formula in plain torch, a chunk at a time, into `out`; all contiguous."""
    dtype = compute_dtype(out.dtype)
    n, n_values = len(job.tensors), out.numel()
    chunks = [(start, min(start + N_CHUNK, n_values)) for start in range(0, n_values, N_CHUNK)]
    kept = [_kept_ref(job, i, chunks, dtype) for i in range(n)]
    weights = torch.tensor(job.weights, dtype=dtype, device=out.device)[:, None]
    for start, stop in chunks:
        target = out.view(-1)[start:stop]
        parts = torch.empty((n, target.numel()), dtype=dtype, device=out.device)
        total = torch.zeros_like(parts[0])
        for i in range(n):
            delta = _delta_ref(job, i, start, stop, dtype)
            if kept[i] is not EVERYTHING:
                delta = delta * kept[i].kept_(delta.abs(), start)
            total += torch.mul(delta, job.weights[i], out=parts[i])
        sign = (total >= 0).to(dtype).mul_(2).sub_(1)
        agree = (parts * sign) > 0
        # A product, not a choice: NaN stays visible.
        merged = parts.mul_(agree).sum(dim=0)
        if job.normalize:
            divisor = (weights * agree).sum(dim=0)
            merged.div_(divisor.masked_fill_(divisor.abs() < TINY, 1.0))
        merged.mul_(job.scale)
        if job.base is not None:
            merged.add_(job.base.view(-1)[start:stop])
        target.copy_(merged)
    return out


@LazyKernel
def _ties_delta(table_ptr, base_ptr, i, start, offs, mask, HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr):
    x_ptr = tl.load(table_ptr + i * 5).to(tl.pointer_type(base_ptr.dtype.element_ty))
    if ALIGNED:
        # So that sixteen bytes are loaded at once.
        x_ptr = tl.multiple_of(x_ptr, 16)
    delta = tl.load(x_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_BASE:
        delta -= tl.load(base_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
    return delta


@LazyKernel
def _ties_key(delta):
    return tl.abs(delta).to(tl.int32, bitcast=True)


@LazyKernel
def _ties_ranked(keys, rank):
    # The rank-th largest key, bit by bit; 0 for a rank beyond their number.
    found = 0
    for bit in range(31):
        larger = found | (1 << (30 - bit))
        found = tl.where(tl.sum((keys >= larger).to(tl.int32), axis=0) >= rank, larger, found)
    return found


@LazyKernel
def _ties_place(state_ptr, i, low, high, quota, split, BITS: tl.constexpr):
    # What is known of threshold i: its bounds, its shift, how many equal keys are kept, whether that is not all.
    shift = 0
    for bit in range(31 - BITS):
        shift += tl.where(((high - low) >> (BITS + bit)) > 0, 1, 0)
    at = state_ptr + i * 5
    tl.store(at, low)
    tl.store(at + 1, high)
    tl.store(at + 2, quota)
    tl.store(at + 3, shift)
    tl.store(at + 4, split)


@LazyKernel
def _ties_sample_kernel(
    table_ptr, base_ptr, state_ptr, n_values, HAS_BASE: tl.constexpr, SAMPLE: tl.constexpr, BITS: tl.constexpr
):
    i = tl.program_id(0)
    k, above, below = tl.load(table_ptr + i * 5 + 1), tl.load(table_ptr + i * 5 + 2), tl.load(table_ptr + i * 5 + 3)
    if k == 0:
        too_large = tl.full((), 1 << 31, tl.int64)
        _ties_place(state_ptr, i, too_large, too_large, k, 0, BITS)
    elif k == n_values:
        _ties_place(state_ptr, i, tl.full((), -1, tl.int64), tl.full((), -1, tl.int64), k, 0, BITS)
    else:
        # One of each `step` values, not always the same one: rows and columns must not come through.
        place = tl.arange(0, SAMPLE).to(tl.int64)
        step = tl.maximum(n_values // SAMPLE, 1).to(tl.int64)
        place = place * step + (place * 40503 >> 4) % step
        mask = place < n_values
        keys = _ties_key(_ties_delta(table_ptr, base_ptr, i, 0, place, mask, HAS_BASE, False))
        keys = tl.where(mask, keys, -1)
        high = tl.where(above > 0, _ties_ranked(keys, above), 0x7FFFFFFF).to(tl.int64)
        low = _ties_ranked(keys, below).to(tl.int64)
        _ties_place(state_ptr, i, low, high, tl.full((), -1, tl.int64), 0, BITS)


@LazyKernel
def _ties_count_kernel(
    table_ptr, base_ptr, state_ptr, above_ptr, hist_ptr, n_values, HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr,
    FEW: tl.constexpr, N_BINS: tl.constexpr, COPIES: tl.constexpr, BLOCK: tl.constexpr,
    BLOCKS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1)
    if tl.load(state_ptr + i * 5 + 2) < 0:
        low, high = tl.load(state_ptr + i * 5).to(tl.int32), tl.load(state_ptr + i * 5 + 1).to(tl.int32)
        shift = tl.load(state_ptr + i * 5 + 3).to(tl.int32)
        start = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS_PER_PROGRAM)
        offs, bins = tl.arange(0, BLOCK), tl.arange(0, FEW)
        n_above, counts = tl.zeros((BLOCK,), tl.int32), tl.zeros((FEW,), tl.int32)
        hist_ptr += (i * COPIES + tl.program_id(0) % COPIES) * N_BINS
        few = high - low < FEW
        for _ in range(BLOCKS_PER_PROGRAM):
            mask = offs < n_values - start
            keys = _ties_key(_ties_delta(table_ptr, base_ptr, i, start, offs, mask, HAS_BASE, ALIGNED))
            n_above += (mask & (keys > high)).to(tl.int32)
            member = mask & (keys >= low) & (keys <= high)
            if few:
                n_members = tl.sum(member.to(tl.int32), axis=0)
                if n_members > 0:
                    # Those that do not belong are counted in bin 0 and taken off again.
                    counts += tl.histogram(tl.where(member, keys - low, 0), FEW)
                    counts -= tl.where(bins == 0, BLOCK - n_members, 0)
            else:
                one = tl.full((BLOCK,), 1, hist_ptr.dtype.element_ty)
                tl.atomic_add(hist_ptr + ((keys - low) >> shift), one, mask=member, sem="relaxed")
            start += BLOCK
        # Sums of integers: the order of arrival does not matter.
        if few:
            tl.atomic_add(hist_ptr + bins, counts.to(hist_ptr.dtype.element_ty), mask=counts != 0, sem="relaxed")
        tl.atomic_add(above_ptr + i, tl.sum(n_above, axis=0).to(above_ptr.dtype.element_ty), sem="relaxed")


@LazyKernel
def _ties_descend(counts, quota, ROW: tl.constexpr):
    # The last place with at least `quota` counts from there on; what is left of the quota, and the count there.
    from_here = tl.sum(counts, axis=0) - tl.cumsum(counts, axis=0) + counts
    place = tl.sum((from_here >= quota).to(tl.int32), axis=0) - 1
    there = tl.arange(0, ROW) == place
    count = tl.sum(tl.where(there, counts, 0), axis=0)
    return place, quota - (tl.sum(tl.where(there, from_here, 0), axis=0) - count), count


@LazyKernel
def _ties_narrow_kernel(
    table_ptr, state_ptr, above_ptr, hist_ptr, ROW: tl.constexpr, BITS: tl.constexpr, COPIES: tl.constexpr
):
    i = tl.program_id(0)
    if tl.load(state_ptr + i * 5 + 2) < 0:
        low, high = tl.load(state_ptr + i * 5), tl.load(state_ptr + i * 5 + 1)
        shift = tl.load(state_ptr + i * 5 + 3)
        at = tl.arange(0, ROW)
        hist_ptr += i * (COPIES * ROW * ROW)
        bins = tl.zeros((ROW, ROW), hist_ptr.dtype.element_ty)
        for copy in tl.static_range(COPIES):
            bins += tl.load(hist_ptr + copy * ROW * ROW + at[:, None] * ROW + at[None, :])
        bins = bins.to(tl.int64)
        rows = tl.sum(bins, axis=1)
        quota = tl.load(table_ptr + i * 5 + 1) - tl.load(above_ptr + i).to(tl.int64)
        unknown = tl.full((), -1, tl.int64)
        # The sample has misled: the threshold is above or below its bounds.
        if quota <= 0:
            _ties_place(state_ptr, i, high + 1, tl.full((), 0x7FFFFFFF, tl.int64), unknown, 0, BITS)
        elif quota > tl.sum(rows, axis=0):
            _ties_place(state_ptr, i, tl.full((), 0, tl.int64), low - 1, unknown, 0, BITS)
        else:
            row, quota, _n = _ties_descend(rows, quota, ROW)
            line = tl.sum(tl.where(at[:, None] == row, bins, 0), axis=0)
            bin, quota, count = _ties_descend(line, quota, ROW)
            low += ((row * ROW + bin).to(tl.int64)) << shift
            done = shift == 0
            high = tl.where(done, low, tl.minimum(high, low + ((unknown * 0 + 1) << shift) - 1))
            split = done & (quota < count)
            _ties_place(state_ptr, i, low, high, tl.where(done, quota, unknown), split.to(tl.int32), BITS)


@partial(LazyKernel, plain=("n_blocks",))
def _ties_equal_kernel(
    table_ptr, base_ptr, state_ptr, equal_ptr, n_values, n_blocks, HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, BLOCKS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1)
    if tl.load(state_ptr + i * 5 + 4) > 0:
        threshold = tl.load(state_ptr + i * 5)
        offs = tl.arange(0, BLOCK)
        for b in range(BLOCKS_PER_PROGRAM):
            block = tl.program_id(0) * BLOCKS_PER_PROGRAM + b
            start = block.to(tl.int64) * BLOCK
            mask = offs < n_values - start
            keys = _ties_key(_ties_delta(table_ptr, base_ptr, i, start, offs, mask, HAS_BASE, ALIGNED))
            count = tl.sum((mask & (keys.to(tl.int64) == threshold)).to(tl.int32), axis=0)
            tl.store(equal_ptr + i.to(tl.int64) * n_blocks + block, count, mask=block < n_blocks)


@LazyKernel
def _ties_trimmed(
    table_ptr, base_ptr, state_ptr, before_ptr, i, start, offs, mask, HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr
):
    # w_i * delta_i, 0 where trimmed.
    delta = _ties_delta(table_ptr, base_ptr, i, start, offs, mask, HAS_BASE, ALIGNED)
    keys, threshold = _ties_key(delta).to(tl.int64), tl.load(state_ptr + i * 5)
    kept = keys >= threshold
    if tl.load(state_ptr + i * 5 + 4) > 0:
        before = tl.load(before_ptr + tl.num_programs(0).to(tl.int64) * i + tl.program_id(0))
        equal, quota = keys == threshold, tl.load(state_ptr + i * 5 + 2)
        rank = before + tl.cumsum(equal.to(tl.int32), axis=0)
        kept = (keys > threshold) | (equal & (rank <= quota))
    return tl.where(kept, delta, 0.0) * _ties_weight(table_ptr, i)


@LazyKernel
def _ties_weight(table_ptr, i):
    return tl.load(table_ptr + i * 5 + 4).to(tl.int32).to(tl.float32, bitcast=True)


@partial(LazyKernel, plain=("n_tensors",))
def _ties_merge_kernel(
    table_ptr, base_ptr, state_ptr, before_ptr, out_ptr, n_values, n_tensors, scale,
    HAS_BASE: tl.constexpr, ALIGNED: tl.constexpr, NORMALIZE: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    mask = offs < n_values - start
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(n_tensors):
        total += _ties_trimmed(table_ptr, base_ptr, state_ptr, before_ptr, i, start, offs, mask, HAS_BASE, ALIGNED)
    sign = tl.where(total >= 0, 1.0, -1.0)
    merged, divisor = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(n_tensors):
        part = _ties_trimmed(table_ptr, base_ptr, state_ptr, before_ptr, i, start, offs, mask, HAS_BASE, ALIGNED)
        agree = part * sign > 0
        merged += tl.where(agree | (part != part), part, 0.0)
        divisor += tl.where(agree, _ties_weight(table_ptr, i), 0.0)
    if NORMALIZE:
        merged = merged / tl.where(tl.abs(divisor) < TINY, 1.0, divisor)
    merged *= scale
    if HAS_BASE:
        merged += tl.load(base_ptr + start + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + start + offs, merged.to(out_ptr.dtype.element_ty), mask=mask)


def _row(tensor: Tensor, k: int, weight: float) -> tuple[int, int, int, int, int]:
    """What the kernels have to know of a tensor: address, values kept, ranks of the sample, bits of the weight."""
    n, n_sampled = tensor.numel(), min(tensor.numel(), SAMPLE)
    rank = k / n * n_sampled
    width = 0.0 if n == n_sampled else ERRORS * (rank * (1 - k / n)) ** 0.5 + 2
    return tensor.data_ptr(), k, int(rank - width), ceil(rank + width), unpack("i", pack("f", weight))[0]


def _launch(job: _Job, out: Tensor) -> Tensor:
    n, n_values, device = len(job.tensors), out.numel(), out.device
    rows = [_row(*of_one) for of_one in zip(job.tensors, job.n_kept, job.weights, strict=True)]
    table, like = sent([number for row in rows for number in row], device), job.base
    options = {"HAS_BASE": like is not None, "ALIGNED": all(row[0] % 16 == 0 for row in rows)}
    like = like if like is not None else job.tensors[0]
    counting = torch.int32 if n_values < 1 << 31 else torch.int64
    state = torch.empty((n, 5), dtype=torch.int64, device=device)
    counts = torch.zeros(N_PASSES * n * (COPIES * N_BINS + 1), dtype=counting, device=device)
    n_blocks = ceil_div(n_values, BLOCK)
    equal = torch.zeros((n, n_blocks), dtype=torch.int32, device=device)
    grid = (ceil_div(n_blocks, BLOCKS_PER_PROGRAM), n)
    with on_device(out):
        launch(
            _ties_sample_kernel, (n,),
            table, like, state, n_values, HAS_BASE=options["HAS_BASE"], SAMPLE=SAMPLE, BITS=BITS, num_warps=16,
        )  # fmt: skip
        for part in counts.view(N_PASSES, -1):
            hist, above = part.split((n * COPIES * N_BINS, n))
            launch(
                _ties_count_kernel, grid, table, like, state, above, hist, n_values, **options,
                FEW=FEW, N_BINS=N_BINS, COPIES=COPIES, BLOCK=BLOCK, BLOCKS_PER_PROGRAM=BLOCKS_PER_PROGRAM, num_warps=8,
            )  # fmt: skip
            launch(
                _ties_narrow_kernel, (n,), table, state, above, hist,
                ROW=1 << BITS // 2, BITS=BITS, COPIES=COPIES, num_warps=8,
            )  # fmt: skip
        launch(
            _ties_equal_kernel, grid, table, like, state, equal, n_values, n_blocks, **options,
            BLOCK=BLOCK, BLOCKS_PER_PROGRAM=BLOCKS_PER_PROGRAM, num_warps=8,
        )  # fmt: skip
        before = equal.cumsum(1, dtype=counting).sub_(equal)
        # Products are rounded before they are summed, as in torch: a fused one could turn an elected sign.
        launch(
            _ties_merge_kernel, (n_blocks,), table, like, state, before, out, n_values, n, float(job.scale), **options,
            NORMALIZE=job.normalize, TINY=TINY, BLOCK=BLOCK, num_warps=8, enable_fp_fusion=False,
        )  # fmt: skip
    return out


@torch.no_grad()
def ties_merge(
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    density: float | Sequence[float],
    *,
    base: Tensor | None = None,
    normalize: bool = True,
    scale: float = 1.0,
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """TIES merge of `tensors` onto `base`, or of task vectors where there is no base.

    Args:
        tensors: at least one, equal shapes, floating point, any strides (not contiguous: copied first).
            Mixed dtypes are merged by torch. With three dimensions a batch of matrices, such as experts, each
            trimmed on its own.
        weights: one number per tensor.
        density: share of the entries kept, in 0..1 (above 0 at least one); one number, or one per tensor.
            1 keeps everything: sign election alone, as for DARE-TIES.
        base: shape of the tensors; deltas are taken from it in float32.
        normalize: divide by the sum of the weights that agree. scale: the lambda of the paper.
        out: shape of the tensors, dtype of the base (else of the first tensor), any strides; may be any input.
        impl: 'auto', 'triton' or 'torch'.

    Raises:
        TypeError, ValueError: wrong type, dtype, shape, device, density, number of weights, or impl; numbers that are
            not finite; or an `out` that overlaps an input without being it.
    """
    tensors = check_alike("ties_merge", tensors)
    n, n_values, normalize = len(tensors), tensors[0].numel(), flag("ties_merge", "normalize", normalize)
    factors = numbers("ties_merge", "weights", weights, compute_dtype(tensors[0].dtype))
    single = isinstance(density, (Real, str)) or density is None
    densities = [number("ties_merge", "density", density)] * n if single else numbers("ties_merge", "density", density)
    scale = number("ties_merge", "scale", scale)
    if len(factors) != n or len(densities) != n:
        raise ValueError(f"ties_merge: {n} tensors, {len(factors)} weights, {len(densities)} densities")
    if not all(0.0 <= d <= 1.0 for d in densities):
        raise ValueError(f"ties_merge: density is {density}, not in 0..1")
    if base is not None:
        check_float("ties_merge", "base", base)
        if base.shape != tensors[0].shape:
            raise ValueError(f"ties_merge: base has shape {tuple(base.shape)}, tensors[0] {tuple(tensors[0].shape)}")
    inputs = [*tensors, base] if base is not None else tensors
    like = base if base is not None else tensors[0]
    triton = use_triton("ties_merge", impl, inputs, mixed=False)
    out = prepare_out("ties_merge", out, like.shape, like.dtype, like.device)
    named = {f"tensors[{i}]": one for i, one in enumerate(tensors)} | ({} if base is None else {"base": base})
    check_apart("ties_merge", out, named, in_place=True)
    if like.dim() == 3:
        for i in range(len(like)):
            parts, own = [tensor[i] for tensor in tensors], base[i] if base is not None else None
            ties_merge(parts, factors, densities, base=own, normalize=normalize, scale=scale, out=out[i], impl=impl)
        return out
    if not n_values:
        return out
    # Several passes read the inputs: an `out` that is one of them is written at the end.
    direct = out.is_contiguous() and all(out.data_ptr() != tensor.data_ptr() for tensor in inputs)
    target = out if direct else torch.empty_like(out, memory_format=torch.contiguous_format)
    job = _Job(
        [tensor.contiguous() for tensor in tensors],
        factors,
        [max(1, int(d * n_values)) if d > 0 else 0 for d in densities],
        base.contiguous() if base is not None else None,
        normalize,
        scale,
    )
    result = _launch(job, target) if triton else ties_merge_ref(job, target)
    return out if direct else out.copy_(result)
