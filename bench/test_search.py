"""The search: olmfast's scorers against a plain driver that works as the original did, and against each other.

    OMP_NUM_THREADS=1 pytest bench/test_search.py --benchmark-only -s

A Llama of 12 blocks, width 512 and 8,000 words, four donors, questions of about 100 tokens with answers of 20
(`search_case.py`); the plain driver is `baseline.py`. Times are CPU seconds of the whole process, so that other work
on the machine counts little. The plain driver needs 22 CPU seconds for a candidate on 8 + 8 questions and scores
candidates one after another, none faster or slower than the next: by default it is given one of each kind, and a
search on 4 + 4 questions (OLMFAST_BENCH_QUESTIONS) in which one module is refined. With OLMFAST_BENCH_ALL=1 it gets two
of each kind in three blocks, and the search has 8 + 8 questions and three modules: about two hours.
"""

import json
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest
import torch
from baseline import Baseline
from peak import cpu, peak_memory
from search_case import BLOCKS, candidates_of, make_case, module_unit, modules_in, session, walk

from olmfast.config.run import Racing
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores
from olmfast.search import evolve
from olmfast.search.candidates import swap
from olmfast.search.log import Outcome
from olmfast.search.racing import heats
from olmfast.search.ranking import Rules, choose
from olmfast.search.record import LEDGER
from olmfast.weights.architecture import Unit

pytestmark = pytest.mark.timeout(0)
ALL = bool(os.environ.get("OLMFAST_BENCH_ALL"))
KINDS = ("block", "unit", "svd_es", "norm_es")
SEEDS = 30  # orders of questions that races are repeated in
DEMO = Path(__file__).parents[1] / "examples" / "demo" / "olm_config.yaml"


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return make_case(tmp_path_factory.mktemp("search"), n_samples=32)


def say(benchmark, title: str, **figures: object) -> None:
    benchmark.extra_info.update({name: str(value) for name, value in figures.items()})
    print(f"\n{title} | " + " | ".join(f"{name} {value}" for name, value in figures.items()), flush=True)


def plain_scores(kind: str, baseline: Baseline, unit: Unit, candidates: list[Candidate]) -> list[Scores]:
    """The same candidates by the plain driver, one after another."""
    if kind in ("block", "unit"):
        return [baseline.score_donor(candidate.label, unit.tensors) for candidate in candidates]
    offspring = baseline.offspring(unit.tensors[0], kind)
    indices = [int(candidate.label.rsplit("/", 1)[1]) for candidate in candidates]
    return [baseline.score_child(unit.tensors[0], offspring.child(index)) for index in indices]


def test_cpu_seconds_per_candidate(benchmark, case):
    config = case.config(samples=32, output="candidates")
    ours: dict[str, list[float]] = {kind: [] for kind in KINDS}
    plain: dict[str, list[float]] = {kind: [] for kind in KINDS}
    worst = 0.0
    with session(config) as engine:
        scorer = engine.search.scorer
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
        baseline = Baseline(case.folders, engine.inputs.datasets, case.folder / "plain")
        baseline.start(engine.search.model.recipe.base, scores)
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
        say(benchmark, f"CPU per candidate, 32 + 32 questions, {kind}", plain=f"{slow:.1f} s", olmfast=f"{fast:.2f} s",
            ratio=f"{slow / fast:.1f}x", of_which=by_block)  # fmt: skip
    ratio = sum(slow for slow, _ in mean.values()) / sum(fast for _, fast in mean.values())
    say(benchmark, "all kinds", ratio=f"{ratio:.1f}x", scoring_what_is_there=f"{current:.1f} s",
        padding=f"{statistics.padding:.1%}", decoded_tokens=statistics.decoded, passes=statistics.passes,
        memory_growth=f"{peak / 1e6:.0f} MB", largest_difference_of_a_score=f"{worst:.1e}")  # fmt: skip


