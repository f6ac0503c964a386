"""Data-flow files: what they may hold, and every way in which one does not fit."""

from __future__ import annotations

import re
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import save_file

from olmfast.config.dataflow import load_dataflow_config
from olmfast.config.tagged import holds_dataflow
from olmfast.dataflow.hops import Hop, hops_of
from olmfast.dataflow.plan import open_donors
from olmfast.errors import InputError
from olmfast.testing import tiny_model
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Expression, Sources

D = 32  # the width of tiny models


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    tiny_model(folder / "a", seed=1, num_hidden_layers=3)
    tiny_model(folder / "b", seed=2, num_hidden_layers=2)
    return folder


def plain(models: Path, **keys):
    """Two passes over `a` (three layers) and `b` (two), of which five layers are used."""
    data = {
        "model_paths": [[str(models / "a"), None], [str(models / "b"), None]],
        "num_r": 2,
        "layer_mask": [[[True, True, False], [False, True]], [[False, False, False], [True, True]]],
        "scaling_factors": [[[1.0, 0.5, None], [None, -2]], [None, ["1e-3", 1]]],
    }
    return {**data, **keys}


def hops(data, folder: Path = Path()) -> list[Hop]:
    config = load_dataflow_config(data)
    return hops_of(config, Pool.open(config.model_paths, folder, folder, alike=False, download=False))


def told(path: list[Hop]) -> list[tuple[str, int, object, object]]:
    return [(Path(hop.donor).name, hop.block, hop.scale, hop.bias) for hop in path]


def test_a_path_is_r_by_model_by_layer_and_the_output_models_last_layer(models):
    assert told(hops(plain(models))) == [
        ("a", 0, 1.0, None),
        ("a", 1, 0.5, None),
        ("b", 1, -2.0, None),
        ("b", 0, 1e-3, None),
        ("b", 1, 1.0, None),
        ("a", 2, None, None),
    ]
    given = plain(models, output_layer_model=1, last_layer_scale=0.25, bias_factors=[[[1, 0, 0], [0, 2]], [[], [3, 4]]])
    assert told(hops(given))[-1] == ("b", 1, 0.25, None)  # its bias is none, whatever the factors say
    assert [hop.bias for hop in hops(given)] == [1.0, 0.0, 2.0, 3.0, 4.0, None]
    assert len(hops(plain(models, add_last_layer=False))) == 5


def test_the_documents_example_is_the_path_that_it_says(tmp_path, monkeypatch):
    text = (Path(__file__).parents[1] / "docs" / "data-flow.md").read_text(encoding="utf-8")
    for seed, name in enumerate(("org/first", "org/second")):
        tiny_model(tmp_path / name, seed=seed, num_hidden_layers=4)
    (tmp_path / "flow.yml").write_text(text.split("```yaml\n")[1].split("```")[0])
    monkeypatch.chdir(tmp_path / "org")
    config = load_dataflow_config(tmp_path / "flow.yml")
    path = hops_of(config, open_donors(config))
    layers = [(hop.donor.split("@")[0], hop.block) for hop in path]
    first, second = "org/first", "org/second"
    assert layers == [*((first, layer) for layer in range(4)), (second, 2), (second, 1), (second, 2), (first, 3)]
    assert [hop.scale for hop in path] == [1, 1, 0.1, 1, 1, 0.8, 1, None]


def test_hub_ids_lie_in_a_cache_of_hugging_faces_or_as_folders(models, tmp_path):
    for name in "ab":
        cached = tmp_path / "cache" / f"models--org--{name}"
        shutil.copytree(models / name, cached / "snapshots" / "0123abc")
        (cached / "refs").mkdir()
        (cached / "refs" / "main").write_text("0123abc")
        shutil.copytree(models / name, tmp_path / "flat" / f"org_{name}")
    config = load_dataflow_config(plain(models, model_paths=["org/a", ["org/b", "main"]]))
    for place in ("cache", "flat"):
        assert told(hops_of(config, open_donors(config, tmp_path / place)))[:2] == [
            ("a", 0, 1.0, None),
            ("a", 1, 0.5, None),
        ]
    with pytest.raises(InputError, match=r"org/a: neither at .* nor in Hugging Face's cache"):
        open_donors(config, tmp_path)


