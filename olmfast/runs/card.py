"""The model card of a run's result: the choices made, and the scores with their settings."""

from __future__ import annotations

from olmfast.config.run import RunConfig
from olmfast.output.card import front_matter
from olmfast.runs.scoreboard import Scoreboard
from olmfast.search.record import Record
from olmfast.weights.recipe import Recipe


def write_card(config: RunConfig, record: Record, recipe: Recipe, boards: dict[str, Scoreboard], account: str) -> str:
    """README.md of the result. Never needs the network: it names models, it does not look them up."""
    base = recipe.base
    donors = [base, *(name for name in record.header["donors"] if name != base)]
    parts = [front_matter(donors), "# Merged model\n"]
    parts.append(
        f"Made by olmfast {record.header['environment']['olmfast']} from {len(donors)} models; base: `{base}`. "
        "Lower scores are better. Skill retained: 1 is as good as the best donor on every dataset, 0 as the worst.\n"
    )
    for title, board in boards.items():
        if board.rows:
            entries = config.dataset if title == "Selection" else config.holdout
            parts.append(f"## {title} scores\n\n{_table(board)}\n")
            settings = "; ".join(
                f"{name}: {entry.mode}, {record.header['samples'][name]} samples" for name, entry in entries.items()
            )
            parts.append(f"{settings}; seed {config.seed}.\n")
    parts.append(f"## Choices\n\n{_choices(record)}\n\n{account}.\n\nRecipe {recipe.digest()}.\n")
    return "\n".join(parts)


def _table(board: Scoreboard) -> str:
    lines = ["| model | " + " | ".join(board.datasets) + " | skill retained |"]
    lines.append("|---" * (len(board.datasets) + 2) + "|")
    for label in board.rows:
        cells = [board.cell(label, name) for name in board.datasets]
        lines.append(f"| {label} | {' | '.join(cells)} | {board.retained(label):.3f} |")
    return "\n".join(lines)


def _choices(record: Record) -> str:
    lines = ["| unit | from |", "|---|---|"]
    for outcome in record.choices():
        lines.append(f"| {outcome.where} | {outcome.winner} |")
    return "\n".join(lines)
