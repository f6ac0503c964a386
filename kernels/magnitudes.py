"""Order statistics of values that are too many to be sorted, or even held: exact, in a few passes.

    cut(k): the k-th largest key, and how many of those equal to it are among the k largest

Keys are non-negative integers; `magnitude_keys` and `value_keys` order like |x| and like x. A radix select: each
pass counts 16 bits of the keys that may still be the one, so memory is one histogram whatever the size. Of equal
keys those of lowest index are taken.
Bytes: the values once per 16 bits of key (float32: twice), and once more where equal keys have to be told apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

DIGIT_BITS = 16
DIGITS = 1 << DIGIT_BITS

Pieces = Callable[[], Iterable[Tensor]]  # the keys, (m,) at a time, in the same order each time they are asked for


def magnitude_keys(values: Tensor) -> Tensor:
    """Integers ordered as |values|: int32 of 31 bits for float32, int64 of 63 bits for float64. NaN is largest."""
    return values.abs().view(torch.int64 if values.dtype == torch.float64 else torch.int32)


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
    """The magnitude in `dtype` of one of `magnitude_keys`."""
    bits = torch.tensor(key, dtype=torch.int64 if dtype == torch.float64 else torch.int32)
    return float(bits.view(dtype))


@dataclass(frozen=True)
class Cut:
    """What belongs to the k largest: keys above `key`, and those equal to it up to flat index `last`."""

    key: int
    last: int


@dataclass(frozen=True)
class Threshold:
    """The same for magnitudes: those above `value`, and those equal to it up to flat index `last`."""

    value: float
    last: int

    def kept_(self, magnitudes: Tensor, start: int) -> Tensor:
        """1 for what belongs and 0 for the rest, in place, for a stretch that begins at flat index `start`.

        In the values' own dtype, because masks of bool are several times slower on a CPU. NaN gives 0.
        """
        n_equal = min(max(self.last + 1 - start, 0), len(magnitudes))
        magnitudes[:n_equal].ge_(self.value)
        magnitudes[n_equal:].gt_(self.value)
        return magnitudes


LAST = torch.iinfo(torch.int64).max
NOTHING, EVERYTHING = Threshold(float("inf"), -1), Threshold(-1.0, LAST)


def thresholds(magnitudes: Pieces, n_kept: Sequence[int], dtype: torch.dtype) -> list[Threshold]:
    """`cuts` for magnitudes of `dtype`, float32 or float64."""

    def keys() -> Iterable[Tensor]:
        return (magnitude_keys(piece) for piece in magnitudes())

    found = cuts(keys, n_kept, 64 if dtype == torch.float64 else 32)
    return [Threshold(key_magnitude(cut.key, dtype), cut.last) for cut in found]


def cuts(pieces: Pieces, n_kept: Sequence[int], n_bits: int = 32) -> list[Cut]:
    """For each number k of `n_kept`, what belongs to the k largest keys; k is at least 1 and at most their number.

    Keys have at most `n_bits` bits, 32 or 64.
    """
    prefixes, remaining, n_equal = [0] * len(n_kept), list(n_kept), [0] * len(n_kept)
    for shift in range(n_bits - DIGIT_BITS, -1, -DIGIT_BITS):
        first = shift == n_bits - DIGIT_BITS
        wanted = sorted(set(prefixes))
        counts = {prefix: torch.zeros(DIGITS, dtype=torch.int64) for prefix in wanted}
        for keys in pieces():
            digits = keys >> shift
            for prefix, count in counts.items():
                members = digits if first else digits[(digits >> DIGIT_BITS) == prefix]
                count += torch.bincount(members & (DIGITS - 1), minlength=DIGITS).cpu()
        for i, prefix in enumerate(prefixes):
            from_top = counts[prefix].flip(0).cumsum(0)
            position = int((from_top < remaining[i]).sum())
            digit = DIGITS - 1 - position
            n_equal[i] = int(counts[prefix][digit])
            remaining[i] -= int(from_top[position]) - n_equal[i]
            prefixes[i] = prefix << DIGIT_BITS | digit
    found = zip(prefixes, remaining, n_equal, strict=True)
    return [Cut(key, LAST if quota == n else _index_of(pieces, key, quota)) for key, quota, n in found]


def _index_of(pieces: Pieces, key: int, number: int) -> int:
    """The flat index of the `number`-th key that equals `key`, counted from 1."""
    start = 0
    for keys in pieces():
        n_equal = int((keys == key).sum())
        if number <= n_equal:
            return start + int((keys == key).nonzero()[number - 1, 0])
        number -= n_equal
        start += len(keys)
    return start
