"""Where a report goes: into the folder of its run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from olmfast.errors import InputError
from olmfast.observer import Observer
from olmfast.output.writer import write_text, writing
from olmfast.report.history import History
from olmfast.report.page import page
from olmfast.search.record import Record

PAGE = "report.html"  # in a run's folder


def write_report(record: Record, observer: Observer) -> None:
    """Write the report of a run that ends beside its record, unless it cannot be made."""
    text = made(lambda: History.of(record), observer)
    if text is not None:
        with writing(record.folder, "--resume"):
            write_text(record.folder / PAGE, text)


def made(history: Callable[[], History], observer: Observer) -> str | None:
    """A report's text. A page that cannot be made is no reason to lose a result: the observer is told."""
    try:
        return page(history())
    except Exception as error:
        observer.note(f"{PAGE} could not be made ({type(error).__name__}: {error}); the result is complete without it")
        return None


def report(folder: str | Path, out: str | Path | None = None) -> Path:
    """Make the report of a run from its record alone: `report.html` in its folder, or `out`. Returns where it is.

    `folder` is a run's result, or its `OUT.partial` while it is in progress. Raises InputError where there is no record
    that can be read, or the page cannot be written.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: is not a directory")
    path = folder / PAGE if out is None else Path(out)
    text = page(History.read(folder))
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        write_text(temporary, text)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise InputError(f"{path}: cannot be written: {error.strerror}") from error
    return path