def test_a_search_decides_as_the_plain_driver(benchmark, case):
    refined = BLOCKS if ALL else (5,)
    samples = int(os.environ.get("OLMFAST_BENCH_QUESTIONS", 8 if ALL else 4))
    keys = {"base_select": True, "es_svd": True, "es_norm": True, "es_norm_generations": 1}
    with session(case.config(samples, "search", **keys)) as engine:
        ours = cpu(lambda: benchmark.pedantic(lambda: walk(engine, BLOCKS, refined), rounds=1))
        decisions = list(engine.report.steps.values())
        unit_of = {block: engine.search.architecture.window_unit(engine.search.tensors, [block]) for block in BLOCKS}
        baseline = Baseline(case.folders, engine.inputs.datasets, case.folder / "plain")

        def search() -> None:
            baseline.select_base()
            for block in BLOCKS:
                baseline.swap(f"layers/{block}", unit_of[block].tensors)
            for name in modules_in(refined).values():
                baseline.swap(f"tensors/{name}", [f"{name}.weight"])
                baseline.evolve(name, f"{name}.weight", "svd_es")
                baseline.evolve(name, f"{name}.weight", "norm_es")

        plain = cpu(search)
    same = 0
    for mine, theirs in zip(decisions, baseline.decisions, strict=True):
        gap = max(abs(mine.metrics[name][k] - own) for name, by in theirs.means.items() for k, own in by.items())
        same += mine.winner == theirs.winner
        print(f"  {theirs.key}: plain {theirs.winner}, olmfast {mine.winner}, scores differ by {gap:.1e} at most")
    n = sum(len(next(iter(decision.means.values()))) for decision in baseline.decisions)
    say(benchmark, f"search of {len(decisions)} decisions, {n} candidates, {samples} + {samples} questions",
        same=f"{same} of {len(decisions)}", plain=f"{plain:.0f} CPU s", olmfast=f"{ours:.0f} CPU s",
        ratio=f"{plain / ours:.1f}x")  # fmt: skip
    assert same == len(decisions)


def test_racing(benchmark, tmp_path):
    """On 192 questions of each dataset, in the last block, where a candidate costs least.

    A search arrives there by the blocks before: what enters the last but one is computed before time is taken.
    Which questions come first is a matter of the seed: the exact scores tell how other seeds would have raced.
    """
    keys = {"es_svd": True, "es_norm": True, "es_norm_generations": 1}
    case = make_case(tmp_path, n_samples=192)
    seconds, found, races = {}, {}, []
    for name, racing in (("exact", False), ("racing", True)):
        with session(case.config(192, name, racing=racing, **keys)) as engine:
            search = engine.search
            for _ in range(2):  # the first finds the current model's own tokens, which the second goes along
                search.scorer.score(search.architecture.window_unit(search.tensors, [10]), [NOW])
            call = lambda search=search: walk_last(search)  # noqa: E731
            seconds[name] = cpu(call if name == "exact" else lambda c=call: benchmark.pedantic(c, rounds=1))
            found[name] = engine.report.choices()
            if name == "exact":
                races = [raced_again(table, search.rules) for table in score_tables(search.report.folder / LEDGER)]
    same = sum(a.winner == b.winner for a, b in zip(found["exact"], found["racing"], strict=True))
    for a, b, others in zip(found["exact"], found["racing"], races, strict=True):
        print(f"  {a.stage} {a.unit}: exact {a.winner} ({gain(a):+.2%}), racing {b.winner} ({gain(b):+.2%}), "
              f"{len(b.dropped)} of {len(next(iter(a.metrics.values())))} dropped early | "
              f"{SEEDS} other orders of the questions: {others}")  # fmt: skip
    say(benchmark, "racing, 192 + 192 questions", exact=f"{seconds['exact']:.0f} CPU s",
        racing=f"{seconds['racing']:.0f} CPU s", ratio=f"{seconds['exact'] / seconds['racing']:.1f}x",
        same=f"{same} of {len(found['exact'])}")  # fmt: skip


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
    n = len(next(iter(table.samples.values())))
    best, same, gains, asked = choose(table, range(n), rules), 0, 0.0, 0

    def score(rows: list[int], samples: Mapping[str, list[int]]) -> Scores:
        nonlocal asked
        asked += (len(rows) - 1) * sum(map(len, samples.values()))  # what is there has been scored before
        return table.rows(rows).limited_to(samples)

    for seed in range(SEEDS):
        scored, dropped = heats(score, n, sizes, Racing(), rules, seed)
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
    """By how much the winner's mean scores are lower than those of what was there, as a share, over the datasets."""
    pairs = [(next(iter(means.values())), means[outcome.winner]) for means in outcome.metrics.values()]
    return sum((now - won) / abs(now) for now, won in pairs) / len(pairs)


