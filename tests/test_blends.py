"""Blends with donors as candidates, and coarse units: what they are worth, and what is recorded of them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from olmfast import load_config, run
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.scorer import Candidate
from olmfast.observer import Observer
from olmfast.runs.estimate import estimate
from olmfast.runs.inputs import Inputs
from olmfast.runs.session import Result
from olmfast.testing import FAMILIES, tiny_model, tiny_run, write_choices
from olmfast.weights.expressions import Copy, Merge, Stored, merge, whole
from olmfast.weights.methods import METHODS
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Expression, Sources, leaves

EVERYTHING = {
    "candidates": ["swap", {"linear": [0.3, 0.6]}, "slerp", {"ties": [0.4]}, "task_arithmetic"],
    "scales": ["model", "depth", "kind", "boundary", "block", "tensor"],
    "units": ["*.0.self_attn.q_proj", "*.1.mlp.down_proj", "*.1.input_layernorm"],
    "model": {"dtype": torch.bfloat16, "num_hidden_layers": 3},
}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def linear(current: torch.Tensor, donor: torch.Tensor, share: float) -> torch.Tensor:
    return (1 - share) * current.double() + share * donor.double()


def slerp(current: torch.Tensor, donor: torch.Tensor, t: float) -> torch.Tensor:
    if current.ndim == 1:
        return linear(current, donor, t)
    a, b = current.double(), donor.double()
    theta = torch.arccos((a * b).sum() / a.norm() / b.norm())
    if torch.cos(theta) > 0.9995:
        return linear(current, donor, t)
    return (torch.sin((1 - t) * theta) * a + torch.sin(t * theta) * b) / torch.sin(theta)


def ties(current: torch.Tensor, donor: torch.Tensor, density: float, base: torch.Tensor) -> torch.Tensor:
    if current.ndim == 1:
        return linear(current, donor, 0.5)
    kept = []
    for values in (current, donor):
        delta = values.float() - base.float()
        ordered = delta.abs().flatten().sort(descending=True, stable=True).indices
        mask = torch.zeros(delta.numel(), dtype=torch.bool)
        mask[ordered[: max(1, int(density * delta.numel()))]] = True
        kept.append(torch.where(mask.view_as(delta), delta, 0).double())
    sign = torch.where(kept[0] + kept[1] >= 0, 1.0, -1.0)
    agreeing = [delta * sign > 0 for delta in kept]
    total = sum(torch.where(agrees, delta, 0) for agrees, delta in zip(agreeing, kept, strict=True))
    return base.double() + total / (agreeing[0].double() + agreeing[1].double()).clamp_min(1)


def task_arithmetic(current: torch.Tensor, donor: torch.Tensor, weight: float, base: torch.Tensor) -> torch.Tensor:
    return current.double() + weight * (donor.double() - base.double())


def prepared(folder: Path, wanted: dict[str, torch.Tensor], **keys: Any) -> Path:
    """A run whose questions have as right answers what a model of the `wanted` weights answers."""
    path = tiny_run(folder, holdout={}, **keys)
    teacher = shutil.copytree(folder / "models" / "donor0", folder / "teacher")
    save_file(wanted, teacher / "model.safetensors", metadata={"format": "pt"})
    write_choices(folder / "own.json", teacher)
    return path


def search(path: Path, **keys: Any) -> Result:
    return run(load_config(path, {"dataset": {"own.json": {"mode": "choice"}}, **keys}))


@pytest.mark.parametrize(
    ("entry", "formula"),
    [
        ({"linear": [0.3]}, lambda current, donor, _: linear(current, donor, 0.3)),
        ({"slerp": [0.3]}, lambda current, donor, _: slerp(current, donor, 0.3)),
        ({"ties": [0.4]}, lambda current, donor, base: ties(current, donor, 0.4, base)),
        ({"task_arithmetic": [0.7]}, lambda current, donor, base: task_arithmetic(current, donor, 0.7, base)),
    ],
    ids=["linear", "slerp", "ties", "task_arithmetic"],
)
def test_the_blend_that_answers_right_wins_and_is_written_as_its_formula_says(entry, formula, tmp_path):
    model = {"dtype": torch.bfloat16, "noise": 0.5}
    tiny_run(tmp_path, model=model)
    base, donor = (weights(tmp_path / "models" / name) for name in ("donor0", "donor2"))
    wanted = {name: formula(base[name], donor[name], base[name]).bfloat16() for name in base}
    path = prepared(tmp_path, wanted, model=model)
    result = search(path, candidates=["swap", entry], scales=["model"])
    ((method, (value,)),) = entry.items()
    outcome = result.record.outcome("model")
    assert outcome.winner == f"{method} {value:g} donor2"
    assert outcome.metrics["own.json"][outcome.winner] == 0 < outcome.metrics["own.json"]["donor2"]
    written = weights(result.output_dir)
    for name, tensor in wanted.items():
        step = torch.finfo(torch.bfloat16).eps * tensor.abs().float()
        assert ((written[name].float() - tensor.float()).abs() <= step).all(), name
        assert (written[name] == tensor).float().mean() > 0.99, name


def test_a_blend_of_a_blend_starts_from_its_rounded_values(tmp_path):
    model = {"dtype": torch.bfloat16, "noise": 0.5}
    tiny_run(tmp_path, model=model)
    base, first, second = (weights(tmp_path / "models" / f"donor{index}") for index in range(3))
    blocks = {name: linear(base[name], first[name], 0.5).bfloat16() for name in base}
    wanted = {name: linear(blocks[name], second[name], 0.25).bfloat16() for name in base}
    path = prepared(tmp_path, wanted, model=model)
    result = search(path, candidates=[{"linear": [0.25, 0.5]}], scales=["model", "block", "boundary"])
    terms = [json.dumps(entry) for entry in result.record.data["olmfast"]["recipe"]["tensors"].values()]
    assert any(text.count("linear") == 2 for text in terms)  # the test is about something
    board = result.selection.rows["merged"]["own.json"]
    last = list(result.record.data["olmfast"]["steps"].values())[-1]
    assert board == last["metrics"]["own.json"][last["winner"]]  # what is written scores as the live model did


@pytest.fixture(scope="module")
def everything(tmp_path_factory):
    """One run with every kind of candidate at every scale."""
    return run(load_config(tiny_run(tmp_path_factory.mktemp("everything"), **EVERYTHING)))


def test_every_scale_is_walked_in_the_order_it_is_listed(everything):
    stages = [outcome.stage for outcome in everything.record.choices()]
    assert list(dict.fromkeys(stages)) == ["model", "depth", "kind", "boundary", "layers", "tensors"]
    keys = list(everything.record.steps)
    assert keys[1:8] == ["model", "depth/0", "depth/1", "depth/2", "kind/attention", "kind/mlp", "boundary"]


def test_what_is_there_comes_first_and_each_donor_in_every_way(everything):
    tried = list(everything.record.outcome("model").metrics["more.json"])
    ways = ["{}", "linear 0.3 {}", "linear 0.6 {}", "slerp 0.5 {}", "ties 0.4 {}", "task_arithmetic 0.5 {}"]
    assert tried == ["donor0", *(way.format(donor) for way in ways for donor in ("donor1", "donor2"))]


def test_what_is_written_is_what_was_scored_bit_for_bit(everything):
    config = load_config(everything.output_dir.parent / "cfg.yaml")
    sources = Sources(Inputs.open(config, Observer()).pool, everything.output_dir)
    written = weights(everything.output_dir)
    assert any(isinstance(expression, Merge) for expression in everything.recipe.tensors.values())
    for name, expression in everything.recipe.tensors.items():
        assert torch.equal(written[name], sources.value(expression)), name


def test_a_refined_tensor_that_was_blended_on_is_kept_as_long_as_it_is_needed(tmp_path):
    model = {"dtype": torch.bfloat16, "noise": 0.5}
    tiny_run(tmp_path, model=model)
    path = prepared(tmp_path, weights(tmp_path / "models" / "donor1"), model=model)
    keys = {"units": ["*.0.mlp.down_proj"], "es_svd": True, "es_svd_generations": 4, "es_svd_sigma": 0.5}
    result = search(path, candidates=[{"linear": [0.9]}], scales=["tensor", "model"], **keys)
    blended = result.recipe.tensors["model.layers.0.mlp.down_proj.weight"]
    assert isinstance(blended, Merge)
    (refined,) = [leaf for leaf in leaves(blended) if isinstance(leaf, Stored)]
    assert [file.name for file in (result.output_dir / "refined").iterdir()] == [Path(refined.file).name]


def test_the_written_model_scores_as_the_last_step_said(everything):
    from olmfast.runs.scoreboard import evaluate

    out, folder = str(everything.output_dir), everything.output_dir.parent
    entries = yaml.safe_load((folder / "cfg.yaml").read_text())["dataset"]
    # All datasets, as in the run: fewer would go in other batches, and round in other places.
    scores = evaluate(out, {str(folder / name): keys for name, keys in entries.items()}, device="cpu").rows[out]
    assert {Path(name).name: score for name, score in scores.items()} == everything.selection.rows["merged"]
    assert any(outcome.changed for outcome in everything.record.choices())


def test_the_plan_is_never_exceeded_and_is_exact_where_no_candidates_coincide(everything):
    config = load_config(everything.output_dir.parent / "cfg.yaml")
    planned = estimate(config).stages
    assert [name for name in planned if name != "base"] == ["model", "depth", "kind", "boundary", "layers", "tensors"]
    for stage, planned_stage in planned.items():
        n_units, n_candidates = len(planned_stage.units), planned_stage.n_candidates
        steps = [e for e in everything.record.data["olmfast"]["steps"].values() if e["stage"] == stage]
        assert len(steps) == n_units
        taken = sum(len(step["metrics"]["more.json"]) for step in steps)
        assert n_candidates - (n_units * 6 if stage not in ("base", "model") else 0) <= taken <= n_candidates


def test_the_report_keeps_the_shape_of_the_original_and_the_card_tells_the_steps(everything):
    data = everything.record.data
    assert set(data) == {"base_model", "boundary_layers", "layers", "tensors", "olmfast"}
    steps, donors = data["olmfast"]["steps"], data["olmfast"]["donors"]
    for stage, suffix in (("layers", ""), ("tensors", ".weight")):
        taken = {step["unit"]: step["winner"] for step in steps.values() if step["stage"] == stage}
        assert len(taken) == 3
        # The original has no name for a blend.
        swapped = {f"{unit}{suffix}": winner for unit, winner in taken.items() if winner in donors}
        assert {name: entry["best_model"] for name, entry in data[stage].items()} == swapped
    card = (everything.output_dir / "README.md").read_text()
    for outcome in everything.record.choices():
        assert f"| {outcome.where} | {outcome.winner} |" in card
    assert "| depth 0 | " in card
    assert "| layers 0 | " in card


def test_a_run_with_blends_is_resumed_to_the_same_bytes_after_every_step(everything, tmp_path):
    source = everything.output_dir.parent
    shutil.copytree(source, tmp_path / "run", ignore=shutil.ignore_patterns("out*"))
    path = tmp_path / "run" / "cfg.yaml"
    budget, status = 0, "stopped"
    while status == "stopped":
        budget += 60
        result = run(load_config(path, {"budget": budget}), resume=True)
        status = result.status
    assert budget > 120
    for file in ("model.safetensors", "evaluations.jsonl"):
        assert (result.output_dir / file).read_bytes() == (everything.output_dir / file).read_bytes()


@pytest.mark.usefixtures("float64_throughout")
def test_both_scorers_choose_the_same_and_measure_the_same(tmp_path):
    fewer = {"candidates": ["swap", {"linear": [0.3]}, {"ties": [0.4]}], "scales": ["model", "kind", "block", "tensor"]}
    keys = {**EVERYTHING, **fewer, "dtype": "float64"}
    batched, sequential = (
        run(load_config(tiny_run(tmp_path / scorer, **keys, scorer=scorer))) for scorer in ("batched", "sequential")
    )
    assert batched.recipe == sequential.recipe
    for ours, plain in zip(batched.record.choices(), sequential.record.choices(), strict=True):
        for dataset, by in plain.metrics.items():
            assert ours.metrics[dataset] == pytest.approx(by, rel=1e-9), (ours.stage, ours.unit)


def test_neither_a_trial_nor_what_follows_it_computes_what_is_there_again(tmp_path, monkeypatch):
    config = load_config(tiny_run(tmp_path))
    inputs = Inputs.open(config, Observer())
    name = "model.layers.0.mlp.up_proj.weight"
    donors = [Copy(donor, name) for donor in inputs.pool.names]
    nest: Expression = donors[0]
    for share in (0.2, 0.3, 0.4, 0.6):
        nest = merge("linear", [nest, donors[1]], weight=(1 - share, share))
    sources = Sources(inputs.pool, tmp_path, memory=1 << 20)
    recipe = whole("donor0", inputs.pool.tensors).with_values({name: nest})
    model = WorkingModel(recipe, sources, inputs.settings.device, inputs.settings.dtype)
    there = model.module.get_parameter(name).clone()
    computed = []
    plain = METHODS["linear"]
    counted = replace(plain, prepare=lambda *arguments: computed.append(1) or plain.prepare(*arguments))
    monkeypatch.setitem(METHODS, "linear", counted)
    for share in (0.1, 0.7):
        with model.trial(Candidate("", {name: merge("linear", [nest, donors[2]], weight=(1 - share, share))})):
            assert not torch.equal(model.module.get_parameter(name), there)
    assert torch.equal(model.module.get_parameter(name), there)
    assert len(computed) == 2  # one per trial


def test_going_back_computes_nothing_where_values_are_wider_than_what_is_saved(tmp_path, monkeypatch):
    tiny_model(tmp_path / "d0", dtype=torch.bfloat16)
    tiny_model(tmp_path / "d1", seed=1)
    pool = Pool.open(["d0", "d1"], tmp_path, tmp_path)
    sources, names = Sources(pool, tmp_path, memory=1 << 24), list(pool.tensors)
    blend = {name: merge("linear", [Copy("d0", name), Copy("d1", name)], weight=(0.3, 0.7)) for name in names}
    model = WorkingModel(whole("d0", names).with_values(blend), sources, torch.device("cpu"), torch.float32)
    there = {name: model.live(name).clone() for name in names}
    computed, plain = [], METHODS["linear"]
    counted = replace(plain, prepare=lambda *arguments: computed.append(1) or plain.prepare(*arguments))
    monkeypatch.setitem(METHODS, "linear", counted)
    with model.trial(Candidate("", {name: Copy("d1", name) for name in names})):
        pass
    assert all(torch.equal(model.live(name), there[name]) for name in names)
    assert not computed


def test_blends_of_equal_donors_and_of_equal_tensors_cost_nothing(tmp_path):
    path = tiny_run(tmp_path)
    for file in ("model.safetensors", "config.json"):
        source = tmp_path / "models" / "donor1" / file
        (tmp_path / "models" / "donor2" / file).write_bytes(source.read_bytes())
    shared = weights(tmp_path / "models" / "donor0")
    both = weights(tmp_path / "models" / "donor1")
    both |= {name: tensor for name, tensor in shared.items() if ".layers.0." in name}
    for donor in ("donor1", "donor2"):
        save_file(both, tmp_path / "models" / donor / "model.safetensors", metadata={"format": "pt"})
    result = run(load_config(path, {"candidates": ["swap", "linear"], "scales": ["block"]}))
    report = result.record
    assert report.evaluations == 2 + 1 + 3  # base; block 0 is the same in all; block 1: two others
    by = report.outcome("layers/1").metrics["sums.json"]
    assert by["linear 0.5 donor1"] == by["linear 0.5 donor2"]
    assert set(report.outcome("layers/0").metrics["sums.json"].values()) == {by["donor0"]}


def test_a_window_of_blocks_is_blended_in_all_combinations(tmp_path):
    apart = {"window": 1, "slide": False}
    path = tiny_run(tmp_path, n_donors=2, layer_swap=True, markov=apart, candidates=["swap", "linear"])
    result = run(load_config(path))
    ways = ["donor0", "donor1", "linear 0.5 donor1"]
    assert list(result.record.outcome("layers/0+1").metrics["sums.json"]) == [f"{a} + {b}" for a in ways for b in ways]


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_tied_heads_stay_tied_when_the_boundary_is_blended(family, tmp_path):
    path = tiny_run(tmp_path, family=family, candidates=["slerp"], scales=["model", "boundary"])
    result = run(load_config(path))
    donor = weights(tmp_path / "models" / "donor0")
    written = weights(result.output_dir)
    assert set(written) == set(donor)
    assert {name: tensor.dtype for name, tensor in written.items()} == {n: t.dtype for n, t in donor.items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_attention_and_mlp_are_told_apart_in_every_family(family, tmp_path):
    tiny_model(tmp_path / "one", family)
    pool = Pool.open(["one"], tmp_path, tmp_path)
    architecture, tensors = pool.architecture, tuple(pool.tensors)
    attention, mlp = architecture.kind_units(tensors)
    blocks = architecture.window_unit(tensors, range(architecture.n_blocks)).tensors
    left = [name for name in blocks if name not in (*attention.tensors, *mlp.tensors)]
    assert not set(attention.tensors) & set(mlp.tensors)
    for unit in (attention, mlp):
        assert {architecture.block_of(name) for name in unit.tensors} == set(unit.blocks) == {0, 1}
    assert any("q" in name.rsplit(".", 2)[-2] or "attn" in name for name in attention.tensors)
    assert all(architecture.is_norm(name.rsplit(".", 1)[0]) for name in left), left


@pytest.mark.parametrize("n_blocks", [1, 2, 3, 7, 32])
def test_parts_of_the_depth_are_contiguous_and_as_equal_as_can_be(n_blocks, tmp_path):
    tiny_model(tmp_path / "one", num_hidden_layers=n_blocks)
    pool = Pool.open(["one"], tmp_path, tmp_path)
    units = pool.architecture.depth_units(tuple(pool.tensors))
    assert [block for unit in units for block in unit.blocks] == list(range(n_blocks))
    assert len(units) == min(3, n_blocks)
    assert max(len(u.blocks) for u in units) - min(len(u.blocks) for u in units) <= 1
    assert all(a.name != b.name for a, b in pairwise(units))
