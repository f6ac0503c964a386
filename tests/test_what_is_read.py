"""What is read is what Transformers would read, is all that a result depends on, and does not change in silence."""

from __future__ import annotations

import json
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from olmfast import check, load_config, merge, run
from olmfast.errors import Interrupted, OlmfastError
from olmfast.observer import Observer
from olmfast.runs import inputs
from olmfast.runs.inputs import Inputs
from olmfast.testing import tree


def interrupted(place: Path) -> None:
    asked = iter([False])
    with pytest.raises(Interrupted):
        run(load_config(place / "cfg.yaml"), stop_requested=lambda: next(asked, True))


def edited(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("tokenizer.json", None),
        ("tokenizer_config.json", None),
        ("generation_config.json", None),
        ("chat_template.jinja", "{{ messages[0]['content'] }}"),
    ],
)
def test_a_tokenizer_file_that_changed_since_a_kill_is_named(file, content, place, olmfast):
    interrupted(place)
    path = place / "a" / file
    if content is None:
        path.write_text(path.read_text() + "\n")
    else:
        path.write_text(content)
    before = tree(place)
    code, _, err = olmfast("run", place / "cfg.yaml", "-q", "--resume")
    assert (code, tree(place)) == (2, before), err
    assert f"changed since it was begun: tokenizer file {file}" in err


@pytest.mark.parametrize("key", ["olmfast", "torch", "threads"])
def test_a_version_that_changed_since_a_kill_is_named(key, place, olmfast, monkeypatch):
    with monkeypatch.context() as earlier:
        environment = inputs.environment
        earlier.setattr(inputs, "environment", lambda settings: environment(settings) | {key: "another"})
        interrupted(place)
    before = tree(place)
    code, _, err = olmfast("run", place / "cfg.yaml", "-q", "--resume")
    assert (code, tree(place)) == (2, before), err
    assert re.search(f"changed since it was begun: {key}: .* instead of another; ", err)


def test_a_run_of_an_older_version_is_refused_by_name(place, olmfast, monkeypatch):
    with monkeypatch.context() as earlier:
        header = Inputs.header
        earlier.setattr(Inputs, "header", lambda self: {k: v for k, v in header(self).items() if k != "tokenizer"})
        interrupted(place)
    code, _, err = olmfast("run", place / "cfg.yaml", "-q", "--resume")
    assert code == 2
    assert "was begun by an older version, which kept no tokenizer" in err


