"""The names of adapted models: which part is the model and which the adapter, and the spellings of mergekit."""

from __future__ import annotations

import re

import pytest

from olmfast.config.mergekit import load_merge_config
from olmfast.errors import InputError
from olmfast.weights.hub import common_model, parts_of


def test_a_plus_in_the_name_of_a_folder_that_exists_is_part_of_it(tmp_path):
    for folder in ("a+b", "models/c+d", "a+b+c", "org_x+y"):
        (tmp_path / folder).mkdir(parents=True)
    for name, parts in {
        "a+b": ["a+b"],
        "a+b+ad": ["a+b", "ad"],
        "a+b+c+ad": ["a+b+c", "ad"],
        "x+a+b": ["x", "a+b"],
        "models/c+d+a+b": ["models/c+d", "a+b"],
        f"{tmp_path}/models/c+d+e": [f"{tmp_path}/models/c+d", "e"],
        "org/x+y": ["org/x+y"],
        "org/base@v1+org/ad@main": ["org/base@v1", "org/ad@main"],
        "plain": ["plain"],
    }.items():
        assert parts_of(name, tmp_path, tmp_path) == parts, name


def test_the_model_that_all_names_are_adapters_of_is_found(tmp_path):
    for names, expected in {
        ("a+x", "a+y"): "a",
        ("a+x", "a"): "a",
        ("a+x", "b+x"): None,
        ("a", "a"): None,
        ("a+x+y", "a+x"): "a",
    }.items():
        assert common_model(names, tmp_path, tmp_path) == expected


def test_mergekits_spellings_of_an_adapted_model_are_one():
    entries = [
        "org/base@v1+org/ad@v2",
        {"model": {"path": "org/base", "revision": "v1"}, "lora": {"path": "org/ad", "revision": "v2"}},
        {"model": "org/base@v1", "lora": "org/ad@v2", "override_architecture": None},
    ]
    for entry in entries:
        config = load_merge_config({"merge_method": "passthrough", "models": [{"model": entry}]})
        assert config.model_names == ["org/base@v1+org/ad@v2"]


@pytest.mark.parametrize(
    ("keys", "name"),
    [({"revision": "v1"}, "org/a@v1"), ({"lora": "org/ad"}, "org/a+org/ad"), ({"adapter": "x"}, "org/a+x")],
)
def test_what_belongs_to_a_models_name_is_said_to(keys, name):
    merged = {"merge_method": "passthrough", "models": [{"model": "org/a", **keys}]}
    source = {"model": "org/a", "layer_range": [0, 1], **keys}
    sliced = {"merge_method": "passthrough", "slices": [{"sources": [source]}]}
    for config in (merged, sliced):
        with pytest.raises(InputError, match=f"is part of the model's name; write model: {re.escape(name)}"):
            load_merge_config(config)
