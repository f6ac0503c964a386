"""A gradient along task vectors, by row: blocks whose activations are kept, against blocks that are computed again.

    OMP_NUM_THREADS=1 pytest bench/test_slopes.py --benchmark-only

The case is that of search_case.py, with questions that are read along; a gradient is of as many as a search by
gradient takes at a time (12 for each half). `all at once` is the sequential Scorer, which goes back through the whole
module, a question at a time, and holds every weight's gradient. CPU seconds, in turn, medians of 3 (5
with OLMFAST_BENCH_ALL=1).
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from figures import sized
from peak import cpu
from search_case import make_case, session

from olmfast.evaluation.batched import BatchedScorer
from olmfast.evaluation.scorer import Candidate, Direction, Slopes
from olmfast.evaluation.sequential import SequentialScorer
from olmfast.weights.expressions import Copy

pytestmark = pytest.mark.timeout(0)
Report = Callable[..., None]
QUESTIONS, ROUNDS = sized(2, 12, 12), sized(1, 3, 5)


def test_a_gradient_along_rows(benchmark: Any, report: Report, tmp_path: Path) -> None:
    case = make_case(tmp_path, QUESTIONS, n_donors=3)
    keys: dict[str, Any] = {"dataset": {"forced.json": {"mode": "exact"}}, "validation": 0.0}
    with session(case.config(QUESTIONS, **keys)) as engine:
        search, scorer = engine.search, engine.search.scorer
        assert isinstance(scorer, BatchedScorer)
        base, *donors = search.donors
        names = [name for name in search.tensors if scorer.architecture.block_of(name) is not None]
        directions = {
            name: [Direction(Copy(base, name), Copy(donor, name), axis=0) for donor in donors] for name in names
        }
        told: tuple[Any, ...] = (
            Candidate("now"),
            directions,
            {"forced.json": list(range(len(scorer.datasets["forced.json"].samples)))},
            {"forced.json": 1.0},
            {},
        )
        plain = SequentialScorer(
            scorer.model, scorer.datasets, scorer.tokenizer, scorer.stop_tokens, scorer.batch_tokens
        )
        room = scorer.shares.graph_bytes

        def gradient(by: Any, graph_bytes: int) -> Slopes:
            scorer.shares.graph_bytes = graph_bytes
            found: Slopes = by.slopes(*told)
            return found

        ways = {
            "kept": partial(gradient, scorer, room),
            "computed again": partial(gradient, scorer, 0),
            "all at once": partial(gradient, plain, 0),
        }
        found = {way: call() for way, call in ways.items()}  # which also fills caches
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(ROUNDS):
            for way, call in ways.items():
                times[way].append(cpu(call))
        benchmark.pedantic(ways["kept"], rounds=1)
    kept, *others = ((way, median(own)) for way, own in times.items())
    for way, seconds in others:
        report(
            f"a gradient of {QUESTIONS} questions",
            f"{kept[1]:.3g} CPU s",
            f"{way} {seconds:.3g} CPU s",
            seconds / kept[1],
        )
    for name in names:
        assert torch.equal(found["kept"].along[name], found["computed again"].along[name])
        torch.testing.assert_close(found["kept"].along[name], found["all at once"].along[name], rtol=1e-3, atol=1e-4)
