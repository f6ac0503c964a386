"""Order statistics of values that are too many to be sorted, or even held: exact, mostly in one pass.

    cut(k): the k-th largest key, and how many of those equal to it are among the k largest

Keys are non-negative integers; `magnitude_keys_` and `value_keys` order like |x| and like x. A sample brackets the
key; one pass counts what lies above the bracket and collects what lies within. Where the bracket has missed, or
holds too much, a radix select takes over: each pass counts 16 bits of the keys that may still be the one, so memory
is one histogram whatever the size. The sample decides what is fast, never what is found.
Of equal keys those of lowest index are taken.
Bytes: the values once, a few of them twice; by radix select once per 16 bits of key.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

DIGIT_BITS = 16
DIGITS = 1 << DIGIT_BITS
# The bracket of so few keys holds them all; no more than so many are collected.
FEW, COLLECTED = 1 << 17, 1 << 23
# The sample: a run of so many neighbours from each of so many keys, at least and at most so many runs.
RUN, SPARSE, FEWEST_RUNS, MOST_RUNS = 1024, 1 << 18, 8, 512
# The bracket is as wide as so many standard errors of the sample, to either side.
ERRORS = 5


class Keys(NamedTuple):
    """Keys that are read a chunk at a time.

    `read(start, stop)` gives those from flat index `start` on, (stop - start,), in memory that may be used again;
    `chunks` are consecutive and cover all. Whatever is read begins and ends at a multiple of `row`.
    `counted(start, stop, low, high)`, where there is one, gives of those that `read` would give how many are above
    `high`, from `high` on, above `low` and from `low` on, and those between the two.
    """

    read: Callable[[int, int], Tensor]
    chunks: Sequence[tuple[int, int]]
    row: int = 1
    counted: Callable[[int, int, int, int], tuple[int, int, int, int, Tensor]] | None = None

    @property
    def n_values(self) -> int:
        """How many there are."""
        return self.chunks[-1][1]


def magnitude_keys_(values: Tensor) -> Tensor:
    """Integers ordered as |values|, in their memory: int32 of 31 bits, for float64 int64 of 63. NaN is largest."""
    return values.abs_().view(torch.int64 if values.dtype == torch.float64 else torch.int32)


def value_keys(values: Tensor) -> Tensor:
    """Non-negative int64 of 32 bits ordered as float32 `values`."""
    bits = values.to(torch.float32).view(torch.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(torch.int64) + (1 << 31)


def key_value(key: int) -> float:
    """The float32 value of one of `value_keys`."""
    bits = key - (1 << 31)
    bits ^= 0x7FFFFFFF if bits < 0 else 0
    return float(torch.tensor(bits, dtype=torch.int32).view(torch.float32))


def key_magnitude(key: int, dtype: torch.dtype) -> float:
    """The magnitude in `dtype` of one of `magnitude_keys_`."""
    bits = torch.tensor(key, dtype=torch.int64 if dtype == torch.float64 else torch.int32)
    return float(bits.view(dtype))


@dataclass(frozen=True)
class Cut:
    """What belongs to the k largest: keys above `key`, and those equal to it up to flat index `last`."""

    key: int
    last: int


@dataclass(frozen=True)
class Threshold:
    """The same for magnitudes: those above `value`, and those equal to it up to flat index `last`.

    `below` is the next smaller magnitude, negative where there is none.
    """

    value: float
    last: int
    below: float

    def kept_(self, magnitudes: Tensor, start: int) -> Tensor:
        """1 for what belongs and 0 for the rest, in place, for a chunk that begins at flat index `start`.

        In the values' own dtype, because masks of bool are several times slower on a CPU. NaN gives 0.
        """
        n_equal = self.n_equal(start, len(magnitudes))
        magnitudes[:n_equal].ge_(self.value)
        magnitudes[n_equal:].gt_(self.value)
        return magnitudes

    def n_equal(self, start: int, n: int) -> int:
        """How many of `n` values from flat index `start` on belong if they are equal to `value`: the first ones."""
        return min(max(self.last + 1 - start, 0), n)

    def thin_(self, values: Tensor, start: int) -> Tensor:
        """Set what does not belong to 0, in place, for a chunk that begins at flat index `start`; NaN stays."""
        n_equal = self.n_equal(start, len(values))
        for part, largest in ((values[:n_equal], self.below), (values[n_equal:], self.value)):
            if largest >= 0 and len(part):
                torch.ops.aten.hardshrink.out(part, largest, out=part)
        return values


LAST = torch.iinfo(torch.int64).max
NOTHING, EVERYTHING = Threshold(float("inf"), -1, float("inf")), Threshold(-1.0, LAST, -1.0)


def thresholds(magnitudes: Keys, n_kept: Sequence[int], dtype: torch.dtype) -> list[Threshold]:
    """`cuts` for magnitudes of `dtype`, float32 or float64: here `read` gives values, which are changed in place."""
    keys = magnitudes._replace(read=lambda start, stop: magnitude_keys_(magnitudes.read(start, stop)))
    found = cuts(keys, n_kept, 64 if dtype == torch.float64 else 32)
    below = [key_magnitude(cut.key - 1, dtype) if cut.key else -1.0 for cut in found]
    return [Threshold(key_magnitude(cut.key, dtype), cut.last, under) for cut, under in zip(found, below, strict=True)]


def cuts(keys: Keys, n_kept: Sequence[int], n_bits: int = 32) -> list[Cut]:
    """For each number k of `n_kept`, what belongs to the k largest keys; k is at least 1 and at most their number.

    Keys have at most `n_bits` bits, 32 or 64.
    """
    sample = _sample(keys)
    tallies = {k: _Tally(_bracket(sample, k / keys.n_values, keys.n_values <= FEW)) for k in n_kept}
    longest = max(stop - start for start, stop in keys.chunks)
    masks = np.empty((4, 0 if keys.counted else longest), dtype=bool)
    for start, stop in keys.chunks:
        if keys.counted is None:
            piece = keys.read(start, stop)
            for tally in tallies.values():
                tally.look_at(piece, masks)
        else:
            for tally in tallies.values():
                *counts, between = keys.counted(start, stop, tally.low, tally.high)
                tally.add(*_parts(counts, tally.low == tally.high, between))
    found = {k: cut for k, tally in tallies.items() if (cut := tally.cut(k, keys)) is not None}
    missed = [k for k in tallies if k not in found]
    if missed:
        found |= zip(missed, _radix_select(keys, missed, n_bits), strict=True)
    return [found[k] for k in n_kept]


class _Bracket(NamedTuple):
    """Where a key is expected: between `low` and `high`, either included."""

    low: int
    high: int


class _Tally:
    """What one pass finds out about a bracket."""

    def __init__(self, bracket: _Bracket) -> None:
        self.low, self.high = bracket
        self.n_above, self.at_high, self.at_low = 0, list[int](), list[int]()  # at the ends: chunk by chunk
        self.between: list[Tensor] = []
        self.n_between = 0

    def look_at(self, keys: Tensor, masks: np.ndarray) -> None:
        """One chunk; `masks` is memory for four of its length."""
        if keys.device.type == "cpu":
            self.add(*_divide_on_cpu(keys, self.low, self.high, masks[:, : len(keys)]))
        else:
            self.add(*_divide(keys, self.low, self.high))

    def add(self, n_above: int, n_high: int, n_low: int, between: Tensor) -> None:
        """What a chunk has above the bracket, at its ends, and between them."""
        self.n_above += n_above
        self.at_high.append(n_high)
        self.at_low.append(n_low)
        self.n_between += len(between)
        if self.n_between > COLLECTED:
            self.between.clear()
        else:
            self.between.append(between)

    def cut(self, k: int, keys: Keys) -> Cut | None:
        """Where the k largest end; None if that is not known."""
        quota = k - self.n_above
        if quota <= 0:
            return None
        if quota <= sum(self.at_high):
            return _up_to(keys, self.high, quota, self.at_high)
        quota -= sum(self.at_high)
        if quota <= self.n_between:
            if self.n_between > COLLECTED:
                return None
            between = torch.cat(self.between)
            key = between.kthvalue(len(between) - quota + 1).values
            quota -= int((between > key).sum())
            counts = [int((part == key).sum()) for part in self.between]
            return _up_to(keys, int(key), quota, counts)
        quota -= self.n_between
        return _up_to(keys, self.low, quota, self.at_low) if quota <= sum(self.at_low) else None


def _divide(keys: Tensor, low: int, high: int) -> tuple[int, int, int, Tensor]:
    """How many keys are above `high`, equal to it, equal to `low` (0 if that is the same), and those between."""
    above, from_high, over, from_low = keys > high, keys >= high, keys > low, keys >= low
    counts = torch.stack([mask.sum() for mask in (above, from_high, over, from_low)]).tolist()
    return _parts(counts, low == high, keys[over & ~from_high])


def _divide_on_cpu(keys: Tensor, low: int, high: int, masks: np.ndarray) -> tuple[int, int, int, Tensor]:
    """`_divide` by NumPy, whose masks are ten times as fast as torch's on a CPU; `masks` (4, keys) are memory."""
    array = keys.numpy()
    above, from_high = np.greater(array, high, out=masks[0]), np.greater_equal(array, high, out=masks[1])
    over, from_low = np.greater(array, low, out=masks[2]), np.greater_equal(array, low, out=masks[3])
    counts = [int(np.count_nonzero(mask)) for mask in (above, from_high, over, from_low)]
    return _parts(counts, low == high, torch.from_numpy(array[np.greater(over, from_high, out=over)]))


