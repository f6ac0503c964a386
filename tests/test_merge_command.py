"""Static merges by the command: what is checked, refused, cut off or interrupted, and that nothing is left of it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from llamas import merged, tensors

from olmfast.config.mergekit import load_merge_config
from olmfast.errors import InputError, Interrupted, OlmfastError
from olmfast.observer import Observer
from olmfast.static.mergekit import plan_merge
from olmfast.static.write import merge, write_merge
from olmfast.testing import tiny_run


@pytest.fixture
def place(llamas, tmp_path) -> Path:
    """A folder of one test's own, with copies of the models."""
    for name in "ab":
        shutil.copytree(llamas / name, tmp_path / name)
    return tmp_path


def told(written) -> Observer:
    """An observer that tells a function of each tensor."""
    observer = Observer()
    observer.written = written
    return observer


def test_an_output_that_is_there_is_not_touched_unless_asked(place, olmfast):
    merged(place)
    before = (place / "out" / "README.md").stat().st_mtime_ns
    code, _, error = olmfast("merge", place / "m.yml", place / "out")
    assert code == 2
    assert "exists; use --overwrite to replace it" in error
    assert (place / "out" / "README.md").stat().st_mtime_ns == before
    assert olmfast("merge", place / "m.yml", place / "out", "--overwrite")[0] == 0


def test_a_result_never_replaces_a_model_it_is_made_of(place):
    plan_file = place / "m.yml"
    plan_file.write_text(yaml.safe_dump({"merge_method": "passthrough", "models": [{"model": "a"}]}))
    with pytest.raises(InputError, match="holds the model a"):
        merge(load_merge_config(plan_file), place / "a", overwrite=True)


def test_too_little_memory_is_refused_before_anything_is_written(place):
    with pytest.raises(InputError, match=r"--max-ram 1000000: the merge needs about \d+ bytes"):
        merged(place, max_ram=1_000_000)
    assert not (place / "out.partial").exists()


def test_check_says_what_moves_and_reads_no_weight(place, olmfast):
    merged(place)
    for name in "ab":
        for file in (place / name).glob("*.safetensors"):  # headers stay, values are gone
            size, n = file.stat().st_size, 8 + int.from_bytes(file.read_bytes()[:8], "little")
            head = file.read_bytes()[:n]
            file.write_bytes(head + b"\xff" * (size - n))
    code, out, _ = olmfast("check", place / "m.yml", "--json", "--out", place / "new")
    plan = json.loads(out)
    assert code == 0
    assert plan["tensors"] == {"merged by linear": len(tensors(place / "out"))}
    assert plan["result_bytes"] == plan_merge(load_merge_config(place / "m.yml")).n_bytes
    assert {"memory_bytes", "estimated_s", "read_bytes", "vocabulary"} <= set(plan)
    code, out, _ = olmfast("merge", place / "m.yml", place / "new", "--dry-run")
    assert code == 0
    assert "(an estimate)" in out
    assert not (place / "new").exists()


