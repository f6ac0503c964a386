"""One item of a dataset file -> a conversation: ShareGPT, OpenAI messages, pairs by many names, multiple choice."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from math import isfinite
from typing import Any

from olmfast.config.datasets import Fields, Wanted, one_or_more
from olmfast.errors import InputError, show
from olmfast.evaluation.metrics import CHOICES, GENERATIVE
from olmfast.evaluation.options import LETTERS, index_of, letter_of, options_of, scored_of
from olmfast.evaluation.turns import (
    HISTORY,
    LeftOut,
    alternating,
    are_texts,
    as_list,
    asks,
    calls_tools,
    has_parts,
    history_of,
    message_of,
    messages_of,
    role_of,
    system_of,
    text_of,
)

TURNS, CONTENTS = ("conversation", "conversations", "messages"), "contents"  # the last is Gemini's
OF_CHOICES = ("question", "question_stem", "query", "problem")  # what a multiple choice asks
SEVERAL = "turns"  # questions that follow one another, of which the first is asked: MT-bench
QUESTIONS = ("prompt", "instruction", *OF_CHOICES, "input", "inputs")
BEFORE_TOKENS = "_pretokenized"  # ends the names of the texts beside inputs and targets that are tokens: P3
WHOLE = "chosen"  # of a preference: the answer, or all messages up to it
ANSWERS = (
    *("response", "completion", "output", "answer", "solution", WHOLE, "target", "targets"),
    "canonical_solution",
)
# Answers where none of those is there, and the value is one: other files call other things so.
LATER = (
    *("preferred_output", "best_answer", "answers", "ideal", f"targets{BEFORE_TOKENS}", "ground_truth"),
    *("expected_output", "reference", "code"),
)
NUMBERS = ("ideal", "ground_truth", "expected_output")  # of these the answers that may be numbers
SEVERAL_ANSWERS = ("answers", "ideal", "targets", "best_answer")  # a list of them is of answers that are all right
PROGRAMS = ("code", "test", "tests", "test_list", "test_cases")  # beside these an expected output is a program's
ABOUT = ("passage", "article", "body", "story")  # what a question is about, told before it: AGIEval, RACE, SVAMP
MORE = ("input", "context")  # what an instruction is about, told after it: alpaca, dolly
SYSTEM = ("system", "system_prompt")
OPTIONS, RIGHT = ("choices", "options"), ("answer", "answerKey", "label")
# What names the right option where none of those does, and it names one: `correct` may also tell how a model did.
RIGHT_NAMED, RIGHT_NUMBERED = ("correct", "correct_option", "gold_label"), ("correct_option", "gold_label")
# Options with a score for each, of which the highest is right: BIG-bench and TruthfulQA, and BIG-bench on the Hub.
SCORED, SCORED_LISTS = ("target_scores", "mc1_targets"), ("multiple_choice_targets", "multiple_choice_scores")
KNOWN = {*TURNS, *QUESTIONS, WHOLE}  # by one of these an item is known
_SPELLED = {key.lower() for key in (*KNOWN, *ANSWERS, *LATER, *ABOUT, *MORE, *SYSTEM, HISTORY, *OPTIONS, *RIGHT)}
_SPELLED |= {key.lower() for key in (*RIGHT_NAMED, *SCORED, *SCORED_LISTS)}
FINAL = "####"  # GSM8K: the steps before it, the answer after it

NO_ANSWER, NO_QUESTION = "without an expected answer", "without a question"
OTHER_MODE = "is a multiple choice, which mode {} does not read; use mode choice"
TOOL_CALLS = "with tool calls"
SEVERAL_RIGHT = "with several right options"
UNWANTED = "with an answer that is labelled unwanted"  # KTO's `label: false`


@dataclass(frozen=True)
class Conversation:
    """Messages up to the question, and the expected response, empty if there is none; `options` are the letters of a
    choice. Without messages it is a text, the response. `number` says which item of its file it was."""

    messages: tuple[dict[str, str], ...]
    response: str
    options: tuple[str, ...] = field(default=())
    number: int = field(default=0, compare=False)

    @property
    def question(self) -> Conversation:
        """The question's own text."""
        return Conversation((), "\n\n".join(message["content"] for message in self.messages), (), self.number)


