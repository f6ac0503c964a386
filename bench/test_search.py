"""The search: olmfast's scorers against a plain driver that works as the original did, and against each other.

    OMP_NUM_THREADS=1 pytest bench/test_search.py --benchmark-only

A Llama of 12 blocks, width 512 and 8,000 words, four donors, questions of about 100 tokens with answers of 20
(`search_case.py`); the plain driver is `baseline.py`. Times are CPU seconds of the whole process, so that other work
on the machine counts little. The plain driver needs about 11 CPU seconds for a candidate on 4 + 4 questions and scores
candidates one after another, none faster or slower than the next: it is given one of each kind, and a search in a
model of 2 blocks on 2 + 2 questions in which one module is refined. With OLMFAST_BENCH_ALL=1 it gets two of each kind
in three blocks on 32 + 32 questions, and a search of 12 blocks, 8 + 8 questions and three modules: about two hours.
"""

from __future__ import annotations

import json
import re
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from baseline import Baseline
from figures import ALL, TINY, Figures, room, sized
from peak import cpu, peak_memory
from search_case import BLOCKS, N_BLOCKS, Case, candidates_of, make_case, module_unit, modules_in, session, walk

from olmfast.config.searches import Racing
from olmfast.evaluation.batched import BatchedScorer
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores
from olmfast.search import evolve
from olmfast.search.candidates import swap
from olmfast.search.log import Outcome
from olmfast.search.loop import Search
from olmfast.search.racing import heats
from olmfast.search.ranking import Rules, choose
from olmfast.search.record import LEDGER
from olmfast.weights.architecture import Unit

pytestmark = pytest.mark.timeout(0)
Report = Callable[..., None]
KINDS = ("block", "unit", "svd_es", "norm_es")
SEEDS = 30  # orders of questions that races are repeated in
DEMO = Path(__file__).parents[1] / "examples" / "demo" / "olm_config.yaml"
NOW = Candidate("now")


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with room(tmp_path_factory, "search", 2e9) as folder:
        yield make_case(folder, sized(2, 8, 32))


def plain_scores(kind: str, baseline: Baseline, unit: Unit, candidates: list[Candidate]) -> list[Scores]:
    """The same candidates by the plain driver, one after another."""
    if kind in ("block", "unit"):
        return [baseline.score_donor(candidate.label, unit.tensors) for candidate in candidates]
    offspring = baseline.offspring(unit.tensors[0], kind)
    indices = [int(candidate.label.rsplit("/", 1)[1]) for candidate in candidates]
    return [baseline.score_child(unit.tensors[0], offspring.child(index)) for index in indices]


def test_cpu_seconds_per_candidate(benchmark: Any, report: Report, case: Case) -> None:
    questions = sized(2, 4, 32)
    ours: dict[str, list[float]] = {kind: [] for kind in KINDS}
    plain: dict[str, list[float]] = {kind: [] for kind in KINDS}
    worst = 0.0
    with session(case.config(questions, "candidates")) as engine:
        scorer = engine.search.scorer
        assert isinstance(scorer, BatchedScorer)
        Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
        before = resident("VmRSS")
        current = cpu(lambda: scorer.score(engine.search.architecture.model_unit(engine.search.tensors), [NOW]))
        scored: dict[tuple[str, int], tuple[Unit, list[Candidate], Scores]] = {}
        for kind in KINDS:  # each kind walks up the blocks from the first, as a search does
            for block in BLOCKS:
                began = time.process_time()
                unit, candidates = candidates_of(kind, engine, block)
                scores = scorer.score(unit, candidates)
                ours[kind].append((time.process_time() - began) / len(candidates))
                scored[kind, block] = (unit, candidates, scores)
        peak, statistics = resident("VmHWM") - before, scorer.statistics
        baseline = Baseline(case.folders, engine.inputs.selection.datasets, case.folder / "plain")
        baseline.start(engine.search.recipe.base, scores)
        for (kind, block), (unit, candidates, scores) in scored.items():
            if block == BLOCKS[1] or ALL:
                some = candidates[: 2 if ALL else 1]
                began = time.process_time()
                found = plain_scores(kind, baseline, unit, some)
                plain[kind].append((time.process_time() - began) / len(some))
                for row, one in enumerate(found):
                    for name in one.samples:
                        worst = max(worst, float((one.samples[name][0] - scores.samples[name][row]).abs().max()))
        benchmark.pedantic(lambda: scorer.score(unit, candidates), rounds=1)
    mean = {kind: (sum(plain[kind]) / len(plain[kind]), sum(ours[kind]) / len(ours[kind])) for kind in KINDS}
    for kind, (slow, fast) in mean.items():
        by_block = ", ".join(f"{s:.2f} s in block {block}" for block, s in zip(BLOCKS, ours[kind], strict=True))
        case_name = f"a candidate, {kind}, {questions} + {questions} questions"
        report(case_name, f"{fast:.2f} CPU s", f"plain {slow:.1f} CPU s", slow / fast, of_which=by_block)
    slow, fast = (sum(column) / len(KINDS) for column in zip(*mean.values(), strict=True))
    report(
        "a candidate, all kinds", f"{fast:.2f} CPU s", f"plain {slow:.1f} CPU s", slow / fast,
        scoring_the_current_model=f"{current:.1f} s", padding=f"{statistics.padding:.1%}",
        decoded_tokens=statistics.decoded, passes=statistics.passes, memory_growth=f"{peak / 1e6:.0f} MB",
        largest_difference_of_a_score=f"{worst:.1e}",
    )  # fmt: skip


