"""Merge files as people publish them, and the files beside the weights: what mergekit runs runs here."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from pairs import merged_by, weights

from olmfast.errors import InputError
from olmfast.runs.check import check
from olmfast.testing import tiny_model

EQUAL = {
    "a name": "name: mine\nmerge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n",
    "modules": """
merge_method: linear
modules:
  default:
    slices:
    - sources: [{model: a, layer_range: [0, 3]}, {model: b, layer_range: [0, 3]}]
parameters: {weight: 1}
""",
    "anchors": """
shared: &shared
  parameters: {weight: 1}
other: {deep: [&number 1]}
merge_method: linear
models:
- {model: a, <<: *shared}
- {model: b, parameters: {weight: *number}}
""",
    "a directive": """%YAML 1.1
---
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1}
...
""",
    "on the dashes' line": "--- {merge_method: linear, models: [{model: a}, {model: b}], parameters: {weight: 1}}",
    "quoted": """
{"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "tokenizer": {"source": "base", "tokens": null},
 "base_model": "a", "parameters": {"normalize": "true", "weight": "1"}}
""",
    "a model: before the tokenizer's": """
merge_method: linear
models: [{model: a}, {model: b}]
parameters: {weight: 1}
tokenizer_source: model:b
""",
    "empty parameters": """
merge_method: linear
models:
- {model: a, parameters: {weight: 1}}
- model: b
  parameters:
    weight: 1
parameters:
""",
}


@pytest.mark.parametrize("which", EQUAL)
def test_what_mergekit_reads_is_read(which, place):
    merged_by(place, EQUAL[which])
    a, b, out = (weights(place / name) for name in ("a", "b", "out"))
    assert all(torch.allclose(out[name], (a[name] + b[name]) / 2) for name in a)


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "della", "sce"])
def test_a_base_with_nothing_added_is_written_as_it_is(place, method):
    slices = "slices:\n- sources: [{model: a, layer_range: [0, 3], parameters: {weight: 1}}]\n"
    written = merged_by(place, f"merge_method: {method}\nbase_model: a\ndtype: float16\n{slices}")
    a, out = weights(place / "a"), weights(place / "out")
    assert all(torch.equal(out[name], tensor.half()) for name, tensor in a.items())
    assert written.account == f"{len(a)} tensors written: {len(a)} copied from a in float16"


def test_a_slice_without_layers_gives_the_head(place):
    merged_by(
        place,
        """
