"""The life of an output folder: begun beside its final name, locked, and renamed when it is complete."""

from __future__ import annotations

import fcntl
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

from olmfast import _shards
from olmfast.errors import InputError

LOCK = ".lock"


class OutputFolder:
    """`OUT.partial` while it is written, `OUT` once it is complete.

    Raises InputError for a name that no folder can have.
    """

    def __init__(self, output: Path, *, overwrite: bool) -> None:
        if output.name in ("", ".."):
            raise InputError(f"output_dir: {output} has no name of its own; name a folder that can be replaced")
        self.output = output
        self.partial = output.with_name(output.name + ".partial")
        self.overwrite = overwrite
        if output.exists() and not output.is_dir():
            raise InputError(f"{output}: exists and is no folder; name another output_dir")

    @contextmanager
    def lock(self, *, empty: bool) -> Iterator[None]:
        """Hold `OUT.partial` for one process at a time; `empty` removes what an earlier one left there."""
        lock = self.partial / LOCK
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            file = lock.open("w")
        except OSError as error:
            raise InputError(f"{self.partial}: cannot be written: {error.strerror}") from None
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise InputError(f"{self.partial}: another process is running this merge") from None
            if empty:  # only now: the folder of a run that goes on must not be emptied
                for path in self.partial.iterdir():
                    if path.is_dir():
                        shutil.rmtree(path)
                    elif path != lock:
                        path.unlink()
            yield

    def forget_if_empty(self) -> None:
        """Leave no trace of what was refused before it began."""
        if [path.name for path in self.partial.iterdir()] == [LOCK]:
            shutil.rmtree(self.partial)

    def rename(self, *, keep: bool = False) -> None:
        """Rename the complete `OUT.partial` to `OUT`; what was there is removed after, or set aside with `keep`."""
        (self.partial / LOCK).unlink(missing_ok=True)
        if self.output.exists():
            aside = _unused(self.output.with_name(self.output.name + (".original" if keep else ".replaced")))
            self.output.rename(aside)
            self.partial.rename(self.output)
            if not keep:
                shutil.rmtree(aside)
        else:
            self.partial.rename(self.output)
        _shards.sync_folder(self.output.parent)


def _unused(path: Path) -> Path:
    """The path, or the first of path.2, path.3, ... that is not there yet."""
    names = (path.with_name(f"{path.name}.{number}" if number > 1 else path.name) for number in count(1))
    return next(candidate for candidate in names if not candidate.exists())
