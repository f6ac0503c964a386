"""A search with two workers beside the same search in one process: bytes, seconds, and what is sent.

    OMP_NUM_THREADS=1 pytest bench/test_cluster.py --benchmark-only

The 12-block case of `search_case.py` at a quarter of its width, 32 + 32 questions: the base, then two blocks as donors
have them; with OLMFAST_BENCH_ALL=1 at its own width, three blocks, and a module in each of them swapped and refined. On
a machine with other work wall times say little; so besides their ratio there is one that other work does not touch: the
CPU seconds of the one process by those of all of the other's (driver, workers and Ray's own), times the share of the
wall time that workers were at errands. What starts before the search does (Ray, libraries, building models) is told
apart.
"""

from __future__ import annotations

import importlib.util
import pickle
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
import search_case
import torch
from figures import ALL, room, sized
from search_case import BLOCKS, make_case, session, walk

from olmfast.cluster.crew import Crew, Desk, Errand, Member
from olmfast.cluster.scorer import ClusterEvaluation
from olmfast.cluster.worker import Worked, news_of
from olmfast.config.run import load_config
from olmfast.evaluation.planning import Call
from olmfast.evaluation.scorer import Candidate, Direction
from olmfast.search import evolve
from olmfast.search.acceptance import Scale
from olmfast.search.coefficients import Coefficients
from olmfast.search.crossfit import CrossFit
from olmfast.search.halves import Halves
from olmfast.testing import tiny_run
from olmfast.weights.coefficients import task_vectors
from olmfast.weights.expressions import Copy

pytestmark = pytest.mark.timeout(0)
Report = Callable[..., None]
N = 2


def cpu_s(process: psutil.Process) -> float:
    """CPU seconds of a process and of all that it has started and is still there."""
    found = 0.0
    for own in (process, *process.children(recursive=True)):
        try:
            times = own.cpu_times()
            found += times.user + times.system
        except psutil.NoSuchProcess:
            continue
    return found


def outcome(folder: Path) -> tuple[bytes, list[Path]]:
    """Every score of every candidate, and the tensors that evolution made."""
    folder = folder.with_name(f"{folder.name}.partial")
    return (folder / "evaluations.jsonl").read_bytes(), sorted((folder / "refined").iterdir())


