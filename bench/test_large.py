"""One block's swap and one module's SVD-ES in a model as large as a GPU is for.

    OLMFAST_BENCH_CONVERSATIONS=questions.json OLMFAST_BENCH_ALL=1 pytest bench/test_large.py --benchmark-only

On CUDA the model has the blocks of Llama-7B (width 4,096), 8 of them or, with OLMFAST_BENCH_ALL=1, all 32, and is
scored in bfloat16 under `max_vram: 24GB`; elsewhere it is a small one that shows that all of this works:
OLMFAST_BENCH_SHAPE says otherwise (`8b`: Llama-3-8B's, whose keys and values take a quarter). Weights are random and
bfloat16: each donor is one ancestor with 1 or 2 % of each matrix's spread added, computed straight into its files once,
all donors side by side. Three donors of 8 blocks take 11 GB, of 32 blocks 40.4 GB, and as much as a fourth must be free
for a result: in memory (/dev/shm) where that has room, else on disk (`--basetemp=FOLDER` says where); they are deleted
afterwards. The plain driver loads a donor into main memory.

Each figure is shown as soon as it is there. On a GPU no new one is begun after 240 seconds (OLMFAST_BENCH_SECONDS says
otherwise); what could not be finished is named at the end.

OLMFAST_BENCH_CONVERSATIONS names a file of docs/config.md's formats, or several with a colon between: the three
datasets get 64 questions each (16 on a CPU, unless OLMFAST_BENCH_ALL=1), from the files in turn, by a byte-level BPE
trained on them. Without it questions are random words, 60 to 170 of them, with answers of 8. The datasets are scored by
exact_match, bigram_loss and perplexity.

The current model is scored first, which finds its own tokens and what enters the middle block, where everything is
measured. Then, for each kind of candidate:

- `all three` is scoring all candidates on all datasets, decoding of what leaves the expected tokens included; `read
  along` is the two datasets in which nothing is decoded. Both begin with the donors' bytes, or the offspring's numbers.
- suffix tokens: the inputs' tokens without padding, times candidates. Tokens that are decoded are not counted.
- `of plain inference`: these tokens a second, as a share of those of one model's blocks from the same one on, by
  Transformers' own forwards, called with the same batches and nothing else done. `fused inference` is the same with the
  kernels that a GPU computes norms, gates and rotations by (`evaluation/fusing.py`).
- `of matmul`: two operations for each token and parameter of these blocks, as a share of the rate of one large product
  in the same dtype. It counts what olmfast leaves out (most of the last block's MLP, and what comes before the
  changed module, once for all candidates), so that with few blocks it can exceed 100 %.
- `busy`: the share of the time in which the GPU had something to do, for blocks, by torch.profiler.
- `merge of the whole model` is what the joint search tries: how long a candidate takes, and what part of it goes into
  computing its weights from the donors' files.
- `plain` is the first candidate by `baseline.py`. In float32, on a CPU, that does not round offspring to bfloat16 as
  olmfast does, and mean scores differ by as much.

`-k small_card` compares that with the same under `max_vram: 8GB` (or three fifths of a smaller model), where blocks are
streamed; `bench/gpu.sh streaming` runs it.

On a GPU seconds are by the clock, synchronised; on a CPU they are the processor's (OMP_NUM_THREADS=1).
"""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from baseline import Baseline
from figures import GPU, Figures, room, sized
from large_case import DEVICE, DONORS, MODES, QUESTIONS, SHAPES, SOURCE, Shape, write_case
from peak import elapsed, timed, watched
from search_case import Case, candidates_of, session

from olmfast.evaluation.batched import BatchedScorer
from olmfast.evaluation.fusing import own_forwards
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.scores import Scores
from olmfast.runs.session import Session
from olmfast.weights.architecture import Unit
from olmfast.weights.expressions import Copy, merge

pytestmark = pytest.mark.timeout(0)

Report = Callable[..., None]
READ_ALONG = [name for name, mode in MODES.items() if mode != "exact_match"]
KINDS = ("block", "svd_es")
VRAM, SMALL_CARD = 24 * 10**9, 8 * 10**9
ROUNDS = 5 if GPU else 1
NOW = Candidate("now")
BEGAN = time.perf_counter()
SECONDS = float(os.environ.get("OLMFAST_BENCH_SECONDS", "240" if GPU else "inf"))
MEMORY_FOLDER = Path("/dev/shm")