merge_method: passthrough
slices:
- sources: [{model: a, layer_range: [0, 3]}]
- sources: [{model: b, layer_range: [3, 3]}]
""",
    )
    a, b, out = (weights(place / name) for name in ("a", "b", "out"))
    heads = ("lm_head.weight", "model.norm.weight")
    assert all(torch.equal(out[name], (b if name in heads else a)[name]) for name in a)
    assert out.keys() == a.keys()


def test_nearswap_moves_no_value_further_than_t(place):
    merged_by(place, "merge_method: nearswap\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.02}\n")
    a, b, out = (weights(place / name) for name in ("a", "b", "out"))
    for name in a:
        base, other = a[name].double(), b[name].double()
        share = (0.02 / (other - base).abs()).nan_to_num(1.0, posinf=1.0).clamp(max=1.0)
        assert torch.allclose(out[name].double(), base + share * (other - base), atol=1e-7), name


HEAD = "merge_method: linear\nparameters: {weight: 1}\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "merge_method: passthrough\nslices:\n- sources: [{model: org/x, revision: v1, layer_range: [0, 2]}]\n",
            "slices[0].sources[0]: revision: is part of the model's name; write model: org/x@v1",
        ),
        (HEAD + "models: [{model: a, revision: v1}, {model: b}]", "models[0]: revision: is part of the model's name;"),
        ("experts: [{source_model: a}]\nbase_model: a\n", "is a mixture-of-experts file (mergekit-moe)"),
        ("genome: {models: [a]}\ntasks: []\n", "is a file of mergekit-evolve; a search is a run here: see olmfast run"),
        (HEAD + "models: [{model: a}, {model: a}]", "'a' is listed twice, and a model merged with itself is itself"),
        (HEAD + "models: !!python/tuple [a, b]", "tags are not read, as they can run code: write the value without"),
        (
            "merge_method: passthrough\nslices:\n- sources: [{model: a, layer_range: [0, 0]}]\n",
            "an empty layer_range, [0, 0]: no layers at all",
        ),
        (
            "merge_method: passthrough\nslices:\n"
            + "".join(f"- sources: [{{model: a, layer_range: [{i}, {j}]}}]\n" for i, j in ((0, 1), (1, 1), (1, 3))),
            "slices[1]: an empty layer_range; only the first slice",
        ),
        (HEAD + "slices:\n- sources: [{model: a, layer_range: [0, -1]}]", "layers are not counted from the last"),
        (
            HEAD + "slices:\n- sources: [{model: a, layer_range: [0, 1], weight: 0.3}]",
            "sources[0].weight: unknown key here; it belongs below parameters",
        ),
        (HEAD + "modules: {text: {}, vision: {}}\n", "modules: expected one, such as {default: {slices: ...}}"),
    ],
)
def test_what_cannot_run_is_said_in_words_that_help(text, message, place):
    with pytest.raises(InputError, match=re.escape(message)):
        merged_by(place, text)
    assert not list(place.glob("out*"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("a/model.safetensors", "is a file; name the folder that it lies in, with its config.json"),
        ("https://huggingface.co/org/name/tree/main", "is an address; name the model org/name"),
        ("hf.co/org/name", "is an address; name the model org/name"),
    ],
)
def test_what_names_no_model_is_told_as_what_it_is(name, message, place):
    models = f"[{{model: '{name}'}}, {{model: b}}]"
    with pytest.raises(InputError, match=re.escape(message)):
        merged_by(place, f"merge_method: linear\nmodels: {models}\nparameters: {{weight: 1}}\n")


# Files beside the weights.

BESIDE = {
    "preprocessor_config.json": "{}",
    "processor_config.json": "{}",
    "video_preprocessor_config.json": "{}",
    "normalizer.json": "{}",
    "chat_template.json": "{}",
    "additional_chat_templates/tools.jinja": "tools",
    "tekken.json": "{}",
    "qwen.tiktoken": "IQ== 0",
    "modules.json": json.dumps([{"path": ""}, {"path": "1_Pooling"}, {"path": "../a"}]),
    "sentence_bert_config.json": "{}",
    "1_Pooling/config.json": "{}",
    "modeling_own.py": "raise SystemExit('never run')",
}


def own(place: Path) -> None:
    """Models of the test's own: a with files of every kind beside its weights."""
    for seed, name in enumerate("ab"):
        tiny_model(place / name, "llama", seed)
    for name, text in BESIDE.items():
        (place / "a" / name).parent.mkdir(exist_ok=True)
        (place / "a" / name).write_text(text)
    (place / "a" / "1_Pooling" / "pytorch_model.bin").write_text("a pickle")
    for file in ("config.json", "tokenizer_config.json"):
        path = place / "a" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), "auto_map": {"AutoModel": "modeling_own.Own"}}))


TWO = HEAD + "models: [{model: a}, {model: b}]"


def test_processor_template_and_code_files_are_copied_and_the_code_is_told(tmp_path):
    own(tmp_path)
    merged_by(tmp_path, TWO)
    for name, text in BESIDE.items():
        assert (tmp_path / "out" / name).read_text() == text
    assert not (tmp_path / "out" / "1_Pooling" / "pytorch_model.bin").exists()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    assert (
        "modeling_own.py) are copied, as auto_map names them; they were not run"
        in check(tmp_path / "m.yml").warnings[0]
    )


@pytest.mark.parametrize("file", ["tokenizer.model", "tekken.json", "modeling_own.py"])
def test_a_pointer_of_git_lfs_is_not_copied_as_if_it_were_the_file(tmp_path, file):
    own(tmp_path)
    (tmp_path / "a" / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 123\n")
    with pytest.raises(InputError, match=f"{file}: is a Git LFS pointer"):
        merged_by(tmp_path, TWO)
    assert not list(tmp_path.glob("out*"))


def test_without_remote_code_files_neither_they_nor_what_names_them_are_in_the_result(tmp_path):
    own(tmp_path)
    merged_by(tmp_path, TWO, remote_code_files=False)
    assert not list((tmp_path / "out").glob("*.py"))
    assert "auto_map" not in (tmp_path / "out" / "config.json").read_text()
    assert "auto_map" not in (tmp_path / "out" / "tokenizer_config.json").read_text()
    assert (tmp_path / "out" / "tekken.json").is_file()
