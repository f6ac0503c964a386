"""A merge script of its own, in plain torch, sped up by importing `olmfast.kernels`: nothing else of olmfast.

    python examples/foreign_merge.py [ROWS]

It merges three fine-tunes of one weight by TIES and by a weighted sum, once as such scripts are usually written
and once with the kernels, checks that both give the same, and prints the ratio of the times.
"""

import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from olmfast.kernels import ties_merge, weighted_sum


def plain_sum(tensors: list[Tensor], weights: list[float]) -> Tensor:
    terms = (tensor.float() * weight for tensor, weight in zip(tensors, weights, strict=True))
    return sum(terms, torch.zeros(())).to(tensors[0].dtype)


def plain_ties(tensors: list[Tensor], weights: list[float], density: float, base: Tensor) -> Tensor:
    deltas = torch.stack([tensor.float() - base.float() for tensor in tensors])
    k = max(1, int(density * base.numel()))
    for delta in deltas:
        kept = delta.abs().flatten().topk(k).indices
        delta.mul_(torch.zeros(base.numel()).index_fill_(0, kept, 1.0).view_as(base))
    factors = torch.tensor(weights).view(-1, 1, 1)
    parts = deltas * factors
    agree = parts.sign() == torch.where(parts.sum(0) >= 0, 1.0, -1.0)
    divisor = (factors * agree).sum(0)
    return (base + (parts * agree).sum(0) / divisor.masked_fill(divisor.abs() < 1e-8, 1.0)).to(base.dtype)


def seconds(call: Callable[[], object], n_rounds: int = 3) -> float:
    call()
    times = []
    for _ in range(n_rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[n_rounds // 2]


def main(rows: int) -> None:
    torch.manual_seed(0)
    base = torch.randn(rows, 1024)
    tensors, weights = [base + 0.1 * torch.randn_like(base) for _ in range(3)], [0.5, 0.3, 0.4]
    halves = [tensor.bfloat16() for tensor in tensors]
    pairs: dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]] = {
        "TIES, float32": (
            lambda: plain_ties(tensors, weights, 0.3, base),
            lambda: ties_merge(tensors, weights, 0.3, base=base),
        ),
        "weighted sum, bfloat16": (lambda: plain_sum(halves, weights), lambda: weighted_sum(halves, weights)),
    }
    for name, (plain, fast) in pairs.items():
        torch.testing.assert_close(fast(), plain())
        before, after = seconds(plain), seconds(fast)
        print(f"{name}: plain torch {before * 1e3:.0f} ms, olmfast.kernels {after * 1e3:.0f} ms: {before / after:.1f}x")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 4096)
