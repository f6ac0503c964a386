"""The search of alphas: an alpha vector scored through the one merged layer, against merging and evaluating the model.

    OMP_NUM_THREADS=1 pytest bench/test_alpha_search.py --benchmark-only

The Llama and the questions of `search_case.py`, of 20 blocks, the last 8 merged into one. The plain driver works as
pruning by merging does: it loads the model, merges its matrices step by step, saves the result, loads that and scores
it, in batches. Beside it the whole pruned model is scored in place, nothing saved or loaded. Times are CPU seconds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import room, sized
from peak import cpu
from search_case import Case, make_case
from transformers import AutoModelForCausalLM

from olmfast.config.run import RunConfig, parse_config
from olmfast.evaluation.batched import BatchedScorer
from olmfast.evaluation.encoding import Dataset, make_batches
from olmfast.evaluation.open import Evaluation, Settings
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.sequential import SequentialScorer
from olmfast.pruning.alphas import weights_of
from olmfast.pruning.questions import Divided
from olmfast.pruning.target import Target

pytestmark = pytest.mark.timeout(0)
N_BLOCKS, N_STEPS = sized((4, 2), (20, 8), (32, 13))
N_QUESTIONS = sized(4, 32, 64)
N_VECTORS = sized(3, 12, 24)  # of a generation of CMA-ES, about
N_PLAIN = sized(1, 2, 4)  # that the plain driver and the whole model score
PROJECTIONS = (
    *("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"),
    *("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
)
BATCH_TOKENS = 1024


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    with room(tmp_path_factory, "alphas", 2e9) as folder:
        yield make_case(folder, N_QUESTIONS, N_BLOCKS, n_donors=1)


def config_of(case: Case) -> RunConfig:
    """A search on the questions with answers."""
    keys = {"models": ["donor0"], "models_dir": "models", "device": "cpu", "output_dir": "out", "budget": 100}
    section = {"method": "cma", "num_layer": N_STEPS, "holdout": 0}
    data = {**keys, "dataset": {"forced.json": {"mode": "exact"}}, "prune": section}
    return parse_config(data, "bench", case.folder)


def merge_and_evaluate(case: Case, dataset: Dataset, alphas: tuple[float, ...], out: Path) -> float:
    """The mean cross-entropy of the answers, by the plain driver."""
    model = AutoModelForCausalLM.from_pretrained(case.folder / "models" / "donor0", dtype=torch.float32)
    with torch.no_grad():
        for alpha in alphas:
            below, last = model.model.layers[-2], model.model.layers[-1]
            for name in PROJECTIONS:
                weight, other = (layer.get_submodule(name).weight for layer in (below, last))
                weight.copy_(alpha * weight + (1 - alpha) * other)
            model.model.layers = model.model.layers[:-1]
    model.config.num_hidden_layers = len(model.model.layers)
    model.config.layer_types = None
    model.save_pretrained(out)
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    losses = []
    inputs = [sample.prompt + sample.response[:-1] for sample in dataset.samples]
    with torch.inference_mode():
        for batch in make_batches([len(ids) for ids in inputs], BATCH_TOKENS):
            ids = torch.zeros(len(batch), len(inputs[batch[0]]), dtype=torch.long)
            for row, index in enumerate(batch):
                ids[row, : len(inputs[index])] = torch.tensor(inputs[index])
            logits = model(ids).logits
            for row, index in enumerate(batch):
                sample = dataset.samples[index]
                own = logits[row, len(sample.prompt) - 1 : len(inputs[index])]
                losses.append(float(torch.nn.functional.cross_entropy(own, torch.tensor(sample.response))))
    return sum(losses) / len(losses)


def test_cpu_seconds_per_alpha_vector(benchmark: Any, report: Callable[..., None], case: Case, tmp_path: Path) -> None:
    config = config_of(case)
    target = Target.open(config, evaluated=True)
    questions = Divided.load(config, target.base).selection
    (name,) = questions.datasets
    dice = torch.rand(N_VECTORS, N_STEPS, generator=torch.Generator().manual_seed(0)).tolist()
    vectors = [tuple(row) for row in dice]
    evaluation = Evaluation(target.recipe(weights_of(vectors[0])), target.pool, Settings.of("cpu", "float32"))
    scorer = evaluation.scorer(questions)
    assert isinstance(scorer, BatchedScorer)
    candidates = [Candidate(str(i), target.values(weights_of(vector))) for i, vector in enumerate(vectors)]
    found: list[list[float]] = []

    def score() -> None:
        found.append(scorer.score(target.unit, candidates).mean(name).tolist())

    first = cpu(score)  # computes what enters the merged layer, which later rounds share
    ours = benchmark.pedantic(lambda: cpu(score), rounds=1, iterations=1) / N_VECTORS
    told = (questions.datasets, questions.tokenizer, (), BATCH_TOKENS)
    whole = SequentialScorer(evaluation.model, *told)
    whole_scores: list[float] = []
    in_place = cpu(
        lambda: whole_scores.extend(whole.score(target.unit, candidates[:N_PLAIN]).mean(name).tolist())
    ) / N_PLAIN  # fmt: skip
    plain_scores: list[float] = []
    plain = cpu(
        lambda: plain_scores.extend(
            merge_and_evaluate(case, questions.datasets[name], vector, tmp_path) for vector in vectors[:N_PLAIN]
        )
    ) / N_PLAIN  # fmt: skip
    assert found[0] == found[1]
    assert plain_scores == pytest.approx(found[0][:N_PLAIN], rel=1e-4)
    assert whole_scores == pytest.approx(found[0][:N_PLAIN], rel=1e-4)
    title = f"alpha vector, {N_STEPS} of {N_BLOCKS} blocks merged, {N_QUESTIONS} questions"
    report(title, f"{ours:.3f} s", f"{plain:.2f} s", plain / ours, first_round=f"{first / N_VECTORS:.3f} s")
    report("alpha vector, the whole model in place", f"{ours:.3f} s", f"{in_place:.2f} s", in_place / ours)
    if N_BLOCKS > 4:
        assert plain / ours >= 10
