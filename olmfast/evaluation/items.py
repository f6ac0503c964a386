"""One item of a dataset file -> a conversation: ShareGPT, OpenAI messages, pairs by many names, multiple choice."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import takewhile
from math import isfinite
from typing import Any

from olmfast.config.datasets import Fields, Wanted, one_or_more
from olmfast.errors import InputError, show
from olmfast.evaluation.metrics import CHOICES
from olmfast.evaluation.options import LETTERS, index_of, letter_of, options_of

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model"), "assistant"),
}
# Roles of messages that call tools or hold what these say, and keys that hold calls.
TOOL_ROLES = (
    *("tool", "function", "function_call", "function-call", "tool_call"),
    *("observation", "function_response", "tool_response", "ipython"),
)
TOOL_KEYS = ("tool_calls", "function_call")
TURNS = ("conversation", "conversations", "messages")
PAIRS = (("input", "output"), ("human", "assistant"))  # what a turn of both sides calls them: Capybara, Firefly
TEXTS = ("text", "input_text", "output_text")  # parts of a message that are text
OF_CHOICES = ("question", "question_stem", "query", "problem")  # what a multiple choice asks
QUESTIONS = ("prompt", "instruction", *OF_CHOICES, "input", "inputs")
WHOLE = "chosen"  # of a preference: the answer, or all messages up to it
ANSWERS = ("response", "completion", "output", "answer", "solution", WHOLE, "target", "targets", "canonical_solution")
ABOUT = ("passage", "article", "body", "story")  # what a question is about, told before it: AGIEval, RACE, SVAMP
MORE = ("input", "context")  # what an instruction is about, told after it: alpaca, dolly
SYSTEM, HISTORY = ("system", "system_prompt"), "history"
OPTIONS, RIGHT = ("choices", "options"), ("answer", "answerKey", "label")
KNOWN = {*TURNS, *QUESTIONS, WHOLE}  # by one of these an item is known
_SPELLED = {key.lower() for key in (*KNOWN, *ANSWERS, *ABOUT, *MORE, *SYSTEM, HISTORY, *OPTIONS, *RIGHT)}
FINAL = "####"  # GSM8K: the steps before it, the answer after it

NO_ANSWER, NO_QUESTION = "without an expected answer", "without a question"
TOOL_CALLS, NO_TEXT = "with tool calls", "with images or other parts that are no text"
UNWANTED = "with an answer that is labelled unwanted"  # KTO's `label: false`


class _LeftOut(Exception):
    """An item that cannot be used, while others of its file may be; says why."""


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
        except _LeftOut as left_out:
            return str(left_out)

    def _conversation(self, mode: str) -> Conversation:
        turns = self._turns(mode)
        if any(_calls_tools(turn) for turn in turns):
            raise _LeftOut(TOOL_CALLS)
        messages = [_message(self.where, turn) for turn in turns]
        response = ""
        if messages and messages[-1]["role"] == "assistant":
            response = messages.pop()["content"]
        last = messages[-1]["role"] if messages else "system"
        if last == "system" or (last == "assistant" and not response.strip()):
            raise _LeftOut(NO_QUESTION)
        found = Conversation(tuple(messages), response if response.strip() else "")
        return self._with_options(found, mode) if mode in CHOICES else found

    def option_index(self) -> tuple[int, int] | None:
        """The number by which a multiple choice names its right option, where it does, and how many options it has."""
        try:
            choices, labels = options_of(self._given_options())
            right = self._right()
        except InputError:  # which is told if the item is asked
            return None
        if not isinstance(choices, list) or letter_of(right, labels, choices, None) is not None:
            return None
        index = index_of(right)
        return None if index is None else (index, len(choices))

    def _turns(self, mode: str) -> list[Any]:
        """The messages as the item has them."""
        data = self.data
        if self.fields:
            asked, answer = self._prompt(), self._field("response")
            self._check_texts({"prompt": asked}, {"response": answer})
            return [*_system(self._field("system")), *_asked(asked), *_answered(answer)]
        system = _system(_first(data, SYSTEM))
        turns = _listed(next((data[key] for key in TURNS if key in data), None))
        if isinstance(turns, list) and turns:
            # The original OLM, whose key is `conversation`, reads nothing beside it.
            turns = _alternating(turns)
            return turns if "conversation" in data or _begins_with_system(turns) else [*system, *turns]
        question = next((key for key in QUESTIONS if key in data), None)
        if turns == [] and question is None:
            raise _LeftOut(NO_QUESTION)
        if turns is None and question is None and _asks(data.get(WHOLE)):
            return [*([] if _begins_with_system(data[WHOLE]) else system), *data[WHOLE]]
        is_choice = question in OF_CHOICES and self._given_options() is not None
        if turns is None and question is not None and (mode in CHOICES or not is_choice):
            answered = next((key for key in ANSWERS if key in data), ANSWERS[0])
            answer = data.get(answered)
            if answered == "completion" and data.get("label") is False:
                raise _LeftOut(UNWANTED)
            if isinstance(answer, str) and FINAL in answer and question == "question":
                answer = answer.rpartition(FINAL)[2].strip()
            asked = data[question]
            if isinstance(asked, dict) and isinstance(asked.get("stem"), str):  # ARC and others as AI2 publishes them
                asked = asked["stem"]
            self._check_texts({question: asked}, {} if mode in CHOICES else {answered: answer})
            if isinstance(asked, str):
                about = [text for text in self._texts(ABOUT, question) if text not in asked]  # not what it quotes
                asked = "\n\n".join([*about, asked, *self._texts(MORE, question)])
            before = [*system, *_history(self.where, data.get(HISTORY))]
            if mode in CHOICES:
                return [*before, *_asked(asked)]
            if _asks(answer) and len(answer) - 1 > len(_asked(asked)):  # what was said before, beside its last question
                return [*([] if _begins_with_system(answer) else before), *answer]
            return [*before, *_asked(asked), *_answered(answer)]
        if turns is None and question is not None:
            raise InputError(f"{self.where}: is a multiple choice, which mode {mode!r} does not read; use mode choice")
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

    def _check_texts(self, asked: Mapping[str, Any], answered: Mapping[str, Any]) -> None:
        """Raise InputError for a question that is no text and no messages, or an answer that is no number either."""
        for key, value in {**asked, **answered}.items():
            fits = isinstance(value, str) or bool(_messages(value))
            if not fits and (key in asked or isinstance(value, (bool, list, dict))):
                raise InputError(f"{self.where}: {key}: expected a text or a list of messages, got {show(value)}")

    def _given_options(self) -> Any:
        """What holds the options of a multiple choice; None if nothing does."""
        keys = self.fields.get("choices")
        if keys is not None:
            return {key: self._at("choices", key) for key in keys} if isinstance(keys, list) else self._field("choices")
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

    def _right(self) -> Any:
        """What names the right option."""
        return self._field("answer") if "answer" in self.fields else _first(self.data, RIGHT)

    def _with_options(self, conversation: Conversation, mode: str) -> Conversation:
        """The question with its options listed, as a multiple choice asks it."""
        choices, labels = options_of(self._given_options())
        if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
            raise InputError(f"{self.where}: mode {mode!r} needs 'choices', a list of 2 to {len(LETTERS)} options")
        right = self._right()
        letter = letter_of(right, labels, choices, self.first_index)
        if letter is None and (right in (None, "") or index_of(right) == -1):
            raise _LeftOut(NO_ANSWER)
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
    return next((data[key] for key in keys if data.get(key) is not None), None)


def _system(text: Any) -> list[Any]:
    return [{"role": "system", "content": text}] if isinstance(text, str) and text.strip() else []


def _begins_with_system(turns: list[Any]) -> bool:
    role = turns[0].get("from", turns[0].get("role")) if isinstance(turns[0], dict) else None
    return isinstance(role, str) and ROLES.get(role.lower()) == "system"


def _listed(turns: Any) -> Any:
    """Turns that are there as text, the JSON of a list."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            return json.loads(turns)
        except (ValueError, RecursionError):
            return turns
    return turns