def _parts(counts: list[int], same: bool, between: Tensor) -> tuple[int, int, int, Tensor]:
    above, from_high, over, from_low = counts
    return above, from_high - above, 0 if same else from_low - over, between


def _sample(keys: Keys) -> Tensor:
    """(runs, keys of a run): consecutive keys from places spread evenly."""
    n, run = keys.n_values, min(-(-RUN // keys.row) * keys.row, keys.n_values)
    n_runs = min(max(n // SPARSE, FEWEST_RUNS), MOST_RUNS)
    last = (n - run) // keys.row
    starts = [last * i // (n_runs - 1) * keys.row for i in range(n_runs)]
    return torch.stack([keys.read(start, start + run).clone() for start in starts])


def _bracket(sample: Tensor, share: float, everything: bool) -> _Bracket:
    """Keys between which the one is likely to be that has `share` of all keys above it.

    Neighbours are alike, so that runs, not keys, count as independent.
    """
    largest = torch.iinfo(sample.dtype).max
    if everything:
        return _Bracket(-1, largest)
    ordered = sample.flatten().sort(descending=True).values
    n = len(ordered)
    middle = min(int(share * n), n - 1)
    above = (sample > ordered[middle]).double().mean(dim=1)
    width = int(ERRORS * float(above.std()) / len(sample) ** 0.5 * n) + 2
    low = int(ordered[middle + width]) if middle + width < n else -1
    high = int(ordered[middle - width]) if middle >= width else largest
    return _Bracket(low, high)


def _up_to(keys: Keys, key: int, quota: int, counts: Sequence[int]) -> Cut:
    """Keys above `key` and the first `quota` of those equal to it; `counts` are how many each chunk has."""
    if quota == sum(counts):
        return Cut(key, LAST)
    for (start, stop), n in zip(keys.chunks, counts, strict=True):
        if quota <= n:
            return Cut(key, start + int((keys.read(start, stop) == key).nonzero()[quota - 1, 0]))
        quota -= n
    raise ValueError(f"there are fewer keys of {key} than were counted")


def _radix_select(keys: Keys, n_kept: Sequence[int], n_bits: int) -> list[Cut]:
    """`cuts` by counting digits, 16 bits a pass, whatever the keys are."""
    prefixes, remaining = [0] * len(n_kept), list(n_kept)
    for shift in range(n_bits - DIGIT_BITS, -1, -DIGIT_BITS):
        first = shift == n_bits - DIGIT_BITS
        counts = {prefix: torch.zeros(DIGITS, dtype=torch.int64) for prefix in sorted(set(prefixes))}
        for start, stop in keys.chunks:
            digits = keys.read(start, stop) >> shift
            for prefix, count in counts.items():
                members = digits if first else digits[(digits >> DIGIT_BITS) == prefix]
                count += torch.bincount(members & (DIGITS - 1), minlength=DIGITS).cpu()
        for i, prefix in enumerate(prefixes):
            from_top = counts[prefix].flip(0).cumsum(0)
            position = int((from_top < remaining[i]).sum())
            digit = DIGITS - 1 - position
            remaining[i] -= int(from_top[position] - counts[prefix][digit])
            prefixes[i] = prefix << DIGIT_BITS | digit
    equal = [[int((keys.read(*chunk) == key).sum()) for chunk in keys.chunks] for key in prefixes]
    return [_up_to(keys, *found) for found in zip(prefixes, remaining, equal, strict=True)]