@dataclass(frozen=True)
class Item:
    """One item of a file, and where it is; `fields` maps what is wanted (prompt, response, ...) to the item's keys.

    `first_index` is what the number of a right option counts from.
    """

    where: str
    data: dict[str, Any]
    fields: Fields = field(default_factory=dict)
    first_index: int = 0

    def conversation(self, mode: str) -> Conversation | str:
        """The conversation, or why the item is left out. Raises InputError for one that is none."""
        try:
            return self._conversation(mode)
        except LeftOut as left_out:
            return str(left_out)

    def _conversation(self, mode: str) -> Conversation:
        turns = self._turns(mode)
        if any(calls_tools(turn) for turn in turns):
            raise LeftOut(TOOL_CALLS)
        messages = [message_of(self.where, turn) for turn in turns]
        response = ""
        if messages and messages[-1]["role"] == "assistant":
            response = messages.pop()["content"]
        last = messages[-1]["role"] if messages else "system"
        if last == "system" or (last == "assistant" and not response.strip()):
            raise LeftOut(NO_QUESTION)
        found = Conversation(tuple(messages), response if response.strip() else "")
        return self._with_options(found, mode) if mode in CHOICES else found

    def option_index(self) -> tuple[int, int] | None:
        """The number by which a multiple choice names its right option, where it does, and how many options it has."""
        try:
            choices, labels = options_of(self._given_options())
            right = self._right()
        except (InputError, LeftOut):  # which is told if the item is asked
            return None
        if not isinstance(choices, list) or letter_of(right, labels, choices, None) is not None:
            return None
        index = index_of(right)
        return None if index is None else (index, len(choices))

    def _turns(self, mode: str) -> list[Any]:
        """The messages as the item has them."""
        data = self.data
        if self.fields:
            if "choices" in self.fields and "response" not in self.fields and mode not in {*CHOICES, *GENERATIVE}:
                raise InputError(f"{self.where}: {OTHER_MODE.format(show(mode))}")
            asked, answer = self._prompt(), _named(self._field("response"))
            self._check_texts({"prompt": asked}, {"response": answer})
            return [*system_of(self._field("system")), *_asked(asked), *_answered(answer)]
        system = system_of(_first(data, SYSTEM))
        turns = as_list(next((data[key] for key in TURNS if key in data), None))
        if isinstance(turns, list) and turns:
            # The original OLM, whose key is `conversation`, reads nothing beside it.
            turns = alternating(turns)
            if "conversation" in data:
                return turns
            answer = _preferred(data.get(WHOLE)) if role_of(turns[-1]) == "user" else []
            return [*([] if role_of(turns[0]) == "system" else system), *turns, *answer]
        question = next((key for key in QUESTIONS if key in data), None)
        if turns == [] and question is None:
            raise LeftOut(NO_QUESTION)
        if turns is None and question is None and asks(data.get(WHOLE)):
            return [*([] if role_of(data[WHOLE][0]) == "system" else system), *data[WHOLE]]
        if turns is None and question is None and has_parts(data.get(CONTENTS)):
            return [*(system_of(data.get("systemInstruction")) or system), *data[CONTENTS]]
        if turns is None:
            question = self._other_question(question)
        if turns is None and question is not None and (mode in CHOICES or not self._is_choice(question)):
            answered, answer = self._answer(question)
            if answered == "completion" and data.get("label") is False:
                raise LeftOut(UNWANTED)
            if isinstance(answer, str) and FINAL in answer and question == "question":
                answer = answer.rpartition(FINAL)[2].strip()
            asked = self._first_turn() if question == SEVERAL else _question(data[question])
            self._check_texts({question: asked}, {} if mode in CHOICES else {answered: answer})
            if isinstance(asked, str):
                about = [*self._definition(question), *self._texts(ABOUT, question)]
                about = [text for text in about if text not in asked]  # not what it quotes
                asked = "\n\n".join([*about, asked, *self._texts(MORE, question)])
            before = [*system, *history_of(self.where, data.get(HISTORY))]
            if mode in CHOICES:
                return [*before, *_asked(asked)]
            if asks(answer) and len(answer) - 1 > len(_asked(asked)):  # what was said before, beside its last question
                return [*([] if role_of(answer[0]) == "system" else before), *answer]
            return [*before, *_asked(asked), *_answered(answer)]
        if turns is None and question is not None:
            raise InputError(f"{self.where}: {OTHER_MODE.format(show(mode))}")
        keys = ", ".join(map(str, data)) or "none"
        also, fields = "", "{prompt: ..., response: ...}"
        if mode in CHOICES:
            also, fields = ", or question and choices", "{prompt: ..., choices: ..., answer: ...}"
        raise InputError(
            f"{self.where}: expected 'conversation', 'conversations', 'messages' or 'prompt' and 'response'{also}, got "
            f"{show(keys)}; other keys are named by fields: {fields}"
        )

    def _texts(self, keys: tuple[str, ...], question: str) -> list[str]:
        """What the item says beside its question under these keys. Raises InputError for what is no text."""
        texts = []
        for key in keys:
            value = None if key == question else _written(self.data.get(key))
            if isinstance(value, list) and all(isinstance(text, str) for text in value):
                value = "\n\n".join(value)
            if value is not None and not isinstance(value, str):
                raise InputError(
                    f"{self.where}: {key}: expected a text, got {show(value)}; fields: {{prompt: {question}, ...}} "
                    "leaves it out"
                )
            texts += [value] if value and value.strip() else []
        return texts

    def _prompt(self) -> Any:
        """What `fields` calls the prompt; of several keys the texts one after another."""
        keys = self.fields.get("prompt")
        if not isinstance(keys, list):
            return self._field("prompt")
        held = {key: _written(self._at("prompt", key)) for key in keys}
        for key, value in held.items():
            if value is not None and not isinstance(value, str):
                raise InputError(f"{self.where}: {key}: expected a text, got {show(value)}")
        return "\n\n".join(text for text in held.values() if text and text.strip())

    def _first_turn(self) -> str:
        """The first of the user's turns, each of which is a text, or an object with it as Arena-Hard has them."""
        turns = self.data[SEVERAL]
        first = turns[0] if isinstance(turns, list) and turns else None
        if isinstance(first, dict) and role_of(first) is None:
            first = first.get("content")
        if not isinstance(first, str):
            raise InputError(f"{self.where}: {SEVERAL}: expected a list of the user's texts, got {show(turns)}")
        return first

    def _other_question(self, question: str | None) -> str | None:
        """The key of the question where it is under none of QUESTIONS, or there as tokens: MT-bench, MBPP, P3."""
        data, text = self.data, f"inputs{BEFORE_TOKENS}"
        are_tokens = question == "inputs" and isinstance(data["inputs"], list)
        if isinstance(data.get(text), str) and (question is None or are_tokens):
            return text
        if question is None and isinstance(data.get(SEVERAL), list) and data[SEVERAL]:
            return SEVERAL
        is_program = isinstance(data.get("text"), str) and isinstance(data.get("code"), str) and "test_list" in data
        return "text" if question is None and is_program else question

    def _answer(self, question: str) -> tuple[str, Any]:
        """The key of the expected answer and what it holds, of several that are right the first."""
        data, text = self.data, f"targets{BEFORE_TOKENS}"
        key = next((key for key in ANSWERS if key in data), None)
        if key is None:
            later = ((key, self._later(key, question)) for key in LATER if key in data)
            return next(((key, value) for key, value in later if value is not None), (ANSWERS[0], None))
        if (
            key == "targets"
            and isinstance(data.get(text), str)
            and isinstance(data[key], list)
            and not are_texts(data[key])
        ):
            return text, data[text]
        if key == "answer" and (answer := self._yes_or_no()) is not None:
            return key, answer
        of_several = key in SEVERAL_ANSWERS or (key == "target" and question == "input")  # BIG-bench
        return key, _first_of(data[key]) if of_several or data[key] == [] else _expected(data[key])

    def _later(self, key: str, question: str) -> Any:
        """The answer under a key of LATER; None where it means something else."""
        data, value = self.data, _written(self.data[key])
        if isinstance(self.data[key], (int, float)) and key not in NUMBERS:
            return None
        if key in SEVERAL_ANSWERS and not (key == "answers" and isinstance(value, list) and self._marks_one()):
            value = _first_of(value)
        if key in ("answers", "ground_truth") and isinstance(value, str) and value.lstrip()[:1] in ("{", "["):
            return None  # what a program checks by, or a list that a table wrote as text
        if key == "expected_output" and ((question != "input" and "input" in data) or any(k in data for k in PROGRAMS)):
            return None
        if key == "reference":  # MT-bench: one for each turn
            value = (value[0] if value else None) if isinstance(value, list) else value
            value = value if question == SEVERAL else None
        if key == "code" and not (question in ("text", "prompt") and isinstance(data.get("test_list"), list)):  # MBPP
            return None
        if key == "preferred_output" and _preferred(value):
            return _expected(value)
        return value if isinstance(value, str) else None

    def _yes_or_no(self) -> str | None:
        """The answer to a question about a passage that is true or false: BoolQ."""
        data = self.data
        answers = {True: "yes", False: "no"}
        is_one = "passage" in data and not self.fields and isinstance(data.get("answer"), bool)
        return answers[data["answer"]] if is_one else None

    def _marks_one(self) -> bool:
        """Whether the item says which of its answers is right: they are options then."""
        marks = ("label", "correct", "gold", "best_answer", "answer_i", "answerkey", "right")
        return any(str(key).lower().startswith(marks) for key in self.data)

    def _definition(self, question: str) -> list[str]:
        """What is asked of every input of a task of Natural Instructions, as the Hub has them."""
        data = self.data
        is_task = "task_name" in data or str(data.get("id")).startswith("task")
        text = text_of(data.get("definition")) if question == "inputs" and "targets" in data and is_task else ""
        return [text] if text else []

    def _is_choice(self, question: str) -> bool:
        """Whether a mode that reads no options has nothing to ask but options."""
        return question in OF_CHOICES and self._plain_options() is not None

    def _scored(self) -> list[tuple[str, float]] | None:
        """The options of a multiple choice by alphabet, with a score for each; None if they have none.

        Raises InputError for scores that are none.
        """
        if "choices" in self.fields or self._plain_options() is not None:
            return None
        given = {key: self.data[key] for key in SCORED if _written(self.data.get(key))}
        if _written(self.data.get(SCORED_LISTS[0])):
            given[SCORED_LISTS[0]] = {"choices": self.data[SCORED_LISTS[0]], "labels": self.data.get(SCORED_LISTS[1])}
        found = next((scored for one in given.values() if (scored := scored_of(one)) is not None), None)
        if found is None and given:
            key = next(iter(given))
            raise InputError(f"{self.where}: {key}: expected options and a number for each, got {show(given[key])}")
        return found

    def _check_texts(self, asked: Mapping[str, Any], answered: Mapping[str, Any]) -> None:
        """Raise InputError for a question that is no text and no messages, or an answer that is no number either."""
        for key, value in {**asked, **answered}.items():
            fits = isinstance(value, str) or bool(messages_of(value))
            if not fits and (key in asked or isinstance(value, (bool, list, dict))):
                more = ""
                if key in answered and are_texts(value) and not self.fields:
                    more = f"; if all are right, fields: {{prompt: ..., response: {key}}} takes the first"
                raise InputError(f"{self.where}: {key}: expected a text or a list of messages, got {show(value)}{more}")

    def _given_options(self) -> Any:
        """What holds the options of a multiple choice; None if nothing does."""
        keys = self.fields.get("choices")
        if isinstance(keys, list):
            options = {key: self._at("choices", key) for key in keys}
            if self._right_key() is None:
                return options
            return dict(sorted(options.items(), key=lambda option: str(option[1])))  # it tends to be the first
        if keys is not None:
            return self._field("choices")
        plain = self._plain_options()
        if plain is None and self._yes_or_no() is not None:
            return ["yes", "no"]
        scored = self._scored() if plain is None else None
        return plain if scored is None else [text for text, _ in scored]

    def _plain_options(self) -> Any:
        """The options that the item has without scores."""
        found = next((place[key] for place in self._places() for key in OPTIONS if key in place), None)
        if found is not None:
            return found
        lettered = {letter: self.data[letter] for letter in takewhile(self._has_text, LETTERS)}  # C-Eval, CMMLU
        return lettered if len(lettered) > 1 else None

    def _has_text(self, key: str) -> bool:
        value = self.data.get(key)
        return value is not None and not isinstance(value, (list, dict)) and str(value).strip() != ""

    def _places(self) -> list[dict[str, Any]]:
        """What may hold the options: the item, and its question where that holds more than a text."""
        asked = self.data.get("question")
        return [self.data, asked] if isinstance(asked, dict) else [self.data]

    def _field(self, name: Wanted) -> Any:
        """What the key that `fields` names holds; None where it names none. Raises InputError if it is missing."""
        keys = self.fields.get(name)
        return None if keys is None else self._at(name, one_or_more(keys)[0])

    def _at(self, name: Wanted, key: str) -> Any:
        if key not in self.data:
            raise InputError(
                f"{self.where}: fields: {name}: no key {show(key)}, got {show(', '.join(map(str, self.data)))}"
            )
        return self.data[key]

    def _right_key(self) -> str | None:
        """The key of the option that `fields` says is the right one, where each option has a key."""
        keys, right = self.fields.get("choices"), self.fields.get("answer")
        return right if isinstance(keys, list) and isinstance(right, str) and right in keys else None

    def _right(self) -> Any:
        """What names the right option, the letter of the one of the highest score where they have scores."""
        if (key := self._right_key()) is not None:
            return key
        scored = None if "answer" in self.fields else self._scored()
        if scored is not None:
            best = max((score for _, score in scored), default=None)
            right: Any = [LETTERS[n : n + 1] for n, (_, score) in enumerate(scored) if score == best]
        else:
            right = self._field("answer") if "answer" in self.fields else self._yes_or_no() or _first(self.data, RIGHT)
        if right is None and not self.fields:
            right = self._right_named()
        if isinstance(right, list) and len(right) > 1:
            raise LeftOut(SEVERAL_RIGHT)
        return (right or [None])[0] if isinstance(right, list) else right

    def _right_named(self) -> Any:
        """What names the right option under one of RIGHT_NAMED; None if nothing there names one."""
        choices, labels = options_of(self._given_options())
        for key in RIGHT_NAMED:
            value = self.data.get(key)
            named = value if isinstance(value, list) else [value]
            numbered = self.first_index if key in RIGHT_NUMBERED else None
            if (
                isinstance(choices, list)
                and named
                and all(
                    letter_of(one, labels, choices, numbered) is not None
                    or (key in RIGHT_NUMBERED and index_of(one) == len(choices))  # of a file that may count from 1
                    for one in named
                )
            ):
                return value
        return None

    def _with_options(self, conversation: Conversation, mode: str) -> Conversation:
        """The question with its options listed, as a multiple choice asks it."""
        choices, labels = options_of(self._given_options())
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            raise InputError(f"{self.where}: mode {mode!r} needs 'choices', a list of 2 to {len(LETTERS)} options")
        right = self._right()
        letter = letter_of(right, labels, choices, self.first_index)
        is_told = "answer" in self.fields or _first(self.data, RIGHT) is not None
        if letter is None and (right in (None, "") or index_of(right) == -1 or not is_told):
            raise LeftOut(NO_ANSWER)
        letters = tuple(LETTERS[: len(choices)])
        if letter is None:
            wanted = ", ".join(letters)
            raise InputError(
                f"{self.where}: 'answer' must be an index, counted from {self.first_index}, or one of {wanted}, got "
                f"{show(right)}"
            )
        *context, question = conversation.messages
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, choices, strict=True))
        asked = {"role": "user", "content": f"{question['content']}\n{listed}\nAnswer:"}
        return Conversation((*context, asked), letter, letters)


