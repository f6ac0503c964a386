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
from olmfast.testing import FAMILIES, tiny_pair

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


@pytest.fixture
def olmfast(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process; returns exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["olmfast", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return (caught.value.code or 0, *capsys.readouterr())

    return call


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
