"""The k-th largest of values that come in pieces, compared with a stable sort of all of them."""

from __future__ import annotations

import pytest
import torch

from olmfast.kernels.magnitudes import cuts, key_value, thresholds, value_keys


def pieces(values: torch.Tensor, size: int = 997):
    return lambda: (piece.clone() for piece in values.split(size))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["distinct", "equal", "few values", "zeros among them"])
def test_the_k_largest_are_those_of_a_stable_sort(kind, dtype):
    numbers = torch.Generator().manual_seed(1)
    x = torch.randn(5000, generator=numbers, dtype=dtype)
    if kind == "equal":
        x = torch.full_like(x, -2.5)
    if kind == "few values":
        x = (x * 3).round()
    if kind == "zeros among them":
        x[::3] = 0
    order = x.abs().sort(descending=True, stable=True).indices
    wanted = [1, 2, 998, 2500, 4999, 5000]
    for k, threshold in zip(wanted, thresholds(pieces(x.abs()), wanted, dtype), strict=True):
        kept, start = [], 0
        for piece in x.split(613):
            kept.append(threshold.kept_(piece.abs(), start))
            start += len(piece)
        expected = torch.zeros_like(x)
        expected[order[:k]] = 1
        assert torch.equal(torch.cat(kept), expected), k


def test_signed_values_are_ordered_as_values():
    x = torch.randn(4001, generator=torch.Generator().manual_seed(2))
    x[:3] = torch.tensor([-0.0, float("-inf"), 1e-40])
    found = cuts(lambda: (value_keys(piece) for piece in x.split(500)), [1, 2000, 4001])
    assert [key_value(cut.key) for cut in found] == [
        float(x.sort(descending=True).values[k - 1]) for k in (1, 2000, 4001)
    ]
