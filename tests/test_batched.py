"""The fast Scorer gives the sequential Scorer's scores, whatever is tried, wherever, and in whatever pieces."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path

import psutil
import pytest
import torch

from olmfast import run
from olmfast.config.datasets import DatasetConfig
from olmfast.config.run import load_config
from olmfast.errors import InputError
from olmfast.evaluation import decoding, generation, memory, passes
from olmfast.evaluation.batched import BatchedScorer
from olmfast.evaluation.blocks import BlockwiseModel
from olmfast.evaluation.blueprint import draw_up
from olmfast.evaluation.encoding import load_datasets
from olmfast.evaluation.leaves import ScaledLeaf, StackedLeaf, stack_leaves
from olmfast.evaluation.memory import PREFIX_SHARE, Memory
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.sequential import SequentialScorer
from olmfast.testing import FAMILIES, sums, tiny_model, tiny_run, tiny_tokenizer, write_dataset
from olmfast.weights.expressions import Copy, merge, whole
from olmfast.weights.offspring import NormOffspring, SvdOffspring
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Sources

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

    def __init__(
        self, folder: Path, family: str, dtype: torch.dtype, saved: torch.dtype = torch.float32, device=CPU, **config
    ):
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
            WorkingModel(whole("d0", self.pool.tensors), Sources(self.pool, folder), device, dtype) for _ in range(2)
        )
        self.plain = SequentialScorer(self.plain_model, self.datasets, tiny_tokenizer(), STOP, 4096)
        self.fast = self.scorer(4096)
        self.tensors = draw_up(self.fast_model.recipe, self.pool, dtype).tensors

    def scorer(self, batch_tokens):
        return BatchedScorer(self.fast_model, self.datasets, tiny_tokenizer(), STOP, batch_tokens)

    def commit(self, candidate):
        recipe = candidate.of(self.fast_model.recipe)
        for scorer in (self.plain, self.fast):
            scorer.commit(recipe, candidate.label)

    def block(self, *blocks):
        return self.pool.architecture.window_unit(self.tensors, blocks)

    def donors(self, unit):
        return [Candidate("now"), *(Candidate(d, {n: Copy(d, n) for n in unit.tensors}) for d in ("d1", "d2"))]

    def offspring(self, unit):
        architecture = self.pool.architecture
        name = next((n for n in unit.tensors if len(self.pool["d0"].tensors[n].shape) == 2), None)
        if name is None:
            return []
        saved = str(self.pool["d0"].tensors[name].dtype).removeprefix("torch.")
        told = (Copy("d0", name), saved, 0.05, 5, name, 0)
        axis = architecture.row_axis(name)
        return [
            *(Candidate(f"svd{i}", {name: SvdOffspring(*told, i)}) for i in range(2)),
            *(Candidate(f"norm{i}", {name: NormOffspring(*told, i, axis)}) for i in range(2)),
        ]


def assert_same(fast, plain, tolerance):
    for name in plain.samples:
        assert torch.equal(fast.evaluated[name], plain.evaluated[name])
        assert torch.equal(fast.truncated[name], plain.truncated[name]), name
        assert (name in fast.right) == (name in plain.right) == (name not in ("words.json", "quality.json"))
        if name in plain.right:
            assert torch.equal(fast.right[name], plain.right[name]), name
        own, other = fast.samples[name], plain.samples[name]
        assert torch.allclose(own, other, rtol=tolerance, atol=tolerance, equal_nan=True), (name, own, other)


@pytest.mark.usefixtures("float64_throughout")
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
        *((unit, [*world.donors(unit), *world.offspring(unit)]) for unit in modules[1 :: max(1, len(modules) // 4)]),
        *((world.block(i), world.donors(world.block(i))) for i in (2, 0, 1)),
    ]
    for unit, candidates in steps:
        fast, plain = world.fast.score(unit, candidates), world.plain.score(unit, candidates)
        assert_same(fast, plain, 1e-9)
        spread = [scores.mean("loss.json").max() - scores.mean("loss.json").min() for scores in (fast, plain)]
        assert min(spread) > 0
        if unit.kind != "model":
            world.commit(candidates[1])
    assert world.fast.statistics.decoded > 0


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "mixtral"])
@pytest.mark.parametrize("batch_tokens", [150, 8192])
def test_on_a_gpu_scores_equal_the_sequential_ones(family, batch_tokens, tmp_path):
    world = World(tmp_path, family, torch.float64, device=torch.device("cuda"))
    module = world.pool.architecture.module_units(world.tensors)[9]
    world.fast = world.scorer(batch_tokens)
    for unit in (world.block(1), module, world.block(0)):
        candidates = [*world.donors(unit), *(world.offspring(unit) if unit is module else ())]
        assert_same(world.fast.score(unit, candidates), world.plain.score(unit, candidates), 1e-9)
        world.commit(candidates[1])
    assert world.fast.statistics.decoded > 0


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("limit", [0, 20_000, 1 << 30])
def test_a_sweep_keeps_as_many_boundaries_as_it_may_and_scores_the_same(backward, limit, tmp_path):
    world = World(tmp_path, "llama", torch.float64)
    world.fast.shares.prefix_bytes = limit
    blocks = [0, 1, 2] if not backward else [2, 1, 0]
    kept = []
    for block in blocks:
        unit = world.block(block)
        candidates = world.donors(unit)
        assert_same(world.fast.score(unit, candidates), world.plain.score(unit, candidates), 1e-9)
        kept.append({boundary for batch in world.fast.trajectories.batches for boundary in batch.hidden})
        world.commit(candidates[2])
    if limit == 0:
        assert kept == ([{2}, {1}, {0}] if backward else [{0}, {1}, {2}])
    elif limit == 1 << 30:  # what a commit makes void goes, the rest stays
        assert kept == ([{1, 2}, {1, 2}, {0, 1}] if backward else [{0}, {0, 1}, {0, 1, 2}])


@pytest.mark.usefixtures("float64_throughout")
def test_rows_that_are_done_may_be_decoded_on_until_the_next_look(tmp_path, monkeypatch):
    world = World(tmp_path, "llama", torch.float64)
    unit = world.block(1)
    candidates = world.donors(unit)
    looked = world.plain.score(unit, candidates)
    monkeypatch.setitem(generation.TOKENS_APART, "cpu", 3)
    for scorer in (world.fast, world.plain):
        assert_same(scorer.score(unit, candidates), looked, 1e-9)
    assert world.fast.statistics.decoded > 0


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize(("batch_tokens", "ahead"), [(40, 2), (150, 0), (8192, 1)])
def test_candidates_may_be_split_in_any_way_and_read_later(batch_tokens, ahead, tmp_path, monkeypatch):
    if ahead:  # as on a GPU
        monkeypatch.setitem(passes.PASSES_AHEAD, "cpu", ahead)
        monkeypatch.setattr(decoding, "FIXED_ON", {"cpu"})
    world = World(tmp_path, "qwen2", torch.float64)
    scorer = world.scorer(batch_tokens)
    unit = world.pool.architecture.module_units(world.tensors)[9]
    candidates = [*world.donors(unit), *world.offspring(unit)]
    assert_same(scorer.score(unit, candidates), world.plain.score(unit, candidates), 1e-9)
    two = {name: [3, 1] for name in MODES}
    assert_same(
        scorer.score(unit, candidates[1:], samples=two), world.plain.score(unit, candidates[1:], samples=two), 1e-9
    )


@pytest.mark.usefixtures("float64_throughout")
def test_batches_of_rollouts_use_the_memory_of_those_before_them_where_steps_are_replayed(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "FIXED_ON", {"cpu"})
    world = World(tmp_path, "llama", torch.float64)
    unit, decoded, loaded = world.block(1), [], []
    now, *candidates = world.donors(unit)
    expected = world.plain.score(unit, candidates)
    world.fast.score(unit, [now])
    world.fast.shares.rollout_tokens = 4 * decoding.ROOM_STEP
    resume, load = decoding.Decoder.resume, decoding._Fixed.load
    monkeypatch.setattr(
        decoding.Decoder, "resume", lambda self, some, stop: decoded.append(len(some)) or resume(self, some, stop)
    )
    monkeypatch.setattr(decoding._Fixed, "load", lambda self, some: loaded.append(len(some)) or load(self, some))
    assert_same(world.fast.score(unit, candidates), expected, 1e-9)
    assert max(decoded) > 1
    assert 2 <= len(loaded) < len(decoded)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize(("fits", "ahead"), [(2, 2), (7, 0), (20, 1)])
def test_what_does_not_fit_the_memory_is_halved_and_scores_the_same(fits, ahead, tmp_path, monkeypatch):
    monkeypatch.setitem(passes.PASSES_AHEAD, "cpu", ahead)
    world = World(tmp_path, "llama", torch.float64)
    unit = world.block(1)
    candidates = world.donors(unit)
    run, stack = BlockwiseModel.run, WorkingModel.stack

    def crowded(self, hidden, first, last, *rest):
        if len(hidden) > fits and last == 3:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return run(self, hidden, first, last, *rest)

    def crowded_stack(self, several):
        if len(several) > 1 and fits == 2:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory")
        return stack(self, several)

    monkeypatch.setattr(BlockwiseModel, "run", crowded)
    monkeypatch.setattr(WorkingModel, "stack", crowded_stack)
    fast = world.fast.score(unit, candidates)
    assert world.fast.statistics.splits > 0
    assert_same(fast, world.plain.score(unit, candidates), 1e-9)
    monkeypatch.setattr(BlockwiseModel, "run", lambda *_: (_ for _ in ()).throw(ValueError("another fault")))
    with pytest.raises(ValueError, match="another fault"):
        world.fast.score(unit, candidates)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("ahead", [0, 2])
def test_what_does_not_fit_while_a_pass_is_read_is_halved_too(ahead, tmp_path, monkeypatch):
    monkeypatch.setitem(passes.PASSES_AHEAD, "cpu", ahead)
    world = World(tmp_path, "llama", torch.float64)
    unit, take = world.block(1), passes.Passes._take_along
    candidates = world.donors(unit)

    def crowded(self, rollouts, *rest):
        if len(rollouts) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        take(self, rollouts, *rest)

    monkeypatch.setattr(passes.Passes, "_take_along", crowded)
    assert_same(world.fast.score(unit, candidates), world.plain.score(unit, candidates), 1e-9)
    assert world.fast.statistics.splits > 0


def test_a_step_that_is_not_replayed_is_told_once(tmp_path, monkeypatch):
    world, told = World(tmp_path, "llama", torch.float32), []
    monkeypatch.setattr(world.fast, "note", told.append)
    decoding._NEEDS_THE_HOST.add(world.fast.blockwise.module)
    for _ in range(2):
        world.fast.score(world.block(1), world.donors(world.block(1)))
    assert told == ["llama: a step of decoding waits for the host, so it is not replayed"]


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("fits", [2, 7])
def test_a_prefix_that_does_not_fit_the_memory_is_halved_too(fits, tmp_path, monkeypatch):
    world = World(tmp_path, "llama", torch.float64)
    run = BlockwiseModel.run

    def crowded(self, hidden, first, last, *rest):
        if len(hidden) > fits:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return run(self, hidden, first, last, *rest)

    monkeypatch.setattr(BlockwiseModel, "run", crowded)
    for unit in (world.block(2), world.block(0, 1)):
        candidates = world.donors(unit)
        assert_same(world.fast.score(unit, candidates), world.plain.score(unit, candidates), 1e-9)
    assert world.fast.statistics.splits > 0


def test_a_stack_that_did_not_fit_is_freed_before_its_halves_are_made(tmp_path, monkeypatch):
    world = World(tmp_path, "llama", torch.float64)
    unit = world.block(1)
    stack, made = WorkingModel.stack, []

    def crowded(self, several):
        assert not any(tensor() is not None for tensor in made)
        result = stack(self, several)
        if len(several) > 1:
            made.extend(map(weakref.ref, result.values.values()))
            raise torch.OutOfMemoryError("CUDA out of memory")
        return result

    monkeypatch.setattr(WorkingModel, "stack", crowded)
    world.fast.score(unit, world.donors(unit))
    assert world.fast.statistics.splits == 1


@pytest.mark.usefixtures("float64_throughout")
def test_a_candidates_values_are_fetched_while_those_before_it_are_computed_with(tmp_path, monkeypatch):
    world = World(tmp_path, "llama", torch.float64)
    unit, done = world.block(1), []
    now, *candidates = world.donors(unit)
    expected = world.plain.score(unit, candidates)
    world.fast.score(unit, [now])
    world.fast.shares.pass_tokens = 1  # a candidate a pass
    fill, together = WorkingModel._fill, BlockwiseModel.run_together

    def filled(self, wanted, *rest, **keys):
        if wanted:
            done.append({name for name, *_ in wanted})
        return fill(self, wanted, *rest, **keys)

    def ran(self, *args):
        done.append("pass")
        return together(self, *args)

    monkeypatch.setattr(WorkingModel, "_fill", filled)
    monkeypatch.setattr(BlockwiseModel, "run_together", ran)
    assert_same(world.fast.score(unit, candidates), expected, 1e-9)
    assert done == [set(unit.tensors), "pass", set(unit.tensors), *["pass"] * (len(done) - 3)]


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("failing", [1, 2])
def test_a_candidate_whose_values_did_not_fit_the_memory_is_fetched_again(failing, tmp_path, monkeypatch):
    world = World(tmp_path, "llama", torch.float64)
    unit, calls, fill = world.block(1), [], WorkingModel._fill
    now, *candidates = world.donors(unit)
    expected = world.plain.score(unit, candidates)
    world.fast.score(unit, [now])
    world.fast.shares.pass_tokens = 128

    def crowded(self, wanted, keep, of=1):
        calls.extend([1] * bool(wanted))
        if wanted and len(calls) == failing:
            for _, _, target in wanted:
                target.fill_(math.nan)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return fill(self, wanted, keep, of)

    monkeypatch.setattr(WorkingModel, "_fill", crowded)
    assert_same(world.fast.score(unit, candidates), expected, 1e-9)
    assert world.fast.statistics.splits == 1


@pytest.mark.usefixtures("float64_throughout")
def test_the_memory_of_a_batch_of_rollouts_is_given_back_before_passes_are_halved(tmp_path, monkeypatch):
    monkeypatch.setattr(decoding, "FIXED_ON", {"cpu"})
    world = World(tmp_path, "llama", torch.float64)
    unit, calls, run = world.block(1), [], BlockwiseModel.run_together
    now, *candidates = world.donors(unit)
    expected = world.plain.score(unit, candidates)
    world.fast.score(unit, [now])
    world.fast.shares.rollout_tokens = 1  # decoded at once
    tokens = world.fast.shares.pass_tokens

    def crowded(self, passes, first, last):
        calls.append(decoder()._last is not None)
        if calls == [*[False] * (len(calls) - 1), True]:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(self, passes, first, last)

    made, init = [], decoding.Decoder.__init__
    decoder = lambda: made[-1]  # noqa: E731
    monkeypatch.setattr(decoding.Decoder, "__init__", lambda self, *args: made.append(self) or init(self, *args))
    monkeypatch.setattr(BlockwiseModel, "run_together", crowded)
    assert_same(world.fast.score(unit, candidates), expected, 1e-9)
    assert any(calls)
    assert (world.fast.statistics.splits, world.fast.shares.pass_tokens) == (1, tokens)


@pytest.mark.usefixtures("float64_throughout")
def test_one_whole_model_is_tried_after_another_without_the_current_one_in_between(tmp_path, monkeypatch):
    world = World(tmp_path, "llama", torch.float64)
    tensors = world.fast_model.recipe.tensors
    unit, names = world.pool.architecture.model_unit(tensors), list(tensors)

    def candidate(weight, some):
        terms = {name: [Copy(donor, name) for donor in ("d1", "d2")] for name in some}
        return Candidate(str(weight), {name: merge("linear", own, weight=(weight, 1.0)) for name, own in terms.items()})

    candidates = [candidate(0.3, names), candidate(0.5, names[2:]), candidate(0.7, names[:-3])]
    applied, apply = [], WorkingModel.apply

    def counted(self, values, *args, **kwargs):
        applied.extend(values)
        return apply(self, values, *args, **kwargs)

    expected = world.plain.score(unit, candidates)
    monkeypatch.setattr(WorkingModel, "apply", counted)
    assert_same(world.fast.score(unit, candidates), expected, 1e-9)
    n = len(names)
    assert len(applied) == n + 2 + (n - 2) + 3 + (n - 3) + (n - 3)  # each, and what the next one does not set
    assert_current(world)
    scored, calls = passes.Passes.run, []

    def failing(self, *args):
        calls.append(args)
        if len(calls) == 2:
            raise ValueError("a fault")
        return scored(self, *args)

    monkeypatch.setattr(passes.Passes, "run", failing)
    with pytest.raises(ValueError, match="a fault"):
        world.fast.score(unit, candidates[:2])
    assert_current(world)


def assert_current(world):
    """The live model is what its recipe says."""
    for name, expression in world.fast_model.recipe.tensors.items():
        assert world.fast_model.equals(name, expression.value(world.fast_model.sources).to(torch.float64)), name


@pytest.mark.parametrize("fixed_on", [set(), {"cpu"}])
def test_nothing_that_scoring_held_waits_for_the_garbage_collector(fixed_on, tmp_path, monkeypatch):
    """Cycles that hold tensors would keep them until Python looks for cycles: memory nobody counts."""
    monkeypatch.setattr(decoding, "FIXED_ON", fixed_on)
    world = World(tmp_path, "llama", torch.float32)
    unit = world.block(1)
    world.fast.score(unit, world.donors(unit))
    assert world.fast.statistics.decoded > 0
    gc.collect()
    gc.disable()
    try:
        world.fast.score(unit, world.donors(unit))
        held = {id(x) for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}
        gc.collect()
        left = {id(x) for x in gc.get_objects() if issubclass(type(x), torch.Tensor)}
    finally:
        gc.enable()
    assert held <= left


@pytest.mark.usefixtures("float64_throughout")
def test_a_dataset_that_is_scored_after_another_keeps_its_prefix(tmp_path, monkeypatch):
    world = World(tmp_path, "llama", torch.float64)
    entered, enter = [], BlockwiseModel.enter
    monkeypatch.setattr(BlockwiseModel, "enter", lambda self, ids: (entered.append(len(ids)), enter(self, ids))[1])
    for block in range(3):
        unit, before = world.block(block), len(entered)
        for name in ("pairs.json", "loss.json"):  # as the guard has them scored
            fast, plain = (scorer.score(unit, world.donors(unit), [name]) for scorer in (world.fast, world.plain))
            assert_same(fast, plain, 1e-9)
        assert (len(entered) == before) == (block > 0)
        world.commit(world.donors(unit)[1])


def test_states_are_kept_only_where_those_of_the_longest_answers_fit(tmp_path):
    world = World(tmp_path, "llama", torch.float64)
    scorer = world.fast
    free = [task for task in scorer.trajectories.tasks if task.runs_freely]
    longest = sum(len(task.sample.prompt) + task.limit for task in free)
    for tokens, kept in ((longest - 1, False), (longest + 1, True)):
        scorer.shares.room = int(2 * tokens * scorer.blockwise.state_bytes / PREFIX_SHARE)
        scorer.forget()
        assert scorer.shares.keeps_states == kept


@pytest.mark.usefixtures("float64_throughout")
def test_states_that_are_not_kept_are_computed_for_all_questions_of_a_pass_at_once(tmp_path, monkeypatch):
    world = World(tmp_path, "llama", torch.float64)
    world.fast.shares.keeps_states = False
    world.fast.trajectories.arrange(set(MODES))
    unit, entered, enter = world.block(2), [], BlockwiseModel.enter
    candidates = world.donors(unit)
    expected = world.plain.score(unit, candidates)
    world.fast.score(unit, candidates[:1])
    monkeypatch.setattr(BlockwiseModel, "enter", lambda self, ids: entered.append(len(ids)) or enter(self, ids))
    before = world.fast.statistics.decoded
    assert_same(world.fast.score(unit, candidates), expected, 1e-9)
    assert world.fast.statistics.decoded > before
    assert len(entered) <= sum(task.runs_freely for task in world.fast.trajectories.tasks) / 3
    assert max(entered) > 1


def test_where_the_system_shows_no_peak_nothing_is_measured(tmp_path, monkeypatch):
    monkeypatch.setattr("olmfast.evaluation.memory.RESET", tmp_path / "none" / "clear_refs")
    done = []
    assert Memory(CPU).taken_by(lambda: done.append(1)) == 0
    assert done == [1]


def test_a_pass_that_fits_in_no_size_is_an_error(tmp_path, monkeypatch):
    world = World(tmp_path, "llama", torch.float64)

    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(BlockwiseModel, "run", full)
    with pytest.raises(torch.OutOfMemoryError):
        world.fast.score(world.block(1), world.donors(world.block(1)))


@pytest.mark.parametrize(("dtype", "saved"), [(torch.float32, torch.float32), (torch.float32, torch.bfloat16)])
def test_in_float32_scores_differ_by_rounding_alone(dtype, saved, tmp_path):
    world = World(tmp_path, "llama", dtype, saved)
    for unit in (world.block(1), *world.pool.architecture.module_units(world.tensors)[2:16:4]):
        candidates = [*world.donors(unit), *world.offspring(unit)]
        assert_same(world.fast.score(unit, candidates), world.plain.score(unit, candidates), 2e-4)


def test_offspring_of_row_norms_scale_outputs_where_that_is_the_same(tmp_path):
    world = World(tmp_path, "qwen2", torch.float32)
    unit = next(u for u in world.pool.architecture.module_units(world.tensors) if u.name.endswith("1.self_attn.q_proj"))
    norm = [candidate.values for candidate in world.offspring(unit) if candidate.label.startswith("norm")]
    (leaf,) = stack_leaves(world.fast_model, norm)
    assert isinstance(leaf, ScaledLeaf)
    rounded = World(tmp_path / "rounded", "qwen2", torch.float32, torch.bfloat16)
    norm = [candidate.values for candidate in rounded.offspring(unit) if candidate.label.startswith("norm")]
    (leaf,) = stack_leaves(rounded.fast_model, norm)
    assert isinstance(leaf, StackedLeaf)


def test_a_candidate_of_no_numbers_scores_nan(tmp_path):
    world = World(tmp_path, "llama", torch.float32)
    unit = next(u for u in world.pool.architecture.module_units(world.tensors) if u.name.endswith("1.mlp.up_proj"))
    (name,) = unit.tensors
    scaled = NormOffspring(Copy("d0", name), "float32", math.inf, 0, name, 0, 0)
    other = NormOffspring(scaled, "float32", 0.0, 0, name, 0, 0)
    broken = [Candidate(label, {unit.tensors[0]: own}) for label, own in (("scaled", scaled), ("other", other))]
    for candidate in broken:
        scores = world.fast.score(unit, [Candidate("now"), candidate])
        for name in MODES:
            assert scores.mean(name)[0].isfinite()
            assert scores.mean(name)[1].isnan()


@pytest.mark.usefixtures("float64_throughout")
def test_a_whole_search_decides_as_with_the_sequential_scorer(tmp_path):
    stages = {"base_select": True, "boundary_select": True, "layer_swap": True, "tensor_swap": True, "es_svd": True}
    units = ["*.0.mlp.down*", "*.1.self_attn.[qo]*"]
    config = tiny_run(tmp_path, dtype="float64", es_norm=True, units=units, direction="backward", **stages)
    results = [
        run(load_config(config, {"scorer": scorer, "output_dir": f"out_{scorer}"}))
        for scorer in ("batched", "sequential")
    ]
    steps = [result.record.data["olmfast"]["steps"] for result in results]
    assert [step["winner"] for step in steps[0].values()] == [step["winner"] for step in steps[1].values()]
    assert sum(step["changed"] for step in steps[0].values()) >= 4
    files = [(result.output_dir / "model.safetensors").read_bytes() for result in results]
    assert files[0] == files[1]


@pytest.mark.parametrize(("text", "limited"), [("1073741824\n", True), ("max\n", False), ("9" * 19, False)])
def test_a_containers_limit_is_the_machines_memory(text, limited, tmp_path, monkeypatch):
    (tmp_path / "memory.max").write_text(text)
    monkeypatch.setattr(memory, "CONTAINER", (tmp_path / "memory.max", tmp_path / "not.there"))
    machine = psutil.virtual_memory().total
    assert memory.machine_bytes() == (1 << 30 if limited else machine)


def test_less_memory_than_the_model_needs_is_an_error(tmp_path):
    config = load_config(tiny_run(tmp_path, layer_swap=True), {"max_ram": "20MB"})
    with pytest.raises(InputError, match=r"max_ram: 0\.02 GB; the model and the libraries alone take"):
        run(config)
