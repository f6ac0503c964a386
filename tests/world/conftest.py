"""Fixtures of the tests of files as people publish them."""

from __future__ import annotations

from pathlib import Path

import pytest

from olmfast.testing import tiny_model


@pytest.fixture(scope="session")
def three_models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    for seed, name in enumerate("abc"):
        tiny_model(folder / name, "llama", seed, num_hidden_layers=3)
    return folder


@pytest.fixture
def place(three_models, tmp_path) -> Path:
    """A folder with three Llamas, a, b and c, none of which is written to."""
    for name in "abc":
        (tmp_path / name).symlink_to(three_models / name)
    return tmp_path