class Remaining:
    """Of the seconds that the benchmark may take, and what there was no time for."""

    def __init__(self) -> None:
        self.left_out: list[str] = []

    @property
    def seconds(self) -> float:
        return SECONDS - (time.perf_counter() - BEGAN)

    def suffices(self, what: str, needed: float) -> bool:
        """Whether there is time for something; it is left out otherwise."""
        if self.seconds >= needed:
            return True
        self.left_out.append(what)
        return False

    def median(self, call: Callable[[], object]) -> float:
        """Seconds of a call: of as many as there is time for, one at least."""
        times = [elapsed(call, DEVICE)]
        while len(times) < ROUNDS and self.seconds > 3 * times[-1]:
            times.append(elapsed(call, DEVICE))
        return median(times)


def shape_asked_for() -> tuple[str, Shape]:
    name = os.environ.get("OLMFAST_BENCH_SHAPE", sized("tiny", *(("quarter", "7b") if GPU else ("small", "small"))))
    if name not in SHAPES:
        pytest.fail(f"OLMFAST_BENCH_SHAPE: {name!r} is none of {', '.join(SHAPES)}")
    return name, SHAPES[name]


@pytest.fixture
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    """Donors and datasets; the donors do not stay."""
    _, shape = shape_asked_for()
    with room(tmp_path_factory, "large", (len(DONORS) + 1) * shape.n_bytes, MEMORY_FOLDER if GPU else None) as folder:
        yield write_case(folder, shape)


def rate_of_matmul(dtype: torch.dtype, tokens: int, shape: Shape) -> float:
    """Operations a second of one product of as many tokens as a pass has with a matrix of the MLP."""
    x = torch.randn(tokens, shape.width, device=DEVICE, dtype=dtype)
    weight = torch.randn(shape.inner, shape.width, device=DEVICE, dtype=dtype)
    times = 20 if GPU else 5

    def products() -> None:
        for _ in range(times):
            torch.nn.functional.linear(x, weight)

    products()
    seconds = median(elapsed(products, DEVICE) for _ in range(5))
    return 2 * tokens * weight.numel() * times / seconds


@torch.inference_mode()
def plain_inference(scorer: Any, block: int, names: Sequence[str], fused: bool = False) -> Callable[[], None]:
    """One model's blocks from `block` on, on the datasets' inputs in the scorer's batches and nothing else: as
    Transformers has them, or `fused` where a GPU computes parts of them by kernels."""
    blockwise, passes = scorer.blockwise, scorer.passes
    parts = scorer.trajectories.parts_of(numbers_of(scorer, names))
    entering = [passes.entering(block, numbers) for part in parts for numbers in part]

    @torch.inference_mode()
    def run() -> None:
        with nullcontext() if fused else own_forwards(blockwise.module):
            for hidden in entering:
                blockwise.run(hidden, block, len(blockwise.blocks))

    return run


def numbers_of(scorer: Any, names: Sequence[str]) -> list[int]:
    return [number for number, task in enumerate(scorer.trajectories.tasks) if task.name in names]


@dataclass
class Measured:
    """Of one kind of candidate; seconds are for all of them, `preparing` those before any is scored."""

    unit: Unit
    labels: list[str]
    scores: Scores
    preparing: float
    decoded: int
    seconds: dict[str, float] = field(default_factory=dict)


@dataclass
class Plain:
    """Of inference of the same blocks and nothing else, per part of the datasets: its tokens, and tokens a second."""

    tokens: dict[str, int]
    rates: dict[str, float]
    matmul: float
    operations: int  # of a token


