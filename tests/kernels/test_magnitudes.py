"""The k-th largest of values that come in pieces, compared with a stable sort of all of them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from olmfast.kernels import magnitudes
from olmfast.kernels.magnitudes import Keys, cuts, key_value, thresholds, value_keys


def keys_of(values: torch.Tensor, size: int = 997, row: int = 1) -> Keys:
    n = len(values)
    chunks = [(start, min(start + size, n)) for start in range(0, n, size)]
    return Keys(lambda start, stop: values[start:stop].clone(), chunks, row)


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
    for k, threshold in zip(wanted, thresholds(keys_of(x), wanted, dtype), strict=True):
        kept, thinned, start = [], [], 0
        for piece in x.split(613):
            kept.append(threshold.kept_(piece.abs(), start))
            thinned.append(threshold.thin_(piece.clone(), start))
            start += len(piece)
        expected = torch.zeros_like(x)
        expected[order[:k]] = 1
        assert torch.equal(torch.cat(kept), expected), k
        assert torch.equal(torch.cat(thinned), x * expected), k


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nan_stays_visible_in_what_is_thinned(dtype):
    x = torch.tensor([3.0, float("nan"), -1.0, 2.0], dtype=dtype).repeat(300)
    (threshold,) = thresholds(keys_of(x), [450], dtype)
    assert torch.equal(threshold.thin_(x.clone(), 0).isnan(), x.isnan())


def test_signed_values_are_ordered_as_values():
    x = torch.randn(4001, generator=torch.Generator().manual_seed(2))
    x[:3] = torch.tensor([-0.0, float("-inf"), 1e-40])
    found = cuts(keys_of(value_keys(x), 500), [1, 2000, 4001])
    assert [key_value(cut.key) for cut in found] == [
        float(x.sort(descending=True).values[k - 1]) for k in (1, 2000, 4001)
    ]


def chunks_of(n: int, size: int = 40_000):
    return [(start, min(start + size, n)) for start in range(0, n, size)]


@pytest.mark.parametrize("kind", ["smooth", "few values", "one value", "sorted", "a heavy one", "rows that differ"])
@pytest.mark.parametrize("bracket", ["the sample's", "one that misses", "one that holds too much"])
def test_a_sample_decides_nothing(kind, bracket, monkeypatch):
    """Beyond a few keys a sample brackets the threshold; where it misleads, the answer is the same."""
    if bracket == "one that misses":
        monkeypatch.setattr(magnitudes, "_bracket", lambda *_: magnitudes._Bracket(5, 6))
    if bracket == "one that holds too much":
        monkeypatch.setattr(magnitudes, "COLLECTED", 100)
    n, numbers = 300_007, torch.Generator().manual_seed(3)
    x = torch.randn(n, generator=numbers)
    if kind == "few values":
        x = (x * 2).round()
    if kind == "one value":
        x = torch.full_like(x, 0.5)
    if kind == "sorted":
        x = x.sort().values
    if kind == "a heavy one":
        x[torch.rand(n, generator=numbers) < 0.3] = 0.7
    if kind == "rows that differ":
        x *= (torch.arange(n) // 256 % 512 == 0) * 1000 + 1.0  # runs of the sample fall on the large ones
    order = x.abs().sort(descending=True, stable=True).indices
    wanted = [1, 2, n // 3, n // 2, n - 1, n]
    found = thresholds(Keys(lambda start, stop: x[start:stop].clone(), chunks_of(n)), wanted, torch.float32)
    for k, threshold in zip(wanted, found, strict=True):
        expected = torch.zeros(n)
        expected[order[:k]] = 1
        kept = [threshold.kept_(x[start:stop].abs(), start) for start, stop in chunks_of(n, 70_001)]
        assert torch.equal(torch.cat(kept), expected), k


def test_what_is_read_begins_and_ends_with_a_row():
    x, row = torch.randn(999 * 300, generator=torch.Generator().manual_seed(4)), 999
    chunks = chunks_of(len(x), row * 40)

    def read(start: int, stop: int) -> torch.Tensor:
        assert start % row == stop % row == 0 < stop - start
        return value_keys(x[start:stop])

    found = cuts(Keys(read, chunks, row), [1000, 200_000])
    ordered = x.sort(descending=True).values
    assert [key_value(cut.key) for cut in found] == [float(ordered[999]), float(ordered[199_999])]


@given(keys=st.lists(st.integers(0, 9), min_size=1, max_size=50), low=st.integers(-1, 9), width=st.integers(0, 5))
def test_keys_are_divided_by_numpy_as_by_torch(keys, low, width):
    keys, high = torch.tensor(keys, dtype=torch.int32), low + width
    masks = np.empty((4, len(keys)), dtype=bool)
    *counts, between = magnitudes._divide(keys, low, high)
    *others, within = magnitudes._divide_on_cpu(keys, low, high, masks)
    assert counts == others
    assert torch.equal(between, within)
    n_below = int((keys < low).sum())
    assert sum(counts) + len(between) + n_below == len(keys)
