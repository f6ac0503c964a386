"""The joint search: what it accepts, what it refuses, and that it can be killed, repeated and checked."""

from __future__ import annotations

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from olmfast import InputError, load_config, run
from olmfast.evaluation.batched import BatchedScorer
from olmfast.report.write import report
from olmfast.search import coefficients
from olmfast.testing import own_answers, skilled_run, tiny_model, tiny_run
from olmfast.weights.by_row import by_row
from olmfast.weights.coefficients import task_vectors
from olmfast.weights.expressions import Copy, merge, whole
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Sources, expression_from_json

# Task vectors


@pytest.fixture(scope="module")
def family(tmp_path_factory):
    """An ancestor and two fine-tunes of it."""
    folder = tmp_path_factory.mktemp("family")
    tiny_model(folder / "base", seed=0, noise=0.0, num_hidden_layers=2)
    for seed in (1, 2, 3):
        tiny_model(folder / f"tune{seed}", seed=seed, noise=0.05, num_hidden_layers=2)
    return folder


def test_the_base_is_the_ancestor_where_the_others_are_nearer_to_it_than_to_each_other(family):
    def anchor(*names):
        pool = Pool.open(list(names), family, family)
        return task_vectors(pool, names, None, names[0], pool.architecture.is_ignored).anchor

    assert anchor("base", "tune1", "tune2", "tune3") == "base"
    assert anchor("tune1", "tune2", "tune3") is None  # the donors' mean


