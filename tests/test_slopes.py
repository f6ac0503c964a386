"""Slopes of the loss along directions of the weights: block by block as through the whole module, and as measured."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from olmfast.config.datasets import DatasetConfig
from olmfast.evaluation import lessons
from olmfast.evaluation.batched import BatchedScorer
from olmfast.evaluation.blocks import BlockwiseModel
from olmfast.evaluation.encoding import load_datasets
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.scorer import Candidate, Direction
from olmfast.evaluation.sequential import SequentialScorer
from olmfast.testing import FAMILIES, sums, tiny_model, tiny_tokenizer, write_choices, write_dataset
from olmfast.weights.expressions import Copy, merge, whole
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Sources

CPU = torch.device("cpu")
MODES = {"free.json": "exact_match", "loss.json": "exact", "choice.json": "choice", "text.json": "quality"}


class World:
    """Three donors, datasets of several modes, and both scorers, each on a model of its own."""

    def __init__(self, folder, family, batch_tokens=120):
        for seed in range(3):
            tiny_model(folder / f"d{seed}", family, seed, num_hidden_layers=2, n_layer=2)
        self.pool = Pool.open(["d0", "d1", "d2"], folder, folder)
        for name in ("free.json", "loss.json"):
            texts = [(f"{q:x>{6 + i}}", f"{a}{'y' * (i % 3)}") for i, (q, a) in enumerate(sums(4))]
            write_dataset(folder / name, texts)
        write_choices(folder / "choice.json", folder / "d1", 3)
        write_dataset(folder / "text.json", sums(2))
        entries = {name: DatasetConfig(mode=mode, max_new_tokens=4) for name, mode in MODES.items()}
        self.datasets = load_datasets(folder, entries, tiny_tokenizer(), 128)
        self.models = [
            WorkingModel(whole("d0", self.pool.tensors), Sources(self.pool, folder), CPU, torch.float64)
            for _ in range(2)
        ]
        self.plain = SequentialScorer(self.models[0], self.datasets, tiny_tokenizer(), [4], 4096)
        self.fast = BatchedScorer(self.models[1], self.datasets, tiny_tokenizer(), [4], batch_tokens)
        self.directions = {
            name: [Direction(Copy("d0", name), Copy(donor, name)) for donor in ("d1", "d2")]
            for name in self.pool.tensors
            if not self.pool.architecture.is_ignored(name)
        }
        self.samples = {name: list(range(len(dataset.samples))) for name, dataset in self.datasets.items()}
        self.weights = {"free.json": 0.5, "loss.json": 1.0, "choice.json": 2.0, "text.json": 1.5}
        whole_donors = [Candidate(donor, recipe=whole(donor, self.pool.tensors)) for donor in ("d0", "d1", "d2")]
        # What is expected of one dataset is its answers alone.
        self.teachers = dict(zip(("free.json", "choice.json", "text.json"), whole_donors, strict=True))

    def moved(self, *weights):
        """The model as far along the directions as the weights say."""
        values = {
            name: merge("task_arithmetic", [Copy(d, name) for d in ("d1", "d2")], Copy("d0", name), weight=weights)
            for name in self.directions
        }
        return Candidate("moved", values)


pytestmark = pytest.mark.usefixtures("float64_throughout")


@pytest.mark.parametrize("family", list(FAMILIES))
def test_slopes_block_by_block_are_those_through_the_whole_module(family, tmp_path):
    world = World(tmp_path, family)
    asked = (world.moved(0.3, 0.2), world.directions, world.samples, world.weights, world.teachers)
    plain, fast = world.plain.slopes(*asked), world.fast.slopes(*asked)
    assert fast.losses == pytest.approx(plain.losses, rel=1e-9)
    assert fast.along.keys() == plain.along.keys() == world.directions.keys()
    size = max(float(values.abs().max()) for values in plain.along.values())
    for name, values in plain.along.items():
        torch.testing.assert_close(fast.along[name], values, rtol=1e-7, atol=1e-9 * size)
    assert size > 0


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_slopes_along_rows_are_shares_of_those_along_their_tensor(family, tmp_path):
    world = World(tmp_path, family)
    axes = {
        name: world.pool.architecture.row_axis(name)
        for name in world.directions
        if len(world.pool["d0"].tensors[name].shape) == 2 and world.pool.architecture.block_of(name) is not None
    }
    by_row = {name: [replace(one, axis=axes.get(name)) for one in own] for name, own in world.directions.items()}
    more = (world.samples, world.weights, world.teachers)
    whole = world.fast.slopes(world.moved(0.3, 0.2), world.directions, *more).along
    plain, fast = (one.slopes(world.moved(0.3, 0.2), by_row, *more).along for one in (world.plain, world.fast))
    size = max(float(values.abs().max()) for values in whole.values())
    assert len(axes) >= 8
    for name in by_row:
        expected = (2, world.pool["d0"].tensors[name].shape[axes[name]]) if name in axes else (2,)
        assert tuple(fast[name].shape) == expected
        torch.testing.assert_close(fast[name], plain[name], rtol=1e-7, atol=1e-9 * size)
        torch.testing.assert_close(fast[name].view(2, -1).sum(dim=1), whole[name], rtol=1e-7, atol=1e-9 * size)


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral", "qwen3_moe"])
def test_what_is_held_on_the_way_up_changes_no_bit(family, tmp_path, monkeypatch):
    world = World(tmp_path, family)
    n_run, run = [], BlockwiseModel.run
    monkeypatch.setattr(BlockwiseModel, "run", lambda *args: (n_run.append(args[2]), run(*args))[1])
    found = []
    for graph_bytes in (0, 1, 1 << 30):  # nothing, the first block, all
        world.fast.shares.graph_bytes = graph_bytes
        n_run.clear()
        found.append(
            (world.fast.slopes(world.moved(0.3, 0.2), world.directions, world.samples, world.weights, {}), len(n_run))
        )
    (plain, most), (first, fewer), (held, fewest) = found
    assert most > fewer > fewest
    for slopes in (first, held):
        assert slopes.losses == plain.losses
        assert all(torch.equal(slopes.along[name], plain.along[name]) for name in plain.along)


def test_a_slope_is_what_a_small_step_changes_the_loss_by(tmp_path):
    world = World(tmp_path, "llama")
    step, at = 1e-2, (0.3, 0.2)
    # Values are rounded to the float32 that they are saved in, so that a step must not be too small.
    asked = (world.samples, world.weights, world.teachers)
    loss = lambda *weights: sum(  # noqa: E731
        world.weights[name] * value
        for name, value in world.plain.slopes(world.moved(*weights), {}, *asked).losses.items()
    )
    slopes = world.fast.slopes(world.moved(*at), world.directions, world.samples, world.weights, world.teachers)
    total = sum(values for values in slopes.along.values())
    for donor in range(2):
        before, after = ([w + sign * step * (i == donor) for i, w in enumerate(at)] for sign in (-1, 1))
        assert float(total[donor]) == pytest.approx((loss(*after) - loss(*before)) / (2 * step), rel=2e-2)


def test_only_the_samples_asked_for_count_and_the_model_is_left_as_it_was(tmp_path):
    world = World(tmp_path, "qwen2")
    before = {name: value.clone() for name, value in world.models[1].module.state_dict().items()}
    samples = {"free.json": [1, 3]}
    fast = world.fast.slopes(world.moved(0.5, 0.5), world.directions, samples, world.weights, world.teachers)
    plain = world.plain.slopes(world.moved(0.5, 0.5), world.directions, samples, world.weights, world.teachers)
    assert list(fast.losses) == ["free.json"]
    assert fast.losses == pytest.approx(plain.losses, rel=1e-9)
    for name, value in world.models[1].module.state_dict().items():
        assert torch.equal(value, before[name])
    assert not any(parameter.requires_grad for parameter in world.models[1].module.parameters())
    unit = world.pool.architecture.model_unit(world.pool.tensors)
    scores = world.fast.score(unit, [Candidate("d0")])
    assert all(math.isfinite(float(scores.mean(name)[0])) for name in MODES)


def test_a_pass_that_does_not_fit_is_halved(tmp_path, monkeypatch):
    from olmfast.evaluation import slopes

    world = World(tmp_path, "llama")
    asked = (world.moved(0.3, 0.2), world.directions, world.samples, world.weights, world.teachers)
    expected = world.fast.slopes(*asked)
    compute, seen = slopes.slopes_blockwise, []

    def fail_first(model, blockwise, questions, directions, n_tokens, *rest):
        seen.append(n_tokens)
        if len(seen) < 3:
            raise torch.OutOfMemoryError("out of memory")
        return compute(model, blockwise, questions, directions, n_tokens, *rest)

    monkeypatch.setattr("olmfast.evaluation.batched.slopes_blockwise", fail_first)
    halved = world.fast.slopes(*asked)
    assert seen[1:] == [seen[0], seen[0] // 2]  # what is held on the way up is given back first
    for name, values in expected.along.items():
        torch.testing.assert_close(halved.along[name], values, rtol=1e-6, atol=1e-8)


def test_a_lesson_is_how_likely_the_teacher_finds_each_token(tmp_path):
    world = World(tmp_path, "llama")
    plain = world.plain.lessons.of(world.samples, world.weights, world.teachers)
    fast = world.fast.lessons.of(world.samples, world.weights, world.teachers)
    for (name, lesson, weight), (_, other, _) in zip(plain, fast, strict=True):
        assert weight == world.weights[name] / len(world.samples[name])
        assert lesson.sample == other.sample
        torch.testing.assert_close(lesson.shares.sum(dim=1), torch.ones(lesson.n, dtype=torch.float64))
        # Tokens that are equally likely to nine digits may come in either order.
        torch.testing.assert_close(other.shares, lesson.shares, rtol=1e-6, atol=1e-9)
        if name != "loss.json":
            assert lesson.shares[:, 0].unique().tolist() == [lessons.EXPECTED]
        if name == "loss.json":
            assert lesson.tokens.tolist() == [[token] for token in lesson.sample.response]
            assert lesson.shares.unique().tolist() == [1]
        if name == "choice.json":
            assert lesson.tokens.tolist() == [[lesson.sample.response[0], *lesson.sample.options]]
        if name == "text.json":
            assert 1 <= len(lesson.sample.response) <= 4
            assert lesson.tokens[:, 0].tolist() == list(lesson.sample.response)
            assert lesson.tokens[:, 1].tolist() == list(lesson.sample.response)  # greedy: the likeliest


def test_what_the_teacher_thinks_is_best_met_by_the_teacher(tmp_path, monkeypatch):
    monkeypatch.setattr(lessons, "EXPECTED", 0.0)
    world = World(tmp_path, "llama")
    teacher = Candidate("d1", recipe=whole("d1", world.pool.tensors))
    asked = (world.samples, world.weights, dict.fromkeys(world.samples, teacher))
    at = lambda *weights: world.plain.slopes(world.moved(*weights), {}, *asked).losses  # noqa: E731
    least = at(1.0, 0.0)
    for elsewhere in (at(0.9, 0.1), at(0.7, 0.0), at(0.0, 1.0)):
        assert all(elsewhere[name] > least[name] for name in world.samples)


def test_a_teacher_is_asked_once(tmp_path, monkeypatch):
    world = World(tmp_path, "llama")
    asked = (world.moved(0.3, 0.2), world.directions, world.samples, world.weights, world.teachers)
    first = world.fast.slopes(*asked)
    monkeypatch.setattr(world.fast.lessons, "logits_of", lambda _: pytest.fail("asked again"))
    assert world.fast.slopes(*asked).losses == first.losses
