"""The life of a run's folder: begun next to its final name, locked, resumed, and renamed when complete."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch

from olmfast.errors import FileChanged, InputError, OlmfastError
from olmfast.output.folder import OutputFolder
from olmfast.output.ownership import Claim
from olmfast.output.writer import copy_file
from olmfast.runs.original import Choices, read_original, read_other
from olmfast.search.log import STEPS
from olmfast.search.record import LEDGER, REFINED, REPORT, Record
from olmfast.weights.digests import DIGESTS
from olmfast.weights.pool import Pool


class RunFolder(OutputFolder):
    """`OUT.partial` while a run is in progress, `OUT` once it is complete.

    A run that begins takes over the choices in `report`, one of the original tool's.
    Raises InputError at once when `OUT` or `OUT.partial` exists and neither `resume` nor `overwrite` is requested.
    """

    def __init__(self, output: Path, *, resume: bool, overwrite: bool, report: Path | None = None) -> None:
        super().__init__(output, overwrite=overwrite)
        self.original = read_other(report) if report is not None else None
        self.resume = resume and not overwrite
        begun = os.path.lexists(self.partial)
        if not self._continues:
            self.check_partial()
        if self.resume:
            self._check_resumable(begun)
        elif not overwrite and begun:
            raise InputError(f"{self.partial}: an unfinished run; --resume continues it, --overwrite starts anew")
        elif not overwrite and self.is_taken:
            raise InputError(f"{output}: exists; use --overwrite to replace it or --resume to continue its run")

    @property
    def _continues(self) -> bool:
        """Whether `OUT.partial` is that of a run that has begun, and is to be continued."""
        return self.resume and any((self.partial / name).is_file() for name in (STEPS, REPORT))

    def _check_resumable(self, begun: bool) -> None:
        """Raise InputError where `OUT` is neither the run's own nor what it was begun to replace."""
        if not self.is_taken:
            return
        if not begun and not any((self.output / name).is_file() for name in (STEPS, REPORT)):
            raise InputError(
                f"{self.output}: exists and holds no {REPORT}, so there is nothing to resume; use --overwrite"
            )
        if self._continues:
            record = Claim.read(self.partial, self.output.name)
            if record is None or record.replaces != self._agreed:
                raise InputError(
                    f"{self.output}: was not there, or was another, when the run in {self.partial} began, and its "
                    "result would replace it; move it away"
                )

    @contextmanager
    def locked(self, header: dict[str, Any], pool: Pool) -> Iterator[Record]:
        """The run's record, begun or loaded and checked against `header`; one process at a time.

        Its report is brought up to date even when the run fails.
        """
        self.heal()
        if self.resume and not self.partial.exists() and (self.output / STEPS).is_file():
            record = Record.load(self.output)
            if record.status == "finished":
                _check_same(self.output, record, header)
                yield record
                return
        is_new = not self._continues
        with self.lock(empty=is_new):
            try:
                record = self._open(header, pool)
            except InputError:
                if is_new:
                    self.discard()
                raise
            if record.folder == self.output:
                self.discard()
            else:
                pool.digests.keep_in(self.partial / DIGESTS)
            try:
                yield record
            except BaseException as error:
                if isinstance(error, InputError) and is_new and not record.steps:
                    self.discard()  # refused before it began
                    raise
                with suppress(OlmfastError):  # a full disk; the first failure is the one to report
                    record.write_report()
                raise

    def publish(self, record: Record) -> None:
        """Rename the complete `OUT.partial` to `OUT`; an old `OUT` is removed after, or kept if not ours.

        Does nothing for a run that was published before.
        """
        if record.folder != self.output:
            record.write_report()
            (self.partial / DIGESTS).unlink(missing_ok=True)
            self.rename(keep=self._is_of_the_original())

    def _is_of_the_original(self) -> bool:
        try:
            return read_original(self.output) is not None
        except InputError:  # damaged; only --overwrite comes this far
            return False

    def _open(self, header: dict[str, Any], pool: Pool) -> Record:
        if not self.resume:
            return self._begin(header, pool)
        if not (self.partial / STEPS).is_file():
            for folder in (self.partial, self.output):
                if (original := read_original(folder)) is not None:
                    return self._import_original(original, header, pool)
            if not (self.output / STEPS).is_file():
                return self._begin(header, pool)
            before = Record.load(self.output)
            _check_same(self.output, before, header)
            if before.status == "finished":
                return before  # OUT.partial is that of a run that was killed before it began
            before.check_ledger()
            self._take_over()
        record = Record.load(self.partial)
        _check_same(self.partial, record, header)
        record.check_ledger()
        record.discard_unrecorded()
        if record.status == "stopped":
            record.update(status="running")
        record.write_report()
        return record

    def _begin(self, header: dict[str, Any], pool: Pool) -> Record:
        if self.original is not None:
            return self._import_original(self.original, header, pool)
        return Record.create(self.partial, header)

    def _take_over(self) -> None:
        """Continue a run that stopped at its budget: its state is copied, the result stays until replaced."""
        (self.partial / REFINED).mkdir()
        for path in sorted((self.output / REFINED).glob("*.safetensors")):
            copy_file(path, self.partial / REFINED / path.name)
        copy_file(self.output / LEDGER, self.partial / LEDGER)
        # Last and in one step: with a log in it, the folder counts as taken over.
        copy_file(self.output / STEPS, self.partial / f"{STEPS}.tmp")
        (self.partial / f"{STEPS}.tmp").replace(self.partial / STEPS)

    def _import_original(self, original: dict[str, Any], header: dict[str, Any], pool: Pool) -> Record:
        """Begin from the decisions of the original tool's report; they count as steps taken."""
        choices = Choices.read(original)
        recipe, outcomes = choices.recipe(pool)
        decided = recipe.base if choices.donors else None
        return Record.create(self.partial, {**header, "imported_base": decided}, outcomes, recipe)


@contextmanager
def told_failures(partial: Path) -> Iterator[None]:
    """Turn what can fail while a run goes on, in `OUT.partial`, into the user's error, which says how to continue."""
    try:
        yield
    except FileChanged as error:
        raise error.with_advice("--resume") from error
    except torch.OutOfMemoryError as error:
        raise OlmfastError(
            f"out of memory: {str(error).splitlines()[0]}; everything decided so far is saved; use --resume with "
            "a smaller batch_tokens"
        ) from error
    except OSError as error:
        raise OlmfastError(
            f"{error.filename or partial}: {error.strerror}; everything decided so far is saved; "
            "fix this and use --resume"
        ) from error


PARTS = (
    ("config", "config key"),
    ("donors", "donor"),
    ("tokenizer", "tokenizer file"),
    ("datasets", "dataset"),
    ("environment", ""),
)


def _check_same(folder: Path, record: Record, header: dict[str, Any]) -> None:
    """Raise InputError naming all that differs from the record's; a finished run computes nothing any more, so that
    for one the versions do not count."""
    changed = []
    for part, label in PARTS[: -1 if record.status == "finished" else None]:
        before, now = record.header.get(part), header[part]
        if before is None and record.status == "finished":
            continue
        if before is None:
            raise InputError(f"{folder}: was begun by an older version, which kept no {part}; use --overwrite")
        for name in {**before, **now}:
            if before.get(name) != now.get(name):
                told = f"{name}: {now.get(name)} instead of {before.get(name)}"
                changed.append(f"{label} {name}" if label else told)
    if changed:
        raise InputError(
            f"{folder}: cannot be resumed, changed since it was begun: {', '.join(changed)}; "
            "undo the change, or use --overwrite to start anew"
        )
