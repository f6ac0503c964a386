"""The section `evolve`: the numbers of a merge searched by CMA-ES, and how they reach each tensor."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from olmfast import InputError, load_config, run
from olmfast.config.searches import Evolve
from olmfast.errors import Interrupted
from olmfast.search.parameters import Genome
from olmfast.testing import skilled_run, tiny_run
from olmfast.weights.expressions import Merge

DEMO = Path(__file__).parents[1] / "examples" / "demo"
PER_BLOCK = {"merge_method": "ties", "layer_granularity": 1, "filters": ["mlp"]}


def genome(n_blocks: int = 4, **keys: Any) -> Genome:
    return Genome(Evolve(**{**PER_BLOCK, **keys}), ("a", "b"), n_blocks)


def settings(genome: Genome, point: np.ndarray, block: int | None, name: str = "x.self_attn.y", first: bool = True):
    return genome.settings(point, name, block, first)


# How numbers reach tensors


@pytest.mark.parametrize(
    ("keys", "shape"),
    [
        ({}, (2, 2, 4, 2)),
        ({"layer_granularity": 2}, (2, 2, 2, 2)),
        ({"layer_granularity": 3}, (2, 2, 2, 2)),  # the last group has the rest
        ({"layer_granularity": -1, "filters": []}, (2, 1, 1, 2)),
        ({"merge_method": "linear", "filters": []}, (1, 1, 4, 2)),
        ({"merge_method": "task_arithmetic", "filters": ["mlp", "self_attn"]}, (1, 3, 4, 2)),
    ],
)
def test_a_point_has_a_number_of_each_kind_set_group_and_term(keys, shape):
    made = genome(**keys)
    assert made.shape == shape
    n = math.prod(shape)
    assert made.population == 4 + math.floor(3 * math.log(n))
    assert made.bounds.shape == (n, 2)
    assert (made.bounds == [0, 1]).all()


def test_only_weights_may_be_negative():
    bounds = genome(allow_negative_weights=True).bounds.reshape(2, -1, 2)
    assert (bounds[0, :, 0] == -1).all()
    assert (bounds[1, :, 0] == 0).all()


def test_blocks_of_a_group_and_tensors_of_a_filter_share_their_numbers():
    made = genome(layer_granularity=2)
    point = np.arange(made.n_numbers, dtype=float) / made.n_numbers
    numbers = point.reshape(made.shape)  # kind, set, group, term
    assert settings(made, point, 1)["weight"] == tuple(numbers[0, 1, 0])
    assert settings(made, point, 2, "x.mlp.y") == {
        "weight": tuple(numbers[0, 0, 1]),
        "density": tuple(numbers[1, 0, 1]),
    }
    assert settings(made, point, None, "embed", first=True)["weight"] == tuple(numbers[0, 1, 0])
    assert settings(made, point, None, "norm", first=False)["weight"] == tuple(numbers[0, 1, 1])


def test_smooth_numbers_are_interpolated_over_the_depth():
    made = genome(merge_method="linear", filters=[], layer_granularity=2, smooth=True)
    point = np.array([0.0, 0.3, 0.9, 0.6])  # two groups of two terms
    weights = [settings(made, point, block)["weight"] for block in range(4)]
    for block, found in enumerate(weights):
        assert found == pytest.approx((0.3 * block, 0.3 + 0.1 * block))


def test_weights_of_nothing_do_not_end_a_linear_search():
    made = genome(merge_method="linear", filters=[])
    assert settings(made, np.zeros(made.n_numbers), 0)["weight"] == (1.0, 1.0)


# Configs


def test_a_genome_of_mergekit_evolve_stands_as_it_is(tmp_path):
    data = yaml.safe_load(tiny_run(tmp_path, 3).read_text())
    del data["models"]
    section = {"models": ["donor1", "donor2"], "base_model": "donor0", "merge_method": "dare_ties"}
    optional = {"tokenizer_source": None, "layer_granularity": 2, "normalize": False, "smooth": True}
    config = load_config({**data, "evolve": {**section, **optional, "allow_negative_weights": True}})
    assert (config.models, config.ancestor) == (["donor1", "donor2"], "donor0")
    section["base_model"] = {"model": {"path": "donor0"}, "override_architecture": "LlamaForCausalLM"}
    section["models"] = ["donor1", {"model": "donor2", "lora": {"path": "x", "revision": "v"}}]
    mapped = load_config({**data, "evolve": section})
    assert (mapped.models, mapped.ancestor) == (["donor1", "donor2+x@v"], "donor0")
    assert config.evolve == Evolve(
        merge_method="dare_ties", layer_granularity=2, normalize=False, smooth=True, allow_negative_weights=True
    )


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"evolve": {"merge_method": "ties", "layer_granularty": 2}}, "did you mean 'layer_granularity'"),
        ({"evolve": {"merge_method": "slerp"}}, "evolve.merge_method"),
        ({"evolve": {"merge_method": "ties", "generations": 0}}, "evolve.generations"),
        ({"evolve": PER_BLOCK, "layer_swap": True, "search": "joint"}, "search, layer_swap: evolve is a search of its"),
        ({"evolve": PER_BLOCK, "start": "donor0"}, "start: evolve is a search of its own"),
        ({"evolve": {**PER_BLOCK, "models": ["donor1"]}}, "evolve.models: is given as models too"),
        ({"evolve": {**PER_BLOCK, "filters": ["mpl"]}}, "evolve.filters: no tensor's name contains 'mpl'"),
        ({"evolve": {**PER_BLOCK, "layer_granularity": 9}}, "layer_granularity: 9, but the models have 2 blocks"),
        ({"evolve": PER_BLOCK, "models": ["donor0"]}, "donor0 is the only one"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_written(keys, said, tmp_path):
    config = tiny_run(tmp_path, 2, **keys)
    with pytest.raises(InputError) as caught:
        run(config)
    assert said in str(caught.value)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


# Whole runs


def demo_run(folder: Path, **keys: Any) -> Path:
    """Two of the demo's models, their questions read along, and a few generations."""
    config = {
        "models_dir": str(DEMO / "models"),
        "dataset_dir": str(DEMO / "data"),
        "output_dir": "out",
        "models": ["arithmetic", "grammar"],
        "dataset": {name: {"mode": "exact"} for name in ("arithmetic.json", "grammar.json")},
        "holdout": {
            name: {"mode": "exact", "samples": 60} for name in ("arithmetic_holdout.json", "grammar_holdout.json")
        },
        "device": "cpu",
        "samples": 32,
        "evolve": {"merge_method": "linear", "generations": 5},
        **keys,
    }
    path = folder / "cfg.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