def test_a_merge_loads_neither_transformers_nor_a_tokenizer_library(place):
    merged(place)
    code = (
        "import sys; from olmfast.cli import app\n"
        "try: app(['merge', sys.argv[1], sys.argv[2], '--overwrite'])\n"
        "except SystemExit: print(sorted({'transformers', 'tokenizers', 'scipy', 'triton'} & set(sys.modules)))"
    )
    command = [sys.executable, "-c", code, str(place / "m.yml"), str(place / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip().splitlines()[-1] == "[]"


def test_a_hub_id_is_taken_from_the_local_cache_and_never_from_the_network(place, monkeypatch):
    cache = place / "cache"
    snapshot = cache / "models--org--far" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    shutil.copytree(place / "b", snapshot)
    (cache / "models--org--far" / "refs").mkdir()
    (cache / "models--org--far" / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("used the network"))
    config = {"merge_method": "linear", "parameters": {"weight": 1}}
    (place / "m.yml").write_text(yaml.safe_dump({**config, "models": [{"model": "a"}, {"model": "org/far"}]}))
    merge(load_merge_config(place / "m.yml"), place / "out")
    (place / "m.yml").write_text(yaml.safe_dump({**config, "models": [{"model": "org/nowhere"}]}))
    with pytest.raises(InputError, match="merging uses no network; get it with: hf download org/nowhere"):
        merge(load_merge_config(place / "m.yml"), place / "out2")


def test_a_model_that_is_cut_off_during_a_merge_is_named_and_the_same_command_completes_it(place, olmfast):
    merged(place)
    file = place / "a" / "model.safetensors"
    whole, expected = file.read_bytes(), tensors(place / "out")
    status = file.stat()
    cut = []

    def written(_: object) -> None:
        if not cut:
            cut.append(os.truncate(file, len(whole) // 2))

    plan = plan_merge(load_merge_config(place / "m.yml"))
    message = r"model.safetensors: .*while in use; put the file back as it was and use the same command$"
    with pytest.raises(OlmfastError, match=message) as caught:
        write_merge(plan, place / "new", observer=told(written))
    assert caught.value.exit_code == 1
    assert not (place / "new").exists()
    file.write_bytes(whole)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert olmfast("merge", place / "m.yml", place / "new")[0] == 0
    assert all(torch.equal(tensor, expected[name]) for name, tensor in tensors(place / "new").items())


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            {"merge_method": "linear", "models": [("a", {"weight": 1}), ("b", {"weight": -1})]},
            "sum to 0 and cannot be normalised; use normalize: false",
        ),
        (
            {"merge_method": "della", "base_model": "a", "models": [("b", {"weight": 1, "density": 0.1})]},
            "density 0.1 -/+ epsilon 0.15: expected both to lie between 0 and 1",
        ),
        (
            {"merge_method": "linear", "models": [("a", {"weight": [{"filter": "norm", "value": 1}]})]},
            "no value for the required parameter weight; no filter matches this tensor",
        ),
    ],
)
def test_settings_that_a_method_refuses_are_told_by_check_once_for_all_tensors(place, olmfast, config, message):
    models = [{"model": model, "parameters": parameters} for model, parameters in config["models"]]
    (place / "m.yml").write_text(yaml.safe_dump({**config, "models": models}))
    code, _, error = olmfast("check", place / "m.yml")
    assert code == 2
    assert re.fullmatch(rf"olmfast: lm_head.weight and \d+ more: .*{re.escape(message)}.*\n", error)


@pytest.mark.parametrize("command", ["merge", "check"])
def test_a_place_that_cannot_hold_a_result_is_refused(place, olmfast, command):
    merged(place)
    (place / "file").touch()
    target = place / "file" / "out"
    arguments = [place / "m.yml", target] if command == "merge" else [place / "m.yml", "--out", target]
    code, _, error = olmfast(command, *arguments)
    assert code == 2
    assert error == f"olmfast: {target}: {place / 'file'} is not a directory; name another place for the result\n"


def test_a_trial_copy_that_fails_is_an_error_that_says_where(place, olmfast, monkeypatch):
    merged(place)
    monkeypatch.setattr("olmfast.static.write.parent_of", lambda _: place / "gone")
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 0, 1))
    code, _, error = olmfast("check", place / "m.yml", "--out", place / "new")
    assert code == 2
    assert error.startswith(f"olmfast: {place / 'new'}: a trial copy failed: {place / 'gone'}")


def test_a_merge_that_is_interrupted_says_so_and_leaves_nothing(place):
    merged(place)

    def written(_: object) -> None:
        raise KeyboardInterrupt

    plan = plan_merge(load_merge_config(place / "m.yml"))
    with pytest.raises(Interrupted, match="new: stopped; nothing of it is left") as caught:
        write_merge(plan, place / "new", observer=told(written))
    assert caught.value.exit_code == 130
    assert {path.name for path in place.iterdir()} == {"a", "b", "m.yml", "out"}


def test_check_of_a_run_prints_its_plan(tmp_path, olmfast):
    code, out, _ = olmfast("check", tiny_run(tmp_path, 2, layer_swap=True), "--json")
    assert code == 0
    assert json.loads(out)["stages"]["layers"]["units"] == 2


def test_a_file_that_is_meant_for_the_other_command_says_so(place, tmp_path, olmfast):
    merged(place)
    file = place / "m.yml"
    message = f"olmfast: {file}: is a merge file, not a run's configuration; use: olmfast merge {file} OUT\n"
    assert olmfast("run", file)[::2] == (2, message)
    run_file = tiny_run(tmp_path / "run", 2)
    message = f"olmfast: {run_file}: is a run's configuration, not a merge file; use: olmfast run {run_file}\n"
    assert olmfast("merge", run_file, place / "new")[::2] == (2, message)
    file.write_text("merge_methd: linear\nmodels: [{model: a, parameters: {weight: 1}}]")
    code, _, error = olmfast("check", file)
    assert code == 2
    assert "merge_methd: unknown key; did you mean 'merge_method'?" in error
