"""Reinforced Agent Merging: what several terms changed is averaged, what one alone changed is kept, or amplified.

    changed_i = |term_i - base| > epsilon          count = number of terms that changed the entry
    result    = base + sum_i scale_i * changed_i * (term_i - base)             where count = 1
                base + sum_i changed_i * (term_i - base) / count               elsewhere

Source: Yuan et al., "Behavior Knowledge Merge in Reinforced Agentic Models", arXiv 2601.13572.
"""

from __future__ import annotations

import torch

from olmfast.weights.chunks import Operands, Piece, Settings

EPSILON, RATIO, CLIP = 1e-5, 0.1, 0.2


def ram(operands: Operands, settings: Settings) -> Piece:
    """RAM: every scale is 1."""
    return _merged(operands, settings.number("epsilon", EPSILON), None)


def ram_plus(operands: Operands, settings: Settings) -> Piece:
    """RAM+, tensor by tensor: scale_i = 1 + r * min(shared_i / max(alone_i, epsilon), alpha).

    shared_i and alone_i are how many entries term i changed with others and alone. The paper counts over the whole
    model; over one tensor it is mergekit's `ramplus_tl`.
    """
    epsilon, clip = settings.number("epsilon", EPSILON), settings.number("alpha", CLIP)
    shared, alone = (torch.zeros(len(operands), dtype=torch.float64) for _ in range(2))
    for start, stop in operands.chunks():
        _, changed, counts = _differences(operands, start, stop, operands.from_base(start, stop), epsilon)
        shared += (changed & (counts > 1)).sum(dim=1).to("cpu", torch.float64)
        alone += (changed & (counts == 1)).sum(dim=1).to("cpu", torch.float64)
    overlap = (shared / alone.clamp_min(max(epsilon, 1.0))).clamp(0, clip)
    return _merged(operands, epsilon, 1 + settings.number("r", RATIO) * overlap)


def _merged(operands: Operands, epsilon: float, scales: torch.Tensor | None) -> Piece:
    def piece(start: int, stop: int) -> torch.Tensor:
        base = operands.from_base(start, stop)
        parts, changed, counts = _differences(operands, start, stop, base, epsilon)
        parts.mul_(changed)  # a product, not a choice: NaN stays visible
        if scales is not None:
            parts.mul_(torch.where(counts == 1, scales.to(parts)[:, None], parts.new_ones(())))
        return base.add_(parts.sum(dim=0).div_(counts.clamp_min(1)))

    return piece


def _differences(
    operands: Operands, start: int, stop: int, base: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(n, m) terms minus the base, (n, m) whether these count as changes, (m,) how many do."""
    parts = operands.scratch("parts", len(operands) * (stop - start)).view(len(operands), -1)
    for i in range(len(operands)):
        parts[i] = operands.delta(i, start, stop, base)
    changed = parts.abs() > epsilon
    return parts, changed, changed.sum(dim=0)