def test_candidates_of_a_large_model(benchmark: Any, report: Report, figures: Figures, case: Case) -> None:
    name, shape = shape_asked_for()
    remaining = Remaining()
    config = case.config(
        QUESTIONS,
        device=str(DEVICE),
        dtype="auto",
        dataset={file: {"mode": mode} for file, mode in MODES.items()},
        max_vram="24GB",
    )
    kind = "random words" if SOURCE is None else "conversations"
    figures.say(
        f"shape {name}: {shape.n_blocks} blocks of width {shape.width}, {shape.n_bytes / 1e9:.2f} GB, "
        f"{QUESTIONS} x {len(MODES)} questions of {kind}; donors in {case.folder}"
    )
    with session(config) as engine:
        figures.say(f"donors made and opened after {time.perf_counter() - BEGAN:.0f} s")
        peak, found = measure(benchmark, report, figures, engine, shape, remaining)
        datasets, base, dtype = (
            engine.inputs.selection.datasets,
            engine.search.recipe.base,
            engine.inputs.settings.dtype,
        )
    del engine  # the plain driver has the device to itself
    gc.collect()
    if GPU:
        torch.cuda.empty_cache()
    if found and remaining.suffices("the plain driver", 30):
        baseline = Baseline(case.folders, datasets, case.folder / "plain", device=DEVICE, dtype=dtype)
        baseline.start(base, Scores.empty(1, datasets, torch.float32))
        seconds, _ = timed(partial(baseline.score, baseline.model), DEVICE)  # the first forwards are slower
        for kind, ours in found.items():
            if remaining.suffices(f"the plain driver's {kind}", 1.5 * seconds):
                compare(report, kind, ours, baseline)
    for left_out in remaining.left_out:
        figures.say(f"not finished within {SECONDS:.0f} s: {left_out}")
    assert not GPU or peak < VRAM


PARTS = {"read along": READ_ALONG, "all three": list(MODES)}


def test_the_same_on_a_small_card(benchmark: Any, report: Report, figures: Figures, case: Case) -> None:
    """The same candidates where all of the model fits `max_vram`, and where its blocks are streamed."""
    _, shape = shape_asked_for()
    if not GPU:
        pytest.skip("needs a GPU")
    remaining, limit = Remaining(), min(SMALL_CARD, int(0.6 * shape.n_bytes))
    resident, most = scored_under(case, VRAM, shape, remaining)
    gc.collect()
    torch.cuda.empty_cache()
    streamed, peak = benchmark.pedantic(scored_under, (case, limit, shape, remaining), rounds=1)
    for (kind, part), seconds in streamed.items():
        if (kind, part) in resident:
            report(
                f"{kind}, {part}, streamed under {limit / 1e9:.1f} GB", f"{seconds:.3g} s",
                f"resident {resident[kind, part]:.3g} s", resident[kind, part] / seconds,
                f"{peak / limit:.0%} of max_vram", peak=f"{peak / 1e9:.2f} GB", resident=f"{most / 1e9:.2f} GB",
            )  # fmt: skip
    for left_out in remaining.left_out:
        figures.say(f"not finished within {SECONDS:.0f} s: {left_out}")
    assert peak < limit


def scored_under(
    case: Case, limit: int, shape: Shape, remaining: Remaining
) -> tuple[dict[tuple[str, str], float], int]:
    """Seconds of scoring each kind of candidate on each part of the questions, and bytes at the peak."""
    datasets, found = {file: {"mode": mode} for file, mode in MODES.items()}, dict[tuple[str, str], float]()
    keys = {"device": str(DEVICE), "dtype": "auto", "dataset": datasets, "max_vram" if GPU else "max_ram": limit}
    block, at_hand = shape.n_blocks // 2, (0, shape.n_blocks // 2, shape.n_blocks - 1)
    with session(case.config(QUESTIONS, output=f"under{limit}", **keys)) as engine:
        scorer = engine.search.scorer
        assert isinstance(scorer, BatchedScorer)
        with watched(scorer.memory) as peak:
            scorer.score(engine.search.architecture.window_unit(engine.search.tensors, [block]), [NOW])
            for kind in KINDS:
                unit, candidates = candidates_of(kind, engine, block, at_hand, per_unit=None)
                seconds = elapsed(partial(scorer.score, unit, candidates), DEVICE)  # compiles, and fills caches
                for part, names in PARTS.items():
                    if remaining.suffices(f"{kind}, {part} under {limit / 1e9:.1f} GB", seconds):
                        found[kind, part] = remaining.median(partial(scorer.score, unit, candidates, names))
        return found, peak.n_bytes