def python_tags(data) -> str:
    """The file as PyYAML writes the original's OrderedDict of tuples."""
    ordered = OrderedDict({**data, "model_paths": [tuple(entry) for entry in data["model_paths"]]})
    return yaml.dump(ordered, sort_keys=False)


def test_ordered_mappings_and_tuples_of_python_are_plain_ones(models, tmp_path):
    text = python_tags(plain(models))
    assert "!!python/object/apply:collections.OrderedDict" in text
    assert "!!python/tuple" in text
    (tmp_path / "tagged.yml").write_text(text)
    (tmp_path / "old.yml").write_text(  # PyYAML of another age, and the way the tag is written by hand
        f"!!python/object/apply:collections.OrderedDict [[[model_paths, [!!python/tuple [{models}/a, null]]],\n"
        "  [num_r, 1], [layer_mask, [[[True, false, true]]]], [scaling_factors, [[[.10, 1.0, 2.]]]]]]\n"
    )
    (tmp_path / "plain.yml").write_text(yaml.safe_dump(plain(models)))
    assert told(hops(tmp_path / "tagged.yml")) == told(hops(tmp_path / "plain.yml"))
    assert told(hops(tmp_path / "old.yml")) == [("a", 0, 0.1, None), ("a", 2, 2.0, None), ("a", 2, None, None)]
    assert all(holds_dataflow(tmp_path / f"{name}.yml") for name in ("tagged", "old", "plain"))
    assert told(hops(OrderedDict(plain(models)))) == told(hops(tmp_path / "plain.yml"))


@pytest.mark.parametrize(
    "text",
    [
        "model_paths: !!python/object/apply:os.system ['touch {mark}']\nlayer_mask: []\n",
        "!!python/object/apply:collections.OrderedDict [[[model_paths, !!python/object/apply:os.system "
        "['touch {mark}']]]]\n",
        "!!python/object/new:collections.OrderedDict [[[model_paths, [a]]]]\n",
        "model_paths: !!python/name:os.system\n",
        "model_paths: !!python/object/apply:collections.deque [[a]]\n",
        "!!python/object/apply:collections.OrderedDict [[[model_paths, [a]], [model_paths, [b]]]]\n",
        "!!python/object/apply:collections.OrderedDict [[model_paths, [a]]]\n",
        "!!python/object/apply:collections.OrderedDict {{args: [[[model_paths, [a]]]]}}\n",
        "model_paths: !!python/tuple {{a: b}}\n",
        "- model_paths\n",
        "",
    ],
)
def test_any_other_tag_is_an_error_and_runs_nothing(text, tmp_path):
    file, mark = tmp_path / "flow.yml", tmp_path / "mark"
    file.write_text(text.format(mark=mark))
    with pytest.raises(InputError, match=re.escape(str(file))):
        load_dataflow_config(file)
    assert not mark.exists()