def test_a_search_decides_as_the_plain_driver(
    benchmark: Any, report: Report, figures: Figures, tmp_path_factory: pytest.TempPathFactory
) -> None:
    n_blocks, samples = sized((2, 2), (2, 2), (N_BLOCKS, 8))
    blocks, refined = (BLOCKS, BLOCKS) if ALL else ((0, 1), (1,))
    keys = {"base_select": True, "es_svd": True, "es_norm": True, "es_norm_generations": 1}
    with room(tmp_path_factory, "decisions", 2e9) as folder:
        case = make_case(folder, samples, n_blocks)
        with session(case.config(samples, "search", **keys)) as engine:
            ours = cpu(lambda: benchmark.pedantic(lambda: walk(engine, blocks, refined), rounds=1))
            decisions = list(engine.record.steps.values())
            unit_of = {
                block: engine.search.architecture.window_unit(engine.search.tensors, [block]) for block in blocks
            }
            baseline = Baseline(case.folders, engine.inputs.selection.datasets, case.folder / "plain")

            def search() -> None:
                baseline.select_base()
                for block in blocks:
                    baseline.swap(f"layers/{block}", unit_of[block].tensors)
                for name in modules_in(refined).values():
                    baseline.swap(f"tensors/{name}", [f"{name}.weight"])
                    baseline.evolve(name, f"{name}.weight", "svd_es")
                    baseline.evolve(name, f"{name}.weight", "norm_es")

            plain = cpu(search)
    same, worst = 0, 0.0
    for mine, theirs in zip(decisions, baseline.decisions, strict=True):
        pairs = [(mine.metrics[name][label], own) for name, by in theirs.means.items() for label, own in by.items()]
        gap = max(abs(score - own) for score, own in pairs if score is not None)
        same, worst = same + (mine.winner == theirs.winner), max(worst, gap)
        figures.say(f"  {theirs.key}: plain {theirs.winner}, olmfast {mine.winner}, scores differ by {gap:.1e} at most")
    n = sum(len(next(iter(decision.means.values()))) for decision in baseline.decisions)
    report(
        f"a search of {n} candidates, {samples} + {samples} questions", f"{ours:.1f} CPU s", f"plain {plain:.0f} CPU s",
        plain / ours, f"{same} of {len(decisions)} decisions", largest_difference_of_a_mean=f"{worst:.1e}",
    )  # fmt: skip
    assert same == len(decisions)


