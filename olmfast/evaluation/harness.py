"""lm-evaluation-harness: its tasks' documents as questions, and a live model evaluated by its documented Python call.

What a document asks and which answer is right is the harness' own to say (`fewshot_context`, `construct_requests`,
`doc_to_target`), with its seeds. The package lm-eval is an extra, imported when it is first asked for.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

from olmfast.config.datasets import DatasetConfig
from olmfast.errors import InputError, did_you_mean, told
from olmfast.evaluation.items import NO_ANSWER, Conversation
from olmfast.evaluation.metrics import CHOICES, GENERATIVE
from olmfast.evaluation.rendering import silenced

SEED = 1234  # the harness' own, of worked examples
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
ANSWERED = ("multiple_choice", "loglikelihood", "generate_until")


def load_harness() -> Any:
    """The package. Raises InputError where it is not installed."""
    try:
        import lm_eval
        import lm_eval.tasks
    except ImportError as error:
        raise InputError("lm_eval: the package lm-eval is not installed; pip install 'olmfast[eval]'") from error
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    return lm_eval


def manager(names: Sequence[str], include: Path | None) -> Any:
    """A TaskManager that knows the tasks: those of the folder `include`, and where these are not enough the harness'.

    Raises InputError for a folder that is none, or a name that no task, group or tag has.
    """
    tasks = load_harness().tasks
    if include is not None and not include.is_dir():
        raise InputError(f"{include}: is no folder of tasks")
    known: list[str] = []
    for defaults in (False, True):
        if include is None and not defaults:
            continue
        try:
            found = _scanned(tasks, include, defaults, _changed(include))
        except Exception as error:  # a task's file that is not to be read raises whatever reading it raises
            raise InputError(f"{include}: its tasks cannot be read: {told(error)}") from error
        known = found.all_tasks
        if all(name in known for name in names):
            return found
    missing = next(name for name in names if name not in known)
    raise InputError(f"lm_eval: no task is called {missing!r}{did_you_mean(missing, known)}")


@lru_cache(maxsize=4)
def _scanned(tasks: Any, include: Path | None, defaults: bool, _: float) -> Any:
    """Reading thousands of files takes seconds: once while they do not change."""
    return tasks.TaskManager(include_path=None if include is None else str(include), include_defaults=defaults)


def _changed(include: Path | None) -> float:
    """When anything in the folder was last changed."""
    return 0.0 if include is None else max(path.stat().st_mtime for path in [include, *include.rglob("*.yaml")])


@contextmanager
def _told(what: str) -> Iterator[None]:
    """Say of whatever a task raises, which may run code of its own, which task it was."""
    try:
        with silenced():
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"lm_eval: {what}: {type(error).__name__}: {told(error)}") from error


def conversations(entry: DatasetConfig, include: Path | None) -> tuple[list[Conversation], Counter[str]]:
    """The documents of a task's split as questions, and how many are left out, by reason.

    Raises InputError for a task that is not there, is of another kind, or has no such split.
    """
    name = str(entry.lm_eval)
    with _told(name):
        loaded = manager([name], include).load([name])["tasks"]
    if list(loaded) != [name]:
        raise InputError(f"lm_eval: {name} is a group of {len(loaded)} tasks; name one, such as {next(iter(loaded))}")
    task = loaded[name]
    kind = task.OUTPUT_TYPE
    if kind not in (*ANSWERED, "loglikelihood_rolling"):
        raise InputError(f"lm_eval: {name} is a task of kind {kind}; expected one of {', '.join(ANSWERED)}")
    with _told(name):
        docs = _documents(task, name, entry.split)
        task.set_fewshot_seed(seed=SEED)
        found, left_out = list[Conversation](), Counter[str]()
        for number in range(min(len(docs), entry.samples)):
            made = _conversation(task, docs[number], number, entry.mode)
            made = made.question if entry.of_question and made.messages else made
            if made.response or entry.mode in GENERATIVE:
                found.append(made)
            else:
                left_out[NO_ANSWER] += 1
    if not found:
        raise InputError(f"lm_eval: {name}: none of its documents has an answer")
    return found, left_out


def _documents(task: Any, name: str, split: str | None) -> Any:
    """The documents of a split: `test` is the split that the task is scored by, the others must not be."""
    if split == "test":
        return list(task.eval_docs)
    # A task without a test split is scored by its validation split: no choice may be made by that.
    own = {"train": task.has_training_docs(), "validation": task.has_validation_docs() and task.has_test_docs()}
    wanted = split or next((part for part in ("validation", "train") if own[part]), None)
    if wanted is None or not own[wanted]:
        others = [part for part, there in own.items() if there]
        scored = wanted != "train" and task.has_validation_docs()
        why = "its validation split is what it is scored by" if scored else f"has no {wanted or 'other'} split"
        instead = f"use split: {others[0]}" if others else "it has no split to search by"
        raise InputError(f"lm_eval: {name}: {why}; {instead}")
    return list(task.training_docs() if wanted == "train" else task.validation_docs())


def _conversation(task: Any, doc: Any, number: int, mode: str) -> Conversation:
    """What the harness would ask of a document, and the right answer."""
    sampler: Any = getattr(task, "sampler", None)
    shots, sample = task.config.num_fewshot or 0, getattr(sampler, "sample", None)
    if shots and sample is not None:  # none of its worked examples may be the question itself
        sampler.sample = lambda n, **rest: sample(n, **{**rest, "eval_doc": doc})
    try:
        context = task.fewshot_context(doc, num_fewshot=shots, gen_prefix=task.doc_to_prefix(doc))
    finally:
        if shots and sample is not None:
            sampler.sample = sample
    made = task.construct_requests(doc=doc, ctx=context, metadata=(task.config.task, number, 1))
    requests = made if isinstance(made, list) else [made]
    if task.OUTPUT_TYPE == "loglikelihood_rolling":
        return Conversation((), requests[0].args[0], (), number)
    if task.OUTPUT_TYPE == "multiple_choice":
        return _choice(task, doc, [request.args for request in requests], number, mode)
    asked, *rest = requests[0].args
    if task.OUTPUT_TYPE == "loglikelihood":
        return _pair(asked, rest[0], number)
    target = task.doc_to_target(doc)
    target = (target[0] if target else "") if isinstance(target, list) else target
    return _pair(asked, f"{task.config.target_delimiter}{target}" if str(target) else "", number)


def _choice(task: Any, doc: Any, pairs: Sequence[Any], number: int, mode: str) -> Conversation:
    """The right option's text as the answer; among letters, where all options are letters, in the modes of choices."""
    options = task.doc_to_choice(doc)
    right = task.doc_to_text(doc) if task.multiple_input else task.doc_to_target(doc)
    right = right[0] if isinstance(right, list) else right
    right = options.index(right) if isinstance(right, str) and right in options else right
    if not isinstance(right, int) or not 0 <= right < len(options):
        return Conversation(({"role": "user", "content": pairs[0][0]},), "", (), number)
    asked, answer = pairs[right][:2]
    if mode not in CHOICES:
        return _pair(asked, answer, number)
    if [str(option) for option in options] != list(LETTERS[: len(options)]):
        raise InputError(f"mode {mode}: its options are not the letters A, B, ...; use mode exact")
    return Conversation(({"role": "user", "content": asked.rstrip()},), options[right], tuple(options), number)


def _pair(asked: str, answer: str, number: int) -> Conversation:
    """Spaces between question and answer belong to the answer, as the harness has it."""
    bare = asked.rstrip()
    if not bare:
        return Conversation((), asked + answer, (), number)
    return Conversation(({"role": "user", "content": bare},), asked[len(bare) :] + answer if answer else "", (), number)


def evaluate_module(
    module: Any,
    tokenizer: Any,
    names: Sequence[str],
    *,
    include: Path | None,
    limit: float | None,
    batch_size: int | str,
) -> dict[str, Any]:
    """What `lm_eval.simple_evaluate` gives of a Transformers module; samples are logged.

    Raises InputError for tasks that are not there or fail.
    """
    harness, tasks = load_harness(), manager(names, include)
    from lm_eval.models.huggingface import HFLM

    with _told(", ".join(names)):
        wrapped = HFLM(pretrained=module, tokenizer=tokenizer, batch_size=batch_size)
        call = partial(harness.simple_evaluate, model=wrapped, tasks=list(names), task_manager=tasks, log_samples=True)
        found: dict[str, Any] | None = call(limit=limit)
    if found is None:
        raise InputError(f"lm_eval: {', '.join(names)}: gave no results")
    return found
