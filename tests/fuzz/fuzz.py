"""`make fuzz`: malformed input, as much of it as is asked for: `python tests/fuzz/fuzz.py [--cases N] [--kind KIND]`.

A case ends well in one of two ways: with 0 and a result that loads, or with 2, one message that names the input, and a
file system that is the same byte for byte. Everything else is a fault and is printed with the number that repeats it.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from harness import Case, Outcome, Tree, call, judge, prepare, restore, tree
from kinds import FAMILIES, KINDS, MERGES, Place, good_cases, make_place, make_unfinished

# Of a hundred cases, how many are of a kind; reports are the slowest, since they are what a real run goes on from.
SHARES = {
    "run config": 20, "merge file": 16, "command line": 10, "dataset": 16, "tokenizer": 12, "config.json": 16,
    "weights": 8, "report": 2,
}  # fmt: skip


@dataclass(frozen=True)
class Tried:
    """A case by the kind and the number that make it again, and how it ended."""

    kind: str
    number: int
    case: Case
    outcome: Outcome


class Fuzzer:
    """Good input of the families that are asked for, and the cases made of it."""

    def __init__(self, folder: Path, families: tuple[str, ...], patch: pytest.MonkeyPatch) -> None:
        prepare(patch)
        self.places: dict[str, Place] = {}
        self.trees: dict[str, Tree] = {}
        for family in families:
            place = make_place(folder / family, family)
            if family == families[0]:
                make_unfinished(place)
            self.places[family], self.trees[family] = place, tree(place.folder)
        place = self.places[families[0]]
        os.chdir(place.folder)
        for arguments in good_cases(place):
            code, _, err = call(arguments, float("inf"))
            if code != 0:
                raise ValueError(f"good input is refused by {arguments}: {err}")
            restore(place.folder, self.trees[families[0]])
            place.merge_file(MERGES["linear"])
        restore(place.folder, self.trees[families[0]])

    def run(self, kind: str, number: int) -> Tried:
        """The case of a kind with this number: the same at each call."""
        rng = random.Random(f"{kind} {number}")
        family = rng.choice(list(self.places)) if kind == "config.json" else next(iter(self.places))
        place = self.places[family]
        case = KINDS[kind](rng, place)
        try:
            return Tried(kind, number, case, judge(place.folder, case))
        finally:
            restore(place.folder, self.trees[family])


def numbered(n_cases: int, kinds: list[str], first: int = 0) -> Iterator[tuple[str, int]]:
    """So many cases of these kinds, by their shares."""
    deck = [kind for kind in kinds for _ in range(SHARES[kind])]
    random.Random(0).shuffle(deck)
    for i in range(first, first + n_cases):
        yield deck[i % len(deck)], i


def main() -> int:
    """Try, print what is wrong and the sums; 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0, help="the number of the first case")
    parser.add_argument("--kind", choices=KINDS, action="append", help="only these kinds")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after this time")
    parser.add_argument("--show", action="store_true", help="print what each case printed")
    asked = parser.parse_args()
    memory = "/dev/shm" if os.path.isdir("/dev/shm") else None  # a disk would have to be waited for
    folder = Path(tempfile.mkdtemp(prefix="olmfast-fuzz-", dir=memory))
    counts: Counter[tuple[str, str]] = Counter()
    started = time.monotonic()
    try:
        fuzzer = Fuzzer(folder, FAMILIES, pytest.MonkeyPatch())
        began = time.monotonic()
        for kind, number in numbered(asked.cases, asked.kind or list(KINDS), asked.first):
            if time.monotonic() - began > asked.seconds:
                break
            tried = fuzzer.run(kind, number)
            end = "wrong" if tried.outcome.fault else "accepted" if tried.outcome.code == 0 else "refused"
            counts[kind, end] += 1
            if tried.outcome.fault or asked.show:
                print(f"{kind} {number}: {tried.outcome.fault}\n  olmfast {' '.join(tried.case.arguments)[:400]!a}")
                print(f"  {(tried.outcome.err or tried.outcome.out)[:600]!a}", flush=True)
    finally:
        shutil.rmtree(folder)
    for kind in KINDS:
        row = {end: counts[kind, end] for end in ("accepted", "refused", "wrong")}
        print(f"{kind:<13} " + ", ".join(f"{n} {end}" for end, n in row.items()))
    n_wrong = sum(n for (_, end), n in counts.items() if end == "wrong")
    took = f"{time.monotonic() - began:.0f} s, after {began - started:.0f} s of making good input"
    print(f"{sum(counts.values())} cases in {took}: {n_wrong} wrong")
    return bool(n_wrong)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent))
    sys.exit(main())