def shards(folder: Path) -> dict[str, torch.Tensor]:
    """Give a model two shards and an index; returns its tensors."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    weight_map = {}
    for number in (0, 1):
        part = {name: tensors[name] for name in names[number::2]}
        file = f"model-0000{number + 1}-of-00002.safetensors"
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return tensors


class Notes(Observer):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.mark.parametrize("stale", [False, True])
def test_of_two_formats_in_one_folder_the_one_that_transformers_takes_is_taken_and_told(stale, place):
    expected = merge(place / "m.yml", place / "expected")
    shards(place / "a")
    for path in (place / "a").glob("model-*"):
        if stale:
            path.unlink()
        else:
            save_file({name: 2 * tensor for name, tensor in load_file(path).items()}, path)
    merge(place / "m.yml", place / "out")
    weights = [(folder / "model.safetensors").read_bytes() for folder in (expected.output_dir, place / "out")]
    assert weights[0] == weights[1]
    told = f"{place / 'a'}: has both model.safetensors and model.safetensors.index.json; the single file is taken"
    assert any(note.startswith(told) for note in check(place / "m.yml").warnings)
    observer = Notes()
    check(load_config(place / "cfg.yaml"), observer=observer)
    assert any(note.startswith(told) for note in observer.notes)


def test_a_tensor_that_the_index_does_not_list_is_merged_and_told(place):
    merge(place / "m.yml", place / "expected")
    shards(place / "a")
    (place / "a" / "model.safetensors").unlink()
    index = place / "a" / "model.safetensors.index.json"
    listed = json.loads(index.read_text())["weight_map"]
    norm = "model.norm.weight"
    shard = listed.pop(norm)
    edited(index, weight_map=listed)
    merge(place / "m.yml", place / "out")
    merged, expected = (load_file(place / name / "model.safetensors") for name in ("out", "expected"))
    assert merged.keys() == expected.keys()
    assert torch.equal(merged[norm], expected[norm])
    told = f"{place / 'a' / shard}: holds {norm}, not in the index; taken, as by Transformers"
    assert told in check(place / "m.yml").warnings


def test_a_tensor_in_two_shards_is_refused(place, olmfast):
    tensors = shards(place / "a")
    (place / "a" / "model.safetensors").unlink()
    listed = json.loads((place / "a" / "model.safetensors.index.json").read_text())["weight_map"]
    other = next(file for file in listed.values() if file != listed["model.norm.weight"])
    path = place / "a" / other
    save_file({**load_file(path), "model.norm.weight": tensors["model.norm.weight"]}, path)
    code, _, err = olmfast("merge", place / "m.yml", place / "out")
    assert code == 2
    assert f"says that model.norm.weight is in {listed['model.norm.weight']}, but {other} holds it too" in err


@pytest.mark.parametrize("where", ["../b/model.safetensors", "ABSOLUTE", "x/../../b/model.safetensors", "", "."])
def test_an_index_that_leads_out_of_its_folder_is_refused(where, place, olmfast):
    names = list(load_file(place / "a" / "model.safetensors"))
    (place / "a" / "model.safetensors").unlink()
    where = str(place / "b" / "model.safetensors") if where == "ABSOLUTE" else where
    index = place / "a" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(names, where)}))
    before = tree(place)
    for command in (["merge", place / "m.yml", place / "out"], ["run", place / "cfg.yaml", "-q"]):
        code, _, err = olmfast(*command)
        assert (code, tree(place)) == (2, before), err
        assert f"{index}: names the shard {where!r}, which is not in the folder" in err


@pytest.mark.parametrize("file", ["tokenizer.json", "extra.jinja", "generation_config.json"])
def test_a_file_of_the_tokenizer_that_links_out_of_the_model_is_not_copied(file, place, olmfast):
    secret = place / "secret.txt"
    path = place / "a" / file
    secret.write_text(path.read_text() if path.exists() else "the key")
    path.unlink(missing_ok=True)
    path.symlink_to(secret)
    before = tree(place)
    commands = (
        ["merge", place / "m.yml", place / "out"],
        ["run", place / "cfg.yaml", "-q"],
        ["linear", "--model_a", place / "a", "--model_b", place / "b", "--alpha", "1", "--output_dir", place / "out"],
    )
    for command in commands:
        code, _, err = olmfast(*command)
        assert (code, tree(place)) == (2, before), err
        assert f"{path}: is a link out of the model's folder, to {secret}" in err


def test_files_that_link_within_the_model_or_into_the_hub_cache_are_copied(place, olmfast):
    blobs = place / "models--org--a" / "blobs"
    blobs.mkdir(parents=True)
    (place / "a" / "tokenizer.json").rename(blobs / "0123")
    (place / "a" / "tokenizer.json").symlink_to("../models--org--a/blobs/0123")
    (place / "a" / "tokenizer_config.json").rename(place / "a" / "mine")
    (place / "a" / "tokenizer_config.json").symlink_to("mine")
    assert olmfast("merge", place / "m.yml", place / "out")[0] == 0
    assert not (place / "out" / "tokenizer.json").is_symlink()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (place / "out" / name).read_bytes() == (place / "b" / name).read_bytes()


class Meanwhile(Observer):
    """Does something to a model as soon as the work has begun."""

    def __init__(self, path: Path, content: str | None) -> None:
        self.path, self.content = path, content

    def written(self, *_: object) -> None:
        if self.content is None:
            self.path.unlink(missing_ok=True)
        else:
            self.path.write_text(self.content)

    def step(self, *_: object) -> None:
        self.written()


@pytest.mark.parametrize("file", ["tokenizer.json", "generation_config.json", "config.json"])
@pytest.mark.parametrize("content", [None, '{"another": 1}', "{"])
def test_a_file_of_the_tokenizer_that_is_changed_during_a_merge_fails_it(file, content, place):
    with pytest.raises(OlmfastError, match=f"{place / 'a' / file}: .*; put the file back as it was and use the same"):
        merge(place / "m.yml", place / "out", observer=Meanwhile(place / "a" / file, content))
    assert not (place / "out").exists()


def test_a_tokenizer_that_is_removed_during_a_run_fails_it_until_it_is_back(place):
    path = place / "a" / "tokenizer.json"
    held = path.read_bytes()
    with pytest.raises(OlmfastError, match=f"{path}: .*; put the file back as it was and use --resume"):
        run(load_config(place / "cfg.yaml"), observer=Meanwhile(path, None))
    assert not (place / "out").exists()
    path.write_bytes(held)
    result = run(load_config(place / "cfg.yaml"), resume=True)
    assert (result.output_dir / "tokenizer.json").read_bytes() == held


@pytest.mark.parametrize(("stopped", "lost"), [(False, 1), (False, 10**6), (False, None), (True, 1)])
def test_a_ledger_that_has_lost_lines_is_refused_not_filled(lost, stopped, place, olmfast):
    if stopped:
        run(load_config(place / "cfg.yaml", {"budget": 3}))
    else:
        interrupted(place)
    ledger = place / ("out" if stopped else "out.partial") / "evaluations.jsonl"
    if lost is None:
        ledger.unlink()
    else:
        ledger.write_bytes(ledger.read_bytes()[:-lost])
    before = tree(place)
    code, _, err = olmfast("run", place / "cfg.yaml", "-q", "--resume")
    assert (code, tree(place)) == (2, before), err
    assert f"{ledger}: has " in err


def test_a_dataset_given_twice_to_evaluate_is_refused(place, olmfast):
    modes = [f"--dataset={place / 'sums.json'}:perplexity"] * 2
    code, _, err = olmfast("evaluate", place / "a", *modes, "--device", "cpu")
    assert code == 2
    assert f"{place / 'sums.json'}:perplexity: is given twice" in err


@pytest.mark.parametrize("mode", ["perplexity", "exact_match"])
def test_a_model_that_holds_nan_is_not_scored(mode, place, olmfast):
    path = place / "a" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"][3] = float("nan")
    save_file(tensors, path, metadata={"format": "pt"})
    code, _, err = olmfast("evaluate", place / "a", f"--dataset={place / 'sums.json'}:{mode}", "--device", "cpu")
    assert code == 2
    assert f"{path}: model.norm.weight: holds NaN or infinity" in err


def test_a_score_that_overflows_is_not_a_score(place, olmfast):
    path = place / "a" / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] *= 1e38
    save_file(tensors, path, metadata={"format": "pt"})
    arguments = [f"--dataset={place / 'sums.json'}:perplexity", "--device", "cpu"]
    code, out, err = olmfast("evaluate", place / "a", *arguments)
    assert code == 2, out
    assert "its score on" in err


@pytest.mark.parametrize("file", ["tokenizer.json", "README.md", "mergekit_config.yml", "config.json"])
def test_a_full_disk_names_the_file_that_was_being_written(file, place, olmfast):
    size = 200_000 + (place / "a" / "model.safetensors").stat().st_size
    if file == "tokenizer.json":
        path = place / "a" / file
        path.write_text(path.read_text() + " " * size)
    elif file == "config.json":
        edited(place / "a" / file, remark="x" * size)
    else:
        with (place / "m.yml").open("a") as recipe:
            recipe.write(f"# {'x' * size}\n")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    room = {"README.md": size + 200}.get(file, size - 100_000)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        code, _, err = olmfast("merge", place / "m.yml", place / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 1
    assert f"{place / 'out.partial' / file}: cannot be written: File too large; free some space" in err
    assert not (place / "out").exists()
    assert olmfast("merge", place / "m.yml", place / "out")[0] == 0