def matrix(seed: int = 0) -> torch.Tensor:
    return torch.randn(D, D, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_factors_are_numbers_diagonals_and_matrices_alike_or_mixed(models):
    a, b = matrix(), matrix(1)[0]
    data = plain(
        models,
        add_last_layer=False,
        scaling_factors=[[[a.tolist(), b, None], [None, 2]], [None, [np.ones((D, D)), tuple(b.tolist())]]],
        bias_factors=[[[b, 0.5, None], [None, b.tolist()]], [None, [0, 0]]],
    )
    d = matrix(2)[:3]
    expected = [d @ a.T + b, d * b + 0.5, 2 * d + b, d @ torch.ones(D, D, dtype=torch.float64), d * b]
    for hop, wanted in zip(hops(data), expected, strict=True):
        torch.testing.assert_close(hop.act(d, SOURCES), wanted, rtol=0, atol=1e-12)


def test_one_factor_of_many_layers_may_be_written_once(models, tmp_path):
    many, one = 20, matrix().tolist()
    mask = [[[True] * 3, [True] * 2]] * many
    data = plain(models, num_r=many, layer_mask=mask, scaling_factors=[[[one] * 3, [one] * 2]] * many)
    text = yaml.safe_dump(data)
    assert "&id" in text
    (tmp_path / "flow.yml").write_text(text)
    path = hops(tmp_path / "flow.yml")
    assert len(path) == 5 * many + 1
    assert len({hop.scale for hop in path[:-1]}) == 1


SOURCES = Sources(None, Path("/"))  # type: ignore[arg-type]


@pytest.mark.parametrize("level", ["all", "r", "model", "entry"])
def test_large_factors_lie_in_a_file_and_those_of_masked_layers_are_not_read(level, models, tmp_path):
    whole = torch.full((2, 2, 3, D, D), torch.nan)
    used = {(0, 0, 0), (0, 0, 1), (0, 1, 1), (1, 1, 0), (1, 1, 1)}
    for seed, place in enumerate(sorted(used)):
        whole[place] = matrix(seed).float()
    tensors = {"all": whole}
    for r in range(2):
        tensors[f"r{r}"] = whole[r].clone()
        for m in range(2):
            tensors[f"r{r}m{m}"] = whole[r, m, : 3 - m].clone()
            tensors |= {f"r{r}m{m}l{layer}": whole[r, m, layer].clone() for layer in range(3 - m)}
    save_file(tensors, tmp_path / "factors.safetensors")

    def named(name):
        return {"safetensors": "factors.safetensors", "tensor": name}

    given = {
        "all": named("all"),
        "r": [named("r0"), named("r1")],
        "model": [[named("r0m0"), named("r0m1")], [None, named("r1m1")]],
        "entry": [[[named(f"r{r}m{m}l{x}") for x in range(3 - m)] for m in range(2)] for r in range(2)],
    }
    file = tmp_path / "flow.yml"
    file.write_text(yaml.safe_dump(plain(models, scaling_factors=given[level], add_last_layer=False)))
    d = matrix(9)[:2]
    for hop, place in zip(hops(file), sorted(used), strict=True):
        assert isinstance(hop.scale, Expression)
        torch.testing.assert_close(hop.act(d, SOURCES), d @ whole[place].double().T, rtol=0, atol=1e-12)


FLAT = [[[1.0] * 3, [1.0] * 2]] * 2


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_r": 3}, "layer_mask: expected 3 entries, as num_r says, got 2"),
        ({"num_r": 0}, "num_r: expected greater than or equal to 1"),
        ({"num_r": "2"}, "num_r: expected a valid integer, got '2'"),
        ({"layer_mask": [[[True] * 3]] * 2}, "layer_mask[0]: expected 2 lists, one for each of model_paths, got 1"),
        ({"layer_mask": [True, False]}, "layer_mask[0]: expected a valid list, got True"),
        (
            {"layer_mask": [[[True] * 3, [True] * 2], [[True] * 3, [True] * 3]]},
            "layer_mask[1][1]: expected 2 entries, as layer_mask[0][1] has, got 3",
        ),
        ({"layer_mask": [[["yes"] * 3, [True] * 2]] * 2}, "layer_mask[0][0][0]: expected true or false, got 'yes'"),
        ({"layer_mask": [[[True] * 4, [True] * 2]] * 2, "scaling_factors": [[[1] * 4, [1] * 2]] * 2}, "a has 3 layers"),
        ({"layer_mask": [[[False] * 3, [False] * 2]] * 2, "add_last_layer": False}, "layer_mask: uses no layer"),
        ({"input_layer_model": 2}, "input_layer_model: expected 0 to 1, as model_paths counts, got 2"),
        ({"output_layer_model": -1}, "output_layer_model: expected 0 to 1, as model_paths counts, got -1"),
        ({"output_layer_model": True}, "output_layer_model: expected a valid integer, got True"),
        ({"model_paths": []}, "model_paths: expected 1 or more entries, got []"),
        ({"model_paths": [[1, None]]}, "model_paths[0]: expected a model as [name, revision or null], got [1, None]"),
        ({"scaling_factors": 1.0}, "scaling_factors: expected a list of 2 entries, as many as num_r says, got 1.0"),
        ({"scaling_factors": FLAT[:1]}, "scaling_factors: expected a list of 2 entries, as many as num_r says, got 1"),
        (
            {"scaling_factors": [FLAT[0], [*FLAT[0], [1.0]]]},
            "scaling_factors[1]: expected a list of 2 entries, as many as model_paths says, got 3",
        ),
        (
            {"scaling_factors": [[[1.0] * 4, [1.0] * 2], FLAT[0]]},
            "scaling_factors[0][0]: expected a list of 3 entries, as many as layer_mask says, got 4",
        ),
        ({"scaling_factors": [[[None] * 3, [1.0] * 2], FLAT[0]]}, "scaling_factors[0][0][0]: expected a finite number"),
        ({"scaling_factors": [[[float("nan")] * 3, [1.0] * 2], FLAT[0]]}, "scaling_factors[0][0][1]: expected a fin"),
        ({"bias_factors": [FLAT[0], [None, [float("inf"), 0]]]}, "bias_factors[1][1][0]: expected a finite number"),
        ({"bias_factors": [FLAT[0]]}, "bias_factors: expected a list of 2 entries"),
        ({"bias_factors": [FLAT[0], [None, [matrix().tolist(), 0]]]}, "bias_factors[1][1][0]: expected finite numbers"),
        (
            {"scaling_factors": [[[[1.0] * 31, 1, 1], [1, 1]], FLAT[0]]},
            "scaling_factors[0][0][0]: expected a number, 32 numbers, the width of the model, or 32 lists of 32, got",
        ),
        ({"scaling_factors": [[[[[1.0] * 32] * 31, 1, 1], [1, 1]], FLAT[0]]}, "or 32 lists of 32, got 31 x 32"),
        ({"scaling_factors": [[[[[1.0, 2.0], [1.0]], 1, 1], [1, 1]], FLAT[0]]}, "got lists of different lengths"),
        ({"scaling_factors": [[[[1.0, "x"], 1, 1], [1, 1]], FLAT[0]]}, "expected finite numbers, got 'x' among them"),
        ({"last_layer_scale": float("nan")}, "last_layer_scale: expected a finite number, got nan"),
        ({"add_last_layer": "no"}, "add_last_layer: expected a valid boolean, got 'no'"),
        ({"layer_masks": []}, "layer_masks: unknown key; did you mean 'layer_mask'?"),
        ({"scaling_factors": {"safetensor": "f", "tensor": "t"}}, "unknown key 'safetensor'; did you mean 'safetensor"),
        ({"scaling_factors": {"safetensors": "f"}}, "scaling_factors.tensor: expected a text, got nothing"),
        ({"scaling_factors": {"safetensors": "f", "tensor": "t"}}, "f: cannot be opened: No such file"),
    ],
)
def test_what_does_not_fit_is_said_with_what_was_expected(keys, message, models):
    with pytest.raises(InputError, match=re.escape(message)):
        hops(plain(models, **keys))


def test_a_file_of_factors_must_have_the_masks_shape_and_finite_numbers(models, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = torch.ones(2, 2, 3, D)
    bad = good.clone()
    bad[1, 1, 0, 5] = torch.nan
    tensors = {"good": good, "bad": bad, "few": good[:, :1].clone(), "narrow": good[..., :7].clone()}
    save_file({**tensors, "whole": torch.ones(2, 2, 3, dtype=torch.int64)}, "f.safetensors")
    assert len(hops(plain(models, scaling_factors={"safetensors": "f.safetensors", "tensor": "good"}))) == 6
    for name, message in {
        "none": "has no tensor none; it has",
        "few": "expected a shape that begins with [2, 2, 3], as the mask has it, got [2, 1, 3, 32]",
        "narrow": "got 7 at [0, 0, 0] of narrow",
        "bad": "scaling_factors[1][1][0]: expected finite numbers, got torch.float32 with NaN or infinity at [1, 1, 0]",
        "whole": "expected finite numbers, got torch.int64",
    }.items():
        with pytest.raises(InputError, match=re.escape(message)):
            hops(plain(models, scaling_factors={"safetensors": "f.safetensors", "tensor": name}))
