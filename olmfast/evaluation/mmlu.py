"""MMLU (Hendrycks et al., arXiv 2009.03300): its folder of CSV files, a subject's questions, and how they are asked.

`test/<subject>_test.csv` has a line for each question and `dev/<subject>_dev.csv` one for each worked example:
question, A, B, C, D and the answer's letter. Cells are text, whatever they look like.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from olmfast.errors import InputError, did_you_mean, show
from olmfast.evaluation.item_files import cells_in
from olmfast.evaluation.items import KNOWN
from olmfast.weights.files import read_text

LETTERS = "ABCD"
TEST, DEV = "_test.csv", "_dev.csv"
# How it is asked: as the paper does, with the letters as they follow "Answer:"; or as the tool that prunes by merging
# did, in which two spaces stand before the subject, an empty cell is "nan", and the letters compared are bare.
Style = Literal["spaced", "seed"]
# The cells that pandas, which that tool reads them with, takes for empty.
_EMPTY = (
    *("", "#N/A", "#N/A N/A", "#NA", "-1.#IND", "-1.#QNAN", "-NaN", "-nan", "1.#IND", "1.#QNAN", "<NA>", "N/A", "NA"),
    *("NULL", "NaN", "None", "n/a", "nan", "null"),
)


@dataclass(frozen=True)
class Question:
    """A question with its options, up to "Answer:", and the right letter."""

    text: str
    answer: str


@dataclass(frozen=True)
class Subject:
    """One subject: its worked examples, its questions, and the files they are in."""

    name: str
    examples: tuple[Question, ...]
    questions: tuple[Question, ...]
    files: tuple[Path, ...]
    style: Style = "spaced"

    def before(self, n_shots: int) -> str:
        """What comes before a question: what the questions are about, and the first `n_shots` worked examples."""
        return header(self.name, self.style) + "".join(
            f"{example.text} {example.answer}\n\n" for example in self.examples[:n_shots]
        )


def header(subject: str, style: Style = "spaced") -> str:
    """The first line of a prompt."""
    space = "  " if style == "seed" else " "
    return f"The following are multiple choice questions (with answers) about{space}{subject.replace('_', ' ')}.\n\n"


def read_mmlu(
    folder: Path,
    subjects: Sequence[str] | None = None,
    n_shots: int = 0,
    limit: int | None = None,
    style: Style = "spaced",
) -> list[Subject]:
    """The subjects of a folder (None: all, in alphabetical order) with the first `limit` questions of each.

    Raises InputError naming the folder, file or line that is missing or no question, or a subject that is not there.
    """
    known = subjects_in(folder)
    for name in subjects or ():
        if name not in known:
            raise InputError(f"{folder}: no subject {show(name)}{did_you_mean(name, known)}")
    return [_read(folder, name, n_shots, limit, style) for name in dict.fromkeys(subjects or known)]


def subjects_in(folder: Path) -> list[str]:
    """The names of a folder's subjects. Raises InputError if it has none."""
    test = folder / "test"
    try:
        names = sorted(name.removesuffix(TEST) for name in os.listdir(test) if name.endswith(TEST))
    except OSError as error:
        raise InputError(
            f"{folder}: is no folder of MMLU: expected test/<subject>{TEST} and dev/<subject>{DEV}: {test}: "
            f"{error.strerror}{_advice(folder)}"
        ) from error
    if not names:
        raise InputError(f"{folder}: is no folder of MMLU: {test} holds no <subject>{TEST}")
    return names


def _advice(folder: Path) -> str:
    """What to do with a folder of the Hub, or of the package datasets."""
    tables = [path for pattern in ("*.arrow", "*.parquet", "*/*.arrow", "*/*.parquet") for path in folder.glob(pattern)]
    return f"; it holds {tables[0].relative_to(folder)}: name that file" if tables else ""


def _read(folder: Path, name: str, n_shots: int, limit: int | None, style: Style) -> Subject:
    files = [folder / "test" / f"{name}{TEST}", *([folder / "dev" / f"{name}{DEV}"] if n_shots else [])]
    examples = list(read_questions(files[1], style)) if n_shots else []
    if len(examples) < n_shots:
        raise InputError(f"{files[1]}: holds {len(examples)} worked examples, and {n_shots} shots are asked for")
    questions = tuple(read_questions(files[0], style))[:limit]
    if not questions:
        raise InputError(f"{files[0]}: holds no questions")
    return Subject(name, tuple(examples[:n_shots]), questions, tuple(files), style)


def read_questions(path: Path, style: Style = "spaced") -> Iterator[Question]:
    """The questions of one of MMLU's files. Raises InputError naming the line that is none."""
    for number, row in enumerate(csv_rows(path), 1):
        if len(row) != 6 or row[5] not in tuple(LETTERS):
            raise InputError(f"{path}:{number}: expected question, A, B, C, D and the answer's letter, got {show(row)}")
        question, *options, answer = ("nan" if style == "seed" and cell in _EMPTY else cell for cell in row)
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=True))
        yield Question(f"{question}\n{listed}\nAnswer:", answer)


def csv_rows(path: Path) -> list[list[str]]:
    """The lines of a CSV file, their cells as text. Raises InputError for any other file."""
    return [row for _, row in cells_in(path, read_text(path, "utf-8-sig"))]


def is_mmlu_file(path: Path) -> bool:
    """Whether a file is read as one of MMLU's, which have no header, where its columns are not named.

    It is a .csv whose first line does not name columns of a question and its answer. Raises InputError where it cannot
    be read.
    """
    if path.suffix != ".csv":
        return False
    first = next(iter(csv_rows(path)), [])
    return not (KNOWN & {cell.strip().lower() for cell in first})


def worked_examples(path: Path) -> list[Path]:
    """The files beside one of MMLU's that its prompts are made of: the subject's worked examples."""
    subject, _, split = path.stem.rpartition("_")
    if path.suffix != ".csv" or split == "dev":
        return []
    return [path.parent.parent / "dev" / f"{subject}{DEV}"]
