"""Whose a folder is: the record by which one made here is known again, and what tells a folder from any other."""

from __future__ import annotations

import json
import os
import re
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from olmfast import __version__

LOCK = ".lock"
UNGUESSABLE = re.compile(r"\.olmfast-[0-9a-f]{16}")
MOST_RECORD_BYTES = 4096
MOST_LINKS = 40  # on the way to one file, as the kernel counts


@dataclass(frozen=True)
class Claim:
    """What a folder that is made here holds in its lock file.

    `output` is the name that it will get, `inode` its own number, which no folder made elsewhere has, and `replaces`
    the `identity` of what had that name when the work began.
    """

    output: str
    inode: int
    replaces: str | None
    olmfast: str = __version__

    @classmethod
    def read(cls, folder: Path, output: str) -> Claim | None:
        """The record of a real folder that was made here for `output`; None for any other."""
        try:
            own = folder.lstat()
            data = json.loads(_read_plainly(folder / LOCK))
            record = cls(str(data["output"]), int(data["inode"]), data["replaces"], str(data["olmfast"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None
        return record if stat.S_ISDIR(own.st_mode) and (record.output, record.inode) == (output, own.st_ino) else None

    def to_bytes(self) -> bytes:
        """One line of JSON."""
        return json.dumps(asdict(self)).encode() + b"\n"


@dataclass(frozen=True)
class Note:
    """Kept in a folder while it replaces another: the old one's identity, the name that it has meanwhile, and the one
    that it gets to be removed, which nobody can guess."""

    aside: str
    identity: str
    gone: str

    @classmethod
    def read(cls, path: Path) -> Note | None:
        """What the file says; None where there is none, or something else."""
        try:
            data = json.loads(_read_plainly(path))
            return cls(str(data["aside"]), str(data["identity"]), str(data["gone"]))
        except (OSError, ValueError, KeyError, TypeError, RecursionError):
            return None

    def to_text(self) -> str:
        """One line of JSON."""
        return json.dumps(asdict(self)) + "\n"


def unguessable() -> str:
    """A name for a folder that only its maker knows, until it has written it down."""
    return f".olmfast-{secrets.token_hex(8)}"


def _read_plainly(path: Path) -> bytes:
    """A small regular file, opened through no link and without waiting for a writer."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise ValueError("not a regular file")
        return os.read(descriptor, MOST_RECORD_BYTES)
    finally:
        os.close(descriptor)


def identity(path: Path) -> str | None:
    """What tells a folder and all it holds (a file, a link) from every other; None where there is nothing.

    No byte of a file is read: its number, size and times of change say whether it is the one that was there. Links are
    not followed.
    """
    try:
        state = xxhash.xxh3_128(_told(path.lstat()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    if path.is_symlink():
        state.update(os.fsencode(os.readlink(path)))
        return state.hexdigest()
    for folder, folders, files in os.walk(path):
        folders.sort()
        for name in sorted([*folders, *files]):
            place = os.path.join(folder, name)
            state.update(os.fsencode(os.path.relpath(place, path)))
            with suppress(OSError):  # gone since it was listed, so the next time it is not listed
                held = os.lstat(place)
                state.update(_told(held) + str(held.st_ctime_ns).encode())  # the folder's own changes as it is renamed
    return state.hexdigest()


def _told(found: os.stat_result) -> bytes:
    return f"\0{found.st_mode} {found.st_ino} {found.st_size} {found.st_mtime_ns}\0".encode()


def places(path: Path) -> Iterator[Path]:
    """Every real place on the way to what `path` leads to: each link that is followed, and where the last one ends."""
    at = Path("/")
    rest = list(reversed((path if path.is_absolute() else Path.cwd() / path).parts[1:]))
    links = 0
    while rest:
        part = rest.pop()
        if part == "..":
            at = at.parent
            continue
        if (at / part).is_symlink() and links < MOST_LINKS:
            links += 1
            yield at / part
            target = Path(os.readlink(at / part))
            at = Path("/") if target.is_absolute() else at
            rest += reversed(target.parts[1:] if target.is_absolute() else target.parts)
        else:
            at = at / part
    yield at


def first_inside(taken: Iterable[Path], read: Iterable[Path]) -> tuple[Path, Path] | None:
    """The first of the folders `taken` that is, or holds, something on the way to what is read, and that place.

    By the folders' numbers, not their names: a folder that is mounted, or spelt, in another way is the same.
    """
    numbers = {_number(path, follow): path for path in taken for follow in (False, True)}
    numbers.pop(None, None)
    seen: set[Path] = set()
    for place in (place for path in read for place in places(path)) if numbers else ():
        for folder in (place, *place.parents):
            if folder in seen:
                break
            seen.add(folder)
            if (number := _number(folder, False)) in numbers:
                return numbers[number], place
    return None


def _number(path: Path, follow: bool) -> tuple[int, int] | None:
    try:
        found: Any = os.stat(path, follow_symlinks=follow)
    except (OSError, ValueError):
        return None
    return found.st_dev, found.st_ino