@pytest.mark.parametrize("names", [("base", "tune1", "tune2"), ("tune1", "tune2", "tune3")])
def test_coefficients_are_read_back_from_the_expressions_they_make(names, family):
    pool = Pool.open(list(names), family, family)
    vectors = task_vectors(pool, names, None, names[0], pool.architecture.is_ignored)
    sources, recipe = Sources(pool, family), whole(names[0], pool.tensors)
    name = "model.layers.1.mlp.up_proj.weight"
    values = {donor: pool[donor].read(name).double() for donor in names}
    anchor = values[vectors.anchor] if vectors.anchor else sum(values.values()) / len(values)
    numbers = torch.arange(len(vectors.donors), dtype=torch.float64)[:, None] / 4 + 0.1
    made = vectors.of(recipe, numbers.expand(-1, len(vectors.tensors)))
    moved = made.with_values(vectors.moved(made, torch.full_like(numbers, 0.5).expand(-1, len(vectors.tensors))))
    for result, offset in ((made, 0.0), (moved, 0.5)):
        expected = anchor + sum(
            (float(x) + offset) * (values[donor] - anchor) for donor, x in zip(vectors.donors, numbers, strict=True)
        )
        torch.testing.assert_close(sources.value(result.tensors[name]).double(), expected, rtol=1e-5, atol=1e-6)
        assert vectors.coefficients_of(result.tensors[name], name) is not None
    other = merge("slerp", [Copy(names[0], name), Copy(names[1], name)], t=0.5)
    assert vectors.coefficients_of(other, name) is None
    halves = torch.full((len(vectors.donors), len(vectors.tensors)), 0.5)
    step = vectors.moved(recipe.with_values({name: other}), halves)
    wanted = sources.value(other).double() + sum(0.5 * (values[donor] - anchor) for donor in vectors.donors)
    torch.testing.assert_close(sources.value(step[name]).double(), wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("names", [("base", "tune1", "tune2"), ("tune1", "tune2", "tune3")])
@pytest.mark.parametrize("axis", [0, 1])
def test_rows_move_by_coefficients_of_their_own(names, axis, family, monkeypatch):
    monkeypatch.setattr("olmfast.weights.chunks.TASK_CHUNK", 100)  # chunks end within the tensor
    pool = Pool.open(list(names), family, family)
    vectors = task_vectors(pool, names, None, names[0], pool.architecture.is_ignored)
    sources, recipe = Sources(pool, family), whole(names[1], pool.tensors)
    name = "model.layers.1.mlp.up_proj.weight"
    n = pool[names[0]].tensors[name].shape[axis]
    rows = {name: (n, axis)}
    n_columns = len(vectors.tensors) - 1 + n
    begin = vectors.tensors.index(name)
    offsets = torch.randn(len(vectors.donors), n_columns, generator=torch.Generator().manual_seed(1)).double()
    moved = vectors.moved(recipe, offsets, rows)
    assert moved.keys() == set(vectors.tensors)
    again = vectors.moved(recipe.with_values(moved), 0.5 * offsets, rows)
    values = {donor: pool[donor].read(name).double() for donor in names}
    anchor = values[vectors.anchor] if vectors.anchor else sum(values.values()) / len(values)
    own = offsets[:, begin : begin + n]
    for made, factor in ((moved, 1.0), (again, 1.5)):
        expected = values[names[1]] + sum(
            factor * x.unsqueeze(1 - axis) * (values[donor] - anchor)
            for donor, x in zip(vectors.donors, own, strict=True)
        )
        torch.testing.assert_close(sources.value(made[name]).double(), expected, rtol=1e-5, atol=1e-6)
        told = json.loads(json.dumps(made[name].to_json()))
        assert expression_from_json(told) == made[name]
    other = "model.norm.weight" if "model.norm.weight" in moved else vectors.tensors[0]
    alone = vectors.moved(recipe, torch.cat([offsets[:, :begin], own[:, :1], offsets[:, begin + n :]], dim=1))
    assert moved[other] == alone[other]  # what has no rows of its own moves as ever


def test_coefficients_of_other_rows_than_a_tensor_has_are_refused(family):
    pool = Pool.open(["base", "tune1"], family, family)
    name = "model.layers.1.mlp.up_proj.weight"
    wrong = by_row(Copy("base", name), [Copy("tune1", name)], None, torch.zeros(1, 5), 0)
    with pytest.raises(ValueError, match="coefficients of 5 rows for a tensor of shape"):
        wrong.open(Sources(pool, family))


def test_distances_are_those_of_the_task_vectors(family):
    names = ("base", "tune1", "tune2")
    pool = Pool.open(list(names), family, family)
    vectors = task_vectors(pool, names, "base", "tune1", pool.architecture.is_ignored)
    squares = sum((pool["tune1"].read(n).double() - pool["base"].read(n).double()).square().sum() for n in pool.tensors)
    assert vectors.distances()["tune1"] == pytest.approx(math.sqrt(float(squares)), rel=1e-5)


# Whole runs


@pytest.fixture
def few_steps(monkeypatch):
    """Descents by row and by tensor of ten steps, which tiny models need no more of."""
    for grain in ("row", "tensor"):
        monkeypatch.setitem(coefficients.GRAINS, grain, 10)


def test_a_config_of_models_and_questions_gets_the_joint_search(tmp_path):
    config = skilled_run(tmp_path, n=20, budget=60)
    assert load_config(config).is_joint
    result = run(config)
    assert result.record.evaluations <= 60
    assert {key.split("/")[0] for key in result.record.steps} >= {"base", "start", "gradient"}
    anchor = result.record.values["anchor"]
    assert set(anchor["distances"]["overall"]) == {"donor0", "donor1", "donor2"}
    report = json.loads((tmp_path / "out" / "merge_report.json").read_text())
    assert report["olmfast"]["verdict"] is not None
    written = load_file(tmp_path / "out" / "model.safetensors")
    pool = Pool.open(["donor0", "donor1", "donor2"], tmp_path / "models", tmp_path)
    sources = Sources(pool, tmp_path / "out")
    for name, value in written.items():
        assert torch.equal(value, sources.value(result.recipe.tensors[name]))


@pytest.mark.parametrize(
    "keys", [{"layer_swap": True}, {"selection": "ranks"}, {"scales": ["model"]}, {"direction": "forward"}]
)
def test_a_config_with_keys_of_the_original_is_searched_by_stages(keys, tmp_path):
    config = load_config(tiny_run(tmp_path, 2), keys)
    assert not config.is_joint
    assert config.required_p is None


def scattered_run(folder: Path, **keys) -> Path:
    """Two donors that each have one block of two that is good for a skill of its own, and junk in the other.

    The answers to each skill's questions are those of a model that is the base but for that block.
    """
    models = folder / "models"
    tiny_model(models / "base", seed=0, noise=0.0, num_hidden_layers=2)
    for name, seed in (("good", 1), ("junk", 2)):
        tiny_model(models / name, seed=seed, noise=0.15, num_hidden_layers=2)
    base, good, junk = (load_file(models / name / "model.safetensors") for name in ("base", "good", "junk"))
    for i, name in enumerate(("one", "two")):
        skill = base | {k: v for k, v in good.items() if f".layers.{i}." in k}
        donor = skill | {k: v for k, v in junk.items() if f".layers.{1 - i}." in k}
        for where, values in ((f"skill {i}", skill), (name, donor)):
            tiny_model(models / where, num_hidden_layers=2)
            save_file(values, models / where / "model.safetensors", metadata={"format": "pt"})
        for part, seed in (("asked", i), ("held", 10 + i)):
            own_answers(folder / f"{part}{i}.json", models / f"skill {i}", 140, seed)
    config = {"models_dir": "models", "output_dir": "out", "models": ["base", "one", "two"], "device": "cpu"}
    for key, part in (("dataset", "asked"), ("holdout", "held")):
        config[key] = {f"{part}{i}.json": {"mode": "exact"} for i in (0, 1)}
    path = folder / "cfg.yaml"
    path.write_text(yaml.safe_dump({**config, **keys}))
    return path


@pytest.mark.usefixtures("few_steps")
def test_the_search_finds_which_donor_has_what_where_the_usual_merges_do_not(tmp_path):
    result = run(scattered_run(tmp_path, budget=60))
    board = result.holdout
    assert board.retained("merged") > 0.1 + max(board.retained(label) for label in board.rows if label != "merged")
    assert any(one.changed for key, one in result.record.steps.items() if key.startswith("gradient"))
    validated = result.record.values["validation"]["skill"]
    assert validated["start"] < list(validated.values())[-1]
    told, held_out = result.verdict.foretold[0], board.retained("merged")
    assert abs(result.verdict.expected - held_out) < abs(result.selection.retained("merged") - held_out)
    assert told in (result.output_dir / "README.md").read_text()
    assert told[1:] in report(result.output_dir).read_text()


@pytest.mark.usefixtures("few_steps")
def test_the_plain_average_of_equal_donors_is_left_as_it_is_where_nothing_is_better(tmp_path):
    result = run(skilled_run(tmp_path, n=40, held_out=60, noise=0.05, mode="exact", budget=60))
    board = result.holdout
    assert board.retained("merged") > max(board.retained(donor) for donor in board.donors)
    assert board.retained("merged") >= board.retained("start") - 1e-6


def test_training_begins_at_the_best_start_also_where_it_is_not_proved_better_than_a_donor(tmp_path, monkeypatch):
    asked = []
    slopes = BatchedScorer.slopes
    monkeypatch.setattr(BatchedScorer, "slopes", lambda *args: asked.append(args[1]) or slopes(*args))
    result = run(skilled_run(tmp_path, n=12, noise=0.05, mode="exact", budget=40, significance=1e-12))
    assert not result.record.steps["start"].changed
    moved = asked[0].values["model.layers.0.mlp.up_proj.weight"]
    assert dict(moved.settings)["weight"] == pytest.approx([1 / 3] * 3)
    assert result.recipe.tensors == whole(result.recipe.base, result.recipe.tensors).tensors


def test_donors_that_are_copies_leave_nothing_to_search(tmp_path):
    config = tiny_run(tmp_path, 2)
    data = yaml.safe_load(config.read_text())
    for name in ("donor0", "donor1"):
        tiny_model(tmp_path / "models" / name, seed=1)
    del data["dataset"]["talk.json"]
    config.write_text(yaml.safe_dump(data))
    notes = []

    from olmfast.observer import Observer

    class Notes(Observer):
        def note(self, text):
            notes.append(text)

    result = run(config, observer=Notes())
    assert result.status == "finished"
    assert result.recipe.tensors == whole("donor0", result.recipe.tensors).tensors
    assert any("nothing to search by" in note for note in notes)


@pytest.mark.parametrize("seed", range(4))
def test_on_a_pool_that_no_merge_helps_the_result_is_not_worse_than_its_start(seed, tmp_path):
    # Nothing but one donor's skill counts, so that whatever is mixed in does harm.
    config = skilled_run(tmp_path, n=12, n_donors=2, held_out=150, budget=60, seed=seed)
    data = yaml.safe_load(config.read_text())
    data["dataset"], data["holdout"] = ({k: v for k, v in data[p].items() if "0" in k} for p in ("dataset", "holdout"))
    config.write_text(yaml.safe_dump(data))
    board = run(config).holdout
    start = board.retained("start") if "start" in board.rows else max(board.retained(d) for d in board.donors)
    assert board.retained("merged") >= start - 1e-6


def digest(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.safetensors")}


def test_a_killed_search_resumed_is_the_search_uninterrupted(tmp_path):
    config = skilled_run(tmp_path, n=16, budget=45)
    whole_run = run(load_config(config, {"output_dir": str(tmp_path / "whole")}))
    command = [sys.executable, "-m", "olmfast.cli", "run", str(config), "-q"]
    log, waits = tmp_path / "out.partial" / "steps.jsonl", [2, 4]
    for n_lines in waits:
        process = subprocess.Popen([*command, "--resume"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and (not log.exists() or log.read_bytes().count(b"\n") < n_lines + 2):
            time.sleep(0.02)
        process.send_signal(signal.SIGKILL)
        process.wait()
    resumed = run(config, resume=True)
    assert resumed.recipe == whole_run.recipe
    assert resumed.record.evaluations == whole_run.record.evaluations
    assert digest(tmp_path / "out") == digest(tmp_path / "whole")


@pytest.mark.usefixtures("float64_throughout")
def test_the_sequential_scorer_decides_the_same(tmp_path):
    config = skilled_run(tmp_path, n=10, budget=50, dtype="float64")
    found = {
        scorer: run(load_config(config, {"scorer": scorer, "output_dir": str(tmp_path / scorer)}))
        for scorer in ("batched", "sequential")
    }
    steps = {scorer: {key: one.winner for key, one in found[scorer].record.steps.items()} for scorer in found}
    assert steps["batched"] == steps["sequential"]


def test_the_ancestor_and_the_start_may_be_models_that_are_not_merged(tmp_path):
    tiny_model(tmp_path / "models" / "ancestor", seed=0, noise=0.0, num_hidden_layers=2)
    tiny_model(tmp_path / "models" / "given", seed=9, noise=0.2, num_hidden_layers=2)
    result = run(skilled_run(tmp_path, n=16, budget=20, ancestor="ancestor", start="given"))
    assert result.record.values["anchor"]["model"] == "ancestor"
    assert "given start" in result.record.steps["start"].metrics["skill0.json"]
    assert result.selection.donors == ["donor0", "donor1", "donor2"]


def test_the_start_may_be_a_merge_file_of_which_nothing_is_written(tmp_path, olmfast):
    tiny_model(tmp_path / "models" / "given", seed=9, noise=0.2, num_hidden_layers=2)
    merge = {
        "merge_method": "ties",
        "base_model": "../models/donor0",
        "parameters": {"density": 0.5},
        "dtype": "float32",
    }
    merge["models"] = [{"model": f"../models/{m}", "parameters": {"weight": 0.7}} for m in ("donor1", "given")]
    file = tmp_path / "recipes" / "start.yml"
    file.parent.mkdir()
    file.write_text(yaml.safe_dump(merge))
    config = skilled_run(tmp_path, n=16, budget=20, start="recipes/start.yml")
    result = run(config)
    assert result.selection.donors == ["donor0", "donor1", "donor2"]
    assert olmfast("merge", file, tmp_path / "written")[0] == 0
    by_folder = run(load_config(config, {"start": "written", "output_dir": str(tmp_path / "again")}))
    tried = [one.record.steps["start"].metrics["skill0.json"]["given start"] for one in (result, by_folder)]
    assert tried[0] == pytest.approx(tried[1], rel=1e-6)

    merge["models"][0]["parameters"]["weight"] = 0.9
    file.write_text(yaml.safe_dump(merge))
    code, _, err = olmfast("run", config, "--resume", "--set", "budget=30")
    assert (code, "config key start" in err) == (2, True)


def test_a_merge_file_to_start_from_that_is_missing_or_would_be_replaced_is_refused(tmp_path, olmfast):
    config = skilled_run(tmp_path, n=4, start="start.yml")
    code, _, err = olmfast("run", config)
    assert (code, "start: start.yml: no such merge file" in err) == (2, True)
    (tmp_path / "out").mkdir()
    merge = {"merge_method": "passthrough", "models": [{"model": "../models/donor0"}]}
    (tmp_path / "out" / "start.yml").write_text(yaml.safe_dump(merge))
    code, _, err = olmfast("run", config, "--set", "start=out/start.yml", "--overwrite")
    assert (code, "the start" in err) == (2, True)
    assert (tmp_path / "out" / "start.yml").is_file()


@pytest.mark.parametrize(
    ("merge", "told"),
    [
        ({"merge_method": "linear"}, "start.yml"),
        ({"merge_method": "passthrough", "slices": [{"layer_range": [0, 1]}] * 3}, "num_hidden_layers"),
        ({"merge_method": "passthrough", "models": ["donor0"], "tokenizer_source": "union"}, "vocabulary of its own"),
    ],
)
def test_a_start_of_another_shape_is_refused_before_anything_is_written(merge, told, tmp_path, olmfast):
    config = skilled_run(tmp_path, n=4, start="start.yml")
    for key in ("slices", "models"):
        entries = [{"model": "models/donor0", **(one if isinstance(one, dict) else {})} for one in merge.get(key, [])]
        merge |= {key: [{"sources": [one]} for one in entries] if key == "slices" else entries} if entries else {}
    (tmp_path / "start.yml").write_text(yaml.safe_dump(merge))
    code, _, err = olmfast("run", config)
    assert (code, told in err) == (2, True)
    assert not (tmp_path / "out.partial").exists()


def test_an_ancestor_in_a_search_by_stages_is_an_error(tmp_path):
    with pytest.raises(InputError, match="search: joint"):
        load_config(tiny_run(tmp_path, 2, layer_swap=True, ancestor="donor0"))


@pytest.mark.usefixtures("few_steps")
def test_stages_that_are_switched_on_as_well_are_tested_too_and_a_generation_offers_its_sum(tmp_path):
    keys = {"search": "joint", "es_norm": True, "es_norm_generations": 1, "es_norm_sigma": 0.2}
    keys["units"] = ["model.layers.1.mlp.down_proj"]
    steps = run(skilled_run(tmp_path, n=20, budget=300, **keys)).record.steps
    generation = {key: one for key, one in steps.items() if "/norm_es/0" in key}
    assert any(key.endswith("/sum") for key in generation) or any(one.changed for one in generation.values())
    assert all(one.tested or not one.changed for one in generation.values())


def test_a_dataset_of_one_question_and_validation_of_its_own_are_no_obstacle(tmp_path):
    config = skilled_run(tmp_path, n=20, budget=60)
    data = yaml.safe_load(config.read_text())
    own_answers(tmp_path / "one.json", tmp_path / "models" / "donor1", 1, seed=5)
    own_answers(tmp_path / "check.json", tmp_path / "models" / "donor1", 5, seed=6)
    data["dataset"]["one.json"] = {"mode": "exact_match"}
    data["validation"] = {"check.json": {"mode": "exact_match"}}
    config.write_text(yaml.safe_dump(data))
    result = run(config)
    assert any(key.startswith("gradient") for key in result.record.steps)


@pytest.mark.usefixtures("few_steps")
def test_a_larger_budget_continues_from_where_the_smaller_one_ended(tmp_path):
    config = scattered_run(tmp_path)
    whole_run = run(load_config(config, {"output_dir": str(tmp_path / "whole"), "budget": 60}))
    for budget in (12, 22, 35):
        parts = run(load_config(config, {"budget": budget}), resume=True)
    recipes = *parts.record.standing.lines, parts.record.recipe
    first, second, both = (recipe.tensors["model.layers.0.mlp.up_proj.weight"].numbers for recipe in recipes)
    torch.testing.assert_close(both, (first + second) / 2)  # the result is the mean of what each half led to
    assert not torch.equal(first, second)
    parts = run(load_config(config, {"budget": 60}), resume=True)
    assert parts.record.steps == whole_run.record.steps
    assert parts.record.standing == whole_run.record.standing
    assert sum(one.changed for key, one in parts.record.steps.items() if key.startswith("gradient")) == 2


def test_a_descent_takes_as_many_steps_as_the_budget_pays_for(tmp_path, monkeypatch):
    monkeypatch.setattr(coefficients, "FEWEST", 4)
    monkeypatch.setitem(coefficients.GRAINS, "row", 1000)
    asked = []
    slopes = BatchedScorer.slopes
    monkeypatch.setattr(BatchedScorer, "slopes", lambda *args: asked.append(1) or slopes(*args))
    result = run(skilled_run(tmp_path, n=20, budget=80))
    assert "gradient/row/1" in result.record.steps
    assert 77 < result.record.evaluations <= 80
    assert len(asked) < 2 * 1000


def test_the_plan_of_a_joint_search_says_that_it_is_of_one_round(tmp_path, olmfast):
    code, out, _ = olmfast("check", skilled_run(tmp_path, n=4, budget=30))
    assert code == 0
    assert "one round of the joint search" in out
    assert "candidates of a unit" not in out
    assert "of at most" in out