def _alternating(turns: list[Any]) -> list[Any]:
    """Turns that are texts alone are the user's and the model's in turn (LIMA), as are those of a turn of both."""
    for pair in PAIRS:
        if all(isinstance(turn, dict) and all(isinstance(turn.get(side), str) for side in pair) for turn in turns):
            turns = [turn[side] for turn in turns for side in pair]
    if not all(isinstance(turn, str) for turn in turns):
        return turns
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]


def _asks(value: Any) -> bool:
    """Whether messages hold a question, and not the answer alone."""
    roles = [turn.get("from", turn.get("role")) for turn in _messages(value)]
    return any(isinstance(role, str) and ROLES.get(role.lower()) == "user" for role in roles)


def _history(where: str, pairs: Any) -> list[Any]:
    """Earlier turns beside a pair: [[question, answer], ...], as alpaca files of several turns have them."""
    if not pairs:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise InputError(f"{where}: {HISTORY}: expected pairs of question and answer, got {show(pairs)}")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _asked(question: Any) -> list[Any]:
    """A question that is a text, or a list of messages."""
    return _messages(question) or [{"role": "user", "content": question}]


def _answered(answer: Any) -> list[Any]:
    """An expected answer that is a text, a number, nothing, or a list of one message."""
    if listed := _messages(answer):
        return listed[-1:]
    text = _written(answer)
    text = "" if text is None else text
    return [{"role": "assistant", "content": text}]


def _written(value: Any) -> Any:
    """A number as text, and None for what is none: NaN is how pandas writes nothing."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return value
    return None if isinstance(value, float) and not isfinite(value) else str(value)


def _messages(value: Any) -> list[Any]:
    """The messages of a list of them; nothing of anything else."""
    return value if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value) else []


def _calls_tools(turn: Any) -> bool:
    if not isinstance(turn, dict):
        return False
    role = turn.get("from", turn.get("role"))
    return (isinstance(role, str) and role.lower() in TOOL_ROLES) or any(turn.get(key) for key in TOOL_KEYS)


def _message(where: str, turn: Any) -> dict[str, str]:
    role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    key = next((key for key in ("value", "content") if key in turn), None) if isinstance(turn, dict) else None
    content = "" if key is not None and turn[key] is None else _text(turn[key]) if key is not None else None
    if not isinstance(role, str) or role.lower() not in ROLES or not isinstance(content, str):
        raise InputError(f"{where}: expected a message with 'from' (system, human, gpt) and 'value', got {show(turn)}")
    if not content.isascii() and any("\ud800" <= character <= "\udfff" for character in content):
        raise InputError(f"{where}: holds half of a character (a lone surrogate), which no tokenizer reads")
    return {"role": ROLES[role.lower()], "content": content}


def _text(content: Any) -> Any:
    """A message's text, also where it comes in parts; what is neither stays as it is."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    kinds = [part.get("type", "text") for part in content]
    if any(isinstance(kind, str) and kind not in TEXTS for kind in kinds):
        raise _LeftOut(NO_TEXT)
    texts = [part.get("text") for part in content]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else content
