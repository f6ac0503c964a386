"""Paths scored without being written, against what there is to do otherwise: write each, load it, evaluate it.

    OMP_NUM_THREADS=1 OLMFAST_BENCH_ALL=1 pytest bench/test_dataflow.py --benchmark-only

The rival is `olmfast.dataflow.execute`, which writes a path and loads what it wrote with Transformers, and then one
plain batched pass over the same questions; it is timed on a few of the paths. With few, short questions a path costs
what its weights cost to be written and read again, as it does on a GPU, where computing takes little beside that; with
many, on a CPU, it is computing that takes the time, of which only what paths share can be saved. `limit` says which
part of our time the matrix products of the hops that have to be computed take by themselves. Scores of both are
compared.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import room, sized
from search_case import llama_config, word_tokenizer

from olmfast.config.datasets import DatasetConfig
from olmfast.config.searches import Dataflow
from olmfast.dataflow import execute
from olmfast.dataflow.drawing import Space, distribution
from olmfast.dataflow.hops import Hop
from olmfast.dataflow.kinds import LayerKinds
from olmfast.dataflow.running import PathCandidate, PathModel
from olmfast.dataflow.scoring import PathScorer
from olmfast.evaluation.encoding import Sample
from olmfast.evaluation.open import Evaluation, Questions, Settings
from olmfast.search.ranges import grid, told
from olmfast.weights.expressions import whole
from olmfast.weights.pool import Pool

pytestmark = pytest.mark.timeout(0)
N_BLOCKS, WIDTH, INNER, HEADS = sized((3, 32, 48, 4), (8, 1024, 2816, 8), (16, 1536, 4096, 12))
WORDS, PATHS, WRITTEN = sized((100, 6, 1), (8000, 24, 2), (8000, 64, 3))
FEW, SOME, MANY = sized((2, 3, 3), (4, 16, 64), (4, 16, 64))  # questions
LEAST = 10.0  # times faster than the rival
Paths = Mapping[str, Sequence[Hop]]


def make_donors(folder: Path, n_questions: int) -> None:
    """Two random models in bfloat16, and questions of six words with answers of one."""
    import json

    import transformers
    from transformers import AutoModelForCausalLM

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    tokenizer = word_tokenizer(WORDS)
    for seed, name in enumerate("ab"):
        torch.manual_seed(seed)
        config = llama_config(N_BLOCKS, WIDTH, INNER, HEADS, WORDS, spread=0.03)
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).bfloat16().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    dice = torch.Generator().manual_seed(7)
    words = torch.randint(10, WORDS, (n_questions, 7), generator=dice).tolist()
    text = [[f"w{word}" for word in row] for row in words]
    asked = [{"prompt": " ".join(row[:6]), "response": row[6]} for row in text]
    (folder / "asked.json").write_text(json.dumps(asked))


def repeats() -> Paths:
    """Ranges of blocks run twice."""
    ranges = grid(N_BLOCKS, 1)[:: max(1, len(grid(N_BLOCKS, 1)) // PATHS)][:PATHS]
    return {told(one): [Hop("a", block) for block in (*range(one[1]), *range(one[0], N_BLOCKS))] for one in ranges}


def drawn() -> Paths:
    """Paths through both models, with factors, as a search draws them first."""
    space = Space(("a", "b"), N_BLOCKS, 1, True)
    found = distribution(Dataflow.model_validate({"population": PATHS}), space, 1).draw()
    return {str(index): one.hops for index, one in enumerate(found) if one.hops}


@torch.inference_mode()
def plain_scores(model: Any, samples: Sequence[Sample]) -> list[float]:
    """The mean cross-entropy of each answer: one batch, padded on the right."""
    width = max(len(sample.prompt) + len(sample.response) for sample in samples)
    ids = torch.zeros(len(samples), width, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.prompt) + len(sample.response)] = torch.tensor((*sample.prompt, *sample.response))
    logits = model(input_ids=ids, use_cache=False).logits.float()
    found = []
    for row, sample in enumerate(samples):
        begin, n = len(sample.prompt) - 1, len(sample.response)
        told_of = torch.nn.functional.cross_entropy(logits[row, begin : begin + n], torch.tensor(sample.response))
        found.append(float(told_of))
    return found


KINDS = {repeats: "ranges run twice", drawn: "paths of two models"}


@pytest.mark.parametrize(
    ("make", "n_questions"),
    [(repeats, FEW), (repeats, SOME), (repeats, MANY), (drawn, FEW), (drawn, MANY)],
    ids=["ranges, few", "ranges, some", "ranges, many", "paths, few", "paths, many"],
)
def test_paths(
    make: Callable[[], Paths],
    n_questions: int,
    benchmark: Any,
    report: Callable[..., None],
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    n_bytes = 4 * (2 * WORDS * WIDTH + 3 * N_BLOCKS * (4 * WIDTH**2 + 3 * WIDTH * INNER))
    with room(tmp_path_factory, "dataflow", 3 * n_bytes) as folder:
        make_donors(folder, n_questions)
        paths = make()
        pool = Pool.open(["a", "b"], folder, folder)
        entry = {"asked.json": DatasetConfig(mode="exact", template="raw")}
        questions = Questions.load(pool["a"], folder, entry)
        evaluation = Evaluation(whole("a", pool.tensors), pool, Settings(torch.device("cpu"), torch.float32))
        kinds = LayerKinds()
        model = PathModel(evaluation.model, "a", "a", kinds)
        asked = (questions.datasets, questions.tokenizer, questions.stop_tokens, 8192)
        scorer = PathScorer(model, *asked, lambda: evaluation.scorer(questions))
        unit = pool.architecture.model_unit(pool.tensors)
        model.taken_apart("b")  # read once for all paths
        scorer.score(unit, [PathCandidate.of_hops("first", [Hop("a", 0), Hop("b", 0)], pool, ("a", "a"), kinds)])

        def ours() -> Any:
            made = [PathCandidate.of_hops(label, hops, pool, ("a", "a"), kinds) for label, hops in paths.items()]
            return scorer.score(unit, made)

        found = benchmark.pedantic(ours, rounds=1)
        seconds = benchmark.stats.stats.min / len(paths)
        samples, computed = questions.datasets["asked.json"].samples, scorer.passed.computed - 2
        needed = computed * products_s(sum(len(one.prompt) + len(one.response) - 1 for one in samples))
        others = []
        for row in torch.linspace(0, len(paths) - 1, WRITTEN).long().tolist():
            hops = [*paths.values()][row]
            started = time.perf_counter()
            loaded, _ = execute(file_of(hops, folder), folder / "written", dtype="float32", overwrite=True)
            scores = plain_scores(loaded, samples)
            others.append(time.perf_counter() - started)
            torch.testing.assert_close(
                found.samples["asked.json"][row], torch.tensor(scores, dtype=torch.float32), rtol=1e-3, atol=1e-3
            )
        ratio = sum(others) / len(others) / seconds
        report(
            f"{KINDS[make]}, {n_questions} questions, {N_BLOCKS} blocks, width {WIDTH}",
            f"{seconds:.3f} s a path",
            f"{sum(others) / len(others):.2f} s",
            ratio,
            limit=f"{needed / len(paths) / seconds:.0%} products",
            hops_shared=f"{1 - scorer.passed.computed / scorer.passed.hops:.0%}",
        )
        assert ratio >= (sized(0.0, LEAST, LEAST) if n_questions == FEW else 0.0)


@torch.inference_mode()
def products_s(n_tokens: int) -> float:
    """Seconds of the matrix products of a block for so many tokens; the fastest of three."""
    shapes = [*[(WIDTH, WIDTH)] * 4, (INNER, WIDTH), (INNER, WIDTH), (WIDTH, INNER)]
    weights, inputs = [torch.ones(shape) for shape in shapes], [torch.ones(n_tokens, shape[1]) for shape in shapes]
    best = float("inf")
    for _ in range(3):
        started = time.perf_counter()
        for x, weight in zip(inputs, weights, strict=True):
            torch.nn.functional.linear(x, weight)
        best = min(best, time.perf_counter() - started)
    return best


def file_of(hops: Sequence[Hop], folder: Path) -> dict[str, Any]:
    """What a data-flow file says of any path: a pass for every hop."""
    used = [[[hop.donor == name and hop.block == block for block in range(N_BLOCKS)] for name in "ab"] for hop in hops]
    scales = [[[hop.scale or 1.0 for _ in range(N_BLOCKS)] for _ in "ab"] for hop in hops]
    paths = [[str(folder / name), None] for name in "ab"]
    keys = {"model_paths": paths, "num_r": len(hops), "layer_mask": used, "scaling_factors": scales}
    return {**keys, "add_last_layer": False}
