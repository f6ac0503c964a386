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
from olmfast.evaluation.metrics import CHOICES, GENERATIVE
from olmfast.evaluation.options import LETTERS, index_of, letter_of, options_of, scored_of

ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "chatbot", "bot", "model"), "assistant"),
}
# Roles of messages that call tools or hold what these say, and keys that hold calls.
TOOL_ROLES = (
    *("tool", "function", "function_call", "function-call", "tool_call"),
    *("observation", "function_response", "tool_response", "ipython"),
)
TOOL_KEYS = ("tool_calls", "function_call", "functionCall", "functionResponse")
TURNS, CONTENTS = ("conversation", "conversations", "messages"), "contents"  # the last is Gemini's
PAIRS = (("input", "output"), ("human", "assistant"))  # what a turn of both sides calls them: Capybara, Firefly
CONTENT = ("value", "content", "parts")  # keys of a message that hold what is said
TEXTS = ("text", "input_text", "output_text")  # parts of a message that are text
OF_CHOICES = ("question", "question_stem", "query", "problem")  # what a multiple choice asks
SEVERAL = "turns"  # questions that follow one another, of which the first is asked: MT-bench
QUESTIONS = ("prompt", "instruction", *OF_CHOICES, "input", "inputs_pretokenized", "inputs", SEVERAL)
WHOLE = "chosen"  # of a preference: the answer, or all messages up to it
ANSWERS = (
    *("response", "completion", "output", "answer", "solution", WHOLE, "targets_pretokenized", "target", "targets"),
    *("canonical_solution", "answers", "ideal", "preferred_output", "reference", "ground_truth", "expected_output"),
    *("best_answer", "code"),
)
# What a question is about, told before it: AGIEval, RACE, SVAMP, Natural Instructions, BIG-bench.
ABOUT = ("passage", "article", "body", "story", "definition", "task_prefix")
MORE = ("input", "context")  # what an instruction is about, told after it: alpaca, dolly
SYSTEM, HISTORY = ("system", "system_prompt", "systemInstruction"), "history"
OPTIONS, RIGHT = ("choices", "options"), ("answer", "answerKey", "label", "correct", "correct_option", "gold_label")
# Options with a score for each, of which the highest is right: BIG-bench and TruthfulQA, and BIG-bench on the Hub.
SCORED, SCORED_LISTS = ("target_scores", "mc1_targets"), ("multiple_choice_targets", "multiple_choice_scores")
KNOWN = {*TURNS, CONTENTS, *QUESTIONS, WHOLE} - {SEVERAL}  # by one of these an item is known
_SPELLED = {key.lower() for key in (*KNOWN, SEVERAL, *ANSWERS, *ABOUT, *MORE, *SYSTEM, HISTORY, *OPTIONS, *RIGHT)}
_SPELLED |= {key.lower() for key in (*SCORED, *SCORED_LISTS)}
FINAL = "####"  # GSM8K: the steps before it, the answer after it

