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
        conversation = _conversation(where, item, mode)
        if mode == "choice":
            conversation = _with_options(where, item, conversation)
        conversations.append(conversation)
    return conversations


def _items(path: Path) -> list[Any]:
    try:
        text = path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such dataset file") from error
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read: not UTF-8 text") from error
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number without end
        data = _json_lines(path, text, error)
    if isinstance(data, dict):
        data = [data]
    if not isinstance(data, list) or not data:
        raise InputError(f"{path}: expected a list of conversations, got {_show(data)}")
    return data


def _json_lines(path: Path, text: str, error: Exception) -> list[Any]:
    lines: list[Any] = []
    # Not splitlines(): a JSON string may hold U+2028 and other ends of line as they are.
    for number, line in enumerate(text.split("\n"), 1):
        try:
            lines += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as fault:
            if not lines:
                break
            raise InputError(f"{path}:{number}: not JSON: {fault}") from fault
    if not lines:
        raise InputError(f"{path}: neither JSON nor JSON Lines: {error}") from error
    return lines


def _show(value: object) -> str:
    """A value as a message shows it: in full only where it is short."""
    if value == []:
        return "an empty list"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _conversation(where: str, item: Any, mode: str) -> Conversation:
    if not isinstance(item, dict):
        raise InputError(f"{where}: expected an object, got {type(item).__name__}")
    turns = next((item[k] for k in ("conversation", "conversations", "messages") if k in item), None)
    if turns is None and "prompt" in item and "response" in item:
        turns = [{"role": "user", "content": item["prompt"]}, {"role": "assistant", "content": item["response"]}]
    if turns is None and mode == "choice" and "question" in item:
        turns = [{"role": "user", "content": item["question"]}, {"role": "assistant", "content": "-"}]
    if not isinstance(turns, list) or not turns:
        keys = ", ".join(map(str, item)) or "none"
        raise InputError(
            f"{where}: expected 'conversation', 'conversations', 'messages' or 'prompt' and 'response'"
            f"{', or question and choices' if mode == 'choice' else ''}, got {_show(keys)}"
        )
    messages = [_message(where, turn) for turn in turns]
    *context, last = messages
    if last["role"] != "assistant" or not last["content"].strip():
        raise InputError(f"{where}: no response: the last message must be the expected answer of 'gpt'/'assistant'")
    if not context:
        raise InputError(f"{where}: no question: expected a message before the expected answer")
    return Conversation(tuple(context), last["content"])


def _message(where: str, turn: Any) -> dict[str, str]:
    role = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
    content = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
    if not isinstance(role, str) or role not in ROLES or not isinstance(content, str):
        raise InputError(f"{where}: expected a message with 'from' (system, human, gpt) and 'value', got {_show(turn)}")
    if not content.isascii() and any("\ud800" <= character <= "\udfff" for character in content):
        raise InputError(f"{where}: holds half of a character (a lone surrogate), which no tokenizer reads")
    return {"role": ROLES[role], "content": content}


def _with_options(where: str, item: dict[str, Any], conversation: Conversation) -> Conversation:
    choices, answer = item.get("choices"), item.get("answer")
    if not isinstance(choices, list) or not 2 <= len(choices) <= len(LETTERS):
        raise InputError(f"{where}: mode 'choice' needs 'choices', a list of 2 to {len(LETTERS)} options")
    letters = tuple(LETTERS[: len(choices)])
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(letters):
        answer = letters[answer]
    if answer not in letters:
        raise InputError(f"{where}: 'answer' must be an index or one of {', '.join(letters)}, got {_show(answer)}")
    *context, question = conversation.messages
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(letters, choices, strict=True))
    asked = {"role": "user", "content": f"{question['content']}\n{listed}\nAnswer:"}
    return Conversation((*context, asked), answer, letters)


def worked_examples(path: Path) -> list[Path]:
    """The files beside the dataset file that its prompts are made of: for MMLU, the subject's dev file."""
    subject, _, split = path.stem.rpartition("_")
    if path.suffix != ".csv" or split == "dev":
        return []
    return [path.parent.parent / "dev" / f"{subject}_dev.csv"]


def _mmlu(path: Path, limit: int) -> list[Conversation]:
    """MMLU's own prompt: five worked examples of the subject's dev file, then the question.

    `<folder>/test/<subject>_test.csv` takes its examples from `<folder>/dev/<subject>_dev.csv`
    (Hendrycks et al., arXiv 2009.03300).
    """
    subject = path.stem.rpartition("_")[0]
    header = f"The following are multiple choice questions (with answers) about {subject.replace('_', ' ')}.\n\n"
    for shots in worked_examples(path):
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
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = list(csv.reader(file))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from error
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path}: not CSV in UTF-8: {error}") from error
    for number, row in enumerate(rows, 1):
        if len(row) != 6 or row[5] not in tuple("ABCD"):
            raise InputError(
                f"{path}:{number}: expected question, A, B, C, D and the answer's letter, got {_show(row)}"
            )
        question, *options, answer = row
        listed = "\n".join(f"{letter}. {text}" for letter, text in zip("ABCD", options, strict=True))
        yield f"{question}\n{listed}\nAnswer:", answer
