"""What is no place for a result is refused before anything is written: one that holds what is read, or no folder."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from olmfast.testing import tree


def hub_cache(place: Path) -> Path:
    """Donor a as Hugging Face's cache keeps it: files are links to blobs. Returns the blobs."""
    cache = place / "models--org--a"
    (cache / "blobs").mkdir(parents=True)
    for number, path in enumerate(sorted((place / "a").iterdir())):
        path.rename(cache / "blobs" / f"{number:040x}")
        path.symlink_to(cache / "blobs" / f"{number:040x}")
    return cache / "blobs"


def weights_elsewhere(place: Path) -> Path:
    (place / "elsewhere").mkdir()
    (place / "a" / "model.safetensors").rename(place / "elsewhere" / "weights")
    (place / "a" / "model.safetensors").symlink_to("../elsewhere/weights")
    return place / "elsewhere"


def a_link_on_the_way(place: Path) -> Path:
    """The folder holds no byte of the model, only a link that leads to it."""
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "link").symlink_to("../real")
    (place / "a").rename(place / "real")
    (place / "a").symlink_to("elsewhere/link")
    return place / "elsewhere"


def the_model(place: Path) -> Path:
    return place / "a"


def all_of_it(place: Path) -> Path:
    return place


def the_same_folder_by_a_link(place: Path) -> Path:
    (place / "again").symlink_to(place / "a")
    return place / "again"


HOLDING = (hub_cache, weights_elsewhere, a_link_on_the_way, the_model, all_of_it, the_same_folder_by_a_link)


@pytest.mark.parametrize("holding", HOLDING, ids=lambda make: make.__name__)
def test_an_output_that_holds_a_model_is_refused_and_both_are_named(holding, place, olmfast):
    out = holding(place)
    before = tree(place)
    commands = [
        ["merge", place / "m.yml", out],
        ["linear", "--model_a", place / "a", "--model_b", place / "b", "--alpha", "0.5", "--output_dir", out],
        ["run", place / "cfg.yaml", "-q", "--set", f"output_dir={out}"],
    ]
    for command in commands:
        code, _, err = olmfast(*command, "--overwrite")
        assert (code, tree(place)) == (2, before), err
        assert str(out) in err
    assert "the donor a" in err or "the config" in err


@pytest.mark.parametrize("file", ["m.yml", "alphas.yml", "sums.json", "cfg.yaml"])
@pytest.mark.parametrize("how", ["in it", "by a link"])
def test_an_output_that_holds_a_file_that_is_read_is_refused_and_both_are_named(file, how, place, olmfast):
    (place / "alphas.yml").write_text("[0.1, 0.9]")
    out = place / "holder"
    out.mkdir()
    (place / file).rename(out / file)
    given = out / file
    if how == "by a link":
        given = place / file
        given.symlink_to(out / file)
    (place / "again").mkdir()
    if file in ("m.yml", "cfg.yaml"):  # the paths in it are relative to where it is
        given.write_text(given.read_text().replace("a", "a") if how == "by a link" else _absolute(given, place))
    linear = ["linear", "--model_a", place / "a", "--model_b", place / "b", "--alpha", "0.5", "--output_dir", out]
    commands = {
        "m.yml": ["merge", given, out],
        "alphas.yml": [*linear, "--layer_alphas", given],
        "sums.json": [*linear, "--sensitivity", f"{given}:perplexity", "--top", "1"],
        "cfg.yaml": ["run", given, "-q", "--set", f"output_dir={out}"],
    }
    before = tree(place)
    code, _, err = olmfast(*commands[file], "--overwrite")
    assert (code, tree(place)) == (2, before), err
    assert f"{out} holds the " in err
    assert str(out / file) in err or file == "cfg.yaml"


def _absolute(path: Path, place: Path) -> str:
    data = yaml.safe_load(path.read_text())
    if "merge_method" in data:
        models = [{"model": str(place / name)} for name in "ab"]
        return yaml.safe_dump(data | {"base_model": str(place / "a"), "models": models})
    return yaml.safe_dump(data | {"models_dir": str(place), "dataset_dir": str(place)})


@pytest.mark.parametrize("name", ["x" * 256, "x" * 250, "é" * 130])
def test_a_name_that_is_too_long_is_refused_at_once(name, place, olmfast):
    before = tree(place)
    run = ["run", place / "cfg.yaml", "--set", f"output_dir={name}"]
    for arguments in (["merge", place / "m.yml", place / name], run):
        code, _, err = olmfast(*arguments)
        assert (code, tree(place)) == (2, before), err
        assert "bytes" in err


