"""What a terminal shows of MMLU: a row per subject, all of them, and other models' accuracies beside."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from olmfast.runs.mmlu import Board, Compared
from olmfast.search.log import strict
from olmfast.terminal.runs import make_console


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
