"""One case of malformed input: what is changed, the command that meets it, and whether what came of it is right."""

from __future__ import annotations

import math
import os
import re
import resource
import shutil
import signal
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from huggingface_hub import constants

from olmfast import cli
from olmfast.runs import estimate

HANGS_AFTER_S = 30
MEMORY = 6 << 30
LONGEST_LINE, MOST_LINES = 1500, 40
Tree = dict[str, tuple[Any, ...]]


@dataclass(frozen=True)
class Case:
    """A command line whose input has been spoilt.

    `named`: a refusal has to contain one of these. `output` is what the command may write. `loads` looks at what an
    accepted case has written and raises if it is not whole.
    """

    arguments: list[str]
    named: tuple[str, ...]
    output: tuple[str, ...] = ()
    loads: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Outcome:
    """How a case ended: `fault` says what is wrong with that, None if nothing is."""

    code: int | None
    out: str
    err: str
    fault: str | None


class Hangs(BaseException):
    """The time of a case is over."""


def tree(folder: Path) -> Tree:
    """Every path below a folder with what it holds, byte for byte."""
    found: Tree = {}
    for place, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(place, name)
            mode = os.lstat(path).st_mode
            held: Any = None
            if stat.S_ISREG(mode):
                with open(path, "rb") as file:
                    held = file.read()
            elif stat.S_ISLNK(mode):
                held = os.readlink(path)
            found[os.path.relpath(path, folder)] = (stat.S_IFMT(mode), held)
    return found


def restore(folder: Path, before: Tree) -> None:
    """Make a folder again what it was."""
    now = tree(folder)
    for name in sorted(now, reverse=True):
        if before.get(name) != now[name] and os.path.lexists(path := folder / name):
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    for name in sorted(before):
        path, (mode, held) = folder / name, before[name]
        if os.path.lexists(path):
            continue
        if stat.S_ISDIR(mode):
            path.mkdir()
        elif stat.S_ISREG(mode):
            path.write_bytes(held)


@contextmanager
def caught() -> Iterator[Callable[[], tuple[str, str]]]:
    """What this process writes to its standard output and error, by whichever library, until the block ends."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        kept = os.dup(1), os.dup(2)
        before = sys.stdout, sys.stderr
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.stdout = open(1, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", encoding="utf-8", errors="backslashreplace", closefd=False)  # noqa: SIM115

        def read() -> tuple[str, str]:
            texts = []
            for file in (out, err):
                file.seek(0)
                texts.append(file.read().decode("utf-8", "replace"))
            return texts[0], texts[1]

        try:
            yield lambda: result
        finally:
            with suppress(OSError, ValueError):
                sys.stdout.flush()
                sys.stderr.flush()
            sys.stdout, sys.stderr = before
            for fd, saved in enumerate(kept, 1):
                os.dup2(saved, fd)
                os.close(saved)
            result = read()


def call(arguments: list[str], seconds: float = HANGS_AFTER_S) -> tuple[int | None, str, str]:
    """Exit code, standard output and standard error of the command in this process; no code if it hangs."""
    hangs = False

    def over(*_: Any) -> None:
        nonlocal hangs
        hangs = True
        raise Hangs

    code: int | None = None
    before = signal.signal(signal.SIGALRM, over)
    sys.argv = ["olmfast", *arguments]
    with caught() as read:
        signal.setitimer(signal.ITIMER_REAL, 0 if seconds == math.inf else seconds)
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else 0 if end.code is None else 1
        except Hangs:
            hangs = True
        except BaseException as error:  # what must not come out
            print(f"{type(error).__name__} came out of main: {error}", file=sys.stderr)
            code = -1
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, before)
    return (None if hangs else code, *read())


def judge(folder: Path, case: Case) -> Outcome:
    """Run a case in its folder, and say what is wrong with how it ended."""
    before = tree(folder)
    os.chdir(folder)
    code, out, err = call(case.arguments)
    after = tree(folder)
    return Outcome(code, out, err, _fault(case, code, out, err, _changes(before, after)))


def _changes(before: Tree, after: Tree) -> list[str]:
    return [name for name in {**before, **after} if before.get(name) != after.get(name)]


def _fault(case: Case, code: int | None, out: str, err: str, changed: list[str]) -> str | None:
    if code is None:
        return f"hangs for {HANGS_AFTER_S} s"
    if "Traceback" in err + out or "panicked" in err + out:
        return "a traceback"
    if code == 0:
        strange = [name for name in changed if name.split(os.sep)[0] not in case.output]
        if strange:
            return f"writes {strange[:3]}"
        try:
            case.loads()
        except Exception as error:
            return f"accepted, but the result does not load: {type(error).__name__}: {error}"
        return None
    if code != 2:
        return f"ends with {code}"
    if changed:
        return f"refused, but changes {sorted(changed)[:3]}"
    return _fault_of_refusal(case, out, err)


def _fault_of_refusal(case: Case, out: str, err: str) -> str | None:
    if out:
        return "refused, with something on standard output"
    err = re.sub(r"^(note|warning): .*\n", "", err, flags=re.MULTILINE)  # what it told before it came to the fault
    usage = err.startswith(("Usage: ", "╭─ Error"))
    if not usage and (not err.startswith("olmfast: ") or err.count("olmfast: ") > 1):
        return "refused, but not with one message"
    lines = err.splitlines()
    if len(lines) > MOST_LINES or any(len(line) > LONGEST_LINE for line in lines):
        return f"refused, with {len(lines)} lines, the longest of {max(map(len, lines))} characters"
    if any(not (character.isprintable() or character == "\n") for character in err):
        return "refused, with characters that are not printable"
    if not usage and not any(name in err for name in case.named):
        return f"refused, but none of {case.named} is named"
    return None


def prepare(patch: pytest.MonkeyPatch) -> None:
    """Leave out what is the same each time, and what would ask the network; let nothing take all memory."""
    patch.setattr(estimate, "TRIAL_SECONDS", 1e-6)
    patch.setattr(cli, "app", typer.main.get_command(cli.app))  # built once, not for each case
    patch.setattr(constants, "HF_HUB_OFFLINE", True)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, most))
