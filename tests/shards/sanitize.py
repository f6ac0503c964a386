"""`make sanitize`: the shard engine's tests under AddressSanitizer and UndefinedBehaviorSanitizer.

Builds csrc/ with both into a temporary folder and runs tests/shards against that build; further arguments go
to pytest. Needs g++ with libasan and libubsan (they come with it) and the packages of the `dev` extra.
"""

import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import pybind11

ROOT = Path(__file__).resolve().parents[2]
FLAGS = [
    "-std=c++17", "-O1", "-g", "-ffp-contract=off", "-fno-trapping-math", "-fno-omit-frame-pointer", "-Wall", "-Wextra",
    "-fvisibility=hidden", "-fPIC", "-shared", "-pthread", "-fsanitize=address,undefined", "-fno-sanitize-recover=all",
]  # fmt: skip


def library(compiler: str, name: str) -> str:
    """Full path of one of the compiler's shared libraries."""
    asked = subprocess.run([compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True)
    path = asked.stdout.strip()
    if not os.path.isabs(path):
        sys.exit(f"sanitize: {compiler} has no {name}; install it, or name another compiler in CXX")
    return path


def main() -> int:
    """Build, run, and return pytest's exit code."""
    compiler = os.environ.get("CXX", "g++")
    with tempfile.TemporaryDirectory() as folder:
        module = Path(folder) / "_shards.so"
        includes = [f"-I{pybind11.get_include()}", f"-I{sysconfig.get_paths()['include']}"]
        sources = sorted(map(str, (ROOT / "csrc").glob("*.cpp")))
        subprocess.run([compiler, *FLAGS, *includes, *sources, "-o", str(module)], check=True)
        environment = {
            **os.environ,
            "OLMFAST_SHARDS_BUILD": str(module),
            # Both: with libasan alone, the first C++ exception aborts.
            "LD_PRELOAD": " ".join(library(compiler, name) for name in ("libasan.so", "libstdc++.so")),
            # The interpreter never frees everything; SIGBUS is the engine's own.
            "ASAN_OPTIONS": "detect_leaks=0:handle_sigbus=0:allow_user_segv_handler=1",
            "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", str(ROOT / "tests" / "shards"), *sys.argv[1:]]
        return subprocess.run(command, cwd=ROOT, env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
