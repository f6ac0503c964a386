"""Paths that run without being written: the same scores as the folded models', with what they share computed once."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

import pytest
import torch

from olmfast.config.datasets import DatasetConfig
from olmfast.dataflow.hops import Hop
from olmfast.dataflow.kinds import LayerKinds
from olmfast.dataflow.running import PathCandidate, PathModel
from olmfast.dataflow.scoring import PathScorer, Tree
from olmfast.evaluation import decoding
from olmfast.evaluation.encoding import load_datasets
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.sequential import SequentialScorer
from olmfast.testing import FAMILIES, sums, tiny_model, tiny_tokenizer, write_dataset
from olmfast.weights.affine import Given
from olmfast.weights.expressions import whole
from olmfast.weights.pool import Pool
from olmfast.weights.skeletons import Skeletons
from olmfast.weights.sources import Sources

DEPTH, D = 3, 32
MODES = ("exact", "exact_match", "bigram_loss", "diversity")


@functools.cache
def pool_of(family: str, dtype: torch.dtype = torch.float64, **config: object) -> Pool:
    folder = Path(tempfile.mkdtemp(prefix=f"paths-{family}-"))
    depth = "n_layer" if family in ("gpt2", "gptj") else "num_hidden_layers"
    for seed, name in enumerate("ab", 1):
        tiny_model(folder / name, family, seed, dtype=dtype, noise=0.3, **{depth: DEPTH, **config})
    return Pool.open(["a", "b"], folder, folder)


def scorers(pool: Pool, folder: Path, modes=MODES, entry="a", out="a", dtype=torch.float64):
    """The fast scorer of paths, and the reference, on a few questions of each mode."""
    entries = {f"{mode}.json": DatasetConfig(mode=mode, max_new_tokens=6) for mode in modes}
    for seed, name in enumerate(entries):
        write_dataset(folder / name, sums(4, seed))
    tokenizer = tiny_tokenizer()
    datasets = load_datasets(folder, entries, tokenizer, 128)
    model = WorkingModel(whole(entry, pool.tensors), Sources(pool, folder), torch.device("cpu"), dtype)
    plain = SequentialScorer(model, datasets, tokenizer, (4,), 512)
    paths = PathModel(model, entry, out, LayerKinds())
    return PathScorer(paths, datasets, tokenizer, (4,), 512, lambda: plain), plain


def assert_alike(fast, plain, tolerance=1e-9):
    for name, values in plain.samples.items():
        assert torch.equal(fast.evaluated[name], plain.evaluated[name])
        torch.testing.assert_close(fast.samples[name], values, rtol=tolerance, atol=tolerance, equal_nan=True)


def drawn(seed: int, *shape: int) -> Given:
    values = 1 + 0.3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return Given(tuple(values.flatten().tolist()), shape)


def candidates(pool: Pool, hops: dict[str, list[Hop]], entry="a", out="a") -> list[Candidate]:
    skeletons = LayerKinds()
    return [PathCandidate.of_hops(label, own, pool, (entry, out), skeletons) for label, own in hops.items()]


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_scores_as_the_folded_model_does(family, tmp_path, monkeypatch):
    if family in ("llama", "gemma2", "gpt2"):  # decoded as on a GPU
        monkeypatch.setattr(decoding, "FIXED_ON", {"cpu"})
    pool = pool_of(family)
    fast, plain = scorers(pool, tmp_path, MODES if family == "llama" else ("bigram_loss", "exact_match"))
    wide = drawn(1, D) if family == "gemma2" else drawn(1, D, D)
    paths = {
        "own": [Hop("a", 0), Hop("a", 1), Hop("a", 2)],
        "repeated": [Hop("a", 0), Hop("a", 1), Hop("a", 1), Hop("a", 2)],
        "of both": [Hop("b", 1, -0.5), Hop("a", 0, 0.7), Hop("b", 2, drawn(2, D)), Hop("a", 2, wide), Hop("a", 2, 1.2)],
        "short": [Hop("b", 2)],
    }
    made = candidates(pool, paths)
    unit = pool.architecture.model_unit(pool.tensors)
    assert_alike(fast.score(unit, made), plain.score(unit, made))
    # The blocks are shared with the live model, which is as it was.
    assert_alike(fast.score(unit, [Candidate("current")]), plain.score(unit, [Candidate("current")]))


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", ["llama", "gpt2", "gpt_neox"])
@pytest.mark.parametrize("tied", [True, False])
def test_biases_and_the_head_of_another_model(family, tied, tmp_path):
    pool = pool_of(family, tie_word_embeddings=tied)
    fast, plain = scorers(pool, tmp_path, ("exact", "exact_match"), "a", "b")
    bias = drawn(3, D)
    hops = [Hop("b", 0, 0.5, bias), Hop("a", 1, None, 0.3), Hop("a", 2, 2.0, bias)]
    made = candidates(pool, {"biased": hops}, "a", "b")
    unit = pool.architecture.model_unit(pool.tensors)
    assert_alike(fast.score(unit, made), plain.score(unit, made))


def test_float32_agrees_within_rounding(tmp_path):
    pool = pool_of("llama", torch.float32)
    fast, plain = scorers(pool, tmp_path, ("exact", "bigram_loss"), dtype=torch.float32)
    made = candidates(pool, {"scaled": [Hop("a", 0, 0.9), Hop("b", 1, 1.1), Hop("a", 2, 0.8)]})
    unit = pool.architecture.model_unit(pool.tensors)
    assert_alike(fast.score(unit, made), plain.score(unit, made), 1e-4)


def test_paths_that_begin_alike_share_what_they_begin_with(tmp_path):
    pool = pool_of("llama", torch.float32)
    fast, plain = scorers(pool, tmp_path, ("exact",), dtype=torch.float32)
    own = [Hop("a", 0), Hop("a", 1), Hop("a", 2)]
    repeats = {f"{i}-{j}": [*own[:j], *own[i:]] for j in range(1, 4) for i in range(j)}
    made = candidates(pool, repeats)
    unit = pool.architecture.model_unit(pool.tensors)
    found = fast.score(unit, made)
    assert_alike(found, plain.score(unit, made), 1e-4)
    n_batches = fast.passed.hops // sum(map(len, repeats.values()))
    # The first pass once; of each range what comes after it.
    assert fast.passed.computed == n_batches * (3 + sum(3 - i for j in range(1, 4) for i in range(j) if j < 3) + 6)
    again = fast.score(unit, made, samples={"exact.json": [1, 3]})
    for row in range(len(made)):
        torch.testing.assert_close(again.samples["exact.json"][row, 1::2], found.samples["exact.json"][row, 1::2])
    assert again.samples["exact.json"][:, ::2].isnan().all()


def test_a_paths_scores_do_not_depend_on_those_beside_it(tmp_path):
    """Also of a path that others go on from, or that stands there twice: its last hop is computed for it alone."""
    pool = pool_of("llama", torch.float32)
    fast, _ = scorers(pool, tmp_path, ("exact", "exact_match"), dtype=torch.float32)
    begun = [Hop("a", 0), Hop("b", 1)]
    paths = {"begun": begun, "longer": [*begun, Hop("a", 2)], "again": begun, "other": [Hop("a", 0), Hop("a", 2)]}
    unit = pool.architecture.model_unit(pool.tensors)
    made = candidates(pool, paths)
    together = fast.score(unit, made)
    seen: list[int] = []
    mlp = fast.model.taken_apart("b").blocks[1].mlp
    hook = mlp.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[0] * args[0].shape[1]))
    alone = [fast.score(unit, [one]) for one in made]
    hook.remove()
    for name, values in together.samples.items():
        for row, own in enumerate(alone):
            assert torch.equal(values[row], own.samples[name][0])
    n_labels = sum(len(sample.response) for sample in fast.datasets["exact.json"].samples)
    assert min(seen) <= n_labels  # of all positions those that somebody looks at


def test_prompts_of_free_runs_are_shared_too_and_what_does_not_fit_the_memory_is_halved(tmp_path, monkeypatch):
    pool = pool_of("llama", torch.float32)
    fast, plain = scorers(pool, tmp_path, ("exact", "exact_match", "diversity"), dtype=torch.float32)
    own = [Hop("a", 0), Hop("a", 1), Hop("a", 2)]
    made = candidates(pool, {"as it is": own, "twice": [*own, Hop("a", 2)], "shorter": own[:2]})
    unit = pool.architecture.model_unit(pool.tensors)
    expected = plain.score(unit, made)
    walk, refused = Tree.walk, []

    def small(tree, entering, *args, **kwargs):
        if len(entering) > 1:
            refused.append(len(entering))
            raise MemoryError
        return walk(tree, entering, *args, **kwargs)

    for patched in (False, True):
        if patched:
            monkeypatch.setattr(Tree, "walk", small)
        found = fast.score(unit, made)
        for name, values in expected.samples.items():
            torch.testing.assert_close(found.samples[name], values, rtol=1e-3, atol=1e-3, equal_nan=True)
            assert torch.equal(found.truncated[name], expected.truncated[name])
    assert refused
    assert fast.passed.computed < fast.passed.hops / 2


def test_a_factor_keeps_apart_what_it_changes(tmp_path):
    pool = pool_of("llama", torch.float32)
    fast, plain = scorers(pool, tmp_path, ("exact",), dtype=torch.float32)
    paths = {f"{x}": [Hop("a", 0), Hop("a", 1), Hop("a", 2, x), Hop("a", 2)] for x in (1.0, 0.5, 0.0)}
    made = candidates(pool, paths)
    unit = pool.architecture.model_unit(pool.tensors)
    found = fast.score(unit, made)
    assert_alike(found, plain.score(unit, made), 1e-4)
    assert len({float(x) for x in found.mean("exact.json")}) == 3
    assert fast.passed.computed * 12 == fast.passed.hops * 10  # the first hop of each alone is what the others have


def test_each_donors_blocks_lie_in_memory_once(tmp_path):
    pool = pool_of("llama", torch.float32)
    fast, _ = scorers(pool, tmp_path, ("exact", "exact_match"), dtype=torch.float32)
    made = candidates(pool, {str(n): [Hop("a", 0)] * n + [Hop("b", 1)] * n for n in range(1, 6)})
    fast.score(pool.architecture.model_unit(pool.tensors), made)
    shells = [fast.model.module_of(one.hops) for one in made]
    blocks = {id(hop.block) for shell in shells for hop in shell.model.layers}
    assert len(blocks) == 2
    kept = {id(p): p for shell in shells for p in shell.parameters()}
    assert all(p.device.type == "cpu" for p in kept.values())
    embedding = fast.model.whole.get_input_embeddings().weight
    assert {id(p) for p in kept.values() if p.shape == embedding.shape} <= {
        id(embedding),
        id(fast.model.whole.get_output_embeddings().weight),
    }


def test_the_current_path_is_what_was_committed_and_is_known_again_after_a_kill(tmp_path):
    pool = pool_of("llama", torch.float32)
    fast, _ = scorers(pool, tmp_path, ("exact",), dtype=torch.float32)
    made = candidates(pool, {"one": [Hop("a", 0), Hop("a", 2, 0.5)], "two": [Hop("b", 1)]})
    unit = pool.architecture.model_unit(pool.tensors)
    scored = fast.score(unit, [Candidate("current"), *made])
    fast.commit(made[0].recipe, "one")
    again, _ = scorers(pool, tmp_path, ("exact",), dtype=torch.float32)
    again.state = fast.state
    for scorer in (fast, again):
        now = scorer.score(unit, [Candidate("current")])
        torch.testing.assert_close(now.samples["exact.json"][0], scored.samples["exact.json"][1])


@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "mixtral"])
def test_layers_of_a_kind_are_asked_for_once_and_the_answer_is_the_same(family):
    pool = pool_of(family)
    kinds, plain = LayerKinds(), Skeletons()
    configs = {donor.name: donor.config for donor in pool}
    for layers in ([0, 1, 2], [2, 2], [1, 0, 1, 0], [0, 1, 1, 2, 2], [2, 1, 0, 0, 1]):
        for names in ("aaaaa", "ababa", "bbaab"):
            asked = [[(name, layer)] for name, layer in zip(names, layers, strict=False)]
            used = {name: configs[name] for name in sorted({name for ((name, _),) in asked})}
            assert kinds.stack(configs["a"], used, asked) == plain.stack(configs["a"], used, asked)
    assert len(kinds._known) < len(plain._known) + 6