def spelled(data: dict[str, Any]) -> dict[str, Any]:
    """An item with its known keys in small letters, as some files have `Question` and `INSTRUCTION`."""
    odd = {key: key.lower() for key in data if key not in _SPELLED and key.lower() in _SPELLED}
    return {**data, **{small: data[key] for key, small in odd.items() if small not in data}} if odd else data


def _first(data: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    return next((data[key] for key in keys if _written(data.get(key)) is not None), None)


def _question(asked: Any) -> Any:
    """A question out of what holds more than it: `stem` as AI2 publishes it, `messages` of OpenAI's preferences."""
    if isinstance(asked, dict):
        asked = next((asked[key] for key in ("stem", "messages") if key in asked), asked)
    return asked


def _expected(answer: Any) -> Any:
    """An answer out of what holds more than it: a message, SQuAD's `text`, TriviaQA's `value` beside its aliases."""
    if role_of(answer) is not None:
        return [answer]
    if isinstance(answer, dict) and isinstance(answer.get("text"), str):
        return answer["text"]
    if isinstance(answer, dict) and {"text", "answer_start"} <= answer.keys():
        return _first_of(answer["text"])
    return answer["value"] if isinstance(answer, dict) and {"value", "aliases"} <= answer.keys() else answer


def _first_of(answers: Any) -> Any:
    """The first of answers that are all right: texts, or objects with nothing but them and where they begin (SQuAD)."""
    if answers == []:
        return None
    if messages_of(answers) and all("text" in one and (len(one) == 1 or "answer_start" in one) for one in answers):
        answers = [one["text"] for one in answers]
    return answers[0] if are_texts(answers) else _expected(answers)


def _named(answer: Any) -> Any:
    """The answer under a key that the user named: the first of any list of texts and numbers."""
    if isinstance(answer, list) and not any(role_of(one) for one in answer):
        found = [_written(one["text"] if isinstance(one, dict) and "text" in one else one) for one in answer]
        if all(one is None or isinstance(one, str) for one in found):
            return found[0] if found else None
    return _first_of(answer)


def _preferred(answer: Any) -> list[Any]:
    """A preferred answer as the model's message: a text, or messages that end in it; nothing of anything else."""
    if isinstance(answer, str):
        return _answered(answer)
    said = messages_of(answer if isinstance(answer, list) else [answer])[-1:]
    return said if said and role_of(said[0]) == "assistant" else []


def _asked(question: Any) -> list[Any]:
    """A question that is a text, or a list of messages."""
    return messages_of(question) or [{"role": "user", "content": question}]


def _answered(answer: Any) -> list[Any]:
    """An expected answer that is a text, a number, nothing, or a list of one message."""
    if listed := messages_of(answer):
        return listed[-1:]
    text = _written(answer)
    text = "" if text is None else text
    return [{"role": "assistant", "content": text}]


def _written(value: Any) -> Any:
    """A number as text, and None for what is none: NaN is how pandas writes nothing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return None if isinstance(value, float) and not isfinite(value) else str(value)