@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs Ray")
def test_two_workers(
    benchmark: Any, report: Report, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    sent: Counter[str] = Counter()
    n_sent: Counter[str] = Counter()
    ask = Crew._ask

    def watched(self: Crew, desk: Desk, member: Member, errand: Errand) -> Any:
        sent[errand.method] += len(pickle.dumps(errand.args[1:]))  # the call is sent once, for all
        n_sent[errand.method] += 1
        return ask(self, desk, member, errand)

    samples, process = sized(2, 32, 32), psutil.Process()
    blocks, refined = (BLOCKS, BLOCKS) if ALL else (BLOCKS[:2], ())
    keys = {"base_select": True, "layer_swap": True, "es_svd": ALL, "es_norm": ALL, "es_norm_generations": 1}
    monkeypatch.setattr(search_case, "WIDTH", search_case.WIDTH // sized(1, 4, 1))
    monkeypatch.setattr(search_case, "INNER", search_case.INNER // sized(1, 4, 1))
    with room(tmp_path_factory, "cluster", 2e9) as folder:
        case = make_case(folder, samples)
        found, wall, cpu = {}, {}, {}
        for n in (1, N):
            config = case.config(samples, f"out{n}", **keys, workers=n)
            began = time.monotonic()
            with monkeypatch.context() as patch:
                patch.setattr(Crew, "_ask", watched)
                with session(config) as engine:
                    start_s = time.monotonic() - began
                    crew = engine.evaluation.crew if isinstance(engine.evaluation, ClusterEvaluation) else None
                    busy_before = crew.busy_s if crew is not None else 0.0
                    before, began = cpu_s(process), time.monotonic()
                    if n == 1:
                        benchmark.pedantic(lambda: walk(engine, blocks, refined), rounds=1)
                    else:
                        walk(engine, blocks, refined)
                    wall[n], cpu[n] = time.monotonic() - began, cpu_s(process) - before
                    found[n] = outcome(config.output_dir)
                    if crew is not None:
                        busy = (crew.busy_s - busy_before) / (N * wall[n])
        assert found[1][0] == found[N][0]
        for mine, theirs in zip(found[1][1], found[N][1], strict=True):
            assert mine.read_bytes() == theirs.read_bytes()
    each = {method: f"{sent[method] / n_sent[method] / 1e3:.1f} kB x {n_sent[method]}" for method in sent}
    report(
        f"{N} workers, {samples} + {samples} questions", f"{wall[N]:.0f} s", f"one process {wall[1]:.0f} s",
        wall[1] / wall[N], efficiency_by_wall=f"{wall[1] / wall[N] / N:.0%}",
        efficiency_by_cpu=f"{cpu[1] / cpu[N] * busy:.0%} ({cpu[1]:.0f} of {cpu[N]:.0f} CPU s, workers busy {busy:.0%})",
        load=" ".join(f"{x:.1f}" for x in psutil.getloadavg()), to_start=f"{start_s:.0f} s", **each,
    )  # fmt: skip


def size(value: object) -> int:
    """Bytes that a message takes."""
    return len(pickle.dumps(value))


def told(n: float) -> str:
    """Bytes in words."""
    return f"{n / 1e6:.1f} MB" if n >= 1e6 else f"{n / 1e3:.1f} kB" if n >= 1e3 else f"{n:.0f} B"


def test_what_is_sent(benchmark: Any, report: Report, tmp_path: Path) -> None:
    """Messages have the size of names and numbers, whatever that of the weights: a model of as many tensors as one of
    7 billion parameters has, each of them tiny, shows what is sent for both."""
    n_donors, n_blocks = 4, sized(2, 32, 32)
    place = tiny_run(tmp_path, n_donors, model={"num_hidden_layers": n_blocks})
    config = load_config(place, {"search": "joint"})
    sent: dict[str, int] = {}
    with session(config) as engine:
        search, pool = engine.search, engine.inputs.pool
        engine.choose_base()
        search.begin_tests(CrossFit(Halves.of(search.scorer.sizes, 0), Scale(search.rules.spans, {}), None))
        vectors = task_vectors(pool, list(pool.names), None, search.recipe.base, search.architecture.is_ignored)
        moves = Coefficients(search, vectors)
        block = search.architecture.window_unit(search.tensors, [0])
        offsets = torch.zeros(n_donors, len(vectors.tensors), dtype=torch.float64)
        noise = torch.randn(offsets.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        wanted = {name: list(range(n)) for name, n in search.scorer.sizes.items()}
        whole_model = [Candidate(str(i), vectors.moved(search.recipe, noise / (i + 1))) for i in range(8)]
        swaps = [Candidate(name, {n: Copy(name, n) for n in block.tensors}) for name in pool.names]
        sent["a call: a block as 4 donors have it"] = size(Call(block, tuple(swaps), wanted))
        sent["a call: 8 models that differ in every tensor"] = size(Call(moves.unit, tuple(whole_model), wanted))
        matrix = next(name for name in block.tensors if search.is_matrix(name))
        children = evolve.generation(search, matrix, "svd_es", 0, 0)
        sent[f"a call: {len(children)} offspring of a matrix"] = size(Call(block, tuple(children), wanted))
        directions = {
            name: [Direction(Copy("donor0", name), Copy(own, name)) for own in pool.names] for name in vectors.tensors
        }
        sent["a gradient's: values and directions of every tensor"] = size((whole_model[0], directions))
        rows = moves._rows("row")
        n_rows = sum(n for n, _ in rows.values())
        columns = sum(rows[name][0] if name in rows else 1 for name in vectors.tensors)
        by_row = vectors.moved(search.recipe, torch.randn(n_donors, columns, dtype=torch.float64), rows)
        sent["a gradient's, for each row of a matrix"] = round((size(by_row) - size(whole_model[0])) / n_rows)
        after = search.recipe.with_values(swaps[1].values)
        sent["news: a block has been swapped"] = size(news_of(search.recipe, after))
        after = search.recipe.with_values(whole_model[0].values)
        sent["news: every tensor is another"] = size(news_of(search.recipe, after))
        sent["a new worker: the recipe"] = size(search.recipe)
        scores = benchmark.pedantic(lambda: search.scorer.score(block, [Candidate("now"), *swaps[1:]]), rounds=1)
        n_questions = sum(map(len, wanted.values()))
        one, two = (size(Worked(scores.rows(range(n)), wanted, {})) for n in (1, 2))
        sent["an answer"] = 2 * one - two
        sent[f"an answer, for each candidate, on {n_questions} questions"] = two - one
        sent["an answer, for each token written"] = round(size([list(range(100, 1100))]) / 1000)
    for what, n in sent.items():
        report(f"{what} ({n_blocks} blocks, {n_donors} donors)" if n > 100 else what, told(n))
