"""Build: `olmfast` from olmfast/, and `olmfast.kernels` from the top-level folder kernels/.

The kernels stand at the top level because other merge tools import them alone; they are installed inside
the package because a top-level package called `kernels` would hide Hugging Face's own package of that name.
The shard engine csrc/ becomes `olmfast._shards`; it needs a C++17 compiler and nothing else.
"""

import glob
import os
import shutil

from pybind11.setup_helpers import Pybind11Extension
from setuptools import find_packages, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

NO_COMPILER = """
olmfast: no C++ compiler found (looked for {names}); the shard engine is compiled when olmfast is installed.
Install one and run the same command again:
    Debian, Ubuntu: apt install g++      Fedora, RHEL: dnf install gcc-c++
    conda: conda install -c conda-forge cxx-compiler
A compiler under another name is taken from the environment variable CXX.
"""


COMPILERS = (("gcc", "g++"), ("clang", "clang++"), ("cc", "c++"))


class BuildExtension(build_ext):
    """The usual build, with a plain word where there is no compiler."""

    def run(self):
        """Choose the compilers and build. Raises CompileError saying what to install if there are none."""
        chosen = os.environ.get("CXX")
        names = [chosen.split()[0]] if chosen else [name for _, name in COMPILERS]
        found = [name for name in names if shutil.which(name)]
        if not found:
            raise CompileError(NO_COMPILER.format(names=", ".join(names)))
        if not chosen:
            c_compiler = next(c for c, name in COMPILERS if name == found[0])
            os.environ["CXX"] = found[0]
            os.environ.setdefault("CC", c_compiler)
        super().run()


kernel_packages = ["olmfast.kernels", *(f"olmfast.kernels.{name}" for name in find_packages("kernels"))]
shards = Pybind11Extension(
    "olmfast._shards",
    sources=sorted(glob.glob("csrc/*.cpp")),
    depends=sorted(glob.glob("csrc/*.hpp")),
    cxx_std=17,
    extra_compile_args=["-O3", "-ffp-contract=off", "-fno-trapping-math", "-Wall", "-Wextra", "-pthread"],
    extra_link_args=["-pthread"],
)

setup(
    packages=[*find_packages(include=["olmfast", "olmfast.*"]), *kernel_packages],
    package_dir={"olmfast": "olmfast", "olmfast.kernels": "kernels"},
    ext_modules=[shards],
    cmdclass={"build_ext": BuildExtension},
)
