"""The life of an output folder: begun next to its final name, locked, and renamed when it is complete."""

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
# In OUT.partial, then in OUT, while one replaces the other: the name that the old result has meanwhile. It tells our
# folder from one that happens to have that name.
REPLACING = ".replacing"


class OutputFolder:
    """`OUT.partial` while it is written, `OUT` once it is complete.

    An `OUT` that a killed process had moved out of the way is put back; one that it had replaced is removed.
    Raises InputError for a name that no folder can have.
    """

    def __init__(self, output: Path, *, overwrite: bool) -> None:
        if output.name in ("", ".."):
            raise InputError(f"output_dir: {output} has no name of its own; name a folder that can be replaced")
        self.output = output
        self.partial = partial_of(output)
        self.overwrite = overwrite
        if output.exists() and not output.is_dir():
            raise InputError(f"{output}: exists and is not a directory; name another output_dir")
        self._heal()

    @contextmanager
    def lock(self, *, empty: bool) -> Iterator[None]:
        """Hold `OUT.partial` for one process at a time; `empty` removes what an earlier one left there."""
        lock = self.partial / LOCK
        try:
            self.partial.mkdir(parents=True, exist_ok=True)
            file = lock.open("w")
        except OSError as error:
            raise InputError(f"{self.partial}: cannot be written: {error.strerror}") from error
        with file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise InputError(f"{self.partial}: another process is running this merge") from error
            if empty:  # only now: the folder of a run in progress must not be emptied
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
        """Rename the complete `OUT.partial` to `OUT`; an old `OUT` is removed after, or set aside with `keep`."""
        lock, note = self.partial / LOCK, self.partial / REPLACING
        if not self.output.exists():
            lock.unlink(missing_ok=True)
            self.partial.rename(self.output)
        else:
            aside = _unused(self.output.with_name(self.output.name + (".original" if keep else ".replaced")))
            if not keep:
                note.write_text(aside.name, encoding="utf-8")
            self.output.rename(aside)
            lock.unlink(missing_ok=True)  # as late as possible: without it another process may begin
            self.partial.rename(self.output)
            if not keep:
                self._remove_replaced(aside)
        _shards.sync_folder(self.output.parent)

    def _heal(self) -> None:
        """Undo or complete a replacement that was killed half-way."""
        if (self.output / REPLACING).is_file():
            self._remove_replaced(self._aside(self.output))
        if (self.partial / REPLACING).is_file():
            with self.lock(empty=False):
                aside = self._aside(self.partial)
                if aside is not None and aside.is_dir() and not self.output.exists():
                    aside.rename(self.output)
                (self.partial / REPLACING).unlink(missing_ok=True)

    def _aside(self, folder: Path) -> Path | None:
        """Where the note in `folder` says that the old result is."""
        name = Path((folder / REPLACING).read_text(encoding="utf-8")).name
        return self.output.with_name(name) if name else None

    def _remove_replaced(self, aside: Path | None) -> None:
        if aside is not None and aside.is_symlink():
            aside.unlink()
        elif aside is not None and aside.is_dir():
            shutil.rmtree(aside)
        (self.output / REPLACING).unlink(missing_ok=True)


def partial_of(output: Path) -> Path:
    """The folder that a result is written to before it is complete."""
    return output.with_name(output.name + ".partial")


def _unused(path: Path) -> Path:
    """The path, or the first of path.2, path.3, ... that does not exist yet."""
    names = (path.with_name(f"{path.name}.{number}" if number > 1 else path.name) for number in count(1))
    return next(candidate for candidate in names if not candidate.exists())


def parent_of(output: Path) -> Path:
    """The innermost existing folder around `output`. Raises InputError if it is a file."""
    place = next(place for place in output.absolute().parents if place.exists())
    if not place.is_dir():
        raise InputError(f"{output}: {place} is not a directory; name another place for the result")
    return place


def free_bytes(output: Path) -> int:
    """Free bytes on the disk that `output` would be written to."""
    return shutil.disk_usage(parent_of(output)).free


def check_space(output: Path, needed: int) -> None:
    """Raise InputError when the disk cannot hold a result of `needed` bytes."""
    free = free_bytes(output)
    if free < needed:
        raise InputError(
            f"{output}: the result needs {needed / 1e9:.2f} GB and {parent_of(output)} has {free / 1e9:.2f} GB free"
        )
