"""Merge files: what is understood, what is refused, and which value of a parameter a tensor gets."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from olmfast.config.mergekit import MergeConfig, is_merge_file, load_merge_config, parse_merge_config
from olmfast.config.parameters import settings_of
from olmfast.errors import InputError

TWO = [{"model": "a"}, {"model": "b"}]


def parse(**keys: Any) -> MergeConfig:
    return parse_merge_config(
        {"merge_method": "linear", "models": TWO, "parameters": {"weight": 1}, **keys}, "m.yml", Path("/")
    )


def value(config: MergeConfig, name: str, tensor: str, depth: float = 0.0) -> Any:
    (group,) = config.groups()
    terms = group.terms(config.method)
    outer, own = (group.parameters, config.parameters), [term.parameters for term in terms]
    return settings_of(config.method, outer, own, [tensor] * len(terms), tensor, depth)[name]


def test_a_parameter_of_a_model_goes_before_that_of_the_file():
    config = parse(models=[{"model": "a", "parameters": {"weight": 0.25}}, {"model": "b"}], parameters={"weight": 2})
    assert value(config, "weight", "x") == (0.25, 2.0)


def test_the_first_filter_that_is_part_of_the_name_decides_and_else_the_next_place_does():
    filtered = [{"filter": "mlp", "value": 0.1}, {"filter": "up_proj", "value": 0.2}]
    config = parse(
        models=[{"model": "a", "parameters": {"weight": filtered}}, {"model": "b"}], parameters={"weight": 3}
    )
    assert value(config, "weight", "layers.0.mlp.up_proj") == (0.1, 3.0)
    assert value(config, "weight", "layers.0.up_proj") == (0.2, 3.0)
    assert value(config, "weight", "layers.0.q_proj") == (3.0, 3.0)


@pytest.mark.parametrize(("depth", "expected"), [(0, 0), (0.25, 0.5), (0.5, 1), (0.75, 0.5), (1, 0)])
def test_a_list_is_a_gradient_over_the_depth(depth, expected):
    assert value(parse(parameters={"weight": [0, 1, 0]}), "weight", "x", depth) == (expected, expected)


def test_a_list_of_true_and_false_is_not_interpolated():
    config = parse(parameters={"weight": 1, "normalize": [True, False]})
    assert value(config, "normalize", "x", 0.9) is True
    assert value(config, "normalize", "x", 1.0) is False


def test_numbers_that_yaml_reads_as_text_are_numbers():
    assert value(parse(parameters={"weight": "1e-3"}), "weight", "x") == (0.001, 0.001)


def test_a_filter_that_leaves_a_tensor_without_its_weight_is_an_error_that_names_both():
    with pytest.raises(InputError, match=r"q_proj: no value for the required parameter weight"):
        value(parse(parameters={"weight": [{"filter": "mlp", "value": 1}]}), "weight", "q_proj")


def test_the_base_is_merged_too_where_a_method_knows_no_task_vectors():
    assert [s.model for s in parse(base_model="c").groups()[0].sources] == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"merge_metod": "ties"}, "merge_metod: unknown key; did you mean 'merge_method'?"),
        ({"merge_method": "tie"}, "merge_method: expected one of linear, slerp"),
        ({"parameters": {"wieght": 1}}, "parameters.wieght: unknown key; did you mean 'weight'?"),
        ({"models": [{"model": "a", "paramters": {}}]}, "models[0].paramters: unknown key; did you mean 'parameters'?"),
        ({"models": ["a", "b"]}, "models[0]: expected {model: a}, got 'a'"),
        ({"slices": []}, "slices: "),
        ({"models": None}, "expected either models or slices, got neither"),
        ({"models": []}, "models: expected 1 or more entries, got []"),
        ({"merge_method": "ties"}, "base_model: required by ties"),
        ({"merge_method": "slerp", "base_model": "c"}, "slerp takes 2 models, got 3: c, a, b"),
        ({"merge_method": "slerp", "base_model": "a"}, "slerp needs the parameter t"),
        (
            {"merge_method": "model_stock", "models": [{"model": "a"}], "base_model": "c"},
            "takes at least 2 models besides",
        ),
        ({"parameters": {}}, "linear needs the parameter weight of every model; a, b have none"),
        (
            {"models": [{"model": "a", "parameters": {"weight": 1}}], "parameters": {}, "base_model": "c"},
            "of every model; c, the base_model, which this method merges like the others, has none",
        ),
        (
            {"merge_method": "slerp", "models": [{"model": "b", "parameters": {"t": 1}}], "base_model": "a"},
            "slerp needs the parameter t; it has one value for all models: give it in the file's parameters",
        ),
        ({"out_path": "x"}, "out_path: unknown key here; the result's folder is an argument of the command"),
        ({"select_topk": 0.1}, "select_topk: unknown key here; it belongs below parameters"),
        ({"pad_to_multiple_of": 8}, "pad_to_multiple_of: unknown key here; it belongs below tokenizer"),
        ({"models": [{"model": "a", "weight": 1}]}, "models[0].weight: unknown key here; it belongs below parameters"),
        ({"parameters": {"dtype": "float16"}}, "parameters.dtype: unknown key here; it belongs at the top of the file"),
        ({"parameters": {"smooth": False, "weight": 1}}, "a key of mergekit-evolve's genomes and changes no merge"),
        ({"models": [*TWO, {"model": "a"}]}, "models: 'a' is listed twice"),
        ({"dtype": "int8"}, "dtype: expected 'float32', 'bfloat16', 'float16' or 'float64', got 'int8'"),
        ({"merge_method": "SLERP"}, "got 'SLERP'; did you mean 'slerp'?"),
        ({"parameters": {"weight": None}}, "parameters.weight: expected a number, true or false, a list of them or of"),
        ({"parameters": {"weight": None}}, ", got nothing"),
        ({"merge_method": None}, "merge_method: expected a valid string, got nothing"),
        ({"parameters": {"weight": [{"pattern": "x", "value": 1}]}}, "pattern: is the older name of filter"),
        (
            {"parameters": {"weight": 0.7, "filter": "mlp"}},
            "parameters: filter: stands beside the value that it limits; write weight: [{filter: mlp, value: 0.7}]",
        ),
        ({"parameters": {"random_seed": 1}}, "random_seed: unknown key here; the seed is an option of the command"),
        ({"tokenizer": "union"}, "tokenizer: expected {source: union}, got 'union'; or write tokenizer_source: union"),
        ({"multi_method_genome": {}}, "multi_method_genome: is a file of mergekit-evolve; a search is a run"),
        ({"stages": []}, "stages: is not a merge file of mergekit's; each stage is a document here"),
        ({"parameters": {"weight": "much"}}, "parameters.weight: expected a number"),
        ({"parameters": {"weight": 16**5000}}, "parameters.weight: expected a number"),
        ({"base_model": 16**5000}, "base_model: expected a valid string, got a number of thousands of digits"),
        ({"tokenizer": {"pad_to_multiple_of": 16**5000}}, "tokenizer.pad_to_multiple_of: expected less than"),
        ({"parameters": {"weight": [{"filters": "x", "value": 1}]}}, "unknown key 'filters'; did you mean 'filter'?"),
        ({"tokenizer": {"source": "union"}, "tokenizer_source": "base"}, "one is the newer form of the other"),
        ({"modules": {}}, "modules: expected one, such as {default: {slices: ...}}, got {}"),
    ],
)
def test_what_cannot_be_meant_is_refused_and_named(keys, message):
    with pytest.raises(InputError) as caught:
        parse(**keys)
    assert message in str(caught.value)
    assert str(caught.value).startswith("m.yml: ")


SLICE = {"sources": [{"model": "a", "layer_range": [0, 1]}]}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"merge_method": "ties"}, "slices[0].merge_method: the file's is linear, got 'ties'; another method needs a"),
        ({"dtype": "float16"}, "slices[0].dtype: unknown key here; it belongs at the top of the file"),
        (
            {"sources": [{**SLICE["sources"][0], "epsilon": 1}]},
            "slices[0].sources[0].epsilon: unknown key here; it belongs below parameters",
        ),
    ],
)
def test_a_key_in_the_wrong_place_is_told_where_it_belongs(keys, message):
    with pytest.raises(InputError) as caught:
        parse(models=None, slices=[{**SLICE, **keys}])
    assert message in str(caught.value)
    assert parse(models=None, slices=[{**SLICE, "merge_method": "linear"}]).slices


@pytest.mark.parametrize(
    ("keys", "notes"),
    [
        ({"parameters": {"weight": 1, "density": 0.5, "int8_mask": True}}, ["density: not read by linear"]),
        ({"parameters": {"weight": 1, "embed_slerp": True}}, ["embed_slerp: not read by linear"]),
        (
            {"models": [{"model": "a", "parameters": {"normalize": False, "weight": 1}}, {"model": "b"}]},
            ["normalize: not read where a model has it"],
        ),
        (
            {
                "merge_method": "ties",
                "base_model": "a",
                "models": [{"model": "a", "parameters": {"weight": 1}}, {"model": "b"}],
            },
            ["weight: not read where the base_model has it"],
        ),
        ({"base_model": "a"}, []),
        ({"models": None, "slices": [{**SLICE, "residual_weight": 0.5}]}, ["residual_weight: not read"]),
    ],
)
def test_parameters_without_effect_are_told(keys, notes):
    found = parse(**keys).notes()
    assert len(found) == len(notes)
    assert all(note in one for note, one in zip(notes, found, strict=True))


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ([5, 4], "0 <= first <= end, got [5, 4]"),
        ([0, 2], "of different lengths"),
        ("0, 4", "layer_range: expected [first, end], got '0, 4'"),
        ([4], "layer_range: expected [first, end], got [4]"),
    ],
)
def test_layer_ranges_that_make_no_slice_are_refused(layers, message):
    sources = [{"model": "a", "layer_range": layers}, {"model": "b", "layer_range": [0, 3]}]
    with pytest.raises(InputError) as caught:
        parse(models=None, slices=[{"sources": sources}])
    assert message in str(caught.value)


def test_a_run_whose_models_are_described_is_still_a_run():
    described = {"models": [{"model": "a"}]}
    assert is_merge_file(described)
    assert is_merge_file({**described, "dataset": {}, "merge_method": "ties"})
    assert not is_merge_file({**described, "dataset": {}})
    assert not is_merge_file({"genome": {}, "dataset": {}})


def test_a_file_of_another_command_of_mergekits_is_no_run():
    assert is_merge_file({"genome": {}, "task": []})


def test_every_fault_is_told_at_once():
    with pytest.raises(InputError) as caught:
        parse(merge_method="tie", dtype="x", nonsense=1, models=[{"model": "a", "weight": 1}])
    assert len(str(caught.value).splitlines()) == 4


def test_python_objects_in_yaml_are_not_made(tmp_path):
    path = tmp_path / "m.yml"
    path.write_text("merge_method: !!python/object/apply:os.system ['true']\n")
    with pytest.raises(InputError, match="not valid YAML"):
        load_merge_config(path)
