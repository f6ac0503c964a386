"""The model card of a run's result: the choices made, and the scores with their settings."""

from __future__ import annotations

from collections.abc import Sequence

from olmfast.config.run import RunConfig
from olmfast.output.card import front_matter
from olmfast.runs.scoreboard import Scoreboard
from olmfast.runs.verdict import Verdict
from olmfast.search.record import Record
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe

INTERVALS = "Differences are of skill retained, with 95 % intervals over the questions."


def write_card(
    config: RunConfig,
    record: Record,
    recipe: Recipe,
    boards: dict[str, Scoreboard],
    verdict: Verdict | None,
    account: str,
    pool: Pool,
    sections: Sequence[str] = (),
) -> str:
    """README.md of the result. Never needs the network: it names models, it does not look them up."""
    base = recipe.base
    donors = [base, *(name for name in record.header["donors"] if name != base)]
    parts = [front_matter(pool.made_of(donors)), "# Merged model\n"]
    parts.append(
        f"Made by olmfast {record.header['environment']['olmfast']} from {len(donors)} models; base: `{base}`. "
        "Lower scores are better. Skill retained: 1 is as good as the best donor on every dataset, 0 as the worst.\n"
    )
    if verdict is not None:
        first, *others = verdict.lines()
        listed = "\n".join(f"- {line}" for line in others)
        parts.append(f"## Verdict\n\n{first}.\n\n{listed}\n\n{INTERVALS}\n")
    for title, board in boards.items():
        if board.rows:
            entries = config.dataset if title == "Selection" else config.holdout
            parts.append(f"## {title} scores\n\n{_table(board)}\n")
            if remark := board.remark():
                parts.append(f"{remark[0].upper()}{remark[1:]}.\n")
            settings = "; ".join(
                f"{name}: {entry.mode}, {record.header['samples'][name]} samples" for name, entry in entries.items()
            )
            parts.append(f"{settings}; seed {config.seed}.\n")
    parts += sections
    parts.append(f"## Choices\n\n{_choices(record)}\n\n{account}.\n\nRecipe {recipe.digest()}.\n")
    return "\n".join(parts)


def _table(board: Scoreboard) -> str:
    header = ["model", *map(board.heading, board.datasets), *(["skill retained"] if board.has_scale else [])]
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for label in board.rows:
        cells = [label, *(board.cell(label, name) for name in board.datasets)]
        cells += [f"{board.retained(label):.3f}"] if board.has_scale else []
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _choices(record: Record) -> str:
    lines = ["| unit | from |", "|---|---|"]
    for outcome in record.choices():
        lines.append(f"| {outcome.where} | {outcome.winner} |")
    return "\n".join(lines)