def a_link_to_nothing(place: Path) -> Path:
    (place / "out").symlink_to("nowhere")
    return place / "out"


def a_link_to_itself(place: Path) -> Path:
    (place / "out").symlink_to("out")
    return place / "out"


def a_folder_behind_a_loop(place: Path) -> Path:
    (place / "loop").symlink_to("loop")
    return place / "loop" / "out"


def a_pipe(place: Path) -> Path:
    os.mkfifo(place / "out")
    return place / "out"


def behind_a_pipe(place: Path) -> Path:
    os.mkfifo(place / "pipe")
    return place / "pipe" / "out"


def the_current_folder(place: Path) -> Path:
    (place / "here").mkdir()
    os.chdir(place / "here")
    return place / "here"


def the_current_folder_as_a_point(place: Path) -> Path:
    return Path(the_current_folder(place).name and ".")


def above_the_current_folder(place: Path) -> Path:
    (place / "here" / "deeper").mkdir(parents=True)
    os.chdir(place / "here" / "deeper")
    return place / "here"


ODD = (
    a_link_to_nothing,
    a_link_to_itself,
    a_folder_behind_a_loop,
    a_pipe,
    behind_a_pipe,
    the_current_folder,
    the_current_folder_as_a_point,
    above_the_current_folder,
)


@pytest.mark.parametrize("odd", ODD, ids=lambda make: make.__name__)
def test_an_output_that_cannot_be_replaced_is_refused_before_anything_is_written(odd, place, olmfast, monkeypatch):
    monkeypatch.chdir(place)
    out = odd(place)
    before = tree(place)
    for flags in ([], ["--overwrite"]):
        code, _, err = olmfast("merge", place / "m.yml", out, *flags)
        assert (code, tree(place)) == (2, before), err
        assert str(out) in err
        assert len(err.splitlines()) == 1
        code, _, err = olmfast("run", place / "cfg.yaml", "--set", f"output_dir={out.absolute()}", "-q", *flags)
        assert (code, tree(place)) == (2, before), err


@pytest.mark.parametrize("flags", [["run"], ["run", "--dry-run"], ["check"]])
def test_a_folder_without_a_name_is_refused(flags, place, olmfast):
    code, _, err = olmfast(*flags, place / "cfg.yaml", "--set", "output_dir=/")
    assert (code, err) == (2, "olmfast: output_dir: / has no name of its own; name a folder that can be replaced\n")


def test_a_file_at_the_output_is_refused_by_check_too(place, olmfast):
    (place / "out").write_text("mine")
    before = tree(place)
    for command in (["merge", place / "m.yml", place / "out"], ["check", place / "m.yml", "--out", place / "out"]):
        code, _, err = olmfast(*command)
        assert (code, tree(place)) == (2, before), err
        assert err.splitlines() == [f"olmfast: {place / 'out'}: exists and is not a directory; name another output_dir"]


def test_a_link_at_the_output_is_replaced_only_with_overwrite_and_never_followed(place, olmfast):
    (place / "out").symlink_to("important")
    before = tree(place)
    assert olmfast("merge", place / "m.yml", place / "out")[0] == 2
    assert tree(place) == before
    assert olmfast("merge", place / "m.yml", place / "out", "--overwrite")[0] == 0
    assert not (place / "out").is_symlink()
    for found in (before, after := tree(place)):
        for path in [path for path in found if Path(path).parts[0] == "out"]:
            del found[path]
    assert after == before


def test_folders_made_for_a_merge_that_is_refused_are_removed_again(place, olmfast):
    weights = bytearray((place / "a" / "model.safetensors").read_bytes())
    weights[-2:] = b"\xc0\x7f"  # NaN
    (place / "a" / "model.safetensors").write_bytes(weights)
    before = tree(place)
    code, _, err = olmfast("merge", place / "m.yml", place / "deep" / "deeper" / "out")
    assert (code, tree(place)) == (2, before), err


def test_folders_made_on_the_way_to_one_that_cannot_be_made_are_removed_again(place, olmfast):
    before = tree(place)
    code, _, err = olmfast("merge", place / "m.yml", place / "deep" / ("x" * 300) / "out")
    assert (code, tree(place)) == (2, before), err
    assert err.endswith("File name too long\n")


def test_a_trial_copy_touches_no_file_that_is_there(place, olmfast):
    (place / ".out.trial").write_text("mine")
    before = tree(place)
    code, out, err = olmfast("merge", place / "m.yml", place / "out", "--dry-run", "--json")
    assert (code, tree(place)) == (0, before), err
    assert json.loads(out)["copy_bytes_per_s"] > 0
