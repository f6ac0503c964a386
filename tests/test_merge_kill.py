"""A merge that is killed, really killed, at any moment: nothing looks finished, and the same command completes."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from olmfast.config.mergekit import load_merge_config
from olmfast.errors import InputError
from olmfast.static.write import merge
from olmfast.testing import tiny_model

KILLED = """
import os, signal, sys
from pathlib import Path
from olmfast.output import folder as output_folder
from olmfast.output import writer
from olmfast.static import write as static
from olmfast.config.mergekit import load_merge_config
from olmfast.observer import Observer

moment, place = sys.argv[1], Path(sys.argv[2])
die = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
seen = []
def written(tensor):
    seen.append(tensor)
    if moment.isdigit() and len(seen) == int(moment):
        die()
if moment == "other files":
    writer.copy_file = die
if moment == "card":
    static.merge_card = die
if moment == "before renaming":
    output_folder.OutputFolder.rename = die
if moment == "between two names":
    rename = Path.rename
    Path.rename = lambda path, target: die() if path.name.endswith("partial") else rename(path, target)
if moment == "removing the old":
    output_folder.shutil.rmtree = die
overwrite = (place / "out").exists()
config = load_merge_config(place / "m.yml")
observer = Observer()
observer.written = written
static.merge(config, place / "out", shard_size=60_000, overwrite=overwrite, observer=observer)
"""


@pytest.fixture
def place(tmp_path) -> Path:
    for seed, name in enumerate("ab"):
        tiny_model(tmp_path / name, "llama", seed, dtype=torch.bfloat16)
    config = {"merge_method": "slerp", "base_model": "a", "models": [{"model": "a"}, {"model": "b"}]}
    (tmp_path / "m.yml").write_text(yaml.safe_dump({**config, "parameters": {"t": 0.5}}))
    return tmp_path


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def killed_at(moment: str, place: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED, moment, str(place)], check=False, capture_output=True)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()


@pytest.mark.parametrize("moment", ["1", "7", "20", "other files", "card", "before renaming"])
def test_a_killed_merge_leaves_no_result_and_the_same_command_completes_it(moment, place):
    killed_at(moment, place)
    assert not (place / "out").exists()
    merge(load_merge_config(place / "m.yml"), place / "out", shard_size=60_000)
    merge(load_merge_config(place / "m.yml"), place / "undisturbed", shard_size=60_000)
    assert files(place / "out") == files(place / "undisturbed")
    assert not (place / "out.partial").exists()


def test_what_was_there_stays_whole_until_the_new_result_is(place):
    merge(load_merge_config(place / "m.yml"), place / "out")
    before = files(place / "out")
    killed_at("before renaming", place)
    assert files(place / "out") == before


@pytest.mark.parametrize("overwrite", [False, True])
def test_an_old_result_that_was_out_of_its_place_at_a_kill_is_put_back_by_the_next_merge(place, overwrite):
    config = load_merge_config(place / "m.yml")
    merge(config, place / "out")
    before = files(place / "out")
    killed_at("between two names", place)
    assert not (place / "out").exists()
    assert files(place / "out.replaced") == before
    if overwrite:
        merge(config, place / "out", shard_size=60_000, overwrite=True)
        merge(config, place / "undisturbed", shard_size=60_000)
        before = files(place / "undisturbed")
    else:
        with pytest.raises(InputError, match="out: exists; use --overwrite to replace it"):
            merge(config, place / "out")
    assert files(place / "out") == before
    assert not (place / "out.replaced").exists()


def test_an_old_result_that_was_being_removed_at_a_kill_is_removed_by_the_next_merge(place):
    config = load_merge_config(place / "m.yml")
    merge(config, place / "out")
    before = files(place / "out")
    killed_at("removing the old", place)
    merge(config, place / "undisturbed", shard_size=60_000)
    (old,) = place.glob(".olmfast-*")
    assert files(old) == before
    assert files(place / "undisturbed").items() <= files(place / "out").items()  # the new one is whole
    with pytest.raises(InputError, match="out: exists; use --overwrite to replace it"):
        merge(config, place / "out")
    assert files(place / "out") == files(place / "undisturbed")
    assert not (place / "out.replaced").exists()
    assert not old.exists()


def test_a_folder_of_the_users_that_is_called_like_an_old_result_is_left_alone(place):
    (place / "out.replaced").mkdir()
    (place / "out.replaced" / "notes.txt").write_text("mine")
    config = load_merge_config(place / "m.yml")
    for overwrite in (False, True):
        merge(config, place / "out", overwrite=overwrite)
    killed_at("between two names", place)
    merge(config, place / "out", overwrite=True)
    assert files(place / "out.replaced") == {"notes.txt": b"mine"}
    assert {path.name for path in place.iterdir()} == {"a", "b", "m.yml", "out", "out.replaced"}


def test_a_process_killed_from_outside_at_any_time_leaves_a_whole_result_or_none(place):
    arguments = ["merge", str(place / "m.yml"), str(place / "out"), "--shard-size", "60KB"]
    command = [sys.executable, "-m", "olmfast.cli", *arguments]
    merge(load_merge_config(place / "m.yml"), place / "whole", shard_size=60_000)
    for delay in (0.0, 0.002, 0.01, 0.03, 0.1):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not (place / "out.partial").exists() and not (place / "out").exists():
            time.sleep(0.0005)
        time.sleep(delay)
        process.kill()
        process.wait()
        if (place / "out").exists():
            assert files(place / "out") == files(place / "whole")
            return
    subprocess.run(command, check=True, capture_output=True)
    assert files(place / "out") == files(place / "whole")
