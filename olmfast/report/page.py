"""The report as one static HTML page: a template, and what is put into it. All text of others' is escaped."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import yaml
from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from olmfast.report import drawings
from olmfast.report.findings import found_by
from olmfast.report.history import History
from olmfast.report.measures import Measure
from olmfast.report.origins import EVOLVED, Cell, Origins
from olmfast.report.tables import (
    distances_table,
    names_shown,
    scores_table,
    skills_of,
    steps_of,
)
from olmfast.runs.verdict import HELD_OUT, Comparison

TEMPLATE = "page.html.jinja"
N_COLOURS = 8  # of models in the map; what comes after them shares one
UNPRINTABLE = re.compile(r"[^\n\t -~\xa0-\U0010ffff]")
LONGEST = 4000  # characters of a question or an answer that are shown; the record has the rest
MOST_BLOCKS = 512  # in the map
MOST_LINES = 400  # of the settings


@dataclass(frozen=True)
class Bar:
    """A cell of the map: pieces of colour (class, share in percent, what it says), and a line for whoever points."""

    pieces: Sequence[tuple[str, str, str]]
    moved: str
    said: str
    taken_from: str = ""


def page(history: History) -> str:
    """The report of a history, whole: no other file, no script and no network belongs to it."""
    donors = history.donors
    labels = [label for board in history.boards.values() for label in board.rows]
    datasets = [name for board in history.boards.values() for name in board.datasets]
    shown = names_shown(list(dict.fromkeys([*donors, *labels])))
    shown |= names_shown(list(dict.fromkeys([*datasets, *history.header.get("datasets", {})])))
    measure = Measure.of(history)
    content = {
        "title": " + ".join(shown.get(name, name) for name in donors[:4]) + (" + ..." if len(donors) > 4 else ""),
        "history": history,
        "verdict": _verdict(history, shown),
        "pictures": _pictures(history, measure, shown),
        "map": _map(history, shown),
        "answers": _answers(history, shown),
        "distances": _distances(history, shown),
        "searches": found_by(history, shown),
        "steps": steps_of(history, measure, shown),
        "measure": measure,
        "settings": _settings(history),
        "tables": [
            (f"{kind.capitalize()} scores", scores_table(board, history.result, shown), board.remark())
            for kind, board in history.boards.items()
        ],
        "held_out": HELD_OUT in history.boards,
    }
    return _printable(_template().render(content))


@cache
def _template() -> Any:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string((files("olmfast.report") / TEMPLATE).read_text(encoding="utf-8"))


def _printable(text: str) -> str:
    """The text without characters that HTML does not have; what UTF-8 cannot say is spelt out."""
    return UNPRINTABLE.sub("\N{REPLACEMENT CHARACTER}", text).encode(errors="backslashreplace").decode()


def _verdict(history: History, shown: Mapping[str, str]) -> dict[str, Any]:
    """The verdict's first line, its comparisons as a table, and its warning; the same in words where there is none."""
    verdict = history.verdict
    if verdict is None:
        board = history.board
        if board is None:
            told = "No result has been scored yet." if history.status == "running" else "The record holds no scores."
        elif remark := board.remark():
            told = f"{remark[0].upper()}{remark[1:]}."
        else:
            told = f"{history.result} and the models beside it are compared in the tables below."
        return {"lead": told, "comparisons": [], "warning": ""}
    first = ". ".join([verdict.lines(shown)[0], *(f"{line[0].upper()}{line[1:]}" for line in verdict.foretold)])
    comparisons = [(_rank(one), shown.get(one.rival, one.rival), *_gap(one)) for one in verdict.comparisons]
    return {"lead": f"{first}.", "comparisons": comparisons, "warning": verdict.warning}


def _rank(one: Comparison) -> str:
    return "better" if one.is_better else "same" if one.holds_zero or one.difference != one.difference else "worse"


def _gap(one: Comparison) -> tuple[str, str]:
    if one.difference != one.difference:  # a question has no score
        return "", ""
    return f"{one.difference:+.3f}", f"{one.low:+.3f} to {one.high:+.3f}"


