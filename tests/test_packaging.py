"""What a stranger installs: every module is in the wheel, and light imports stay light."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel built from a copy of the sources, without what lies in the working tree by chance."""
    source = tmp_path_factory.mktemp("source") / "olmfast"
    source.mkdir()
    for name in ("olmfast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "constraints.txt"):
        shutil.copy(ROOT / name, source / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "dist"), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    return zipfile.ZipFile(next((source / "dist").glob("*.whl")))


def test_the_wheel_that_the_source_distribution_builds_holds_every_module(wheel):
    held = set(wheel.namelist())
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "olmfast").rglob("*.py")}
    expected |= {f"olmfast/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")}
    assert expected <= held
    assert any(name.startswith("olmfast/_shards.") and name.endswith(".so") for name in held)
    assert not any(name.startswith("kernels/") for name in held)  # it would hide Hugging Face's package


def test_importing_the_kernels_loads_neither_transformers_nor_triton():
    code = "import sys, olmfast.kernels; print(sorted({'transformers', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_run_is_the_function_whatever_was_imported_before():
    import olmfast
    import olmfast.runs.session

    assert callable(olmfast.run)
    assert olmfast.run is olmfast.runs.session.run
