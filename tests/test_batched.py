"""The fast Scorer gives the sequential Scorer's scores, whatever is tried, wherever, and in whatever pieces."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from olmfast.config import DatasetConfig
from olmfast.evaluation.batched import BatchedScorer
from olmfast.evaluation.batches import load_datasets
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.scorer import Candidate, SequentialScorer
from olmfast.search.swap import whole
from olmfast.testing import FAMILIES, sums, tiny_model, tiny_tokenizer, write_dataset
from olmfast.weights.methods import Sources
from olmfast.weights.offspring import NormOffspring, Parent, SvdOffspring
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Copy

CPU = torch.device("cpu")
MODES = {
    "free.json": {"mode": "exact_match"},
    "strict.json": {"mode": "exact_match", "strict": True},
    "pairs.json": {"mode": "bigram_loss"},
    "loss.json": {"mode": "exact"},
    "perplexity.json": {"mode": "perplexity"},
    "bigram.json": {"mode": "bigram"},
    "words.json": {"mode": "diversity", "max_new_tokens": 7},
    "quality.json": {"mode": "quality", "max_new_tokens": 5},
    "choice.json": {"mode": "choice"},
}
STOP = [4, 20, 21, 22]  # often met by random models


class World:
    """A pool of three donors, every mode of dataset, and two scorers over models of their own."""

    def __init__(self, folder: Path, family: str, dtype: torch.dtype, saved: torch.dtype = torch.float32, **config):
        for seed in range(3):
            tiny_model(folder / f"d{seed}", family, seed, dtype=saved, num_hidden_layers=3, n_layer=3, **config)
        self.pool = Pool.open(["d0", "d1", "d2"], folder, folder)
        # Transformers' eager attention (Gemma 2) turns left padding into NaN in float64: there, prompts of one length.
        ragged = 0 if family == "gemma2" else 4
        texts = [(f"{q:x>{6 + i % (ragged + 1)}}", f"{a}{'y' * (i % 3)}") for i, (q, a) in enumerate(sums(5))]
        for name in MODES:
            write_dataset(folder / name, texts)
        items = [
            {"prompt": q, "response": "-", "choices": list("abc"), "answer": i % 3} for i, (q, _) in enumerate(texts)
        ]
        (folder / "choice.json").write_text(json.dumps(items))
        entries = {name: DatasetConfig(**keys) for name, keys in MODES.items()}
        self.datasets = load_datasets(folder, entries, tiny_tokenizer(), self.pool.architecture.context)
        self.plain_model, self.fast_model = (
            WorkingModel(whole("d0", self.pool.tensors), Sources(self.pool, folder), CPU, dtype) for _ in range(2)
        )
        self.plain = SequentialScorer(self.plain_model, self.datasets, tiny_tokenizer(), STOP, 4096)
        self.fast = self.scorer(4096)
        self.tensors = tuple(self.fast_model.in_parameter_order(self.pool.tensors))

    def scorer(self, batch_tokens):
        return BatchedScorer(self.fast_model, self.datasets, tiny_tokenizer(), STOP, batch_tokens)

    def commit(self, candidate):
        for model in (self.plain_model, self.fast_model):
            model.set_recipe(model.recipe.with_values(candidate.values))
        self.fast.decided(candidate.label)

    def block(self, *blocks):
        return self.pool.architecture.window_unit(self.tensors, blocks)

    def donors(self, unit):
        return [Candidate("now"), *(Candidate(d, {n: Copy(d, n) for n in unit.tensors}) for d in ("d1", "d2"))]

    def offspring(self, unit):
        architecture = self.pool.architecture
        name = next((n for n in unit.tensors if len(self.pool["d0"].tensors[n].shape) == 2), None)
        if name is None:
            return []
        parent = Parent(self.pool["d0"].read(name))
        draws = torch.Generator().manual_seed(5)
        k, axis = len(parent.factors.s), architecture.row_axis(name)
        svd = [torch.randn(k, generator=draws, dtype=torch.float64) * 0.05 for _ in range(3)]
        norm = [torch.randn(parent.weight.shape[axis], generator=draws, dtype=torch.float64) * 0.05 for _ in range(3)]
        return [
            *(Candidate(f"svd{i}", {name: SvdOffspring(parent, x)}) for i, x in enumerate(svd)),
            *(Candidate(f"norm{i}", {name: NormOffspring(parent, x, axis)}) for i, x in enumerate(norm)),
        ]


def assert_same(fast, plain, tolerance):
    for name in plain.samples:
        assert torch.equal(fast.evaluated[name], plain.evaluated[name])
        assert torch.equal(fast.truncated[name], plain.truncated[name]), name
        torch.testing.assert_close(
            fast.samples[name],
            plain.samples[name],
            rtol=tolerance,
            atol=tolerance,
            equal_nan=True,
            msg=lambda m: f"{name}: {m}",
        )


@pytest.mark.parametrize("family", list(FAMILIES))
def test_scores_equal_the_sequential_ones_for_every_family_unit_and_mode(family, tmp_path):
    world = World(tmp_path, family, torch.float64)
    architecture = world.pool.architecture
    modules = architecture.module_units(world.tensors)
    whole_model = architecture.model_unit(world.tensors)
    steps = [
        (whole_model, world.donors(whole_model)),
        (architecture.boundary_unit(world.tensors), world.donors(architecture.boundary_unit(world.tensors))),
        *((world.block(i), world.donors(world.block(i))) for i in range(3)),
        (world.block(0, 1), world.donors(world.block(0, 1))),
        *((unit, [*world.donors(unit), *world.offspring(unit)]) for unit in modules[1 :: max(1, len(modules) // 6)]),
        *((world.block(i), world.donors(world.block(i))) for i in (2, 0, 1)),
    ]
    for unit, candidates in steps:
        fast, plain = world.fast.score(unit, candidates), world.plain.score(unit, candidates)
        # GPT-J's attention multiplies in float32 whatever the model's dtype is.
        assert_same(fast, plain, 1e-5 if family == "gptj" else 1e-9)
        spread = [scores.mean("loss.json").max() - scores.mean("loss.json").min() for scores in (fast, plain)]
        assert min(spread) > 0
        if unit.kind != "model":
            world.commit(candidates[1])
    assert world.fast.statistics.decoded > 0