def test_on_the_demos_pool_it_beats_the_first_model_on_held_out_questions(tmp_path):
    result = run(demo_run(tmp_path, samples=60, evolve={"merge_method": "linear", "generations": 2}))
    assert result.verdict is not None
    against = {one.rival: one for one in result.verdict.comparisons}
    assert against["arithmetic"].low > 0
    assert [key for key, one in result.record.steps.items() if one.tested]
    assert all(isinstance(own, Merge) and own.method == "linear" for own in result.recipe.tensors.values())


def test_a_search_that_is_stopped_is_resumed_to_the_same_bytes(tmp_path):
    evolve = {"merge_method": "dare_ties", "generations": 6, "population": 4, "layer_granularity": 1}
    config = skilled_run(tmp_path, mode="exact", n_donors=2, validation=0.0, evolve=evolve)
    whole_run = run(load_config(config, {"output_dir": str(tmp_path / "whole")}))
    assert "evolve/6" in whole_run.record.steps
    for after in (3, 6):
        asked = iter(range(after))
        with pytest.raises(Interrupted):
            run(config, stop_requested=lambda asked=asked: next(asked, None) is None, resume=True)
        assert not (tmp_path / "out").exists()
    resumed = run(config, resume=True)
    assert resumed.recipe == whole_run.recipe
    assert resumed.record.steps == whole_run.record.steps
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("out", "whole")]
    assert weights[0] == weights[1]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties"])
@pytest.mark.usefixtures("float64_throughout")
def test_the_sequential_scorer_scores_the_same(method, tmp_path):
    evolve = {"merge_method": method, "generations": 1, "population": 4}
    config = skilled_run(tmp_path, mode="exact", n_donors=2, dtype="float64", evolve=evolve)
    found = []
    for scorer in ("batched", "sequential"):
        result = run(load_config(config, {"scorer": scorer, "output_dir": str(tmp_path / scorer)}))
        found.append({key: (one.winner, one.metrics) for key, one in result.record.steps.items()})
    assert found[0].keys() == found[1].keys()
    for key, (winner, metrics) in found[0].items():
        assert winner == found[1][key][0]
        for dataset, by in metrics.items():
            assert by == pytest.approx(found[1][key][1][dataset], abs=1e-9)


def test_the_plan_counts_its_generations(tmp_path, olmfast):
    config = tiny_run(tmp_path, 3, evolve={"merge_method": "ties", "generations": 4, "population": 6})
    code, out, _ = olmfast("check", config)
    assert code == 0
    assert "evolve" in out
    assert "one round of the joint search" not in out
    assert not (tmp_path / "out").exists()
