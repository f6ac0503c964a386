"""Files that a user names: opened without waiting, read whole, and one error where they cannot be."""

from __future__ import annotations

import json
import os
import re
import stat
from pathlib import Path

from olmfast.errors import InputError, show

LONGEST_NAME = 255  # bytes, on nearly every file system
POINTER = b"version https://git-lfs.github.com/spec/"


def read_bytes(path: Path) -> bytes:
    """What a regular file holds. Raises InputError for one that is missing or unreadable, a folder, pipe or device."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # a pipe is refused below, not waited for
        with os.fdopen(fd, "rb") as file:
            mode = os.fstat(fd).st_mode
            if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
                raise InputError(f"{path}: cannot be read: it is no regular file")
            content = file.read()
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except ValueError as error:  # a null character or half of a character in its name
        raise InputError(f"{show(str(path))}: cannot be read: {error}") from error
    check_not_pointer(path, content)
    return content


def check_not_pointer(path: Path, content: bytes | None = None) -> None:
    """Raise InputError for what a clone without Git LFS holds in a file's place; without `content`, its first bytes."""
    if content is None:
        try:
            with path.open("rb") as file:
                content = file.read(len(POINTER))
        except OSError as error:
            raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    if content.startswith(POINTER):
        raise InputError(f"{path}: is a Git LFS pointer, not the file itself; get it with git lfs pull, or hf download")


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """The same as text, its ends of line as they are."""
    try:
        return read_bytes(path).decode(encoding)
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read: not UTF-8 text") from error


def real(path: Path) -> Path:
    """The path without links, as far as it can be followed: a loop of links ends there."""
    return Path(os.path.realpath(path))


def check_characters(text: str, value: object, where: str) -> None:
    """Raise InputError where a value that was read from a JSON or YAML text holds half of a character: nothing could
    write it, and no tokenizer reads it."""
    if re.search(r"\\[uU]", text):  # only an escape can make one
        try:
            json.dumps(value, ensure_ascii=False, default=str).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: holds half of a character (a lone surrogate)") from error
        except (TypeError, ValueError, RecursionError):  # a key or a number that JSON does not have
            return


def usable(path: str | Path, where: str) -> Path:
    """The path, if a file can have this name. Raises InputError that says what `where` names and why it cannot."""
    text = str(path)
    try:
        if "\0" in text:
            raise ValueError("it holds a null character")
        if any(len(part) > LONGEST_NAME for part in os.fsencode(text).split(b"/")):
            raise ValueError(f"a name in it is longer than {LONGEST_NAME} bytes")
    except UnicodeEncodeError as error:
        raise InputError(f"{where}: {show(text)} is not a usable path: it holds half of a character") from error
    except ValueError as error:
        raise InputError(f"{where}: {show(text)} is not a usable path: {error}") from error
    return Path(path)
