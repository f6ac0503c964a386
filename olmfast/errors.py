"""The errors a user meets, and how they are worded.

Every message reads `<where>: <what was wrong, got and wanted>[; what to do]`.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable

LONGEST = 300  # characters of what a message quotes


class OlmfastError(Exception):
    """The run failed after it had begun; what was decided so far is saved. Exit code 1."""

    exit_code = 1


class InputError(OlmfastError):
    """A file, key or tensor the user gave is unusable; nothing has been written. Exit code 2."""

    exit_code = 2


class FileChanged(OlmfastError):
    """A model's file can no longer be read: it was changed or removed while in use."""

    def with_advice(self, again: str) -> OlmfastError:
        """The error with advice; `again` is how to continue the work afterwards."""
        return OlmfastError(f"{self}; put the file back as it was and use {again}")


class Interrupted(OlmfastError):
    """The user asked the run to stop; it can be resumed. Exit code 130."""

    exit_code = 130


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'weight'?` for the known word closest to `word` in any case, or nothing if none is close."""
    spelled = {one.lower(): one for one in reversed([*known])} if len(word) <= LONGEST else {}
    close = difflib.get_close_matches(word.lower(), list(spelled), n=1)
    return f"; did you mean {show(spelled[close[0]])}?" if close else ""


class _Short(reprlib.Repr):
    """`repr` of nested values that takes no longer, and is no longer, than what a message can quote."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxother = 5, LONGEST
        self.maxdict = self.maxlist = self.maxtuple = self.maxset = 40

    def repr_str(self, x: str, level: int) -> str:  # noqa: ARG002
        return repr(x[: LONGEST + 1])  # cut at its end, not in its middle

    def repr_int(self, x: int, level: int) -> str:
        try:
            return super().repr_int(x, level) if x.bit_length() < 64 * LONGEST else "a number of thousands of digits"
        except ValueError:  # Python refuses to spell it out
            return "a number of thousands of digits"


_SHORT = _Short()


def show(value: object) -> str:
    """A value as a message quotes it: `repr`, cut where it is long."""
    return cut(_SHORT.repr(value))


def shown(value: object) -> str:
    """The same of what a file gives: a key without a value gives nothing."""
    return "nothing" if value is None else show(value)


def told(error: BaseException | str) -> str:
    """What another library says, as part of a message: one line of printable characters, cut where it is long."""
    return cut(printable(" ".join(str(error)[: 10 * LONGEST].split()))) or type(error).__name__


def printable(text: str) -> str:
    """A text in which what is neither printable nor the end of a line is spelt out: file names may hold anything,
    also what would move a terminal's cursor."""
    return "".join(c if c.isprintable() or c == "\n" else c.encode("unicode_escape").decode() for c in text)


def cut(text: str) -> str:
    """A text that is no longer than what a message can quote."""
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."
