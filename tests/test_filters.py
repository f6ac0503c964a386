"""Filters of parameters that have no effect: each is told, and why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from olmfast.runs.check import check


def told(folder: Path, **keys: Any) -> list[str]:
    """What a check of a merge of a and b says of parameters."""
    models = [] if "slices" in keys else [{"model": str(folder / "b")}]
    held = {"merge_method": "slerp", "base_model": str(folder / "a"), **({"models": models} if models else {}), **keys}
    return [note for note in check(held).warnings if note.startswith("parameters: ")]


DEFAULT = {"value": 0.5}


@pytest.mark.parametrize(
    ("entries", "notes"),
    [
        ([{"filter": "self_attn", "value": [0, 1]}, {"filter": "mlp", "value": 1}, DEFAULT], []),
        (
            [{"filter": "self_atn", "value": 1}, DEFAULT],
            ["the filter 'self_atn' is part of no merged tensor's name; did you mean 'self_attn'?"],
        ),
        (
            [{"filter": "model.layers.*.mlp", "value": 1}, DEFAULT],
            [
                "the filter 'model.layers.*.mlp' is part of no merged tensor's name; it is looked for as it stands, "
                "and no pattern"
            ],
        ),
        (
            [DEFAULT, {"filter": "mlp", "value": 1}, {"value": [0, 1]}],
            [
                "the filter 'mlp' is never reached, as a value without a filter stands before it",
                "the value [0, 1] is never reached, as a value without a filter stands before it",
            ],
        ),
        (
            [{"filter": "mlp", "value": 1}, {"filter": "up_proj", "value": 0}, DEFAULT],
            ["the filter 'up_proj' has no effect: every tensor takes a value that goes before it"],
        ),
    ],
)
def test_a_filter_without_effect_is_told_with_the_reason(llamas, entries, notes):
    assert told(llamas, parameters={"t": entries}) == [f"parameters: t: {note}" for note in notes]


def test_one_that_several_slices_repeat_is_told_once_and_only_if_it_has_none_in_all(llamas):
    entries = [{"filter": "lm_head", "value": 1}, {"filter": "lm_haed", "value": 1}, DEFAULT]
    slices = [
        {
            "sources": [{"model": str(llamas / name), "layer_range": [i, i + 1]} for name in "ab"],
            "parameters": {"t": entries},
        }
        for i in range(3)
    ]
    (note,) = told(llamas, slices=slices)
    assert "'lm_haed'" in note


def test_one_of_the_file_is_told_where_each_model_has_a_value_of_its_own(llamas):
    models = [{"model": str(llamas / "b"), "parameters": {"weight": 1}}]
    (note,) = told(
        llamas, merge_method="ties", models=models, parameters={"weight": [{"filter": "mlp", "value": 0.1}]}
    )
    assert note == "parameters: weight: the filter 'mlp' has no effect: every tensor takes a value that goes before it"


def test_a_merge_tells_it_too(llamas, tmp_path, olmfast):
    held = {
        "merge_method": "slerp",
        "base_model": str(llamas / "a"),
        "models": [{"model": str(llamas / "b")}],
        "parameters": {"t": [{"filter": "atention", "value": 1}, DEFAULT]},
    }
    (tmp_path / "m.yml").write_text(yaml.safe_dump(held))
    code, _, err = olmfast("merge", tmp_path / "m.yml", tmp_path / "out")
    assert code == 0
    assert "note: parameters: t: the filter 'atention' is part of no merged tensor's name" in err