def test_racing(benchmark: Any, report: Report, figures: Figures, tmp_path_factory: pytest.TempPathFactory) -> None:
    """In the last block, where a candidate costs least.

    A search arrives there by the blocks before: what enters the last but one is computed before time is taken.
    Which questions come first is a matter of the seed: the exact scores tell how other seeds would have raced.
    """
    n_blocks, questions = sized((2, 30), (6, 64), (N_BLOCKS, 192))
    keys = {"es_svd": True, "es_norm": True, "es_norm_generations": 1}
    seconds: dict[str, float] = {}
    found: dict[str, list[Outcome]] = {}
    races: list[str] = []
    with room(tmp_path_factory, "racing", 2e9) as folder:
        case = make_case(folder, questions, n_blocks)
        for name, racing in (("exact", False), ("racing", True)):
            with session(case.config(questions, name, racing=racing, **keys)) as engine:
                search = engine.search
                for _ in range(2):  # the first finds the current model's own tokens, which the second goes along
                    search.scorer.score(search.architecture.window_unit(search.tensors, [n_blocks - 2]), [NOW])
                call = partial(walk_last, search, n_blocks - 1)
                seconds[name] = cpu(partial(benchmark.pedantic, call, rounds=1) if racing else call)
                found[name] = engine.record.choices()
                if not racing:
                    races = [raced_again(table, search.rules) for table in score_tables(search.record.folder / LEDGER)]
    same = sum(a.winner == b.winner for a, b in zip(found["exact"], found["racing"], strict=True))
    for a, b, others in zip(found["exact"], found["racing"], races, strict=True):
        figures.say(
            f"  {a.stage} {a.unit}: exact {a.winner} ({gain(a):+.2%}), racing {b.winner} ({gain(b):+.2%}), "
            f"{len(b.dropped)} of {len(next(iter(a.metrics.values())))} dropped early | "
            f"{SEEDS} other orders of the questions: {others}"
        )
    report(
        f"racing, {questions} + {questions} questions", f"{seconds['racing']:.1f} CPU s",
        f"exact {seconds['exact']:.1f} CPU s", seconds["exact"] / seconds["racing"],
        same=f"{same} of {len(found['exact'])}",
    )  # fmt: skip


def score_tables(path: Path) -> list[Scores]:
    """Every decision's scores as the ledger has them: dataset -> (candidates, samples)."""
    steps: dict[str, dict[str, list[list[float]]]] = {}
    for line in map(json.loads, path.read_text().splitlines()):
        steps.setdefault(line["step"], {}).setdefault(line["dataset"], []).append(line["samples"])
    tables = [{name: torch.tensor(rows, dtype=torch.float64) for name, rows in step.items()} for step in steps.values()]
    return [Scores(table, *({k: torch.full_like(v, on, dtype=torch.bool) for k, v in table.items()} for on in (1, 0)))
            for table in tables]  # fmt: skip


def raced_again(table: Scores, rules: Rules) -> str:
    """What racing decides of known scores, over `SEEDS` orders of the questions."""
    sizes = {name: values.shape[1] for name, values in table.samples.items()}
    every = {name: list(range(size)) for name, size in sizes.items()}
    n = len(next(iter(table.samples.values())))
    best, same, gains, asked = choose(table, range(n), rules), 0, 0.0, 0

    def score(rows: list[int], samples: Mapping[str, list[int]]) -> Scores:
        nonlocal asked
        asked += (len(rows) - 1) * sum(map(len, samples.values()))  # the incumbent has been scored before
        return table.rows(rows).limited_to(samples)

    for seed in range(SEEDS):
        scored, dropped = heats(score, n, every, Racing(), rules, seed)
        left = [row for row in range(n) if row not in dropped]
        done = sum(int(own[left[-1]].sum()) for own in scored.evaluated.values()) if scored else 0
        asked += (len(left) - 1) * (sum(sizes.values()) - done)
        winner = choose(table, left, rules)
        same += winner == best
        gains += gain_of(table, winner) / SEEDS
    share = asked / SEEDS / ((n - 1) * sum(sizes.values()))
    return f"same {same}, gain {gains:+.2%} of {gain_of(table, best):+.2%}, {1 / share:.1f} times fewer scores"


def gain_of(table: Scores, row: int) -> float:
    """See `gain`."""
    means = [table.mean(name) for name in table.samples]
    return sum(float((mean[0] - mean[row]) / abs(mean[0])) for mean in means) / len(means)


def gain(outcome: Outcome) -> float:
    """By how much the winner's mean scores are lower than the current model's, as a share, over the datasets."""
    gains = []
    for means in outcome.metrics.values():
        now, won = next(iter(means.values())), means[outcome.winner]
        assert now is not None
        assert won is not None
        gains.append((now - won) / abs(now))
    return sum(gains) / len(gains)


def walk_last(search: Search, block: int) -> None:
    module = module_unit(block, f"model.layers.{block}.mlp.down_proj")
    swap(search, "layers", search.architecture.window_unit(search.tensors, [block]))
    swap(search, "tensors", module)
    evolve.refine(search, module)


