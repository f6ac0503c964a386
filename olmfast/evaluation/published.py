"""Multiple choices whose keys are their own, as published: what `fields` would say of them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from olmfast.config.datasets import Fields, one_or_more


class Shape(NamedTuple):
    """What holds what, and what the number of a right option counts from; None where files differ."""

    fields: Fields
    first_index: int | None = None


SHAPES = (
    Shape({"prompt": "ctx", "choices": "endings", "answer": "label"}, 0),  # HellaSwag
    Shape({"prompt": "goal", "choices": ["sol1", "sol2"], "answer": "label"}, 0),  # PIQA
    Shape({"prompt": "sentence", "choices": ["option1", "option2"], "answer": "answer"}, 1),  # WinoGrande
    Shape({"prompt": "question", "choices": ["opa", "opb", "opc", "opd"], "answer": "cop"}),  # MedMCQA
    Shape(  # SciQ
        {
            "prompt": ["support", "question"],
            "response": "correct_answer",
            "choices": ["correct_answer", "distractor1", "distractor2", "distractor3"],
            "answer": "correct_answer",
        }
    ),
    Shape(  # GPQA
        {
            "prompt": "Question",
            "response": "Correct Answer",
            "choices": ["Correct Answer", "Incorrect Answer 1", "Incorrect Answer 2", "Incorrect Answer 3"],
            "answer": "Correct Answer",
        }
    ),
)


def shape_of(item: Mapping[Any, Any]) -> Shape:
    """That of an item that has all keys of a known one; of any other nothing is known."""
    for shape in SHAPES:
        if all(key in item for keys in shape.fields.values() for key in one_or_more(keys)):
            return shape
    return Shape({})
