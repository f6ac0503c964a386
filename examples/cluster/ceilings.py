"""How much faster a step becomes with more workers, computed from what `bench/test_cluster.py` measures.

    python examples/cluster/ceilings.py

A step's work is its errands: candidates that are scored together, or one, on one of at most eight parts of the
questions. The driver sends an errand and takes its answer in `MESSAGE_S`; what no errand can be made smaller than, and
what only the driver does, bound the rest.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from olmfast.evaluation.division import PARTS

MESSAGE_S = 0.001  # an errand and its answer, one after another: docs/cluster.md says how it was measured
BYTES_PER_S = 1e9  # of a network of 10 Gbit/s, and about what one process can pickle


@dataclass(frozen=True)
class Step:
    """`scored_s` is what all of it takes one worker, `errands` how many pieces of about the same size that can be cut
    into, `sent` the bytes of a call."""

    name: str
    scored_s: float
    errands: int
    sent: float


def seconds(step: Step, workers: int) -> float:
    """What the step takes: rounds of its errands, or the driver's messages where these take longer."""
    used = min(workers, step.errands)
    rounds = math.ceil(step.errands / used) / step.errands
    return max(step.scored_s * rounds, step.errands * MESSAGE_S) + step.sent / BYTES_PER_S


def main() -> None:
    per_candidate_s = 60.0  # of a model of 7 billion parameters on 600 questions, say
    population = 4 + int(3 * math.log(6 * 4))  # six groups of tensors, four donors
    steps = [
        Step("a block, as 3 other donors have it, together", 3 * per_candidate_s, PARTS, 1.6e3),
        Step("22 offspring of a matrix, together", 22 * per_candidate_s, PARTS, 3e3),
        Step(
            f"a generation of {population} models", population * per_candidate_s, population * PARTS, 66e3 * population
        ),
        Step("a generation of 125 models", 125 * per_candidate_s, 125 * PARTS, 66e3 * 125),
        Step("a gradient step of both halves", 2 * per_candidate_s / 50, 2, 2 * 146e3),
    ]
    counts = (1, 2, 8, 64, 1000)
    print(f"{'times as fast with workers':44}" + "".join(f"{n:>8}" for n in counts) + "  errands")
    for step in steps:
        gains = [seconds(step, 1) / seconds(step, n) for n in counts]
        print(f"{step.name:44}" + "".join(f"{gain:8.1f}" for gain in gains) + f"{step.errands:9}")


if __name__ == "__main__":
    main()
