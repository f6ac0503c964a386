"""The life of an output folder: begun next to its final name, locked, and renamed when it is complete.

Nothing is emptied, moved or removed that was not made here (its record says so, see `ownership.py`), or that the user
did not agree to lose: what had the final name when the work began. No renaming replaces anything: the system renames a
folder over an empty one at most.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import stat
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from fnmatch import fnmatchcase
from itertools import count
from pathlib import Path

from rich.filesize import decimal

from olmfast import _shards
from olmfast.errors import InputError, OlmfastError
from olmfast.output.beside import CODE, PROCESSOR
from olmfast.output.ownership import LOCK, UNGUESSABLE, Claim, Note, first_inside, identity, unguessable
from olmfast.output.writer import WEIGHTS, write_text
from olmfast.search.log import STEPS
from olmfast.search.record import LEDGER, REFINED, REPORT
from olmfast.weights.checkpoint import GENERATION_CONFIG, TOKENIZER_FILES
from olmfast.weights.digests import DIGESTS

# In OUT.partial, then in OUT, while one replaces the other: what the old result is called meanwhile.
REPLACING = ".replacing"
# What olmfast writes into a folder in progress; one that holds anything else is not emptied.
PARTS: tuple[str, ...] = (
    *(LOCK, REPLACING, STEPS, LEDGER, REPORT, DIGESTS, f"{STEPS}.tmp", f"{REPORT}.tmp"),
    *WEIGHTS,
    *("run.log", "report.html", "report.html.tmp", "path.yml", "repeats.svg"),
    *("config.json", "README.md", "mergekit_config.yml", GENERATION_CONFIG, *TOKENIZER_FILES),
    *(*PROCESSOR, CODE),
    *("adapter_config.json", "adapter_model.safetensors", "alphas.json", "mmlu_results.json"),
)
# The same of the folders in it: chat templates, and parts of sentence-transformers (1_Pooling).
FOLDERS: dict[str, tuple[str, ...]] = {
    REFINED: ("*.safetensors", "*.safetensors.tmp"),
    ".eval_results": ("*.yaml",),
    "additional_chat_templates": ("*.jinja",),
    "[0-9]*_*": ("*.json", "*.safetensors", "*.txt", "*.model"),
}
ATTEMPTS = 3  # to make a folder
LONGEST_ENDING = ".replaced.99"  # after the output's own name


class OutputFolder:
    """`OUT.partial` while it is written, `OUT` once it is complete.

    What is at `OUT` when this is made is what may be replaced, and nothing else. Nothing is changed before `heal` or
    `lock`. Raises InputError for a name that no folder can have, and for what no folder can replace.
    """

    def __init__(self, output: Path, *, overwrite: bool) -> None:
        self.output = output
        self.partial = partial_of(output)
        self.overwrite = overwrite
        try:
            self._check_kinds()
            self._agreed = identity(output)
        except OSError as error:
            raise InputError(f"{error.filename or output}: cannot be read: {error.strerror}") from error
        self._made: list[Path] = []

    @property
    def is_taken(self) -> bool:
        """Whether something is at `OUT` that a result would replace: anything but an empty folder."""
        try:
            return self.output.is_symlink() or (self.output.exists() and any(self.output.iterdir()))
        except OSError as error:
            raise InputError(f"{self.output}: cannot be read: {error.strerror}") from error

    def check(self, read: Mapping[str, Iterable[Path]]) -> None:
        """Raise InputError where a result must not come to be: see `check_apart` and `check_partial`, and an `OUT` that
        is there without `overwrite`. What a killed command left half-way is put right before."""
        self.check_apart(read)
        if not self.overwrite and (self.partial / STEPS).exists():
            raise InputError(f"{self.partial}: holds an unfinished run; use --overwrite to replace it")
        self.check_partial()
        self.heal()
        if self.is_taken and not self.overwrite:
            raise InputError(f"{self.output}: exists; use --overwrite to replace it")

    def check_apart(self, read: Mapping[str, Iterable[Path]]) -> None:
        """Raise InputError where `OUT` or `OUT.partial` holds anything of what is read: what it is called -> its paths.

        Links are followed all the way: a file is also where its links are, and where they lead.
        """
        faults = []
        for what, paths in {**read, "the current folder": _current_folder()}.items():
            found = first_inside((self.output, self.partial), paths)
            if found is not None:
                folder, place = found
                told = "" if place == folder else f" ({place})"
                faults.append(f"output_dir: {folder} holds {what}{told}; name a folder for the result alone")
        if faults:
            raise InputError("\n".join(faults))

    def check_partial(self) -> None:
        """Raise InputError where `OUT.partial` is not one that was begun here, and so must not be emptied."""
        if not os.path.lexists(self.partial):
            return
        if Claim.read(self.partial, self.output.name) is None:
            raise InputError(
                f"{self.partial}: is in the way and was not begun here by this version of olmfast, so it is left as it "
                "is; move it away, or name another output"
            )
        foreign = _foreign(self.partial)
        if foreign is not None:
            raise InputError(f"{foreign}: is in a folder that would be emptied, and is not olmfast's; move it away")

    @contextmanager
    def lock(self, *, empty: bool) -> Iterator[None]:
        """Hold `OUT.partial` for one process at a time; `empty` begins a new one in place of one begun here earlier."""
        try:
            self._sweep()
            if empty:
                self.check_partial()
            if os.path.lexists(self.partial) and empty:
                with _locked(self.partial):
                    self._remove(self.partial)
            held = self._resume() if os.path.lexists(self.partial) else self._make()
        except OSError as error:
            raise InputError(f"{self.partial}: cannot be written: {error.strerror}") from error
        try:
            yield
        finally:
            os.close(held)

    def discard(self) -> None:
        """Leave no trace of what was begun; a file of the user's in it is left where it is."""
        if _foreign(self.partial) is None:
            self._remove(self.partial)
        for folder in reversed(self._made):
            with suppress(OSError):  # something else is in it by now
                folder.rmdir()

    def rename(self, *, keep: bool = False) -> None:
        """Rename the complete `OUT.partial` to `OUT`; an old `OUT` is removed after, or set aside with `keep`.

        Raises OlmfastError where `OUT` is not what it was at the beginning; it is left as it is.
        """
        if identity(self.output) != self._agreed:
            raise self._changed("was changed, or was not there, when the work began")
        if not self.is_taken:
            self._move(self.partial)
        else:
            aside = _unused(self.output.with_name(self.output.name + (".original" if keep else ".replaced")))
            if not keep:
                write_text(self.partial / REPLACING, Note(aside.name, str(self._agreed), unguessable()).to_text())
            self.output.rename(aside)
            if identity(aside) != self._agreed:
                aside.rename(self.output)
                (self.partial / REPLACING).unlink(missing_ok=True)
                raise self._changed("was changed just now")
            _shards.sync_folder(self.output.parent)
            self._move(self.partial)
            _shards.sync_folder(self.output.parent)
            if not keep:
                self._remove_replaced()
        # Last: until here the record says what a kill leaves to be done.
        (self.output / LOCK).unlink(missing_ok=True)
        _shards.sync_folder(self.output.parent)

    def heal(self) -> None:
        """Undo or complete a replacement that was killed half-way, where records made here say that it was one."""
        name = self.output.name
        if Claim.read(self.output, name) is not None:
            with _locked(self.output):
                self._remove_replaced()
                (self.output / LOCK).unlink(missing_ok=True)
            self._agreed = identity(self.output)
        elif Claim.read(self.partial, name) is not None and os.path.lexists(self.partial / REPLACING):
            with _locked(self.partial):
                aside = self._aside(Note.read(self.partial / REPLACING))
                if aside is not None and not os.path.lexists(self.output):
                    aside.rename(self.output)
                    self._agreed = identity(self.output)
                (self.partial / REPLACING).unlink()

    def _check_kinds(self) -> None:
        if self.output.is_symlink() and not self.output.is_dir():
            raise InputError(f"{self.output}: is a link that leads to no folder; name another output_dir")
        if self.output.exists() and not self.output.is_dir():
            raise InputError(f"{self.output}: exists and is not a directory; name another output_dir")
        if os.path.ismount(self.output):
            raise InputError(f"{self.output}: is where a disk is mounted, and cannot be replaced; name a folder in it")
        parent_of(self.output)

    def _make(self) -> int:
        """Make `OUT.partial`: under a name that nobody can guess, with a record in it, then renamed."""
        parent = self.partial.parent
        missing = [folder for folder in (parent, *parent.parents) if not folder.exists()]
        begun, held = parent / unguessable(), -1
        try:
            for folder in reversed(missing):
                folder.mkdir(exist_ok=True)
                self._made.append(folder)
            for _ in range(ATTEMPTS):  # until it is locked, another command may sweep it away
                begun = parent / unguessable()
                begun.mkdir()
                with suppress(InputError, FileNotFoundError):
                    held = _open_lock(begun)
                    break
            else:
                raise _busy(self.partial)
            os.write(held, Claim(self.output.name, begun.stat().st_ino, self._agreed).to_bytes())
            os.fsync(held)
            if os.path.lexists(self.partial):
                raise _busy(self.partial)
            os.rename(begun, self.partial)
            _shards.sync_folder(parent)
        except BaseException:
            if held >= 0:
                os.close(held)
            shutil.rmtree(begun, ignore_errors=True)
            for folder in reversed(self._made):
                with suppress(OSError):
                    folder.rmdir()
            raise
        return held

    def _resume(self) -> int:
        """Take the `OUT.partial` that is there, as it is."""
        if self.partial.is_symlink() or not self.partial.is_dir():
            raise InputError(f"{self.partial}: is not a folder; move it away")
        for path in _within(self.partial):
            if path.is_symlink() or not (path.is_file() or path.is_dir()):
                raise InputError(
                    f"{path}: is a link or no file, and nothing is written to one; put the file itself there"
                )
        return _open_lock(self.partial)

    def _move(self, folder: Path) -> None:
        try:
            folder.rename(self.output)
        except OSError as error:
            raise self._changed(f"cannot be given to the result ({error.strerror})") from error

    def _changed(self, what: str) -> OlmfastError:
        return OlmfastError(
            f"{self.output}: {what}, and is left as it is; the complete result is {self.partial}; move one of them away"
        )

    def _aside(self, note: Note | None) -> Path | None:
        """Where the old result is meanwhile, if it is what the note is about."""
        if note is None or not _is_aside(note.aside, self.output.name):
            return None
        aside = self.output.with_name(note.aside)
        return aside if identity(aside) == note.identity else None

    def _remove_replaced(self) -> None:
        """Remove the old result: under a name that nobody else can have given, so that half of it is known too."""
        note = Note.read(self.output / REPLACING)
        if note is not None and UNGUESSABLE.fullmatch(note.gone):
            aside, gone = self._aside(note), self.output.with_name(note.gone)
            try:
                if aside is not None:
                    aside.rename(gone)
                if os.path.lexists(gone):
                    gone.unlink() if gone.is_symlink() else shutil.rmtree(gone)
            except OSError as error:
                raise OlmfastError(
                    f"{error.filename or gone}: cannot be removed: {error.strerror}; the new result is complete, what "
                    f"it replaced is {gone}"
                ) from error
        (self.output / REPLACING).unlink(missing_ok=True)

    def _sweep(self) -> None:
        """Remove what a kill left of a folder that was being begun, or removed."""
        for path in self.output.parent.glob(".olmfast-" + "[0-9a-f]" * 16):
            with suppress(InputError, OSError):
                is_ours = Claim.read(path, self.output.name) is not None and _foreign(path) is None
                if is_ours or _holds_nothing(path):
                    with _locked(path):
                        _empty(path)

    def _remove(self, folder: Path) -> None:
        """Remove a folder of ours: under another name, so that a kill leaves nothing that looks begun."""
        gone = folder.with_name(unguessable())
        os.rename(folder, gone)
        _empty(gone)


