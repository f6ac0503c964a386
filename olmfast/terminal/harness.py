"""What a terminal shows of lm-evaluation-harness: a row per task and metric, a column per model."""

from __future__ import annotations

import json
from typing import Any

from olmfast.runs import harness
from olmfast.search.log import strict
from olmfast.terminal.runs import print_rows


def evaluate_lm_eval(model: str, tasks: str, as_json: bool, **options: Any) -> None:
    """Evaluate and print the table. Raises InputError for what is unusable."""
    names = [name.strip() for name in tasks.split(",") if name.strip()]
    board = harness.evaluate_with_harness(model, names, **options)
    if as_json:
        print(json.dumps(strict(board.to_json()), indent=2))
        return
    print_rows(board.table(), board.title)
