"""What holds for every command however it ends: one message, the right exit code, and streams that may fail."""

from __future__ import annotations

import errno
import io
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from olmfast.errors import InputError, Interrupted, OlmfastError, cut, printable, told

if TYPE_CHECKING:
    from olmfast.runs.watchers import Watcher

BUG, STOPPED = 1, Interrupted.exit_code
LONGEST_LINE = 1400  # characters of a message: what it quotes is not always cut where it is quoted
UNUSABLE = (errno.ENAMETOOLONG, errno.ELOOP, errno.EACCES, errno.EPERM)  # what is wrong with a path, not with its use


class OutputFailed(OlmfastError):
    """Standard output cannot be written; what was asked for is done as far as the command came. Exit code 1."""


class _Interrupts:
    """Whether Ctrl-C was pressed: what it raises may reach us as an error of the library that was at work."""

    def __init__(self) -> None:
        self.pressed = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.pressed = True
        signal.default_int_handler(number, frame)


def run(command: Callable[[], object]) -> int:
    """Call a command and return the exit code of its process: 0, an error's own, or 1 for what nobody foresaw.

    An error becomes one message on standard error; with OLMFAST_DEBUG=1 its traceback is shown before.
    """
    interrupts, failed, code = _Interrupts(), None, 0
    ours = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)
    try:
        if ours and before is signal.default_int_handler:
            signal.signal(signal.SIGINT, interrupts)
        _check_surroundings()
        code = _code_of(command)
        sys.stdout.flush()
    except BaseException as error:  # a panic of a library's is no Exception
        failed = error
    finally:
        if ours and before is signal.default_int_handler:
            signal.signal(signal.SIGINT, before)
    if interrupts.pressed and not isinstance(failed, Interrupted) and (failed is not None or code):
        failed = Interrupted("stopped")
    return code if failed is None else _tell(failed)


def _code_of(command: Callable[[], object]) -> int:
    try:
        command()
    except SystemExit as end:  # how the parser of command lines ends
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _tell(failed: BaseException) -> int:
    """Print what failed, and return its exit code."""
    if isinstance(failed, OlmfastError):
        message, code = str(failed), failed.exit_code
    elif isinstance(failed, KeyboardInterrupt):
        message, code = "stopped", STOPPED
    elif isinstance(failed, OSError) and failed.errno in UNUSABLE and failed.filename:
        message, code = f"{cut(str(failed.filename))}: {failed.strerror}", InputError.exit_code
    elif isinstance(failed, MemoryError):
        message, code = f"out of memory: {told(failed)}", BUG
    elif isinstance(failed, RuntimeError) and "can't start new thread" in str(failed):
        message, code = "no thread can be started: raise the limit of processes (ulimit -u) or of memory", BUG
    else:
        message = f"this is a bug in olmfast: {type(failed).__name__}: {told(failed)}; OLMFAST_DEBUG=1 shows where"
        code = BUG
    if os.environ.get("OLMFAST_DEBUG", "0") not in ("", "0"):
        traceback.print_exception(failed)
    lines = (line if len(line) <= LONGEST_LINE else f"{line[:LONGEST_LINE]}..." for line in message.split("\n"))
    print(f"olmfast: {printable(chr(10).join(lines))}", file=sys.stderr, flush=True)
    return code


def _check_surroundings() -> None:
    """Give this process streams that can be written to, and a folder to be in.

    Raises InputError where standard output is closed: the next file to be opened would get its number, and what
    libraries print would go there.
    """
    closed = [number for number in (0, 1, 2) if not _is_open(number)]
    for _ in closed:
        os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
    if sys.stderr is None or sys.stderr is sys.__stderr__:
        # Without a buffer, so that a signal's handler can print while something else is being printed.
        raw = _Messages(2, "wb", closefd=False)
        sys.stderr = io.TextIOWrapper(raw, errors="backslashreplace", write_through=True)
    if sys.stdout is None or 1 in closed:
        sys.stdout = _buffered(_Output(1, "wb", closefd=False), False)
        raise InputError("standard output is closed; direct it to a file, or to /dev/null")
    if sys.stdout is sys.__stdout__:
        sys.stdout = _buffered(_Output(1, "wb", closefd=False), os.isatty(1))
    try:
        os.getcwd()
    except OSError as error:
        raise InputError("the current directory no longer exists; change to another one") from error


def _is_open(number: int) -> bool:
    try:
        os.fstat(number)
    except OSError:
        return False
    return True


def _buffered(raw: io.FileIO, by_line: bool) -> io.TextIOWrapper:
    # What the encoding does not have is spelt out: a name must not end what it is a part of.
    return io.TextIOWrapper(io.BufferedWriter(raw), errors="backslashreplace", line_buffering=by_line)


class _Output(io.FileIO):
    """Standard output: an error is told once, and what is left at the end of the process is dropped."""

    failed = False

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write; raises OutputFailed the first time that it cannot."""
        if self.failed:
            return len(data)
        try:
            return super().write(data)
        except OSError as error:
            self.failed = True
            what = "its reader went away" if error.errno == errno.EPIPE else f"cannot be written: {error.strerror}"
            raise OutputFailed(f"standard output: {what}") from error


class _Messages(io.FileIO):
    """Standard error: progress that nobody can read is no reason to end a run."""

    def write(self, data: bytes) -> int:  # type: ignore[override]
        """Write, or drop what cannot be written."""
        try:
            return super().write(data)
        except OSError:
            return len(data)


def quiet_libraries() -> None:
    """Transformers' own progress bars and advice would be drawn into ours."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


@contextmanager
def graceful_stop(observer: Watcher) -> Iterator[Callable[[], bool]]:
    """Once the search has begun, the first Ctrl-C asks it to stop after the current step; any other stops at once."""
    asked = False

    def handler(number: int, frame: Any) -> None:
        nonlocal asked
        if asked or not observer.begun:
            signal.default_int_handler(number, frame)
        asked = True
        print("\nolmfast: finishing the current step; Ctrl-C again stops at once", file=sys.stderr)

    before = signal.signal(signal.SIGINT, handler)
    try:
        yield lambda: asked
    except KeyboardInterrupt as error:
        if observer.begun:
            told = "stopped at once; everything decided so far is saved, continue with --resume"
        else:
            told = "stopped before the first step; --resume begins it"
        raise Interrupted(told) from error
    finally:
        signal.signal(signal.SIGINT, before)