def _check_name(output: Path) -> None:
    """Raise InputError if no folder can have this name."""
    if output.name in ("", ".."):
        raise InputError(f"output_dir: {output} has no name of its own; name a folder that can be replaced")
    try:
        size = len(os.fsencode(output.name))
        if "\0" in str(output):
            raise ValueError("it holds a null character")
    except ValueError as error:
        raise InputError(f"output_dir: {str(output)!r} is not a usable path: {error}") from error
    try:
        most = os.pathconf(parent_of(output), "PC_NAME_MAX") - len(LONGEST_ENDING)
    except OSError as error:
        raise InputError(f"{output}: {error.strerror}") from error
    if size > most:
        raise InputError(f"output_dir: {output.name[:40]}...: a name of {size} bytes; at most {most} are possible here")


def _current_folder() -> list[Path]:
    try:
        return [Path.cwd()]
    except OSError:  # it was removed
        return []


def _within(folder: Path) -> Iterator[Path]:
    """The entries of a folder in progress, and those of the folders in it."""
    for path in sorted(folder.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from sorted(path.iterdir())


def _foreign(folder: Path) -> Path | None:
    """The first entry of a folder in progress that olmfast has not written."""
    for path in _within(folder):
        with suppress(FileNotFoundError):  # gone by now: another process is at work in it
            kind, parts = path.lstat().st_mode, PARTS
            if path.parent != folder:
                parts = next(held for name, held in FOLDERS.items() if fnmatchcase(path.parent.name, name))
            elif stat.S_ISDIR(kind):
                parts = tuple(FOLDERS)
            is_known = stat.S_ISREG(kind) or (stat.S_ISDIR(kind) and path.parent == folder)
            if not is_known or not any(fnmatchcase(path.name, part) for part in parts):
                return path
    return None


def _holds_nothing(folder: Path) -> bool:
    """Whether a folder was made and got no record: it is empty, or holds an empty lock file alone."""
    held = [(path.name, path.lstat()) for path in folder.iterdir()]
    return not folder.is_symlink() and all(
        name == LOCK and stat.S_ISREG(found.st_mode) and found.st_size == 0 for name, found in held
    )


def _empty(folder: Path) -> None:
    """Remove a folder in progress, its record last."""
    for path in folder.iterdir():
        if path.name != LOCK:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    (folder / LOCK).unlink(missing_ok=True)
    folder.rmdir()


def _open_lock(folder: Path) -> int:
    """The lock file of a folder, locked. Raises InputError if another process has it."""
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
    held = os.open(folder / LOCK, flags, 0o666)
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.fstat(held).st_ino != (folder / LOCK).lstat().st_ino:
            raise BlockingIOError
    except OSError as error:
        os.close(held)
        if isinstance(error, (BlockingIOError, FileNotFoundError)):
            raise _busy(folder) from error
        raise
    return held


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    held = _open_lock(folder)
    try:
        yield
    finally:
        os.close(held)


def _busy(folder: Path) -> InputError:
    return InputError(f"{folder}: another process is running this merge")


def _is_aside(name: str, output: str) -> bool:
    """Whether `rename` could have given this name to the old result."""
    ending = name.removeprefix(f"{output}.replaced")
    return ending != name and (not ending or (ending[0] == "." and ending[1:].isdecimal()))


def partial_of(output: Path) -> Path:
    """The folder that a result is written to before it is complete. Raises InputError for a name that has none."""
    _check_name(output)
    return output.with_name(f"{output.name}.partial")


def _unused(path: Path) -> Path:
    """The path, or the first of path.2, path.3, ... that does not exist yet."""
    names = (path.with_name(f"{path.name}.{number}" if number > 1 else path.name) for number in count(1))
    return next(candidate for candidate in names if not os.path.lexists(candidate))


def parent_of(output: Path) -> Path:
    """The innermost existing folder around `output`. Raises InputError if it is a file, or cannot be read."""
    try:
        around = output.absolute().parents or [output]  # nothing is around the root
        place = next(place for place in around if os.path.lexists(place))
        if not place.is_dir():
            raise InputError(f"{output}: {place} is not a directory; name another place for the result")
    except OSError as error:
        raise InputError(f"{output}: {error.strerror}") from error
    return place


def free_bytes(output: Path) -> int:
    """Free bytes on the disk that `output` would be written to."""
    return shutil.disk_usage(parent_of(output)).free


def check_space(output: Path, needed: int) -> None:
    """Raise InputError when the disk cannot hold a result of `needed` bytes."""
    free = free_bytes(output)
    if free < needed:
        raise InputError(
            f"{output}: the result needs {decimal(needed)} and {parent_of(output)} has {decimal(free)} free"
        )
