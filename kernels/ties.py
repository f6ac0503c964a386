"""TIES: trim each task vector to its largest entries, elect a sign per entry, average those that agree.

    delta_i = T_i - base                                        (base=None: T_i is the task vector itself)
    trim:   keep the k = max(1, int(density_i * n)) entries of largest |delta_i| (none for a density of 0), others
            become 0;
            of equal magnitudes at the threshold the lowest flat indices are kept
    elect:  sign = + where sum_i w_i delta_i >= 0, else -
    merge:  m = sum of w_i delta_i that have the sign; normalize: divided by the sum of their w_i
    out = round(base + scale * m)

Shapes: n tensors of one shape, base of that shape -> one of that shape. float32, one rounding.
The threshold is exact and found without a sort: |delta| orders like its bit pattern. On a GPU a histogram of
the high bits says in which bin the k-th largest lies, and one of the next bits of that bin's members goes on
from there (deltas of bfloat16 have 15 bits, all others 31). On a CPU see `magnitudes`.
Bytes: inputs once per pass (GPU: 3 or 2 digits, one count of equals, the merge; CPU: one and the merge), the
result once: bound by memory.
Source: Yadav et al., "TIES-Merging", arXiv 2306.01708.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from olmfast.kernels._dispatch import (
    LazyKernel,
    ceil_div,
    check_alike,
    check_float,
    compute_dtype,
    on_device,
    pointers,
    prepare_out,
    use_triton,
)
from olmfast.kernels.magnitudes import EVERYTHING, NOTHING, Keys, Threshold, thresholds

if TYPE_CHECKING:
    import triton.language as tl

N_CHUNK = 1 << 18  # values handled at a time on a CPU
# On a GPU: a digit of the radix select has N_BINS values.
BLOCK, BLOCKS_PER_PROGRAM, N_BINS = 1024, 16, 2048
# Sums of weights smaller than this are not divided by.
TINY = 1e-8


class _Job(NamedTuple):
    tensors: list[Tensor]
    weights: list[float]
    n_kept: list[int]
    base: Tensor | None
    normalize: bool
    scale: float

    @property
    def halves(self) -> bool:
        """Whether the low 16 bits of every float32 delta are 0."""
        return self.base is None and all(tensor.dtype == torch.bfloat16 for tensor in self.tensors)


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
def _ties_delta(table_ptr, base_ptr, i, offs, mask, HAS_BASE: tl.constexpr):
    x_ptr = tl.load(table_ptr + i).to(tl.pointer_type(base_ptr.dtype.element_ty))
    delta = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    if HAS_BASE:
        delta -= tl.load(base_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    return delta


@LazyKernel
def _ties_digits_kernel(
    table_ptr, base_ptr, prefix_ptr, hist_ptr, n_values, HAS_BASE: tl.constexpr, SHIFT: tl.constexpr,
    WIDTH: tl.constexpr, N_BINS: tl.constexpr, BLOCK: tl.constexpr, BLOCKS_PER_PROGRAM: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(1)
    start = tl.program_id(0).to(tl.int64) * (BLOCK * BLOCKS_PER_PROGRAM)
    prefix = tl.load(prefix_ptr + i)
    bins = tl.arange(0, N_BINS)
    counts = tl.zeros((N_BINS,), dtype=tl.int32)
    for b in range(BLOCKS_PER_PROGRAM):
        offs = start + b * BLOCK + tl.arange(0, BLOCK)
        mask = offs < n_values
        bits = tl.abs(_ties_delta(table_ptr, base_ptr, i, offs, mask, HAS_BASE)).to(tl.int32, bitcast=True)
        digits = bits >> SHIFT
        member = mask & ((digits >> WIDTH).to(tl.int64) == prefix)
        # Those that do not belong are counted in bin 0 and taken off again.
        digits = tl.where(member, digits & ((1 << WIDTH) - 1), 0)
        counts += tl.histogram(digits, N_BINS)
        counts -= tl.where(bins == 0, BLOCK - tl.sum(member.to(tl.int32), axis=0), 0)
    # Sums of integers: the order of arrival does not matter.
    tl.atomic_add(hist_ptr + i * N_BINS + bins, counts.to(tl.int64), mask=counts != 0)


@LazyKernel
def _ties_equal_kernel(
    table_ptr, base_ptr, threshold_ptr, equal_ptr, n_values, HAS_BASE: tl.constexpr, BLOCK: tl.constexpr
):
    block, i = tl.program_id(0).to(tl.int64), tl.program_id(1)
    offs = block * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_values
    bits = tl.abs(_ties_delta(table_ptr, base_ptr, i, offs, mask, HAS_BASE)).to(tl.int32, bitcast=True)
    equal = mask & (bits.to(tl.int64) == tl.load(threshold_ptr + i))
    tl.store(equal_ptr + tl.num_programs(0).to(tl.int64) * i + block, tl.sum(equal.to(tl.int32), axis=0))


@LazyKernel
def _ties_trimmed(table_ptr, base_ptr, trim_ptr, before_ptr, w_ptr, i, offs, mask, HAS_BASE: tl.constexpr):
    # w_i * delta_i, 0 where trimmed; trim holds (threshold, quota) of each tensor.
    delta = _ties_delta(table_ptr, base_ptr, i, offs, mask, HAS_BASE)
    bits = tl.abs(delta).to(tl.int32, bitcast=True).to(tl.int64)
    threshold, quota = tl.load(trim_ptr + i * 2), tl.load(trim_ptr + i * 2 + 1)
    before = tl.load(before_ptr + tl.num_programs(0).to(tl.int64) * i + tl.program_id(0))
    equal = bits == threshold
    rank = before + tl.cumsum(equal.to(tl.int32), axis=0)
    kept = (bits > threshold) | (equal & (rank <= quota))
    return tl.where(kept, delta, 0.0) * tl.load(w_ptr + i)


@LazyKernel
def _ties_merge_kernel(
    table_ptr, base_ptr, trim_ptr, before_ptr, w_ptr, out_ptr, n_values, n_tensors, scale,
    HAS_BASE: tl.constexpr, NORMALIZE: tl.constexpr, TINY: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < n_values
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(n_tensors):
        total += _ties_trimmed(table_ptr, base_ptr, trim_ptr, before_ptr, w_ptr, i, offs, mask, HAS_BASE)
    sign = tl.where(total >= 0, 1.0, -1.0)
    merged, divisor = tl.zeros((BLOCK,), dtype=tl.float32), tl.zeros((BLOCK,), dtype=tl.float32)
    for i in range(n_tensors):
        part = _ties_trimmed(table_ptr, base_ptr, trim_ptr, before_ptr, w_ptr, i, offs, mask, HAS_BASE)
        agree = part * sign > 0
        merged += tl.where(agree | (part != part), part, 0.0)
        divisor += tl.where(agree, tl.load(w_ptr + i), 0.0)
    if NORMALIZE:
        merged = merged / tl.where(tl.abs(divisor) < TINY, 1.0, divisor)
    merged *= scale
    if HAS_BASE:
        merged += tl.load(base_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + offs, merged.to(out_ptr.dtype.element_ty), mask=mask)


def _launch(job: _Job, out: Tensor) -> Tensor:
    n, n_values, device = len(job.tensors), out.numel(), out.device
    table, like = pointers(job.tensors), job.base if job.base is not None else job.tensors[0]
    has_base = job.base is not None
    prefix = torch.zeros(n, dtype=torch.int64, device=device)
    remaining = torch.tensor(job.n_kept, dtype=torch.int64).to(device)
    n_blocks = ceil_div(n_values, BLOCK)
    with on_device(out):
        for shift, width in ((20, 11), (16, 4)) if job.halves else ((20, 11), (10, 10), (0, 10)):
            counts = torch.zeros((n, N_BINS), dtype=torch.int64, device=device)
            _ties_digits_kernel[(ceil_div(n_blocks, BLOCKS_PER_PROGRAM), n)](
                table, like, prefix, counts, n_values, HAS_BASE=has_base, SHIFT=shift, WIDTH=width,
                N_BINS=N_BINS, BLOCK=BLOCK, BLOCKS_PER_PROGRAM=BLOCKS_PER_PROGRAM,
            )  # fmt: skip
            from_top = counts.flip(1).cumsum(1)
            position = (from_top < remaining[:, None]).sum(1, keepdim=True)
            digit = N_BINS - 1 - position
            remaining = remaining - (from_top.gather(1, position) - counts.gather(1, digit))[:, 0]
            prefix = (prefix << width) | digit[:, 0]
        threshold = prefix << (16 if job.halves else 0)
        equal = torch.empty((n, n_blocks), dtype=torch.int64, device=device)
        _ties_equal_kernel[(n_blocks, n)](table, like, threshold, equal, n_values, HAS_BASE=has_base, BLOCK=BLOCK)
        before = equal.cumsum(1) - equal
        weights = torch.tensor(job.weights, dtype=torch.float32).to(device)
        # Products are rounded before they are summed, as in torch: a fused one could turn an elected sign.
        _ties_merge_kernel[(n_blocks,)](
            table, like, torch.stack((threshold, remaining), dim=1).contiguous(), before, weights, out,
            n_values, n, float(job.scale), HAS_BASE=has_base, NORMALIZE=job.normalize, TINY=TINY,
            BLOCK=BLOCK, enable_fp_fusion=False,
        )  # fmt: skip
    return out


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
            Mixed dtypes are merged by torch.
        weights: one number per tensor.
        density: share of the entries kept, in 0..1 (above 0 at least one); one number, or one per tensor.
            1 keeps everything: sign election alone, as for DARE-TIES.
        base: shape of the tensors; deltas are taken from it in float32.
        normalize: divide by the sum of the weights that agree. scale: the lambda of the paper.
        out: shape of the tensors, dtype of the base (else of the first tensor), any strides; may be any input.
        impl: 'auto', 'triton' or 'torch'.

    Raises:
        TypeError, ValueError: wrong dtype, shape, device, density, number of weights, or impl.
    """
    tensors = list(tensors)
    check_alike("ties_merge", tensors)
    n, n_values, factors = len(tensors), tensors[0].numel(), [float(weight) for weight in weights]
    densities = [float(density)] * n if isinstance(density, (int, float)) else [float(d) for d in density]
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