@pytest.mark.parametrize("limit", sized([None], [None, 700_000_000], [None, 1_000_000_000, 700_000_000]))
def test_the_memory_limit(benchmark: Any, report: Report, case: Case, limit: int | None) -> None:
    """A block and a module's offspring in the middle block, in a process of its own."""
    questions = sized(2, 8, 32)
    if TINY:  # starting a process would take longer than all the rest
        peak, before, splits, seconds = benchmark.pedantic(peak_memory, (case, questions, limit), rounds=1)
    else:
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
            call = process.submit(peak_memory, case, questions, limit).result
            peak, before, splits, seconds = benchmark.pedantic(call, rounds=1)
    asked, share = ("none", "-") if limit is None else (f"{limit / 1e6:.0f} MB", f"{peak / limit:.0%} of max_ram")
    report(
        f"memory at the peak, max_ram {asked}", f"{peak / 1e6:.0f} MB", limit=share,
        model_and_libraries=f"{before / 1e6:.0f} MB", splits=splits, cpu=f"{seconds:.1f} s",
    )  # fmt: skip
    assert limit is None or peak < 1.1 * limit


MATRIX_PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::mkldnn_linear",
)


def test_share_of_matrix_products(benchmark: Any, report: Report, case: Case) -> None:
    from torch.profiler import ProfilerActivity, profile

    questions = sized(2, 4, 8)
    blocks = sized(BLOCKS[1:2], BLOCKS[1:2], BLOCKS)
    keys = {"base_select": True, "es_svd": True, "es_norm": True, "es_norm_generations": 1}
    with session(case.config(questions, "profiled", **keys)) as engine:
        scorer = engine.search.scorer
        assert isinstance(scorer, BatchedScorer)
        scorer.score(engine.search.architecture.model_unit(engine.search.tensors), [NOW])

        def search() -> None:
            for kind in KINDS:
                for block in blocks:
                    scorer.score(*candidates_of(kind, engine, block))

        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            seconds = cpu(lambda: benchmark.pedantic(search, rounds=1))
    rows = {row.key: row.self_cpu_time_total / 1e6 for row in recorded.key_averages()}
    products = {key: s for key, s in rows.items() if key in MATRIX_PRODUCTS}
    largest = sorted(((s, key) for key, s in rows.items() if key not in products), reverse=True)[:6]
    total = sum(rows.values())
    report(
        f"scoring, {questions} + {questions} questions, in operators", f"{total:.1f} s",
        limit=f"{sum(products.values()) / total:.1%} matrix products", of=f"{seconds:.1f} CPU s",
        products=", ".join(f"{key} {s:.1f} s" for key, s in products.items()),
        others=", ".join(f"{key} {s:.1f} s" for s, key in largest), padding=f"{scorer.statistics.padding:.1%}",
    )  # fmt: skip


@pytest.mark.skipif(not DEMO.is_file(), reason="the demo's files are not here")
def test_the_demo(benchmark: Any, report: Report, case: Case, tmp_path: Path) -> None:
    """The first candidates of the demo's search, by each scorer, in a process of its own."""
    budget, config = sized(4, 20, 120), DEMO
    if TINY:
        config = case.folder / "tiny.yaml"
        config.write_text(yaml.safe_dump(case.keys(2) | {"layer_swap": True}))
    every = {
        "sequential": ["scorer=sequential"], "batched": ["scorer=batched"], "racing": ["scorer=batched", "racing=true"],
    }  # fmt: skip
    times: dict[str, tuple[float, float]] = {}
    for name, keys in every.items():
        if TINY and name != "racing":
            continue
        command = [sys.executable, "-m", "olmfast.cli", "run", str(config), "--quiet", "--json"]
        for key in (*keys, f"output_dir={tmp_path / name}", f"budget={budget}"):
            command += ["--set", key]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        run = partial(subprocess.run, command, check=True, capture_output=True)
        if name == "racing":
            benchmark.pedantic(run, rounds=1)
        else:
            run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        times[name] = (time.perf_counter() - began, used)
    for name, (wall, used) in times.items():
        rival, ratio = "-", None
        if name != "sequential" and "sequential" in times:
            rival, ratio = f"sequential {times['sequential'][1]:.0f} CPU s", times["sequential"][1] / used
        report(f"the demo's first {budget} candidates, {name}", f"{used:.0f} CPU s", rival, ratio, wall=f"{wall:.0f} s")


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far."""
    return int(re.findall(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[0]) * 1024


if torch.get_num_threads() != 1:
    print("bench/test_search.py: set OMP_NUM_THREADS=1 for figures that can be compared", file=sys.stderr)
