"""What a stranger installs: every module is in the wheel, and light imports stay light."""

from __future__ import annotations

import importlib.metadata
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from olmfast import __version__

ROOT = Path(__file__).parent.parent
VERSION = "9.8.7"  # of the copy that is built: said in one place, it must arrive everywhere


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    """A copy of the sources, without what lies in the working tree by chance; compiled in less time."""
    source = tmp_path_factory.mktemp("source") / "olmfast"
    source.mkdir()
    for name in ("olmfast", "kernels", "csrc"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "MANIFEST.in", "constraints.txt"):
        shutil.copy(ROOT / name, source / name)
    script = source / "setup.py"
    script.write_text(script.read_text().replace('"-O3"', '"-O0"'))
    init = source / "olmfast/__init__.py"
    init.write_text(init.read_text().replace(f'__version__ = "{__version__}"', f'__version__ = "{VERSION}"'))
    return source


@pytest.fixture(scope="module")
def wheel(source) -> zipfile.ZipFile:
    """The wheel that the source distribution builds, which is left beside it."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(source / "dist"), str(source)]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    return zipfile.ZipFile(next((source / "dist").glob("*.whl")))


def test_the_wheel_that_the_source_distribution_builds_holds_every_module(wheel):
    held = set(wheel.namelist())
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "olmfast").rglob("*.py")}
    expected |= {str(path.relative_to(ROOT)) for path in (ROOT / "olmfast").rglob("*.jinja")}
    expected |= {f"olmfast/kernels/{path.relative_to(ROOT / 'kernels')}" for path in (ROOT / "kernels").rglob("*.py")}
    assert expected <= held
    assert any(name.startswith("olmfast/_shards.") and name.endswith(".so") for name in held)
    assert not any(name.startswith("kernels/") for name in held)  # it would hide Hugging Face's package


def test_the_version_is_said_in_one_place(wheel, source):
    (archive,) = (source / "dist").glob("*.tar.gz")
    assert archive.name == f"olmfast-{VERSION}.tar.gz"
    metadata = wheel.read(f"olmfast-{VERSION}.dist-info/METADATA").decode()
    assert f"\nVersion: {VERSION}\n" in metadata
    (source / "editable").mkdir()
    code = "from setuptools import build_meta; print(build_meta.prepare_metadata_for_build_editable('editable'))"
    subprocess.run([sys.executable, "-c", code], cwd=source, capture_output=True, check=True)
    (metadata,) = (path.read_text() for path in (source / "editable").rglob("METADATA"))
    assert f"\nVersion: {VERSION}\n" in metadata


def test_what_is_installed_here_has_the_version_of_the_sources():
    assert importlib.metadata.version("olmfast") == __version__


def test_type_checkers_are_told_that_the_package_is_typed(wheel, source):
    assert "olmfast/py.typed" in wheel.namelist()
    with tarfile.open(next((source / "dist").glob("*.tar.gz"))) as archive:
        assert f"olmfast-{VERSION}/olmfast/py.typed" in archive.getnames()


def test_importing_the_kernels_loads_neither_transformers_nor_triton():
    code = "import sys, olmfast.kernels; print(sorted({'transformers', 'triton'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_run_is_the_function_whatever_was_imported_before():
    import olmfast
    import olmfast.dataflow.session

    assert callable(olmfast.run)
    assert olmfast.run is olmfast.dataflow.session.run
