"""What a report tells of searches of a kind of their own, and of scores beside those that a search goes by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from markupsafe import Markup

from olmfast.report import paths
from olmfast.report.history import History
from olmfast.report.tables import Table, scores_table
from olmfast.runs.harness import HarnessBoard
from olmfast.runs.scoreboard import Scoreboard

# Parts of a pruning's closing table. Its speeds are no part of a report: they differ each time.
KEPT = {"generated": "Answers that are generated", "answers": "Loss on answers", "questions": "Loss on questions"}


def found_by(history: History, shown: Mapping[str, str]) -> list[dict[str, Any]]:
    """What a search of paths, of blocks run twice or of layers to prune found, and what else was scored.

    Each has a title, and a text, a table and a picture that may be empty.
    """
    found, values = [], history.values
    if report := values.get("repeats"):
        head, *rows = paths.table(report)
        svg = Markup(paths.heat_map(report))
        found.append(
            {"title": "Blocks run twice", "text": paths.summary(report), "table": Table(head, rows), "svg": svg}
        )
    if report := values.get("paths"):
        head, *rows = paths.front_table(report)
        text = f"{report['comparisons']} paths were compared on other questions to find these"
        found.append({"title": "Score against depth", "text": text, "table": Table(head, rows), "svg": ""})
    if pruned := values.get("pruned"):
        front = pruned.get("front", {})
        rows = [[layers, f"{one['objective']:.4f}", ", ".join(map(str, one["gone"]))] for layers, one in front.items()]
        table = Table(["layers", "score", "without layers"], rows) if rows else None
        found.append({"title": "Layers", "text": _pruned(pruned), "table": table, "svg": ""})
    if skill := values.get("validation", {}).get("skill"):
        chosen = list(skill).index(values["validation"]["result"])
        rows = [[name, "" if value is None else f"{value:.3f}"] for name, value in skill.items()]
        table = Table(["state of the search", "skill"], rows, chosen)
        text = "Of what the search went through, the marked one is the result"
        found.append({"title": "Validation, on questions that no step used", "text": text, "table": table, "svg": ""})
    if told := values.get("final_eval"):
        harness = HarnessBoard.from_json(told)
        head, *rows = harness.table()
        found.append({"title": "Tasks", "text": harness.title, "table": Table(head, rows, many=True), "svg": ""})
    for kind, title in KEPT.items():
        if (kept := values.get("closing", {}).get(kind)) and kept["rows"]:
            table = scores_table(Scoreboard.from_json(kept), history.result, shown)
            found.append({"title": title, "text": "", "table": table, "svg": ""})
    if parameters := values.get("closing", {}).get("parameters"):
        rows = [[label, f"{n:,}"] for label, n in parameters.items()]
        found.append({"title": "Parameters", "text": "", "table": Table(["model", "parameters"], rows), "svg": ""})
    return found


def _pruned(pruned: Mapping[str, Any]) -> str:
    told = []
    if "first" in pruned:
        told.append(f"layers {pruned['first']} to {pruned['first'] + pruned['steps']} became layer {pruned['first']}")
    if "gone" in pruned:
        told.append(f"layers {', '.join(map(str, pruned['gone']))} went into those below them")
    if alphas := pruned.get("alphas"):
        told.append("alphas " + ", ".join(f"{alpha:.4f}" for alpha in alphas))
    text = "; ".join(told)
    return text[:1].upper() + text[1:]
