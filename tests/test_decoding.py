"""Decoding on from states gives what the model gives token by token, whether shapes grow or stay for a GPU's replay."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from olmfast.evaluation.blocks import BlockwiseModel, Recorder
from olmfast.evaluation.cache import Kept
from olmfast.evaluation.decoding import Decoder, Rollout, _Fixed, needs_the_host, resume
from olmfast.evaluation.leaves import ScaledLeaf, StackedLeaf, _rows
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.replay import Replayed
from olmfast.evaluation.tasks import OwnTokens
from olmfast.testing import FAMILIES, tiny_model
from olmfast.weights.expressions import whole
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Sources

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
LENGTHS = (5, 19, 12, 23, 8, 30, 17)  # also longer than the window of those whose attention slides
LIMITS = (3, 25, 14, 21, 1, 9, 25)
STOP = (20, 21)


class World:
    """A tiny model, and its states after some prompts."""

    def __init__(self, folder, family, device=DEVICE, dtype=torch.float64):
        tiny_model(folder / "d0", family, 0, dtype=torch.float32, num_hidden_layers=3, n_layer=3)
        pool = Pool.open(["d0"], folder, folder)
        self.model = WorkingModel(whole("d0", pool.tensors), Sources(pool, folder), device, dtype)
        self.module, self.device = self.model.module, device
        self.blockwise = BlockwiseModel(self.module, pool.architecture)
        dice = torch.Generator().manual_seed(1)
        self.prompts = [torch.randint(6, 100, (n,), generator=dice).tolist() for n in LENGTHS]
        self.recorder = Recorder()
        with torch.inference_mode():
            ids = self.blockwise.pad(self.prompts)
            self.blockwise.run(self.blockwise.enter(ids), 0, len(self.blockwise.blocks), self.recorder)

    def rollouts(self, candidates=1):
        """The prompts in turn, by candidates in turn; of each its last token is still to be fed."""
        states = self.recorder.states
        return [
            Rollout(
                row % candidates, row, OwnTokens(prompt[-1:], torch.zeros(1)),
                [Kept(*states[block], row) for block in sorted(states)], len(prompt) - 1, limit,
            )
            for row, (prompt, limit) in enumerate(zip(self.prompts, LIMITS, strict=True))
        ]  # fmt: skip

    def resumed(self, leaves=(), candidates=1, **how):
        return resume(self.module, self.rollouts(candidates), leaves, self.blockwise.context, STOP, **how)

    @torch.inference_mode()
    def plainly(self, row):
        """One prompt's continuation, everything computed anew for each token."""
        tokens = []
        while len(tokens) < LIMITS[row] and not (tokens and tokens[-1] in STOP):
            ids = torch.tensor([self.prompts[row] + tokens], device=self.device)
            tokens.append(int(self.module(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
        return tokens


def assert_same(one, other):
    assert [own.tokens for own in one] == [own.tokens for own in other]
    for a, b in zip(one, other, strict=True):
        torch.testing.assert_close(a.max_prob, b.max_prob, rtol=1e-9, atol=1e-9)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", list(FAMILIES))
def test_fixed_shapes_decode_what_growing_ones_do_in_every_family(family, tmp_path):
    world = World(tmp_path, family)
    growing, fixed = world.resumed(fixed=False), world.resumed(fixed=True)
    assert_same(fixed, growing)
    assert len({tuple(own.tokens) for own in growing}) > 3
    assert [own.tokens for own in growing] == [world.plainly(row) for row in range(len(LENGTHS))]


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", list(FAMILIES))
def test_batches_that_follow_each_other_in_the_same_memory_decode_what_each_alone_does(family, tmp_path):
    world = World(tmp_path, family)
    decoder = Decoder(world.module, (), world.blockwise.context, fixed=True)
    for rows in ((3, 5, 6, 1), (0, 2, 4), (6, 0), (1, 3, 5, 2)):
        rollouts = [world.rollouts()[row] for row in rows]
        memory = decoder._last
        alone = resume(world.module, rollouts, (), world.blockwise.context, STOP, fixed=False)
        assert_same(decoder.resume(rollouts, STOP), alone)
        assert decoder._last is memory or memory is None
    assert decoder._last is not None
    assert decoder.fitting(world.rollouts()[:3], ()) == []  # what ends them is another
    rollouts = [world.rollouts()[row] for row in (0, 1, 2, 3, 4)]  # more than there are rows
    alone = resume(world.module, rollouts, (), world.blockwise.context, STOP, fixed=False)
    assert decoder.fitting(rollouts, STOP) == rollouts[:4]
    assert_same(decoder.resume(rollouts, STOP), alone)
    assert decoder._last is not memory


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("kind", [StackedLeaf, ScaledLeaf])
def test_candidates_keep_their_rows_from_batch_to_batch(kind, tmp_path):
    world = World(tmp_path, "llama")
    linear = world.blockwise.blocks[1].mlp.up_proj
    factors = torch.exp(torch.randn(3, len(linear.weight), device=DEVICE, dtype=linear.weight.dtype))
    leaf = kind(linear, factors if kind is ScaledLeaf else {"weight": linear.weight.detach() * factors[:, :, None]})
    decoder, memory = Decoder(world.module, [leaf], world.blockwise.context, fixed=True), None
    for rows in ((0, 1, 2, 3, 4, 5), (4, 6), (1, 5, 3)):  # two rows of each candidate's
        rollouts = [world.rollouts(3)[row] for row in rows]
        alone = resume(world.module, rollouts, [leaf], world.blockwise.context, STOP, fixed=False)
        assert_same(decoder.resume(rollouts, STOP), alone)
        assert memory in (None, decoder._last)
        memory = decoder._last
    fitting = decoder.fitting([world.rollouts(3)[row] for row in (0, 3, 6, 1)], STOP)
    assert [one.task for one in fitting] == [0, 3, 1]
    few = [world.rollouts(3)[row] for row in (0, 3, 6)]
    assert len(decoder.fitting(few, STOP)) == 2  # two thirds of those that wait
    assert decoder.fitting([*few, *few, *few], STOP) == []  # a third of the rows


def test_what_is_no_number_stays_in_its_own_batch(tmp_path):
    world = World(tmp_path, "llama")
    decoder = Decoder(world.module, (), world.blockwise.context, fixed=True)
    ill, well = world.rollouts()[3], world.rollouts()[0]
    ill = replace(ill, states=[Kept(torch.full_like(k, float("nan")), v, row) for k, v, row in ill.states])
    alone = world.resumed(fixed=False)[0]
    assert decoder.resume([ill], STOP)[0].max_prob.isnan().any()
    last = decoder._last
    assert_same(decoder.resume([well], STOP), [alone])
    assert decoder._last is last


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("candidates", [1, 3])
@pytest.mark.parametrize("kind", [StackedLeaf, ScaledLeaf])
def test_each_candidate_decodes_by_its_own_values(kind, candidates, tmp_path):
    world = World(tmp_path, "llama")
    linear = world.blockwise.blocks[1].mlp.up_proj
    factors = torch.exp(torch.randn(candidates, len(linear.weight), device=DEVICE, dtype=linear.weight.dtype))
    values = [(linear.weight * own[:, None]).detach() for own in factors]
    leaf = kind(linear, factors if kind is ScaledLeaf else {"weight": torch.stack(values)})
    growing, fixed, again = (world.resumed([leaf], candidates, fixed=fixed) for fixed in (False, True, True))
    assert_same(fixed, growing)
    assert_same(again, growing)
    for k in range(candidates):
        linear.weight.data = values[k]
        alone = world.resumed(fixed=False)  # from the same states; its values are the candidate's from here on
        assert_same(growing[k::candidates], alone[k::candidates])
        assert candidates == 1 or [own.tokens for own in alone] != [own.tokens for own in growing]


def test_what_cannot_be_captured_is_called_as_it_is(tmp_path):
    world = World(tmp_path, "llama")
    attention, calls = world.blockwise.blocks[1].self_attn, []
    attention.register_forward_pre_hook(lambda *_: calls.append(float(world.module.model.norm.weight.sum())))
    expected = world.resumed(fixed=False)
    for _ in range(2):
        assert_same(world.resumed(), expected)
    if DEVICE.type == "cuda":
        assert needs_the_host(world.module)
    other = World(tmp_path, "llama")
    assert_same(other.resumed(), expected)
    assert not needs_the_host(other.module)


@torch.inference_mode()
def test_what_a_step_needs_is_on_the_device_before_it_is_captured(tmp_path):
    """Rows of factors too, which are sent once: the first step of a module's second batch is captured."""
    world = World(tmp_path, "llama")
    linear = world.blockwise.blocks[1].mlp.up_proj
    factors = torch.rand(3, len(linear.weight), device=DEVICE, dtype=linear.weight.dtype)
    rollouts = [world.rollouts(3)[row] for row in (0, 3, 2, 5)]  # as many of candidate 0 as of 2, and none of 1
    _rows.cache_clear()
    decoding = _Fixed(world.module, rollouts, [ScaledLeaf(linear, factors)], world.blockwise.context, STOP)
    sent = _rows.cache_info().misses
    assert sent > 0
    decoding._step()
    assert _rows.cache_info().misses == sent


def test_work_is_done_once_a_call():
    count = torch.zeros(1, dtype=torch.long, device=DEVICE)
    replayed = Replayed(DEVICE)
    for n in range(1, 6):
        replayed(lambda: count.add_(1))
        assert int(count) == n
    assert replayed.is_captured == (DEVICE.type == "cuda")
