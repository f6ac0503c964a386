"""A file that goes away while it is mapped: an exception that names it, whatever thread reads it."""

import os
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import save_file

from olmfast import _shards

N = 4 << 20  # elements of 2 bytes: eight pieces for the threads


@pytest.fixture
def path(tmp_path):
    save_file({"first": torch.zeros(N, dtype=torch.int16), "second": torch.ones(N, dtype=torch.int16)}, tmp_path / "m")
    return tmp_path / "m"


def into(shard: _shards.Shard, target: torch.Tensor, which: int = 1) -> _shards.Transfer:
    _, dtype, shape, offset, n_bytes = shard.tensors[which]
    return _shards.Transfer(shard, offset, dtype, shape, target.data_ptr(), n_bytes, dtype, target.stride())


@pytest.mark.parametrize("threads", [1, 4])
def test_truncated_file_raises_and_names_file_and_tensor(path, threads):
    shard, target = _shards.Shard(path), torch.zeros(N, dtype=torch.int16)
    before = _shards.threads()
    _shards.set_threads(threads)
    try:
        _shards.copy([into(shard, target)])
        size = path.stat().st_size
        os.truncate(path, 1 << 20)
        for _ in range(3):  # and again: a fault leaves the engine usable
            with pytest.raises(OSError, match="second: shrank") as error:
                _shards.copy([into(shard, target)])
            assert error.value.filename == str(path)
            assert error.value.strerror == f"second: shrank from {size} to 1048576 bytes while in use"
    finally:
        _shards.set_threads(before)


def test_other_files_are_read_on_after_a_fault(path, tmp_path):
    shutil.copy(path, tmp_path / "other")
    shard, other, target = _shards.Shard(path), _shards.Shard(tmp_path / "other"), torch.zeros(N, dtype=torch.int16)
    _shards.copy([into(shard, target)])
    os.truncate(path, 0)
    with pytest.raises(OSError, match="shrank"):
        _shards.copy([into(other, target), into(shard, target), into(other, target, 0)])
    _shards.copy([into(other, target.zero_())])
    assert bool((target == 1).all())


def test_end_inside_the_last_page_is_no_row_of_zeros(path):
    """The kernel fills the rest of a page with zeros and sends no signal."""
    shard, target = _shards.Shard(path), torch.zeros(N, dtype=torch.int16)
    _shards.copy([into(shard, target)])
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(OSError, match="shrank"):
        _shards.copy([into(shard, target)])


def test_a_relative_path_outlives_a_change_of_folder(path, monkeypatch):
    monkeypatch.chdir(path.parent)
    shard, buffer = _shards.Shard(path.name), bytearray(100)
    monkeypatch.chdir("/")
    shard.read_into(0, buffer)
    assert shard.path == path.name
    path.unlink()
    with pytest.raises(OSError, match="is no longer there") as error:
        shard.read_into(0, buffer)
    assert error.value.filename == path.name


def remove(path):
    path.unlink()


def replace(path):
    shutil.copy(path, f"{path}.new")
    os.replace(f"{path}.new", path)


def rewrite(path):
    with path.open("rb+") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"x")
    os.utime(path, ns=(1, 1))


@pytest.mark.parametrize(
    ("change", "message"), [(remove, "is no longer there"), (replace, "was replaced"), (rewrite, "was changed")]
)
@pytest.mark.parametrize("mapped", [True, False])
def test_changed_file_is_not_taken_for_the_one_that_was_opened(path, change, message, mapped):
    shard, target = _shards.Shard(path), torch.zeros(N, dtype=torch.int16)
    if mapped:
        _shards.copy([into(shard, target)])
    change(path)
    with pytest.raises(OSError, match=message if mapped or change is not remove else "No such file") as error:
        _shards.copy([into(shard, target)])
    assert error.value.filename == str(path)


