"""Merge files of several documents, which name what others make."""

from __future__ import annotations

import pytest
import torch
from pairs import merged_by, weights

from olmfast.errors import InputError
from olmfast.runs.check import check

DOCUMENTS = """
name: first
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 0.5}
---
# another, which nobody uses
name: second
merge_method: passthrough
models: [{model: c}]
---
merge_method: passthrough
slices:
- sources: [{model: c, layer_range: [0, 2]}]
- sources: [{model: first, layer_range: [1, 3]}]
"""


def test_a_document_may_name_the_model_of_one_before_it(place):
    merged_by(place, DOCUMENTS)
    a, b, c, out, first = (weights(place / name) for name in ("a", "b", "c", "out", "out-first"))
    name = "model.layers.{}.mlp.up_proj.weight"
    assert torch.equal(out[name.format(1)], c[name.format(1)])
    assert torch.equal(out[name.format(3)], (a[name.format(2)] + b[name.format(2)]) / 2)
    assert torch.equal(first["lm_head.weight"], out["lm_head.weight"])
    assert weights(place / "out-second").keys() == c.keys()
    assert "name: second" in (place / "out-second" / "mergekit_config.yml").read_text()
    assert {path.name for path in place.iterdir()} == {*"abc", "m.yml", "out", "out-first", "out-second"}


@pytest.mark.parametrize(
    ("before", "after", "message"),
    [
        ("[1, 3]", "[1, 9]", "the last document: slices[1]: layer_range [1, 9] of first, which has 3 layers"),
        ("name: first\n", "", "document 1: "),
        ("name: second", "name: first", "two documents have the name 'first'"),
        ("name: second", "name: ../x", "name: expected letters, digits, dots and dashes, got '../x'"),
        ("model: first", "model: frist", "frist: no such model folder"),
        ("models: [{model: c}]", "modles: [{model: c}]", "document 2: modles: unknown key; did you mean 'models'?"),
    ],
)
def test_all_documents_are_checked_before_the_first_is_written(place, before, after, message):
    with pytest.raises(InputError) as caught:
        merged_by(place, DOCUMENTS.replace(before, after))
    assert message in str(caught.value) or (message == "document 1: " and "no name" in str(caught.value))
    assert not list(place.glob("out*"))


def test_check_reads_the_documents_too(place):
    (place / "m.yml").write_text(DOCUMENTS)
    plan = check(place / "m.yml")
    assert "first: made first, by linear of 2 models" in plan.notes
    assert len([tensor for tensor in plan.content.tensors if "up_proj" in tensor.name]) == 4


CHAIN = """
name: first
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 0.5}
---
name: second
merge_method: slerp
base_model: first
models: [{model: c}]
parameters: {t: 0}
---
merge_method: linear
models: [{model: second, parameters: {weight: 1}}, {model: c, parameters: {weight: 1}}]
"""


def test_a_document_may_use_one_that_uses_another(place):
    merged_by(place, CHAIN)
    a, b, c, out = (weights(place / name) for name in ("a", "b", "c", "out"))
    assert all(torch.allclose(out[name], ((a[name] + b[name]) / 2 + c[name]) / 2, atol=1e-6) for name in a)


def test_a_result_that_is_in_the_way_is_found_before_the_first_document_is_written(place):
    merged_by(place, "merge_method: passthrough\nmodels: [{model: a}]\n")
    with pytest.raises(InputError, match=r"out: exists; use --overwrite"):
        merged_by(place, CHAIN)
    assert not list(place.glob("out-*"))


def test_no_document_replaces_a_model_that_another_reads(place):
    merged_by(place, CHAIN)
    before = weights(place / "out-first")
    changed = CHAIN.replace("{model: a}", "{model: c}").replace("model: second", "model: out-first")
    with pytest.raises(InputError, match=r"out-first holds the model out-first"):
        merged_by(place, changed, overwrite=True)
    assert all(torch.equal(tensor, before[name]) for name, tensor in weights(place / "out-first").items())


@pytest.mark.parametrize("path", ["./intermediates/first", "intermediates/first", "/nowhere/first"])
def test_a_path_without_a_folder_that_ends_in_a_documents_name_is_that_document(place, path):
    merged_by(place, CHAIN)
    named = weights(place / "out")
    merged_by(place, CHAIN.replace("base_model: first", f"base_model: {path}"), overwrite=True)
    assert all(torch.equal(tensor, named[name]) for name, tensor in weights(place / "out").items())
    assert f"second: {path}: no such folder, so the document first is meant" in check(place / "m.yml").notes


def test_a_document_by_its_name_and_by_a_path_is_one_model(place):
    twice = "{model: first, parameters: {weight: 1}}, {model: ./intermediates/first, parameters: {weight: 1}}"
    with pytest.raises(InputError, match=r"document 3: models: 'first' is listed twice"):
        merged_by(place, CHAIN.replace("{model: second, parameters: {weight: 1}}", twice))


def test_a_folder_that_is_there_and_a_hub_id_are_no_documents(place):
    (place / "intermediates").mkdir()
    (place / "intermediates" / "first").symlink_to(place / "c")
    merged_by(place, CHAIN.replace("base_model: first", "base_model: ./intermediates/first"))
    assert all(torch.equal(tensor, weights(place / "out")[name]) for name, tensor in weights(place / "c").items())
    with pytest.raises(InputError, match="org/first: neither at"):
        merged_by(place, CHAIN.replace("base_model: first", "base_model: org/first"), overwrite=True)


def test_documents_on_the_lines_of_their_dashes_are_all_read(place):
    text = "--- {name: first, merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: 1}}\n"
    merged_by(place, text + "--- {merge_method: passthrough, models: [{model: first}]}\n")
    assert all(
        torch.equal(tensor, weights(place / "out-first")[name]) for name, tensor in weights(place / "out").items()
    )


def test_documents_may_stand_in_any_order(place):
    *before, result = DOCUMENTS.split("---\n")
    merged_by(place, "---\n".join([result, *reversed(before)]))
    turned = weights(place / "out")
    merged_by(place, DOCUMENTS, overwrite=True)
    assert all(torch.equal(tensor, turned[name]) for name, tensor in weights(place / "out").items())
    assert {path.name for path in place.iterdir()} == {*"abc", "m.yml", "out", "out-first", "out-second"}
    named = "---\n".join([f"name: third\n{result}", before[0]])  # the last that no other uses gives the result
    merged_by(place, named, overwrite=True)
    assert all(torch.equal(tensor, turned[name]) for name, tensor in weights(place / "out").items())
    circle = DOCUMENTS.replace("model: c}]\n---", "model: first}]\n---").replace("{model: b}]", "{model: second}]")
    with pytest.raises(InputError, match=r"documents use each other: (first, second, first|second, first, second)"):
        merged_by(place, circle)
