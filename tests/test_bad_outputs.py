"""Outputs that cannot be written, and disks that fill up: the command says so and nothing is lost."""

from __future__ import annotations

import json
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from olmfast import load_config, run
from olmfast.output.folder import OutputFolder


def edit(cfg: Path, **keys: Any) -> Path:
    """Set keys of a config."""
    cfg.write_text(yaml.safe_dump({**yaml.safe_load(cfg.read_text()), **keys}, sort_keys=False))
    return cfg


@pytest.mark.parametrize("arguments", [[], ["--dry-run"]])
@pytest.mark.parametrize("output", [".", "models", "models/donor1"])
def test_an_output_folder_that_holds_what_is_read_is_refused_even_to_be_overwritten(refused, cfg, output, arguments):
    message = refused(edit(cfg, output_dir=output), "--overwrite", *arguments)
    assert message.startswith(f"output_dir: {cfg.parent / output} holds the ")


def test_an_output_folder_that_exists_is_left_alone(refused, cfg):
    (cfg.parent / "out").mkdir()
    (cfg.parent / "out" / "thesis.txt").write_text("precious")
    out = cfg.parent / "out"
    assert refused(cfg) == f"{out}: exists; use --overwrite to replace it or --resume to continue its run"
    assert refused(cfg, "--resume") == (
        f"{out}: exists and holds no merge_report.json, so there is nothing to resume; use --overwrite"
    )


@pytest.mark.parametrize("flag", [[], ["--resume"], ["--overwrite"]])
def test_an_output_that_is_a_file_is_left_alone(refused, cfg, flag):
    (cfg.parent / "out").write_text("precious")
    assert refused(cfg, *flag) == f"{cfg.parent / 'out'}: exists and is not a directory; name another output_dir"


def test_an_output_below_a_file_is_refused(refused, cfg):
    edit(cfg, output_dir="sums.json/out")
    file = cfg.parent / "sums.json"
    assert refused(cfg) == f"{file / 'out'}: {file} is not a directory; name another place for the result"


def test_an_output_without_a_name_is_refused(refused, cfg):
    assert refused(edit(cfg, output_dir="/")).startswith("output_dir: / has no name of its own")


def test_an_unfinished_run_is_left_alone(refused, cfg):
    with OutputFolder(cfg.parent / "out", overwrite=False).lock(empty=True):
        pass
    message = f"{cfg.parent / 'out.partial'}: an unfinished run; --resume continues it, --overwrite starts anew"
    assert refused(cfg) == message


def test_too_little_space_is_noticed_before_the_run(refused, cfg, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))
    message = refused(cfg)
    place = re.escape(str(cfg.parent))
    assert re.match(rf"{place}/out: the result needs \d[\d.]* [kM]B and {place} has 5 bytes free", message), message


@contextmanager
def no_file_larger_than(n_bytes: int) -> Iterator[None]:
    """Writing past this size fails in this process, as it does on a disk that is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def files(folder: Path) -> dict[str, bytes]:
    """The files of a result that must not depend on how often the run was interrupted."""
    timed = {"steps.jsonl", "merge_report.json", "run.log"}
    wanted = [path for path in folder.iterdir() if path.is_file() and path.name not in timed]
    return {path.name: path.read_bytes() for path in sorted(wanted)}


@pytest.mark.parametrize("file", ["evaluations.jsonl", "steps.jsonl", "merge_report.json", "model.safetensors"])
def test_a_disk_that_fills_up_during_the_run_costs_nothing_that_was_decided(olmfast, cfg, finished, file):
    with no_file_larger_than((finished / file).stat().st_size * 3 // 4):
        code, _, err = olmfast("run", cfg, "-q")
    assert code == 1
    assert "File too large; " in err
    assert "--resume" in err
    assert "Traceback" not in err
    report = json.loads((cfg.parent / "out.partial" / "merge_report.json").read_text())
    assert report["olmfast"]["status"] == "running"
    assert report["olmfast"]["steps"]
    assert not (cfg.parent / "out").exists()
    assert olmfast("run", cfg, "-q", "--resume")[0] == 0
    assert files(cfg.parent / "out") == files(finished)
    assert not (cfg.parent / "out.partial").exists()


@pytest.fixture(scope="module")
def finished(good, tmp_path_factory) -> Path:
    """The result of the good config, uninterrupted."""
    cfg = shutil.copytree(good, tmp_path_factory.mktemp("whole") / "run") / "cfg.yaml"
    return run(load_config(cfg)).output_dir

