"""Methods on task vectors: thin out each term's difference from the base, let signs agree or not, add.

    delta_i = term_i - base                                        thinned, then times w_i
    signs:  entries whose sign is that of sum_i w_i delta_i        (TIES; + where it is 0)
    result = base + lambda * sum_i w_i delta_i [/ sum of the w_i that count]

What is dropped is decided by numbers found in passes before (a threshold, a norm) and by the entry's own value and
place, so results come a chunk at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import xxhash

from olmfast import _shards, kernels
from olmfast.kernels.dare import uniform
from olmfast.kernels.magnitudes import EVERYTHING, NOTHING, Keys, Threshold, cuts, key_value, thresholds, value_keys
from olmfast.weights.checkpoint import reading
from olmfast.weights.chunks import Operands, Piece, Readable, Settings, chunked
from olmfast.weights.fused import COUNTED, Fused, counting, in_memory, operand

# Sets the entries of a chunk that are dropped to 0, in place; the chunk begins at the given flat index. NaN stays.
Thin = Callable[[torch.Tensor, int], torch.Tensor]

TINY_WEIGHT, TINY_NORM = 1e-8, 1e-7


def keep_all(operands: Operands, i: int, settings: Settings) -> Thin | None:  # noqa: ARG001
    """No entry is dropped."""
    return None


def keep_largest(operands: Operands, i: int, settings: Settings) -> Thin | Threshold | None:
    """The max(1, int(density * n)) entries of largest magnitude (Yadav et al., arXiv 2306.01708)."""
    density = settings.each("density", i)
    return _between(operands, i, 0, max(1, _count(density, operands.n_values)) if density > 0 else 0)


def keep_between(operands: Operands, i: int, settings: Settings) -> Thin | Threshold | None:
    """int(density * n) entries, after the int(gamma * n) largest have been left out (arXiv 2312.06795).

    Fewer are left out where the density could not be met otherwise.
    """
    density, n = settings.each("density", i), operands.n_values
    if density >= 1:
        return keep_all(operands, i, settings)
    n_kept = _count(density, n)
    n_smallest = max(0, n - n_kept - _count(settings.each("gamma", i), n))
    return _between(operands, i, n - n_smallest - n_kept, n_kept)


def _count(share: float, n: int) -> int:
    """int(share * n); a share below 0 is none, one above 1 is all."""
    return int(min(max(share, 0.0), 1.0) * n)


def keep_random(operands: Operands, i: int, settings: Settings) -> Thin | None:
    """Each entry with probability `density` (DARE: Yu et al., arXiv 2311.03099); see `kernels.dare_mask`."""
    density, seed, stream = settings.each("density", i), settings.integer("seed", 0), _stream(settings, i)
    if density >= 1:
        return keep_all(operands, i, settings)

    def thin(delta: torch.Tensor, start: int) -> torch.Tensor:
        shape = (len(delta),)
        mask = kernels.dare_mask(shape, max(density, 0.0), seed, stream=stream, start=start, device=delta.device)
        return delta.mul_(mask)  # a product, not a choice: NaN stays visible

    return thin


def keep_by_rank(operands: Operands, i: int, settings: Settings) -> Thin | None:
    """Each entry with a probability that grows with its rank in its row (DELLA's MAGPRUNE, arXiv 2406.11617).

    From density - epsilon for the smallest of a row to density + epsilon for the largest. Raises ValueError where
    these are no probabilities.
    """
    density, epsilon = settings.each("density", i), settings.each("epsilon", i)
    seed, stream, row = settings.integer("seed", 0), _stream(settings, i), operands.row
    if density >= 1:
        return keep_all(operands, i, settings)
    if density > 0 and not 0 < density - epsilon <= density + epsilon < 1:
        raise ValueError(f"density {density} -/+ epsilon {epsilon}: expected both to lie between 0 and 1")

    def thin(delta: torch.Tensor, start: int) -> torch.Tensor:
        if density <= 0:
            return delta.mul_(0)
        order = delta.view(-1, row).abs().argsort(dim=1, stable=True)
        ranks = torch.arange(row, dtype=delta.dtype, device=delta.device).expand_as(order)
        share = torch.empty_like(ranks, memory_format=torch.contiguous_format).scatter_(1, order, ranks)
        share = share / (row - 1) if row > 1 else share + 0.5
        probability = (density - epsilon) + share.view(-1) * (2 * epsilon)
        return delta.mul_(uniform(len(delta), seed, stream, start, delta.device) < probability)

    return thin


@dataclass(frozen=True)
class TaskVectors:
    """One of these methods: how entries are dropped, whether signs must agree, and what the settings default to."""

    thin: Callable[[Operands, int, Settings], Thin | Threshold | None]
    signs: bool
    normalize: bool = False
    rescale: bool = False
    rows: bool = False  # whether what is dropped is decided over whole rows

    def __call__(self, operands: Operands, settings: Settings) -> Piece:
        """Raises ValueError for settings that cannot be used."""
        thins = [self.thin(operands, i, settings) for i in range(len(operands))]
        weights = [settings.each("weight", i) for i in range(len(operands))]
        whole = operands.row if self.rows else 1
        rescale = settings.flag("rescale", self.rescale)
        scales = [_rescaling(operands, i, thin, whole) if rescale else 1.0 for i, thin in enumerate(thins)]
        normalize, scale = settings.flag("normalize", self.normalize), settings.number("lambda", 1.0)

        return in_rows(_Added(operands, thins, scales, weights, self.signs, normalize, scale), operands, whole)


@dataclass(frozen=True)
class _Added(Fused):
    """base + scale * the sum of task vectors, thinned, times `scales` and then `weights`; see `TaskVectors`."""

    thins: Sequence[Thin | Threshold | None]
    scales: Sequence[float]
    weights: Sequence[float]
    signs: bool
    normalize: bool
    scale: float

    def __call__(self, start: int, stop: int) -> torch.Tensor:
        """See `Piece`."""
        operands = self.operands
        base = operands.from_base(start, stop)
        parts = operands.scratch("parts", len(operands) * (stop - start)).view(len(operands), -1)
        for i in range(len(operands)):
            torch.mul(self._thinned(i, start, stop, base), self.weights[i], out=parts[i])
        return _added(operands, base, parts, self.weights, self.signs, self.normalize, self.scale)

    def _thinned(self, i: int, start: int, stop: int, base: torch.Tensor) -> torch.Tensor:
        thinned = _thin(self.thins[i], self.operands.delta(i, start, stop, base), start)
        return thinned if self.scales[i] == 1.0 else thinned.mul_(self.scales[i])

    @property
    def in_memory(self) -> bool:
        """See `Fused`."""
        return super().in_memory or not all(thin is None or isinstance(thin, Threshold) for thin in self.thins)

    @property
    def read(self) -> Sequence[Readable]:
        """See `Fused`."""
        return [*self.operands.terms, self.operands.needed_base]

    def fill(self, start: int, stop: int, target: _shards.Target) -> None:
        """See `Fused`."""
        operands = self.operands
        base = operands.from_base(start, stop) if self.in_memory else None
        of_base = in_memory(base) if base is not None else operand(operands, operands.needed_base, "base", start, stop)
        parts = [self._part(i, start, stop, base) for i in range(len(operands))]
        for part, weight in zip(parts, self.weights, strict=True):
            part.weight = weight
        divisor = float(torch.tensor(self.weights, dtype=torch.float32).sum())
        with reading():
            _shards.combine_task_vectors(
                of_base, parts, self.signs, self.normalize, divisor, TINY_WEIGHT, self.scale, target
            )

    def _part(self, i: int, start: int, stop: int, base: torch.Tensor | None) -> _shards.Operand:
        thin, operands = self.thins[i], self.operands
        if base is not None and not (thin is None or isinstance(thin, Threshold)):
            return in_memory(self._thinned(i, start, stop, base))
        part = operand(operands, operands.terms[i], i, start, stop)
        part.from_base, part.scale = True, self.scales[i]
        if isinstance(thin, Threshold):
            part.n_first = thin.n_equal(start, stop - start)
            part.largest_first, part.largest = thin.below, thin.value
        return part


def _thin(thin: Thin | Threshold | None, delta: torch.Tensor, start: int) -> torch.Tensor:
    if thin is None:
        return delta
    return thin.thin_(delta, start) if isinstance(thin, Threshold) else thin(delta, start)


def _added(
    operands: Operands,
    base: torch.Tensor,
    parts: torch.Tensor,
    weights: Sequence[float],
    signs: bool,
    normalize: bool,
    scale: float,
) -> torch.Tensor:
    """base + scale * sum of `parts`, (n, m) weighted task vectors, into the base's memory; `parts` are used up."""
    merged, divisor = (operands.scratch(name, len(base)) for name in ("merged", "divisor"))
    ones = [1.0] * len(parts)
    _sum(parts, ones, merged)
    if signs:
        # Times the elected sign, what agrees is positive: a sum of magnitudes, which then gets the sign again. That
        # of a sum of 0 is +, unless all its terms are -0, where it does not matter. NaN stays visible.
        sign = torch.copysign(parts.new_ones(()), merged, out=operands.scratch("sign", len(base)))
        parts.mul_(sign).clamp_min_(0)
        _sum(parts, ones, merged).mul_(sign)
    if normalize:
        if signs:
            _sum(parts.gt_(0), weights, divisor)
        else:
            divisor.fill_(torch.tensor(weights, dtype=parts.dtype).sum())
        few = torch.abs(divisor, out=operands.scratch("few", len(base))).lt_(TINY_WEIGHT)
        merged.div_(divisor.add_(few))  # next to nothing counts as 1
    if scale != 1.0:
        merged.mul_(scale)
    return base.add_(merged)


def _sum(parts: torch.Tensor, factors: Sequence[float], out: torch.Tensor) -> torch.Tensor:
    """The rows of `parts` times their factors added up one by one, which for a few is twice as fast as a reduction."""
    if len(parts) == 1:
        return torch.mul(parts[0], factors[0], out=out)
    if factors[0] == 1.0:
        torch.add(parts[0], parts[1], alpha=factors[1], out=out)
    else:
        torch.mul(parts[0], factors[0], out=out).add_(parts[1], alpha=factors[1])
    for part, factor in zip(parts[2:], factors[2:], strict=True):
        out.add_(part, alpha=factor)
    return out


def _agreeing(parts: torch.Tensor) -> torch.Tensor:
    """(n, m) 1 for the entries whose sign is that of their sum, + where it is 0; 0 for others and for entries of 0."""
    sign = parts.sum(dim=0).ge_(0).mul_(2).sub_(1)
    return (parts * sign).gt_(0)


def sce(operands: Operands, settings: Settings) -> Piece:
    """Select the entries of largest variance, weigh models by their energy, erase minority signs.

    The int(select_topk * number of entries that vary) entries of largest variance over the terms stay; w_i is the
    share of term i's mean squared delta; divisors count as at least 1e-6.
    Source: Wan et al., "FuseChat: Knowledge Fusion of Chat Models", arXiv 2408.07990.
    """
    n, kept = settings.number("select_topk", 1.0), EVERYTHING

    def deltas(start: int, stop: int) -> torch.Tensor:
        parts = operands.scratch("parts", len(operands) * (stop - start)).view(len(operands), -1)
        base = operands.from_base(start, stop)
        for i in range(len(operands)):
            parts[i] = operands.delta(i, start, stop, base)
        return parts

    def variances(start: int, stop: int) -> torch.Tensor:
        return deltas(start, stop).var(dim=0, unbiased=False)

    if n < 1:
        chunks = list(operands.chunks())
        n_kept = int(sum(int(variances(*chunk).count_nonzero()) for chunk in chunks) * max(n, 0.0))
        kept = thresholds(Keys(variances, chunks), [n_kept], operands.dtype)[0] if n_kept else NOTHING

    def selected(start: int, stop: int) -> torch.Tensor:
        parts = deltas(start, stop)
        if kept is not EVERYTHING:
            parts.mul_(kept.kept_(parts.var(dim=0, unbiased=False), start))
        return parts

    energy = torch.zeros(len(operands), dtype=torch.float64)
    for start, stop in operands.chunks():
        energy += selected(start, stop).square().sum(dim=1).to("cpu", torch.float64)
    energy /= max(operands.n_values, 1)
    total = float(energy.sum())
    shares = energy / total if abs(total) >= 1e-6 else torch.full_like(energy, 1 / len(operands))

    def piece(start: int, stop: int) -> torch.Tensor:
        parts = selected(start, stop)
        weights = shares.to(parts)[:, None] * _agreeing(parts)
        merged = (parts * weights).sum(dim=0).div_(weights.sum(dim=0).clamp_min(1e-6))
        return operands.from_base(start, stop).add_(merged)

    return piece


def arcee_fusion(operands: Operands, settings: Settings) -> Piece:  # noqa: ARG001
    """Take those entries from the term that differ much from the base where its rows differ much as distributions.

    Importance is |delta| * KL(softmax(term row) || softmax(base row)), probabilities raised by 1e-8; what is at
    least median + 1.5 * (third - first quartile) is taken. Quartiles are exact, by the entries at int(q * (n - 1)).
    Source: the behaviour of mergekit's arcee_fusion, which has no paper.
    """

    def importance(start: int, stop: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        base, term = operands.from_base(start, stop), operands.term(0, start, stop)
        p, q = (x.view(-1, operands.row).softmax(dim=-1).add_(1e-8) for x in (term, base))
        divergence = (p * (p / q).log_()).sum(dim=-1, keepdim=True)
        delta = term.sub_(base)
        return base, delta, (delta.abs().view(-1, operands.row) * divergence).view(-1)

    def keys(start: int, stop: int) -> torch.Tensor:
        return value_keys(importance(start, stop)[2])

    n, row = operands.n_values, operands.row
    ranks = [n - int(q * (n - 1)) for q in (0.25, 0.5, 0.75)]
    found = cuts(Keys(keys, list(operands.chunks(row)), row), ranks)
    first, median, third = (key_value(cut.key) for cut in found)
    threshold = torch.tensor(median) + 1.5 * (torch.tensor(third) - torch.tensor(first))

    def piece(start: int, stop: int) -> torch.Tensor:
        base, delta, score = importance(start, stop)
        return base.add_(delta.mul_(score >= threshold.to(score)))

    return in_rows(piece, operands, row)


def _between(operands: Operands, i: int, n_above: int, n_kept: int) -> Thin | Threshold | None:
    """The `n_kept` entries that follow the `n_above` largest."""
    n = operands.n_values
    if n_above + n_kept >= n and not n_above:
        return None

    count = counting(operands, i)
    chunks = list(operands.chunks() if count is None else chunked(n, COUNTED))
    deltas = Keys(lambda start, stop: operands.delta(i, start, stop), chunks, counted=count)
    wanted = [k for k in (n_above, n_above + n_kept) if 0 < k < n]
    found = {
        0: NOTHING,
        n: EVERYTHING,
        **dict(zip(wanted, thresholds(deltas, wanted, operands.dtype), strict=True)),
    }
    above, within = found[n_above], found[n_above + n_kept]

    if not n_above:
        return within

    def thin(delta: torch.Tensor, start: int) -> torch.Tensor:
        kept = within.kept_(torch.abs(delta, out=operands.scratch("magnitudes", len(delta))), start)
        return delta.mul_(kept.sub_(above.kept_(delta.abs(), start)))

    return thin


def _rescaling(operands: Operands, i: int, thin: Thin | Threshold | None, whole: int) -> float:
    """sum |delta| before / after it is thinned, as mergekit rescales; 1 where either is next to nothing."""
    if thin is None:
        return 1.0
    before = after = 0.0
    for start, stop in operands.chunks(whole):
        delta = operands.delta(i, start, stop)
        before += float(torch.abs(delta, out=operands.scratch("size", len(delta))).sum(dtype=torch.float64))
        after += float(_thin(thin, delta, start).abs_().sum(dtype=torch.float64))
    return 1.0 if before < TINY_NORM or after < TINY_NORM else before / after


def _stream(settings: Settings, i: int) -> int:
    """Which random numbers term i of a tensor gets: by the tensor's name and its place among the terms."""
    return xxhash.xxh3_64_intdigest(f"{settings.text('stream', '')} {i}".encode()) >> 1


def in_rows(piece: Piece, operands: Operands, row: int) -> Piece:
    """A piece that is only ever asked for whole rows, for readers that want any range."""
    if row == 1:
        return piece

    def any_range(start: int, stop: int) -> torch.Tensor:
        first, last = start // row * row, min(-(-stop // row) * row, operands.n_values)
        return piece(first, last)[start - first : stop - first]

    return any_range
