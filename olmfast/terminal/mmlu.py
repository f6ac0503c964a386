"""What a terminal shows of MMLU: a row per subject, all of them, and other models' accuracies beside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from olmfast.errors import InputError, cut
from olmfast.runs import mmlu as scores
from olmfast.runs.mmlu import Board, Compared
from olmfast.search.log import strict
from olmfast.terminal.runs import make_console


def evaluate_mmlu(
    model: str, folder: Path, subjects: str | None, compare: list[str], as_json: bool, *, style: str, **options: Any
) -> None:
    """Score a model on a folder of MMLU and print the table. Raises InputError for options that cannot be."""
    if style not in ("spaced", "seed"):
        raise InputError(f"--mmlu-as {cut(style)}: expected spaced or seed")
    others = [Compared.read(Path(path)) for path in compare]
    named = [name.strip() for name in subjects.split(",") if name.strip()] if subjects is not None else None
    if named == []:
        raise InputError("--subjects: expected names of subjects, such as anatomy,virology")
    print_board(scores.evaluate_mmlu(model, folder, subjects=named, style=style, **options), others, as_json)  # type: ignore[arg-type]


def print_board(board: Board, compared: Sequence[Compared], as_json: bool) -> None:
    """The table, or the same as JSON, in which `compared` holds what the model gains on each of the others."""
    if as_json:
        keys = ("gain", "margin", "subjects")
        gains = {other.name: dict(zip(keys, other.gain(board), strict=True)) for other in compared}
        print(json.dumps(strict(board.to_json() | ({"compared": gains} if gains else {})), indent=2))
        return
    names = _short([other.name for other in compared])
    table = Table("subject", "n", "accuracy", "likelihood", "perplexity", *names, title=f"MMLU: {board.model}")
    table.title_justify = "left"
    for name, one in board.subjects.items():
        others = [f"{other.accuracy[name]:.4f}" if name in other.accuracy else "" for other in compared]
        cells = [str(one.n), f"{one.accuracy:.4f}", f"{one.likelihood:.4f}", f"{one.perplexity:.4g}"]
        table.add_row(name, *cells, *others)
    make_console().print(table)
    n, low, high = (
        sum(one.n for one in board.subjects.values()),
        board.accuracy - board.margin,
        board.accuracy + board.margin,
    )
    print(f"{len(board.subjects)} subjects, {n} questions, {board.shots} worked examples, {board.letters}")
    print(f"mean accuracy of the subjects {board.accuracy:.5f}, 95 % interval {low:.4f} to {high:.4f}")
    print(
        f"likelihood of the right letter {board.average(lambda one: one.likelihood):.4f}, perplexity of the questions "
        f"{board.average(lambda one: one.perplexity):.5g}"
    )
    cut = sum(one.cut for one in board.subjects.values())
    if cut:
        print(f"{cut} questions had fewer worked examples: they would not have fitted the model's context")
    for other, name in zip(compared, names, strict=True):
        print(_gain(board, other, name))


def _gain(board: Board, other: Compared, name: str) -> str:
    gain, margin, n = other.gain(board)
    if not n:
        return f"{name}: has none of these subjects"
    told = "" if abs(gain) > margin else ": no difference beyond noise"
    interval = f"95 % interval {gain - margin:+.4f} to {gain + margin:+.4f}"
    return f"compared with {name}: {gain:+.4f} accuracy on {n} subjects, {interval}{told}"


def _short(paths: Sequence[str]) -> list[str]:
    """Results files are called alike: the folder tells them apart."""
    found = [Path(path).parent.name or Path(path).name for path in paths]
    return [name if found.count(name) == 1 else path for name, path in zip(found, paths, strict=True)]
