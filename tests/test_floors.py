"""The floors of the house: what `make lint` finds when a file imports from above."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def house(tmp_path) -> Path:
    """A copy of the sources as they are installed: the kernels inside the package."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(ROOT / "olmfast", tmp_path / "olmfast", ignore=ignored)
    shutil.copytree(ROOT / "kernels", tmp_path / "olmfast/kernels", ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(house: Path) -> tuple[int, str]:
    command = [Path(sys.executable).with_name("lint-imports"), "--no-logo", "--no-cache"]
    done = subprocess.run(command, cwd=house, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout


def test_the_sources_keep_the_floors(house):
    code, said = lint(house)
    assert code == 0, said
    assert "2 kept, 0 broken" in said


@pytest.mark.parametrize(
    ("file", "line", "told"),
    [
        ("weights/pool.py", "from olmfast.search import loop", "olmfast.weights.pool -> olmfast.search.loop"),
        ("weights/pool.py", "from olmfast.config import run", "olmfast.weights.pool -> olmfast.config.run"),
        ("static/plan.py", "import olmfast.runs.session", "olmfast.static.plan -> olmfast.runs.session"),
        ("kernels/ties.py", "from olmfast.errors import InputError", "olmfast.kernels.ties -> olmfast.errors"),
        ("kernels/dare.py", "from olmfast import __version__", "olmfast.kernels.dare -> olmfast "),
        ("cellar/__init__.py", "", "not listed as layers:\n\n- olmfast.cellar"),
    ],
)
def test_an_import_from_above_is_found_even_inside_a_function(house, file, line, told):
    path = house / "olmfast" / file
    path.parent.mkdir(exist_ok=True)
    with path.open("a") as text:
        text.write(f"\n\ndef planted():\n    {line}\n" if line else "")
    code, said = lint(house)
    assert code == 1
    assert told in said


def test_imports_for_type_checkers_may_look_up(house):
    with (house / "olmfast/weights/pool.py").open("a") as text:
        text.write("\n\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from olmfast.search import loop\n")
    assert lint(house)[0] == 0
