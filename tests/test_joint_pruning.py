"""`olmfast prune --method joint`: which layers go and what the others are blended of, searched together."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from olmfast.config.run import parse_config
from olmfast.errors import InputError, Interrupted
from olmfast.pruning.depths import Point
from olmfast.pruning.prune import prune
from olmfast.pruning.similarity import influences
from olmfast.testing import sums, tiny_model, tree, write_dataset

N = 5


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A model of five layers, a donor, and questions."""
    folder = tmp_path_factory.mktemp("joint")
    for seed, name in enumerate(("m", "donor"), 1):
        tiny_model(folder / name, "llama", seed, num_hidden_layers=N)
    write_dataset(folder / "sums.json", sums(8, 1))
    return folder


@pytest.fixture
def config(world, tmp_path):
    def make(models=("m", "donor"), budget=34, **keys):
        data = {"models": list(models), "models_dir": ".", "output_dir": str(tmp_path / "out"), "device": "cpu"}
        data |= {"dataset": {"sums.json": {"mode": "exact"}}, "budget": budget}
        return parse_config({**data, "prune": {"method": "joint", "num_layer": 2, **keys}}, "cfg", world)

    return make


def formula(tensors, name, point, base="m"):
    """A tensor of the result in float64, by the report's own words: which layers went, and by which shares."""
    before, place, after = name.split(".", 3)[:2], int(name.split(".")[2]), name.split(".", 3)[3]
    stays = [k for k in range(N) if k not in point["gone"]]
    layer = stays[place]
    above = stays[place + 1] if place + 1 < len(stays) else N
    parts = [((donor, k), share) for donor, k, share in point["given"] if k == layer]
    shares = dict(zip(point["gone"], point["shares"], strict=True))
    parts += [((base, k), shares[k]) for k in range(layer + 1, above)]
    total = max(1.0, sum(share for _, share in parts))
    own = 1 - sum(share for _, share in parts) / total

    def value(model, k):
        return tensors[model][".".join([*before, str(k), after])].double()

    return own * value(base, layer) + sum(share / total * value(*part) for part, share in parts)


@pytest.mark.parametrize("everything", [False, True])
def test_the_result_is_what_the_report_says(config, world, tmp_path, everything):
    done = prune(config(merge="all" if everything else "projections"))
    told = json.loads((tmp_path / "out/merge_report.json").read_text())["olmfast"]["pruned"]
    out = load_file(tmp_path / "out/model.safetensors")
    tensors = {name: load_file(world / name / "model.safetensors") for name in ("m", "donor")}
    assert len(told["gone"]) == 2
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == N - 2
    for name in (name for name in out if ".layers." in name):
        if everything or "proj" in name:
            torch.testing.assert_close(out[name].double(), formula(tensors, name, told), rtol=1e-5, atol=1e-6)
    best = done.selection.rows["joint"]["sums.json"]
    assert best == pytest.approx(told["objective"], rel=1e-4)
    assert all(best <= row["sums.json"] + 1e-5 for name, row in done.selection.rows.items() if name != "original")
    assert {"original", "similarity", "drop", "uniform", "least influence dropped"} <= set(done.holdout.rows)


def test_the_front_has_a_model_of_every_depth_that_can_be_made(config, tmp_path, olmfast):
    done = prune(config(budget=40))
    assert list(done.front) == ["4", "3"]
    report = json.loads((tmp_path / "out/merge_report.json").read_text())["olmfast"]
    tried = [one["metrics"]["sums.json"] for key, one in report["steps"].items() if key.startswith("front/")]
    assert done.front["4"]["objective"] == pytest.approx(min(one["1 gone"] for one in tried))
    assert len(done.front["4"]["gone"]) == 1
    assert olmfast("rebuild", tmp_path / "out", tmp_path / "four", "--layers", 4)[0] == 0
    assert json.loads((tmp_path / "four/config.json").read_text())["num_hidden_layers"] == 4
    assert olmfast("rebuild", tmp_path / "out", tmp_path / "three", "--layers", 3)[0] == 0
    three = (tmp_path / "three/model.safetensors").read_bytes()
    assert three == (tmp_path / "out/model.safetensors").read_bytes()
    code, _, error = olmfast("rebuild", tmp_path / "out", tmp_path / "two", "--layers", 2)
    assert (code, "no model of 2 layers is on its front; it has 4, 3" in error) == (2, True)


