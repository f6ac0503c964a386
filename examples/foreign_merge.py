"""A merge script of its own, in plain torch, sped up by importing `olmfast.kernels`: nothing else of olmfast.

    python examples/foreign_merge.py

It merges three fine-tunes of one weight by TIES and by a weighted sum, once as such scripts are usually written
and once with the kernels, checks that both give the same, and prints the ratio of the times.
"""

import time

import torch

from olmfast.kernels import ties_merge, weighted_sum


def plain_sum(tensors, weights):
    return sum(tensor.float() * weight for tensor, weight in zip(tensors, weights)).to(tensors[0].dtype)  # noqa: B905


def plain_ties(tensors, weights, density, base):
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


def seconds(call, n_rounds=3):
    call()
    times = []
    for _ in range(n_rounds):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[n_rounds // 2]


def main():
    torch.manual_seed(0)
    base = torch.randn(4096, 1024)
    tensors, weights = [base + 0.1 * torch.randn_like(base) for _ in range(3)], [0.5, 0.3, 0.4]
    halves = [tensor.bfloat16() for tensor in tensors]
    pairs = {
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
    main()