def measure(
    benchmark: Any, report: Report, figures: Figures, engine: Session, shape: Shape, remaining: Remaining
) -> tuple[int, dict[str, Measured]]:
    """Bytes at the peak of scoring, and for each kind of candidate what was measured."""
    search, scorer, block = engine.search, engine.search.scorer, shape.n_blocks // 2
    assert isinstance(scorer, BatchedScorer)
    found: dict[str, Measured] = {}
    with watched(scorer.memory) as peak:
        unit = search.architecture.window_unit(search.tensors, [block])
        seconds = elapsed(partial(scorer.score, unit, [NOW]), DEVICE)
        figures.say(f"the current model, all questions: {seconds:.3g} s")
        plain: Plain | None = None
        for kind in KINDS:
            if not remaining.suffices(f"{kind} candidates", 10):
                continue
            at_hand = (0, block, shape.n_blocks - 1)
            preparing, (unit, candidates) = timed(
                partial(candidates_of, kind, engine, block, at_hand, per_unit=None), DEVICE
            )
            figures.say(f"{kind}: {len(candidates)} candidates prepared in {preparing:.3g} s")
            before = scorer.statistics.decoded
            # Compiles, and fills caches.
            seconds, scores = timed(partial(scorer.score, unit, candidates), DEVICE)
            figures.say(f"{kind}: scored for the first time in {seconds:.3g} s")
            decoded = scorer.statistics.decoded - before
            found[kind] = ours = Measured(unit, [one.label for one in candidates], scores, preparing, decoded)
            ours.seconds["all three"] = seconds  # until there are better ones
            if plain is None:  # what enters the block is known now
                plain = plain_rates(report, engine, shape, block, remaining)
            for part, names in PARTS.items():
                if not remaining.suffices(f"{kind}, {part}", seconds):
                    continue
                call = partial(scorer.score, unit, candidates, names)
                ours.seconds[part] = remaining.median(call)
                rate = len(ours.labels) * plain.tokens[part] / ours.seconds[part]
                # Of many candidates the profiler's own work takes longer than all else.
                profiled = GPU and kind == "block"
                report(
                    f"{kind}, {len(ours.labels)} candidates, {part}", f"{rate:,.0f} tokens/s",
                    f"plain inference {plain.rates[part]:,.0f}", rate / plain.rates[part],
                    f"{plain.operations * rate / plain.matmul:.1%} of matmul",
                    unit=ours.unit.name, seconds=f"{ours.seconds[part]:.3g}",
                    decoded=f"{ours.decoded if part == 'all three' else 0} tokens",
                    busy=f"{busy_share(call):.0%}" if profiled else "-",
                )  # fmt: skip
        if remaining.suffices("merges of the whole model", 10):
            measure_merges(report, engine, remaining)
        benchmark.pedantic(lambda: None, rounds=1)
        reserved = torch.cuda.max_memory_reserved(DEVICE) if GPU else None
    report(
        "memory at the peak of scoring", f"{peak.n_bytes / 1e9:.2f} GB",
        limit=f"{peak.n_bytes / VRAM:.0%} of 24 GB" if GPU else "-",
        reserved="-" if reserved is None else f"{reserved / 1e9:.2f} GB", splits=scorer.statistics.splits,
        padding=f"{scorer.statistics.padding:.1%}",
    )  # fmt: skip
    return peak.n_bytes, found


def measure_merges(report: Report, engine: Session, remaining: Remaining) -> None:
    """What the joint search tries: sums of all donors' task vectors, computed from their files for each candidate."""
    search, scorer = engine.search, engine.search.scorer
    assert isinstance(scorer, BatchedScorer)
    base, *others = DONORS
    names = list(search.tensors)
    candidates = [
        Candidate(
            f"sum {weight}",
            {
                name: merge("task_arithmetic", [Copy(one, name) for one in others], Copy(base, name), weight=weight)
                for name in names
            },
        )
        for weight in (0.3, 0.4, 0.5)
    ]
    unit = search.architecture.model_unit(search.tensors)

    def merged() -> None:
        for candidate, then in pairwise([*candidates, None]):
            assert candidate is not None
            with scorer.model.trial(candidate, then):
                pass

    pool = scorer.model.sources.pool

    def by_torch() -> None:
        for name in names:
            total = pool[base].read(name).float()
            total += sum(0.3 * (pool[one].read(name).float() - total) for one in others)
            scorer.model.live(name).copy_(total.to(scorer.model.dtype))

    call = partial(scorer.score, unit, candidates, READ_ALONG)
    call()
    seconds, merging = remaining.median(call), remaining.median(merged) / (len(candidates) + 1)
    plain = elapsed(by_torch, DEVICE)
    scorer.model.apply(search.recipe.tensors)
    n_bytes = sum(scorer.model.live(name).nbytes for name in names)
    report(
        f"merge of the whole model, {len(candidates)} candidates, read along",
        f"{seconds / len(candidates):.3g} s each",
        limit=f"{(len(candidates) + 1) * merging / seconds:.0%} of it merging",
    )  # fmt: skip
    report(
        f"computing a sum of {len(others)} task vectors where it is evaluated", f"{merging:.3g} s",
        f"by torch {plain:.3g} s", plain / merging, result=f"{n_bytes / merging / 1e9:.2f} GB/s",
    )  # fmt: skip


