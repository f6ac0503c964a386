"""The options of a multiple choice, and which of them is right, as files say it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from math import isfinite
from typing import Any

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


def options_of(given: Any) -> tuple[Any, list[Any]]:
    """The options of a multiple choice and what they are called, if they have names.

    They are a list of texts, or of texts with their labels; lists of both (ARC on the Hub); or a mapping of labels to
    texts (MedQA), of which those that are null count as none.
    """
    if isinstance(given, dict) and "text" in given:
        labels = given.get("label")
        return given["text"], labels if isinstance(labels, list) else []
    if isinstance(given, dict):
        held = {label: text for label, text in given.items() if text is not None}
        return list(held.values()), list(held)
    if isinstance(given, list) and given and all(isinstance(one, dict) and "text" in one for one in given):
        return [option["text"] for option in given], [option.get("label") for option in given]
    return given, []


def scored_of(given: Any) -> list[tuple[str, float]] | None:
    """Options with a score for each, by alphabet, for files that have scores tend to have the right option first.

    They are a mapping of options to scores (BIG-bench), of which those that are null count as none, or two lists
    (TruthfulQA on the Hub). None for anything else.
    """
    if not isinstance(given, dict):
        return None
    texts, scores = list(given), list(given.values())
    if given.keys() == {"choices", "labels"}:
        texts, scores = given["choices"], given["labels"]
    if not isinstance(texts, list) or not isinstance(scores, list) or len(texts) != len(scores):
        return None
    pairs = [(text, score) for text, score in zip(texts, scores, strict=True) if score is not None]
    is_scored = all(
        isinstance(t, str) and (isinstance(s, int) or (isinstance(s, float) and isfinite(s))) for t, s in pairs
    )
    return sorted(pairs) if is_scored else None


def letter_of(right: Any, labels: list[Any], choices: list[Any], first_index: int | None) -> str | None:
    """The letter of the right option, which is named by its label, its letter, its text or its number, counted from
    `first_index` (None: numbers name none). None where it names none of them."""
    letters = LETTERS[: len(choices)]
    if isinstance(right, (bool, list, dict)) or right is None:
        return None
    named = [str(label) for label in labels]
    if str(right) in named and named.index(str(right)) < len(letters):
        return letters[named.index(str(right))]
    if isinstance(right, str) and len(right) == 1 and right in letters:
        return right
    if isinstance(right, str) and choices.count(right) == 1:
        return letters[choices.index(right)]
    if isinstance(right, str) and (found := re.fullmatch(r"\(?([A-Za-z])[).]?", right.strip())):
        return found[1].upper() if found[1].upper() in letters else None
    index = index_of(right)
    if index is None or first_index is None or not 0 <= index - first_index < len(letters):
        return None
    return letters[index - first_index]


def index_of(right: Any) -> int | None:
    """The number that a right option is named by, if it is one."""
    if isinstance(right, str) and re.fullmatch(r"-?\d{1,2}(\.0)?", right.strip()):
        right = float(right)
    is_whole = isinstance(right, (int, float)) and not isinstance(right, bool) and right == right // 1
    return int(right) if is_whole else None


def first_index(found: Iterable[tuple[int, int] | None]) -> int:
    """What the numbers of right options, each with how many there are, count from: 1 if one of them is that of the last
    option by 1 and none is 0; else 0."""
    numbers = [one for one in found if one is not None and one[0] >= 0]
    return int(any(index == n for index, n in numbers) and all(1 <= index <= n for index, n in numbers))