@pytest.mark.parametrize("after", [1, 2])
def test_killed_and_resumed_it_gives_the_same_bytes(config, tmp_path, after):
    prune(config())
    whole = tree(tmp_path / "out")
    (tmp_path / "out").rename(tmp_path / "whole")
    asked = 0

    def stop():
        nonlocal asked
        asked += 1
        return asked > after

    with pytest.raises(Interrupted):
        prune(config(), stop_requested=stop)
    prune(config(), resume=True)
    again = tree(tmp_path / "out")
    for name in ("model.safetensors", "evaluations.jsonl", "config.json"):
        assert again[name] == whole[name], name


def test_an_alpha_file_is_a_start_of_its_own(config, tmp_path):
    entries = [
        {"step": k, "layer_to_merge_into": 3 - k, "layer_to_remove": 4 - k, "ratio_i_alpha": alpha}
        for k, alpha in enumerate((0.9, 0.8))
    ]
    (tmp_path / "start.json").write_text(json.dumps(entries))
    done = prune(config(budget=8, alphas_file=str(tmp_path / "start.json"), num_layer=None))
    labels = [row[0] for row in done.closing.table()[1:]]
    assert labels[:5] == ["original", "drop", "uniform", "file", "similarity"]
    assert labels[-1] == "joint"
    report = json.loads((tmp_path / "out/merge_report.json").read_text())["olmfast"]
    current = report["steps"]["start"]["metrics"]["sums.json"]["current"]  # the search began there
    assert done.selection.rows["file"]["sums.json"] == pytest.approx(current, rel=1e-5)
    (tmp_path / "start.json").write_text(json.dumps(entries[1:]))
    with pytest.raises(InputError, match="entry 0: merges layer 3 into 2, expected 4 into 3"):
        prune(config(alphas_file=str(tmp_path / "start.json"), num_layer=1))


def test_without_donors_a_layer_is_blended_with_those_it_replaces(config, tmp_path):
    done = prune(config(models=["m"], budget=20))
    told = json.loads((tmp_path / "out/merge_report.json").read_text())["olmfast"]["pruned"]
    assert told["given"] == []
    assert "least influence, all donors" not in done.holdout.rows


def test_a_point_is_a_convex_combination_whatever_its_shares():
    point = Point((2, 3), {2: 0.9, 3: 0.6}, {("donor", 1): 0.5, ("donor", 4): 0.25, ("donor", 2): 1.0})
    layers = point.layers("m", N)
    assert [layer.parts[0] for layer in layers] == [("m", 0), ("m", 1), ("m", 4)]
    assert layers[1].parts == (("m", 1), ("donor", 1), ("m", 2), ("m", 3))
    assert layers[1].weights == pytest.approx((0.0, 0.25, 0.45, 0.3))
    assert layers[2].weights == pytest.approx((0.75, 0.25))
    assert all(sum(layer.weights) == pytest.approx(1) for layer in layers)


def test_influence_is_how_much_a_layer_turns_what_enters_it():
    class Blockwise:
        blocks = (0, 1)

        def pad(self, inputs):
            return torch.tensor(inputs)

        def enter(self, ids):
            return torch.stack([torch.ones(ids.shape), torch.zeros(ids.shape)], dim=2)

        def run(self, hidden, first, _):
            return hidden * 2 if first == 0 else hidden.flip(2)

    assert influences(Blockwise(), [[1, 2], [3, 4]], 100) == pytest.approx([0.0, 1.0])


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_layer": N}, "num_layer 5: the model has 5 layers, of which at most 4 can go"),
        ({"start": 1}, "method joint: chooses the layers itself"),
        ({"models": ["m", "absent"]}, "absent: no such model"),
    ],
)
def test_what_does_not_fit_is_named(config, tmp_path, keys, message):
    with pytest.raises(InputError) as caught:
        prune(config(**keys))
    assert message in str(caught.value) or "absent" in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_layers_of_different_kinds_are_refused_naming_both(tmp_path, world):
    kinds = ["sliding_attention", "full_attention"] * 2
    tiny_model(tmp_path / "g", "gemma2", 1, num_hidden_layers=4, layer_types=kinds)
    data = {"models": ["g"], "models_dir": ".", "output_dir": "out", "device": "cpu"}
    data |= {"dataset": {str(world / "sums.json"): {"mode": "exact"}}, "prune": {"method": "joint", "num_layer": 1}}
    with pytest.raises(InputError, match=r"full_attention.*sliding_attention"):
        prune(parse_config(data, "cfg", tmp_path))