def busy_share(call: Callable[[], object]) -> float:
    """The share of a call's time in which the GPU computes or copies; the profiler slows the host down a little."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        seconds = elapsed(call, DEVICE)
    on_gpu = [e.time_range for e in profiler.events() if e.device_type.name == "CUDA"]
    spans = sorted((span.start, span.end) for span in on_gpu)  # microseconds
    busy, until = 0.0, 0.0
    for begin, end in spans:
        busy += max(0.0, end - max(begin, until))
        until = max(until, end)
    return busy / 1e6 / seconds


def plain_rates(report: Report, engine: Session, shape: Shape, block: int, remaining: Remaining) -> Plain:
    """How fast one model's blocks from `block` on are on the same batches, and one large product."""
    scorer, dtype = engine.search.scorer, engine.inputs.settings.dtype
    assert isinstance(scorer, BatchedScorer)
    lengths = [len(task.ids) for task in scorer.trajectories.tasks]
    operations = 2 * (shape.n_blocks - block) * shape.block_parameters
    plain = Plain({}, {}, rate_of_matmul(dtype, scorer.shares.pass_tokens, shape), operations)
    for part, names in PARTS.items():
        plain.tokens[part] = sum(lengths[number] for number in numbers_of(scorer, names))
        rates = {}
        for what in ("plain", "fused"):
            run = plain_inference(scorer, block, names, fused=what == "fused")
            run()
            rates[what] = plain.tokens[part] / remaining.median(run)
            report(
                f"{what} inference of blocks {block} to {shape.n_blocks - 1}, {part}", f"{rates[what]:,.0f} tokens/s",
                *((f"plain {rates['plain']:,.0f}", rates[what] / rates["plain"]) if what == "fused" else ()),
                f"{operations * rates[what] / plain.matmul:.1%} of matmul",
                inputs=f"{min(lengths)} to {max(lengths)} tokens",
                matmul=f"{plain.matmul / 1e12:.3g} TFLOP/s in {dtype}",
            )  # fmt: skip
        plain.rates[part] = rates["plain"]
    return plain


def compare(report: Report, kind: str, ours: Measured, baseline: Baseline) -> None:
    """The first candidate by the plain driver; a generation's factors are shared out among its offspring."""
    once, n = 0.0, len(ours.labels)
    call: Callable[[], Scores]
    if kind == "block":
        call = partial(baseline.score_donor, ours.labels[0], ours.unit.tensors)
    else:
        tensor = ours.unit.tensors[0]
        once, offspring = timed(partial(baseline.offspring, tensor, kind), DEVICE)
        assert offspring.count == n
        call = lambda: baseline.score_child(tensor, offspring.child(0))  # noqa: E731
    seconds, scores = timed(call, DEVICE)
    plain = seconds + once / n
    fast = (ours.preparing + ours.seconds["all three"]) / n
    pairs = {mode: (float(ours.scores.mean(name)[0]), float(scores.mean(name)[0])) for name, mode in MODES.items()}
    means = ", ".join(f"{mode} {own:.6g}, plain {other:.6g}" for mode, (own, other) in pairs.items())
    report(
        f"a candidate of a large model, {kind}", f"{fast:.3g} s (mean of {n})", f"plain {plain:.3g} s (1 run)",
        plain / fast, preparing=f"{ours.preparing:.3g} s for all, plain {once:.3g} s", mean_scores=means,
    )  # fmt: skip
    if kind == "block" and baseline.dtype == torch.float32:  # where rounding does not hide a wrong candidate
        for own, other in pairs.values():
            assert own == pytest.approx(other, rel=1e-3)