def walk_last(search) -> None:
    module = module_unit(11, "model.layers.11.mlp.down_proj")
    swap(search, "layers", search.architecture.window_unit(search.tensors, [11]))
    swap(search, "tensors", module)
    evolve.refine(search, module)


@pytest.mark.parametrize("limit", [None, 1_000_000_000, 700_000_000])
def test_the_memory_limit(benchmark, case, limit):
    """A block and a module's offspring in block 5 on 32 + 32 questions, in a process of its own."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
        call = lambda: process.submit(peak_memory, case, limit).result()  # noqa: E731
        peak, before, splits, seconds = benchmark.pedantic(call, rounds=1)
    asked = "none" if limit is None else f"{limit / 1e6:.0f} MB"
    say(benchmark, f"max_ram {asked}", peak=f"{peak / 1e6:.0f} MB", model_and_libraries=f"{before / 1e6:.0f} MB",
        splits=splits, cpu=f"{seconds:.0f} s")  # fmt: skip
    assert limit is None or peak < 1.1 * limit


MATRIX_PRODUCTS = (
    "aten::mm",
    "aten::addmm",
    "aten::bmm",
    "aten::baddbmm",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::mkldnn_linear",
)


def test_share_of_matrix_products(benchmark, case):
    from torch.profiler import ProfilerActivity, profile

    questions = int(os.environ.get("OLMFAST_BENCH_QUESTIONS", 16))
    keys = {"base_select": True, "es_svd": True, "es_norm": True, "es_norm_generations": 1}
    with session(case.config(questions, "profiled", **keys)) as engine:
        scorer = engine.search.scorer
        scorer.score(engine.search.architecture.model_unit(engine.search.tensors), [NOW])

        def search() -> None:
            for kind in KINDS:
                for block in BLOCKS:
                    scorer.score(*candidates_of(kind, engine, block))

        with profile(activities=[ProfilerActivity.CPU]) as recorded:
            seconds = cpu(lambda: benchmark.pedantic(search, rounds=1))
    rows = {row.key: row.self_cpu_time_total / 1e6 for row in recorded.key_averages()}
    products = {key: s for key, s in rows.items() if key in MATRIX_PRODUCTS}
    largest = sorted(((s, key) for key, s in rows.items() if key not in products), reverse=True)[:6]
    share = sum(products.values()) / sum(rows.values())
    say(benchmark, f"matrix products in scoring, {questions} + {questions} questions", share=f"{share:.1%}",
        of=f"{sum(rows.values()):.0f} s in operators, {seconds:.0f} CPU s",
        products=", ".join(f"{key} {s:.1f} s" for key, s in products.items()),
        others=", ".join(f"{key} {s:.1f} s" for s, key in largest),
        padding=f"{scorer.statistics.padding:.1%}")  # fmt: skip


@pytest.mark.skipif(not DEMO.is_file(), reason="the demo's files are not here")
def test_the_demo(benchmark, tmp_path):
    """The first candidates of the demo's search, by each scorer, in a process of its own."""
    budget = 120
    times: dict[str, tuple[float, float]] = {}
    for name, keys in {
        "sequential": ["scorer=sequential"], "batched": ["scorer=batched"], "racing": ["scorer=batched", "racing=true"],
    }.items():  # fmt: skip
        command = [sys.executable, "-m", "olmfast.cli", "run", str(DEMO), "--quiet", "--json"]
        for key in (*keys, f"output_dir={tmp_path / name}", f"budget={budget}"):
            command += ["--set", key]
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        run = lambda command=command: subprocess.run(command, check=True, capture_output=True)  # noqa: E731
        if name == "racing":
            benchmark.pedantic(run, rounds=1)
        else:
            run()
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        times[name] = (time.perf_counter() - began, used)
    figures = {name: f"{wall:.0f} s wall, {used:.0f} s CPU" for name, (wall, used) in times.items()}
    say(benchmark, f"demo, the first {budget} candidates", **figures)


NOW = Candidate("now")


def resident(field: str) -> int:
    """Bytes of this process in memory: VmRSS now, VmHWM at most so far."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024


if torch.get_num_threads() != 1:
    print("bench/test_search.py: set OMP_NUM_THREADS=1 for figures that can be compared", file=sys.stderr)
