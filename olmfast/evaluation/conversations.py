"""Dataset files -> conversations: JSON, JSON Lines, and the CSV files of MMLU; `items.py` reads what a file lists."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from olmfast.config.datasets import DatasetConfig, Fields, one_or_more
from olmfast.errors import InputError, show
from olmfast.evaluation import harness
from olmfast.evaluation.item_files import items_in
from olmfast.evaluation.items import KNOWN, NO_ANSWER, SCORED, SCORED_LISTS, Conversation, Item, spelled
from olmfast.evaluation.metrics import CHOICES, GENERATIVE
from olmfast.evaluation.mmlu import LETTERS, Subject, is_mmlu_file, read_mmlu, read_questions, worked_examples
from olmfast.evaluation.options import first_index
from olmfast.evaluation.published import Shape, shape_of


class Conversations(NamedTuple):
    """What a dataset file holds, as far as a mode can use it, and how many items are left out, by reason."""

    usable: list[Conversation]
    left_out: Counter[str]


def conversations_of(path: Path, entry: DatasetConfig) -> Conversations:
    """What a dataset's entry says of a file, a folder of MMLU, or a task. Raises what `load_conversations` raises, and
    what `harness.conversations` does."""
    if entry.lm_eval is not None:
        return Conversations(*harness.conversations(entry, path if entry.lm_eval_path else None))
    if not path.is_dir():
        return load_conversations(path, entry.mode, entry.samples, entry.fields, of_question=entry.of_question)
    found: list[Conversation] = []
    for subject in subjects_of(path, entry):
        before = "" if entry.of_question else subject.before(entry.shots)
        for question in subject.questions:
            asked = ({"role": "user", "content": before + question.text},)
            options = tuple(LETTERS) if entry.mode in CHOICES else ()
            own = Conversation(asked, question.answer, options, len(found))
            found.append(own.question if entry.of_question else own)
    return Conversations(found, Counter())


def subjects_of(path: Path, entry: DatasetConfig) -> list[Subject]:
    """The subjects of a folder of MMLU that an entry asks for, with as many questions of each."""
    return read_mmlu(path, entry.subjects, 0 if entry.of_question else entry.shots, entry.samples)


def load_conversations(
    path: Path, mode: str, limit: int, fields: Fields | None = None, *, of_question: bool = False
) -> Conversations:
    """The first `limit` conversations of a file: JSON, JSON Lines, a table with a header, or without one as MMLU's.

    `fields` maps prompt, response, system, choices and answer to the keys of the items. Items without the expected
    answer that the mode needs, and those with tool calls, are left out. `of_question`: the questions' texts alone.
    Raises InputError naming the file and the item that no mode can use, or saying that no item is left.
    """
    if is_mmlu_file(path) and not fields:
        return Conversations(_mmlu(path, limit, of_question), Counter())
    usable, left_out = [], Counter[str]()
    named = {key for keys in (fields or {}).values() for key in one_or_more(keys)}
    items = items_in(path, named or KNOWN, named=bool(named))

    def item(number: int, data: dict[Any, Any], first: int = 0) -> Item:
        shape = Shape(fields) if fields else shape_of(data)
        first = first if shape.first_index is None else shape.first_index
        return Item(f"{path}: item {number}", data if shape.fields else spelled(data), shape.fields, first)

    known = [item(number, data) for number, data in enumerate(items) if isinstance(data, dict)]
    first = first_index(one.option_index() for one in known) if mode in CHOICES else 0
    for number, data in enumerate(items[:limit]):
        if not isinstance(data, dict):
            raise InputError(f"{path}: item {number}: expected an object, got {type(data).__name__}")
        found = item(number, data, first).conversation(mode)
        if isinstance(found, Conversation) and not found.response and mode not in GENERATIVE and not of_question:
            found = NO_ANSWER
        if isinstance(found, str):
            left_out[found] += 1
        else:
            usable.append(replace(found.question if of_question else found, number=number))
    if not usable:
        counted = ", ".join(f"{n} {why}" for why, n in left_out.items())
        more, first = "", items[0]
        if NO_ANSWER in left_out and isinstance(first, dict) and not fields:
            keys = show(", ".join(map(str, first)))
            wanted = "choices: ..., answer: ..." if mode in CHOICES else "response: ..."
            more = f"; of the keys {keys}, fields: {{prompt: ..., {wanted}}} says which are meant"
            if mode not in CHOICES and any(key in first for key in (*SCORED, SCORED_LISTS[0])):
                more = "; it is a multiple choice, which mode choice reads"
        raise InputError(f"{path}: no item can be scored by mode {mode}: {counted}{more}")
    return Conversations(usable, left_out)


def _mmlu(path: Path, limit: int, of_question: bool) -> list[Conversation]:
    """MMLU's own prompt: five worked examples of the subject's dev file, then the question.

    `<folder>/test/<subject>_test.csv` takes its examples from `<folder>/dev/<subject>_dev.csv`
    (Hendrycks et al., arXiv 2009.03300).
    """
    try:
        questions = tuple(read_questions(path))[:limit]
    except InputError as error:
        raise InputError(
            f"{error}; a table with a header is read with fields: {{prompt: ..., response: ...}}"
        ) from error
    examples = [example for shots in worked_examples(path) for example in read_questions(shots)]
    if not questions:
        raise InputError(f"{path}: holds no questions")
    subject = Subject(path.stem.rpartition("_")[0], tuple(examples), questions, (path,))
    before = "" if of_question else subject.before(len(examples))
    found = [
        Conversation(({"role": "user", "content": before + question.text},), question.answer, tuple(LETTERS), number)
        for number, question in enumerate(questions)
    ]
    return [own.question for own in found] if of_question else found
