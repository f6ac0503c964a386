"""Fixtures of more than one test file."""

from __future__ import annotations

import gc
import importlib
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import hypothesis
import pytest
import torch

from olmfast import cli
from olmfast.testing import FAMILIES, tiny_model, tiny_pair, tiny_run

hypothesis.settings.register_profile("untimed", deadline=None)  # no test rests on how fast a machine is
hypothesis.settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """What the tests import stays: thousands of collections, in each Evaluation, need not walk through it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def pair(tmp_path_factory) -> Path:
    """See `tiny_pair`; tests copy it."""
    return tiny_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture
def place(pair, tmp_path) -> Path:
    """A copy of the pair, and beside it a folder that must never be touched."""
    shutil.copytree(pair, tmp_path, dirs_exist_ok=True)
    (tmp_path / "important").mkdir()
    (tmp_path / "important" / "thesis.txt").write_text("the only copy")
    return tmp_path


@pytest.fixture(scope="session")
def llamas(tmp_path_factory) -> Path:
    """Two bfloat16 Llamas of three blocks: a in one file, b in shards."""
    folder = tmp_path_factory.mktemp("llamas")
    for seed, name in enumerate("ab"):
        size = "20KB" if name == "b" else "5GB"
        tiny_model(folder / name, "llama", seed, dtype=torch.bfloat16, num_hidden_layers=3, shard_size=size)
    return folder


@pytest.fixture
def olmfast(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process; returns exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["olmfast", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return (caught.value.code or 0, *capsys.readouterr())

    return call


@pytest.fixture(scope="session")
def good(tmp_path_factory) -> Path:
    """A folder with donors and a config that runs; see `cfg`."""
    folder = tmp_path_factory.mktemp("good")
    tiny_run(folder, 2, layer_swap=True, tensor_swap=True, es_norm=True, units=["*.0.self_attn.q_proj"])
    return folder


@pytest.fixture
def cfg(good, tmp_path) -> Path:
    """The config of a copy of `good`, for tests to break."""
    return shutil.copytree(good, tmp_path / "run") / "cfg.yaml"


@pytest.fixture
def refused(olmfast, tmp_path) -> Callable[..., str]:
    """The message that `olmfast run` refuses its arguments with, once it is clear that nothing was written."""

    def call(*arguments: object) -> str:
        before = snapshot(tmp_path)
        code, out, err = olmfast("run", *arguments, "-q")
        assert code == 2, err
        assert out == ""
        assert err.startswith("olmfast: ")
        assert "Traceback" not in err
        assert snapshot(tmp_path) == before
        return err.removeprefix("olmfast: ").rstrip("\n")

    return call


def snapshot(folder: Path) -> dict[str, tuple[int, int]]:
    """Every path below a folder with its size and time of change."""
    return {str(p): (p.lstat().st_size, p.lstat().st_mtime_ns) for p in folder.rglob("*")}


class Wide:
    """The module torch, where float32 is float64."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture
def float64_throughout(monkeypatch) -> None:
    """Transformers computes norms, and some attention, in float32 whatever the model's dtype is; here in float64.

    Two float64 sums that differ in their last bit may be rounded to different float32: where, depends on the processor.
    """
    for family in FAMILIES:
        modeling = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
        monkeypatch.setattr(modeling, "torch", Wide())
        if family.startswith("gemma"):
            norm = getattr(modeling, f"{family.capitalize()}RMSNorm")
            monkeypatch.setattr(norm, "forward", lambda self, x: self._norm(x) * (1 + self.weight))
