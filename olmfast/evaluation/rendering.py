"""Chat templates are programs that come with a model: they run in a child process, within limits of time and memory.

Nothing but a process can be stopped whatever it is doing: a loop, a power of two big numbers, a text of gigabytes.
"""

from __future__ import annotations

import ctypes
import os
import pickle
import resource
import select
import signal
import struct
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from olmfast.errors import InputError, told

SECONDS, N_BYTES = 10.0, 16 << 20  # that one conversation may take, and that its text may have
MEMORY = 1 << 30  # bytes that rendering may take beside what the process has
PR_SET_PDEATHSIG = 1
LENGTH = struct.Struct("<Q")


def rendered(render: Callable[[Any], Any], items: Sequence[Any], where: str) -> list[Any]:
    """What `render` returns for each item, computed in a child process.

    Raises InputError naming `where` and the item for which it fails, takes more than 10 s, or makes more than 16 MB.
    """
    receiver, sender = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the child only computes text: no thread is needed there
        child = os.fork()
    if child == 0:
        os.close(receiver)
        _child(render, items, sender)
    os.close(sender)
    results: list[Any] = []
    try:
        for number in range(len(items)):
            kind, result = _receive(receiver, f"{where}: item {number}")
            if kind != "rendered":
                raise InputError(f"{where}: item {number}: {result}")
            results.append(result)
    finally:
        os.close(receiver)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    return results


@contextmanager
def silenced() -> Iterator[None]:
    """Drop what compiled libraries print on their own: a tokenizer's file can make them talk, or panic."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = os.dup(1), os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY | os.O_CLOEXEC)
    try:
        os.dup2(nowhere, 1)
        os.dup2(nowhere, 2)
        yield
    finally:
        for number, file in enumerate(kept, 1):
            os.dup2(file, number)
            os.close(file)
        os.close(nowhere)


def _receive(receiver: int, where: str) -> tuple[str, Any]:
    deadline = time.monotonic() + SECONDS
    (length,) = LENGTH.unpack(_read(receiver, LENGTH.size, deadline, where))
    if length > N_BYTES:
        raise InputError(f"{where}: the chat template makes more than {N_BYTES >> 20} MB; repair it")
    answer: tuple[str, Any] = pickle.loads(_read(receiver, length, deadline, where))  # our own child wrote it
    return answer


def _read(receiver: int, n_bytes: int, deadline: float, where: str) -> bytes:
    parts, left = [], n_bytes
    while left:
        ready, _, _ = select.select([receiver], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            raise InputError(f"{where}: the chat template takes more than {SECONDS:g} s; repair it")
        part = os.read(receiver, min(left, 1 << 20))
        if not part:
            raise InputError(f"{where}: the chat template's process was killed: it takes too much memory")
        parts.append(part)
        left -= len(part)
    return b"".join(parts)


def _child(render: Callable[[Any], Any], items: Sequence[Any], sender: int) -> None:
    """Render, send and end without anything that the parent would do at its end."""
    try:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        prctl = getattr(ctypes.CDLL(None), "prctl", None)
        if prctl is not None:
            prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # a template in an endless loop does not outlive its parent
        with suppress(OSError, ValueError):
            _limit_memory()
        for answer in _answers(render, items):
            content = pickle.dumps(answer)
            content = LENGTH.pack(len(content)) + content
            while content:
                content = content[os.write(sender, content) :]
    finally:
        os._exit(0)


def _limit_memory() -> None:
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    wanted = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (wanted if most == resource.RLIM_INFINITY else min(wanted, most), most))


def _answers(render: Callable[[Any], Any], items: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    for item in items:
        try:
            yield "rendered", render(item)
        except InputError as error:
            yield "refused", str(error)
        except BaseException as error:  # whatever a program that came with a model can raise
            yield "refused", f"the chat template fails: {type(error).__name__}: {told(error)}"
