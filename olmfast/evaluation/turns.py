"""The turns of a conversation as files have them: whose each is and what it says, in the many shapes they come in."""

from __future__ import annotations

import json
from typing import Any

from olmfast.errors import InputError, show

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
TOOL_KEYS, TOOL_PARTS = ("tool_calls", "function_call"), ("functionCall", "functionResponse")  # the last are Gemini's
PAIRS = (("input", "output"), ("human", "assistant"))  # what a turn of both sides calls them: Capybara, Firefly
CONTENT = ("value", "content", "parts")  # keys of a message that hold what is said
TEXTS = ("text", "input_text", "output_text")  # parts of a message that are text
HISTORY = "history"
NO_TEXT = "with images or other parts that are no text"


class LeftOut(Exception):
    """An item that cannot be used, while others of its file may be; says why."""


def messages_of(value: Any) -> list[Any]:
    """The messages of a list of them; nothing of anything else."""
    return value if isinstance(value, list) and value and all(isinstance(turn, dict) for turn in value) else []


def role_of(turn: Any) -> str | None:
    """Whose a message is: system, user, assistant; None for another's, and for what is no message."""
    role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    return ROLES.get(role.lower()) if isinstance(role, str) else None


def message_of(where: str, turn: Any) -> dict[str, str]:
    role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    key = next((key for key in CONTENT if key in turn), None) if isinstance(turn, dict) else None
    content = "" if key is not None and turn[key] is None else said_in(turn[key]) if key is not None else None
    if not isinstance(role, str) or role.lower() not in ROLES or not isinstance(content, str):
        raise InputError(f"{where}: expected a message with 'from' (system, human, gpt) and 'value', got {show(turn)}")
    if not content.isascii() and any("\ud800" <= character <= "\udfff" for character in content):
        raise InputError(f"{where}: holds half of a character (a lone surrogate), which no tokenizer reads")
    return {"role": ROLES[role.lower()], "content": content}


def said_in(content: Any) -> Any:
    """A message's text, also where it comes in parts; what is neither stays as it is."""
    if not isinstance(content, list) or not all(isinstance(part, dict) for part in content):
        return content
    kinds = [part.get("type", "text") for part in content]
    if any(isinstance(kind, str) and kind not in TEXTS for kind in kinds):
        raise LeftOut(NO_TEXT)
    texts = [part.get("text") for part in content]
    return "\n".join(texts) if all(isinstance(text, str) for text in texts) else content


def calls_tools(turn: Any) -> bool:
    if not isinstance(turn, dict):
        return False
    role, parts = turn.get("from", turn.get("role")), turn.get("parts")
    if not any(key in turn for key in ("value", "content")) and any(
        part.get(key) for part in messages_of(parts) for key in TOOL_PARTS
    ):
        return True
    return (isinstance(role, str) and role.lower() in TOOL_ROLES) or any(turn.get(key) for key in TOOL_KEYS)


def are_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)


def text_of(value: Any) -> str:
    """A text, or texts one after another; nothing of what is neither."""
    if are_texts(value):
        value = "\n\n".join(value)
    return value if isinstance(value, str) and value.strip() else ""


def system_of(given: Any) -> list[Any]:
    """What is told beside the turns: a text, or parts of text (Bedrock, Gemini). Other things are no system prompt."""
    if isinstance(given, dict):
        given = given.get("content") if role_of(given) == "system" else given.get("parts", [given])
    parts = messages_of(given)
    if parts and all(_is_text(part) for part in parts):
        given = "\n".join(part["text"] for part in parts)
    return [{"role": "system", "content": given}] if isinstance(given, str) and given.strip() else []


def _is_text(part: dict[str, Any]) -> bool:
    """Whether this is a part of text, and no document with a title."""
    kind = part.get("type", "text")
    return isinstance(part.get("text"), str) and kind in TEXTS and part.keys() <= {"type", "text", "cache_control"}


def has_parts(value: Any) -> bool:
    """Whether these are turns as Gemini has them: roles and parts, and nothing else."""
    return bool(messages_of(value)) and all("parts" in turn and turn.keys() <= {"role", "parts"} for turn in value)


def as_list(turns: Any) -> Any:
    """Turns that are there as text, the JSON of a list."""
    if isinstance(turns, str) and turns.lstrip().startswith("["):
        try:
            return json.loads(turns)
        except (ValueError, RecursionError):
            return turns
    return turns


def alternating(turns: list[Any]) -> list[Any]:
    """Turns that are texts alone are the user's and the model's in turn (LIMA), as are those of a turn of both."""
    for pair in PAIRS:
        if all(isinstance(turn, dict) and all(isinstance(turn.get(side), str) for side in pair) for turn in turns):
            turns = [turn[side] for turn in turns for side in pair]
    if not all(isinstance(turn, str) for turn in turns):
        return turns
    return [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate(turns)]


def asks(value: Any) -> bool:
    """Whether messages hold a question, and not the answer alone."""
    return any(role_of(turn) == "user" for turn in messages_of(value))


def history_of(where: str, pairs: Any) -> list[Any]:
    """Earlier turns beside a pair: [[question, answer], ...], as alpaca files of several turns have them."""
    if not pairs:
        return []
    if not isinstance(pairs, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        raise InputError(f"{where}: {HISTORY}: expected pairs of question and answer, got {show(pairs)}")
    roles = ("user", "assistant")
    return [{"role": role, "content": text} for pair in pairs for role, text in zip(roles, pair, strict=True)]
