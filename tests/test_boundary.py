"""How a command ends whatever happens to it: streams that fail, Ctrl-C at any moment, a folder that is gone."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator

import pytest

from olmfast.errors import InputError

OLMFAST = [sys.executable, "-m", "olmfast"]


def ends(command: str, **options: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a line of shell; `olmfast` in it is this one."""
    line = command.replace("olmfast", f"{sys.executable} -m olmfast")
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False, **options)
    return done.returncode, done.stdout, done.stderr


def test_standard_output_that_cannot_be_written_is_told_once():
    message = "olmfast: standard output: cannot be written: No space left on device\n"
    assert ends("olmfast schema > /dev/full") == (1, "", message)
    code, _, err = ends("set -o pipefail; olmfast schema | true")
    assert (code, err) in [(1, "olmfast: standard output: its reader went away\n"), (0, "")]  # 0: it was quicker


def test_closed_standard_output_is_refused_and_closed_error_output_is_not_missed(tmp_path):
    message = "olmfast: standard output is closed; direct it to a file, or to /dev/null\n"
    assert ends("olmfast schema >&-") == (2, "", message)
    code, out, err = ends("olmfast run absent.yaml 2>&-", cwd=tmp_path)
    assert (code, out, err) == (2, "", "")
    assert list(tmp_path.iterdir()) == []


def test_progress_that_nobody_can_read_ends_nothing():
    assert ends("olmfast doctor --json 2> /dev/full")[0] == 0


def test_a_current_directory_that_is_gone_is_told():
    code, out, err = ends('cd "$(mktemp -d)" && rmdir "$PWD" && olmfast schema')
    told = "olmfast: the current directory no longer exists; change to another one\n"
    assert (code, out, err.splitlines(True)[-1]) == (2, "", told)


def test_ctrl_c_while_python_is_still_importing_ends_with_a_word():
    code = """if True:
        import os, signal, sys
        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's job in the background ignores it
        class Pressed:
            def find_spec(self, name, *_):
                if name == "typer":
                    os.kill(os.getpid(), signal.SIGINT)
        sys.meta_path.insert(0, Pressed())
        sys.argv = ["olmfast", "doctor"]
        from olmfast.__main__ import main
        main()
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "olmfast: stopped\n")


def press(*_: object, **__: object) -> None:
    """Ctrl-C, and some time in which it is noticed."""
    os.kill(os.getpid(), signal.SIGINT)
    threading.Event().wait(1)


def as_an_error_of_its_own(*_: object) -> None:
    try:
        press()
    except KeyboardInterrupt as error:
        raise ImportError("something was interrupted") from error


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Ctrl-C as a terminal's; a shell's job in the background ignores it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("pressed", [press, as_an_error_of_its_own])
def test_ctrl_c_while_a_command_starts_is_told_as_that(olmfast, monkeypatch, pressed):
    monkeypatch.setattr("olmfast.terminal.doctor.examine", pressed)
    assert olmfast("doctor") == (130, "", "olmfast: stopped\n")


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_before_the_first_step_of_a_run_does_not_wait_for_one(olmfast, monkeypatch, tmp_path):
    keys = {"models_dir": "m", "output_dir": "out", "models": ["a"], "dataset": {"d.json": {"mode": "exact"}}}
    (tmp_path / "cfg.yaml").write_text(json.dumps(keys))
    monkeypatch.setattr("olmfast.runs.inputs.Inputs.open", press)
    code, out, err = olmfast("run", tmp_path / "cfg.yaml", "-q")
    assert (code, out, err) == (130, "", "olmfast: stopped before the first step; --resume begins it\n")
    assert [path.name for path in tmp_path.iterdir()] == ["cfg.yaml"]


class Panic(BaseException):
    """What a compiled library may raise."""


@pytest.mark.parametrize(
    ("raised", "message"),
    [
        (Panic("at the\ndisco"), "this is a bug in olmfast: Panic: at the disco; OLMFAST_DEBUG=1 shows where"),
        (KeyError("k" * 5000), f"this is a bug in olmfast: KeyError: '{'k' * 299}...; OLMFAST_DEBUG=1 shows where"),
        (OSError(5, "\x1b[2J"), r"this is a bug in olmfast: OSError: [Errno 5] \x1b[2J; OLMFAST_DEBUG=1 shows where"),
        (MemoryError("8 TB"), "out of memory: 8 TB"),
        (
            RuntimeError("can't start new thread"),
            "no thread can be started: raise the limit of processes (ulimit -u) or of memory",
        ),
    ],
)
def test_whatever_is_raised_is_one_line_and_exit_code_1(olmfast, monkeypatch, raised, message):
    def fails() -> None:
        raise raised

    monkeypatch.delenv("OLMFAST_DEBUG", raising=False)
    monkeypatch.setattr("olmfast.terminal.doctor.examine", fails)
    assert olmfast("doctor") == (1, "", f"olmfast: {message}\n")


def test_a_line_of_a_message_is_cut_where_it_is_long(olmfast, monkeypatch):
    def fails() -> None:
        raise InputError(f"one: {'x' * 3000}\ntwo: short")

    monkeypatch.setattr("olmfast.terminal.doctor.examine", fails)
    code, _, err = olmfast("doctor")
    assert (code, err) == (2, f"olmfast: one: {'x' * 1395}...\ntwo: short\n")


def test_names_that_would_move_a_terminals_cursor_are_spelt_out(olmfast):
    code, out, err = olmfast("run", "\x1b[2J\udc80.yaml")
    assert (code, out) == (2, "")
    assert err == "olmfast: \\x1b[2J\\udc80.yaml: cannot be read: No such file or directory\n"
    code, out, err = olmfast("run", "cfg.yaml", "one\u2028too many")
    assert (code, out) == (2, "")
    assert r"(one\u2028too many)" in err


@pytest.mark.parametrize(
    ("number", "reason"), [(errno.ENAMETOOLONG, "File name too long"), (errno.EACCES, "Permission denied")]
)
def test_a_path_that_the_system_refuses_is_the_inputs_fault(olmfast, monkeypatch, number, reason):
    def fails() -> None:
        raise OSError(number, os.strerror(number), "sums.json")

    monkeypatch.setattr("olmfast.terminal.doctor.examine", fails)
    assert olmfast("doctor") == (2, "", f"olmfast: sums.json: {reason}\n")


def test_copies_are_made_where_no_thread_can_be_started(tmp_path):
    code = """if True:
        import resource, sys
        from pathlib import Path
        import torch
        from safetensors.torch import save_file
        from olmfast import _shards
        from olmfast.weights.checkpoint import copy_tensors, read_header
        _shards.set_threads(4)
        path, tensors = Path(sys.argv[1]), {str(i): torch.randn(700, 700) for i in range(8)}
        save_file(tensors, path)
        infos = read_header(path)
        targets = [torch.zeros(700, 700) for _ in infos]
        transfers = [info.into(target) for info, target in zip(infos, targets)]
        for info in infos:
            info.shard.advise(info.offset, info.n_bytes, "load")
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limit = pages * resource.getpagesize() + (1 << 20)  # less than the stack of a thread
        resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
        copy_tensors(transfers)
        assert all(torch.equal(target, tensors[info.name]) for info, target in zip(infos, targets))
    """
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x.safetensors"], capture_output=True, check=False)
    assert (done.returncode, done.stderr.decode()) == (0, "")