def test_many_threads_at_once_survive_a_truncation(path):
    shard = _shards.Shard(path)
    targets = [torch.zeros(N, dtype=torch.int16) for _ in range(4)]
    started, failures = threading.Barrier(5), []

    def read(target: torch.Tensor) -> None:
        started.wait()
        try:
            while True:
                _shards.copy([into(shard, target)])
        except OSError as error:
            failures.append(str(error))

    readers = [threading.Thread(target=read, args=(target,)) for target in targets]
    for reader in readers:
        reader.start()
    started.wait()
    os.truncate(path, 4096)
    for reader in readers:
        reader.join(60)
    assert len(failures) == 4
    assert all("m" in failure and "shrank" in failure for failure in failures)


def test_hashing_buffer_and_load_are_guarded_too(path):
    _shards.release_copied(False)  # under a limit of memory, which a test before may have set, nothing is loaded ahead
    shard = _shards.Shard(path)
    shard.view(0, 8)
    os.truncate(path, 4096)
    with pytest.raises(OSError, match="shrank"):
        shard.read_into(shard.size - 100, bytearray(100))
    with pytest.raises(OSError, match="shrank"):
        shard.advise(1 << 20, 1 << 20, "load")


PREPARE = """
import faulthandler, mmap, os, signal, sys
from olmfast import _shards
shard = _shards.Shard(sys.argv[1])
target = bytearray(shard.tensors[0][4])
"""
FAULT = """
os.truncate(sys.argv[1], 4096)
try:
    shard.read_into(shard.data_start, target)
except OSError as error:
    print("caught", flush=True)
"""
NOT_OURS = """
with open(sys.argv[1] + ".other", "wb+") as file:
    file.truncate(8192)
    other = mmap.mmap(file.fileno(), 8192)
    file.truncate(0)
    other[5000]
print("alive", flush=True)
"""


def run(path, *parts: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", "".join((PREPARE, *parts)), str(path)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)


# With sanitizers, the interpreter's own handlers stand where these tests put theirs.
plain_build_only = pytest.mark.skipif("OLMFAST_SHARDS_BUILD" in os.environ, reason="sanitizers take SIGBUS themselves")


@plain_build_only
@pytest.mark.parametrize("enable", ["", "faulthandler.enable()\n"], ids=["default", "faulthandler"])
def test_a_fault_that_is_not_ours_still_kills(path, enable):
    done = run(path, enable, FAULT, NOT_OURS)
    assert done.stdout == "caught\n"
    assert done.returncode == -signal.SIGBUS
    assert ("Bus error" in done.stderr) == bool(enable)


@plain_build_only
def test_a_handler_installed_later_is_passed_on_to(path):
    done = run(path, FAULT, "faulthandler.enable()\n", FAULT, NOT_OURS)
    assert done.stdout == "caught\ncaught\n"
    assert done.returncode == -signal.SIGBUS
    assert done.stderr.count("Bus error") == 1


@plain_build_only
def test_a_sigbus_from_another_process_is_not_swallowed(path):
    done = run(path, FAULT, "os.kill(os.getpid(), signal.SIGBUS)\nprint('alive')\n")
    assert done.stdout == "caught\n"
    assert done.returncode == -signal.SIGBUS


@plain_build_only
def test_python_handler_keeps_getting_its_signal(path):
    handler = "signal.signal(signal.SIGBUS, lambda *_: print('handled', flush=True))\n"
    done = run(path, handler, FAULT, "os.kill(os.getpid(), signal.SIGBUS)\nprint('alive')\n")
    assert done.stdout == "caught\nhandled\nalive\n"
    assert done.returncode == 0


def test_a_forked_child_copies_too(path):
    shard, buffer = _shards.Shard(path), bytearray(2 * N)
    before = _shards.threads()
    _shards.set_threads(2)
    try:
        shard.read_into(shard.data_start, buffer)
        child = os.fork()
        if child == 0:  # no torch in here: its own threads do not survive a fork
            signal.alarm(60)
            shard.read_into(shard.data_start + 2 * N, buffer)
            os._exit(0 if buffer[:2] == buffer[-2:] == b"\1\0" else 1)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        _shards.set_threads(before)
