"""Dataset files -> conversations. The formats people have: ShareGPT, OpenAI messages, prompt/response, MMLU."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmfast.errors import InputError

ROLES = {"system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Conversation:
    """Messages up to the question, and the expected response; `options` are the letters of a choice."""

    messages: tuple[dict[str, str], ...]
    response: str
    options: tuple[str, ...] = field(default=())


def load_conversations(path: Path, mode: str, limit: int) -> list[Conversation]:
    """The first `limit` conversations of a file (JSON, JSON Lines, or an MMLU .csv).

    Raises InputError naming the file and the item that cannot be used.
    """
    if path.suffix == ".csv":
        return _mmlu(path, limit)
    conversations = []
    for number, item in enumerate(_items(path)[:limit]):
        where = f"{path}: item {number}"
        conversation = _conversation(where, item)
        if mode == "choice":
            conversation = _with_options(where, item, conversation)
        conversations.append(conversation)
    return conversations


def _items(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise InputError(f"{path}: no such dataset file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    try:
        data = json.loads(text)
    except json.JSONDecodeError as error:
        data = _json_lines(path, text, error)
    if isinstance(data, dict):
        data = [data]
    if not isinstance(data, list) or not data:
        raise InputError(f"{path}: expected a list of conversations, got {'an empty list' if data == [] else data!r}")
    return data


def _json_lines(path: Path, text: str, error: json.JSONDecodeError) -> list[Any]:
    try:
        lines = [json.loads(line) for line in text.splitlines() if line.strip()]
    except json.JSONDecodeError:
        lines = []
    if not lines:
        raise InputError(f"{path}: neither JSON nor JSON Lines: {error}") from None
    return lines


def _conversation(where: str, item: Any) -> Conversation:
    if not isinstance(item, dict):
        raise InputError(f"{where}: expected an object, got {type(item).__name__}")
    turns = next((item[k] for k in ("conversation", "conversations", "messages") if k in item), None)
    if turns is None and "prompt" in item and "response" in item:
        turns = [{"role": "user", "content": item["prompt"]}, {"role": "assistant", "content": item["response"]}]
    if turns is None and "question" in item and "choices" in item:
        turns = [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": "-"}]
    if not isinstance(turns, list) or not turns:
        keys = ", ".join(map(str, item)) or "none"
        raise InputError(
            f"{where}: expected 'conversation', 'conversations', 'messages' or 'prompt' and 'response', got {keys}"
        )
    messages = [_message(where, turn) for turn in turns]
    *context, last = messages
    if last["role"] != "assistant" or not last["content"].strip():
        raise InputError(f"{where}: no response: the last message must be the expected answer of 'gpt'/'assistant'")
    return Conversation(tuple(context), last["content"])


def _message(where: str, turn: Any) -> dict[str, str]:
    role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    content = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
    if role not in ROLES or not isinstance(content, str):
        raise InputError(f"{where}: expected a message with 'from' (system, human, gpt) and 'value', got {turn!r}")
    return {"role": ROLES[role], "content": content}


def _with_options(where: str, item: dict[str, Any], conversation: Conversation) -> Conversation:
    choices, answer = item.get("choices"), item.get("answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise InputError(f"{where}: mode 'choice' needs 'choices', a list of 2 to {len(LETTERS)} options")
    letters = tuple(LETTERS[: len(choices)])
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        answer = letters[answer]
    if answer not in letters:
        raise InputError(f"{where}: 'answer' must be an index or one of {', '.join(letters)}, got {answer!r}")
    *context, question = conversation.messages
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, choices, strict=True))
    asked = {"role": "user", "content": f"{question['content']}\n{listed}\nAnswer:"}
    return Conversation((*context, asked), answer, letters)


def _mmlu(path: Path, limit: int) -> list[Conversation]:
    """MMLU's own prompt: five worked examples of the subject's dev file, then the question.

    `<folder>/test/<subject>_test.csv` takes its examples from `<folder>/dev/<subject>_dev.csv`
    (Hendrycks et al., arXiv 2009.03300).
    """
    subject, _, split = path.stem.rpartition("_")
    shots = path.parent.parent / "dev" / f"{subject}_dev.csv"
    header = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    if split != "dev":
        header += "".join(f"{question} {answer}\n\n" for question, answer in _mmlu_rows(shots))
    rows = list(_mmlu_rows(path))[:limit]
    if not rows:
        raise InputError(f"{path}: holds no questions")
    return [
        Conversation(({"role": "user", "content": header + question},), answer, tuple("ABCD"))
        for question, answer in rows
    ]


def _mmlu_rows(path: Path) -> Iterator[tuple[str, str]]:
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = list(csv.reader(file))
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from None
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5] not in tuple("ABCD"):
            raise InputError(f"{path}:{number}: expected question, A, B, C, D and the answer's letter, got {row!r}")
        question, *options, answer = row
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", options, strict=True))
        yield f"{question}\n{listed}\nAnswer:", answer