def _pictures(history: History, measure: Measure, shown: Mapping[str, str]) -> dict[str, Any]:
    """The pictures, and the legend of the second."""
    found: dict[str, Any] = {"progress": "", "skills": "", "legend": []}
    timed = [taken for taken in history.steps if taken.evaluations is not None]
    if timed and measure.spans:
        kept = drawings.Series(
            [taken.evaluations or 0 for taken in timed],
            [measure.value(taken.outcome, taken.outcome.winner) for taken in timed],
        )
        labels = [(taken, label) for taken in timed for label in next(iter(taken.outcome.metrics.values()), {})]
        labels = labels[:: -(-len(labels) // drawings.MOST_POINTS) or 1]
        tried = drawings.Series(
            [taken.evaluations or 0 for taken, _ in labels],
            [measure.value(taken.outcome, label) for taken, label in labels],
        )
        upwards = "skill retained" if measure.higher_is_better else "score by the first's"
        found["progress"] = Markup(drawings.progress(tried, kept, upwards))
    rows = skills_of(history.board) if history.board else {}
    if rows:
        found["skills"] = Markup(drawings.skills(rows, history.result, shown))
        marks = drawings.markers([model for by in rows.values() for model in by], history.result)
        found["legend"] = [
            (MARKS[mark], shown.get(model, model), model == history.result) for model, mark in marks.items()
        ]
    return found


# What the legend shows for a marker of a picture.
MARKS = dict(zip("s^Dvx+<>pdo", "□△◇▽✕✚◁▷⬠◊●", strict=True))


def _map(history: History, shown: Mapping[str, str]) -> dict[str, Any] | None:
    if history.recipe is None:
        return None
    origins = Origins.of(history.recipe, history.start)
    models = origins.models
    classes = {model: f"m{place}" if place < N_COLOURS else "rest" for place, model in enumerate(models)}
    blocks = [
        (block, [_bar(cells[part], classes, shown) if part in cells else None for part in origins.parts])
        for block, cells in list(origins.blocks.items())[:MOST_BLOCKS]
    ]
    legend = [(classes[model], shown.get(model, model)) for model in models[:N_COLOURS]]
    return {
        "parts": origins.parts,
        "blocks": blocks,
        "outside": [(module, _bar(cell, classes, shown)) for module, cell in origins.outside.items()],
        "legend": legend + ([("rest", "others")] if len(models) > N_COLOURS else []),
        "evolved": EVOLVED in models,
        "from_start": history.start is not None,
        "base": shown.get(history.recipe.base, history.recipe.base),
        "cut": len(origins.blocks) - len(blocks),
    }


def _bar(cell: Cell, classes: Mapping[str, str], shown: Mapping[str, str]) -> Bar:
    total = sum(abs(share) for share in cell.shares.values()) or 1.0
    ordered = sorted(cell.shares.items(), key=lambda item: list(classes).index(item[0]))
    pieces = [
        (classes[model] + (" taken" if share < 0 else ""), f"{100 * abs(share) / total:.2f}", shown.get(model, model))
        for model, share in ordered
        if abs(share) / total >= 0.005
    ]
    said = ", ".join(f"{shown.get(model, model)} {share:+.2f}" for model, share in ordered)
    taken = ", ".join(map(str, cell.taken_from))
    return Bar(pieces, f"{cell.moved:.2f}", f"{said}; moved {cell.moved:.2f}", taken)


def _answers(history: History, shown: Mapping[str, str]) -> dict[str, Any] | None:
    """The questions whose answers the record has; None where it has none, as of older versions."""
    kept = history.values.get("answers")
    if not kept or not kept.get("asked"):
        return None
    asked = [
        {
            "dataset": shown.get(one["dataset"], one["dataset"]),
            "mode": one["mode"],
            "number": one["number"] + 1,
            "prompt": _cut(one["prompt"]),
            "expected": _cut(one["expected"]),
            "answers": [
                (shown.get(label, label), _cut(text), "" if score is None else f"{score:.4g}", label == history.result)
                for label, text, score in one["answers"]
            ],
        }
        for one in kept["asked"]
    ]
    return {"kind": kept["questions"], "asked": asked, "longest": kept.get("longest")}


def _cut(text: str) -> str:
    """A text that is no longer than what is shown, without its middle."""
    if len(text) <= LONGEST:
        return text
    return f"{text[: LONGEST // 4]}\n[...]\n{text[-3 * LONGEST // 4 :]}"


def _distances(history: History, shown: Mapping[str, str]) -> dict[str, Any] | None:
    anchor = history.values.get("anchor")
    if not anchor:
        return None
    name = anchor["model"]
    return {"from": shown.get(name, name), "unevenness": anchor["unevenness"], "table": distances_table(anchor, shown)}


def _settings(history: History) -> list[tuple[str, str]]:
    """Titles and texts: what the result depends on, and what it is known by."""
    header, values = history.header, history.values
    parts = {
        "Config": header.get("config"),
        "Versions and machine": header.get("environment") or {"olmfast": header.get("olmfast")},
        "Donors (xxh3-128 of config and tensors)": header.get("donors"),
        "Datasets (xxh3-128 of the files)": header.get("datasets"),
        "Questions": {key: header[key] for key in ("samples", "left_out") if header.get(key)},
        "Files of the tokenizer (xxh3-128)": header.get("tokenizer"),
        "Result": {key: values[key] for key in ("recipe_digest", "account") if key in values},
    }
    if history.recipe is not None:
        parts["Result"] = {
            "base": history.recipe.base,
            "recipe_digest": history.recipe.digest(),
            **(parts["Result"] or {}),
        }
    told = {
        title: yaml.safe_dump(part, sort_keys=False, allow_unicode=True, width=96)
        for title, part in parts.items()
        if part
    }
    return [(title, _first_lines(text)) for title, text in told.items()]


def _first_lines(text: str) -> str:
    lines = text.rstrip().splitlines()
    rest = len(lines) - MOST_LINES
    return "\n".join(lines if rest <= 0 else [*lines[:MOST_LINES], f"[{rest} more lines in merge_report.json]"])
