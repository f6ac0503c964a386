"""The questions whose answers a record keeps, so that people can see what scores mean."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import islice, zip_longest
from typing import Any

from olmfast.cluster.scorer import ClusterEvaluation
from olmfast.evaluation.open import Evaluation, Questions
from olmfast.evaluation.replies import LONGEST, text_of
from olmfast.evaluation.scorer import Candidate
from olmfast.runs.scoreboard import Scoreboard
from olmfast.weights.recipe import Recipe

MOST_CHARACTERS = 8000  # of a question or an answer that is kept


def answered(
    evaluation: Evaluation | ClusterEvaluation,
    questions: Questions,
    kind: str,
    board: Scoreboard,
    models: Mapping[str, Recipe],
    n: int,
) -> dict[str, Any]:
    """Ask models (label -> recipe, with rows in `board`) a few questions: plain JSON values for the record.

    These are `n`, or one per dataset where there are more datasets than that. The live model is left as it was.
    """
    labels = [label for label in models if label in board.samples]  # the first is shown first
    chosen = dict(_chosen(board, labels, n)) if n else {}
    said: dict[str, dict[str, list[str]]] = {}
    for label in labels if chosen else []:
        said[label] = evaluation.replies(Candidate(label, recipe=models[label]), questions, chosen)
    asked = []
    for name, indices in chosen.items():
        dataset = questions.datasets[name]
        for place, index in enumerate(indices):
            sample = dataset.samples[index]
            prompt, expected = (text_of(tokens, questions.tokenizer) for tokens in (sample.prompt, sample.response))
            answers = [[label, _cut(said[label][name][place]), board.samples[label][name][index]] for label in labels]
            about = {"dataset": name, "number": index, "mode": dataset.config.mode}
            asked.append({**about, "prompt": _cut(prompt), "expected": _cut(expected), "answers": answers})
    return {"questions": kind, "longest": LONGEST, "asked": asked}


def _chosen(board: Scoreboard, labels: Sequence[str], n: int) -> Iterator[tuple[str, list[int]]]:
    """Dataset -> its questions: of each in turn the first that tells the models apart."""
    each = {name: _telling(board, labels, name) for name in board.datasets}
    turns = ([(name, index) for name, index in zip(each, turn, strict=True)] for turn in zip_longest(*each.values()))
    listed = [(name, index) for turn in turns for name, index in turn if index is not None]
    taken = list(islice(listed, max(n, len(each))))
    for name in each:
        if indices := [index for own, index in taken if own == name]:
            yield name, indices


def _telling(board: Scoreboard, labels: Sequence[str], name: str) -> list[int]:
    """The questions on which the models' scores differ by half as much as on any other; where none does, the first."""
    rows = [board.samples[label][name] for label in labels]
    gaps = [max(scores) - min(scores) for scores in zip(*rows, strict=True)]
    largest = max((gap for gap in gaps if math.isfinite(gap)), default=0.0)
    return [index for index, gap in enumerate(gaps) if gap >= largest / 2] if largest else [0]


def _cut(text: str) -> str:
    """A text that is no longer than what is kept, without its middle."""
    if len(text) <= MOST_CHARACTERS:
        return text
    return f"{text[: MOST_CHARACTERS // 4]}\n[...]\n{text[-3 * MOST_CHARACTERS // 4 :]}"
