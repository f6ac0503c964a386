"""The errors a user meets, and how they are worded.

Every message reads `<where>: <what was wrong, got and wanted>[; what to do]`.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


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
    """`; did you mean 'weight'?` for the known word closest to `word`, or nothing if none is close."""
    close = difflib.get_close_matches(word, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""