NO_ANSWER, NO_QUESTION = "without an expected answer", "without a question"
TOOL_CALLS, NO_TEXT = "with tool calls", "with images or other parts that are no text"
SEVERAL_RIGHT = "with several right options"
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
        except (InputError, _LeftOut):  # which is told if the item is asked
            return None
        if not isinstance(choices, list) or letter_of(right, labels, choices, None) is not None:
            return None
        index = index_of(right)
        return None if index is None else (index, len(choices))

    def _turns(self, mode: str) -> list[Any]:
        """The messages as the item has them."""
        data = self.data
        if self.fields:
            asked, answer = self._prompt(), _expected(self._field("response"))
            self._check_texts({"prompt": asked}, {"response": answer})
            return [*_system(self.where, self._field("system")), *_asked(asked), *_answered(answer)]
        turns = _listed(next((data[key] for key in TURNS if key in data), _messages(data.get(CONTENTS)) or None))
        if isinstance(turns, list) and turns:
            # The original OLM, whose key is `conversation`, reads nothing beside it.
            turns = _alternating(turns)
            if "conversation" in data:
                return turns
            answer = _answered(_expected(data[WHOLE])) if WHOLE in data and _role(turns[-1]) == "user" else []
            system = [] if _role(turns[0]) == "system" else _system(self.where, _first(data, SYSTEM))
            return [*system, *turns, *answer]
        system = _system(self.where, _first(data, SYSTEM))
        question = next((key for key in QUESTIONS if key in data), None)
        if turns == [] and question is None:
            raise _LeftOut(NO_QUESTION)
        if turns is None and question is None and _asks(data.get(WHOLE)):
            return [*([] if _role(data[WHOLE][0]) == "system" else system), *data[WHOLE]]
        if turns is None and question is not None and (mode in CHOICES or not self._is_choice(mode, question)):
            answered = next((key for key in ANSWERS if key in data), ANSWERS[0])
            answer = _expected(data.get(answered))
            if answered == "completion" and data.get("label") is False:
                raise _LeftOut(UNWANTED)
            if isinstance(answer, str) and FINAL in answer and question == "question":
                answer = answer.rpartition(FINAL)[2].strip()
            asked = self._first_turn() if question == SEVERAL else _question(data[question])
            self._check_texts({question: asked}, {} if mode in CHOICES else {answered: answer})
            if isinstance(asked, str):
                about = [text for text in self._texts(ABOUT, question) if text not in asked]  # not what it quotes
                asked = "\n\n".join([*about, asked, *self._texts(MORE, question)])
            before = [*system, *_history(self.where, data.get(HISTORY))]
            if mode in CHOICES:
                return [*before, *_asked(asked)]
            if _asks(answer) and len(answer) - 1 > len(_asked(asked)):  # what was said before, beside its last question
                return [*([] if _role(answer[0]) == "system" else before), *answer]
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
        if isinstance(first, dict) and _role(first) is None:
            first = first.get("content")
        if not isinstance(first, str):
            raise InputError(f"{self.where}: {SEVERAL}: expected a list of the user's texts, got {show(turns)}")
        return first

    def _is_choice(self, mode: str, question: str) -> bool:
        """Whether a mode that reads no options has nothing to ask but options."""
        if self._scored() is not None:
            return mode not in GENERATIVE and not any(key in self.data for key in ANSWERS)
        return question in OF_CHOICES and self._given_options() is not None

    def _scored(self) -> list[tuple[str, float]] | None:
        """The options of a multiple choice by alphabet, with a score for each; None if they have none.

        Raises InputError for scores that are none.
        """
        if "choices" in self.fields or any(key in self.data for key in OPTIONS):
            return None
        key = next((key for key in (*SCORED, SCORED_LISTS[0]) if self.data.get(key)), None)
        if key is None:
            return None
        given = self.data[key]
        if key == SCORED_LISTS[0]:
            given = {"choices": given, "labels": self.data.get(SCORED_LISTS[1])}
        found = scored_of(given)
        if found is None:
            raise InputError(f"{self.where}: {key}: expected options and a number for each, got {show(given)}")
        return found

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
        scored = self._scored()
        if scored is not None:
            return [text for text, _ in scored]
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
        """What names the right option, the one of the highest score where they have scores."""
        scored = None if "answer" in self.fields else self._scored()
        if scored is not None:
            right: Any = [text for text, score in scored if score == max(score for _, score in scored)]
        else:
            right = self._field("answer") if "answer" in self.fields else _first(self.data, RIGHT)
        if isinstance(right, list) and len(right) > 1:
            raise _LeftOut(SEVERAL_RIGHT)
        return (right or [None])[0] if isinstance(right, list) else right

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


def _system(where: str, given: Any) -> list[Any]:
    """What is told beside the turns, a text or its parts (Bedrock, Gemini). Raises InputError for what is no text."""
    if isinstance(given, dict):
        given = next((given[key] for key in (*CONTENT, "text") if key in given), given)
    text = _text(given) if given else ""
    if not isinstance(text, str):
        raise InputError(f"{where}: system: expected a text, got {show(given)}")
    return [{"role": "system", "content": text}] if text.strip() else []


def _role(turn: Any) -> str | None:
    """Whose a message is: system, user, assistant; None for another's, and for what is no message."""
    role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    return ROLES.get(role.lower()) if isinstance(role, str) else None


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
    return any(_role(turn) == "user" for turn in _messages(value))


def _history(where: str, pairs: Any) -> list[Any]:
    """Earlier turns beside a pair: [[question, answer], ...], as alpaca files of several turns have them."""
    if not pairs:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise InputError(f"{where}: {HISTORY}: expected pairs of question and answer, got {show(pairs)}")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]


def _question(asked: Any) -> Any:
    """A question out of what holds more than it: `stem` as AI2 publishes it, `messages` of OpenAI's preferences."""
    if isinstance(asked, dict):
        asked = next((asked[key] for key in ("stem", "messages") if key in asked), asked)
    return asked


def _expected(answer: Any) -> Any:
    """Of several answers that are right the first: of a list, of SQuAD's `text`, of TriviaQA's `aliases`."""
    if _role(answer) is not None:
        return [answer]
    if isinstance(answer, dict) and ("text" in answer or {"value", "aliases"} <= answer.keys()):
        answer = answer.get("text", answer.get("value"))
    if isinstance(answer, list):
        found = [_written(one["text"] if isinstance(one, dict) and "text" in one else one) for one in answer]
        if all(one is None or isinstance(one, str) for one in found):
            return found[0] if found else None
    return answer


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
    role, parts = turn.get("from", turn.get("role")), turn.get("parts")
    if isinstance(parts, list) and any(_calls_tools(part) for part in parts):
        return True
    return (isinstance(role, str) and role.lower() in TOOL_ROLES) or any(turn.get(key) for key in TOOL_KEYS)


def _message(where: str, turn: Any) -> dict[str, str]:
    role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    key = next((key for key in CONTENT if key in turn), None) if isinstance(turn, dict) else None
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
