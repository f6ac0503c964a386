"""The JSON files beside the weights that say what tokens there are: read, and checked where olmfast looks at them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from olmfast.errors import InputError
from olmfast.weights.checkpoint import read_json

TOKENIZER, TOKENIZER_CONFIG = "tokenizer.json", "tokenizer_config.json"
ADDED, GENERATION = "added_tokens.json", "generation_config.json"


def token_ids(folder: Path) -> Mapping[str, int]:
    """Token -> id from tokenizer.json, where there is one and its model lists its tokens.

    Raises InputError for a file that is no tokenizer's.
    """
    path = folder / TOKENIZER
    if not os.path.lexists(path):
        return {}
    if not path.is_file():
        read_json(path)  # says why it cannot be read
    status = path.stat()
    return _token_ids(path, status.st_ino, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=16)
def _token_ids(path: Path, *_unchanged: int) -> Mapping[str, int]:
    data = _tokenizer(path)
    listed = data["model"].get("vocab", {})
    if isinstance(listed, list):  # unigram models list (token, score) pairs in the order of the ids
        listed = {entry[0]: index for index, entry in enumerate(listed)}
    return {**listed, **{entry["content"]: entry["id"] for entry in data.get("added_tokens", [])}}


def added_tokens(folder: Path) -> list[dict[str, Any]]:
    """The entries of `added_tokens` of tokenizer.json; none where there is no such file."""
    path = folder / TOKENIZER
    return list(_tokenizer(path).get("added_tokens", [])) if os.path.lexists(path) else []


def _tokenizer(path: Path) -> dict[str, Any]:
    data = read_json(path)
    model, added = data.get("model"), data.get("added_tokens", [])
    listed = model.get("vocab", {}) if isinstance(model, dict) else None
    if not isinstance(added, list) or not all(_is_added(entry) for entry in added):
        raise InputError(f"{path}: added_tokens: is not a list of tokens with 'id' and 'content'")
    ids = isinstance(listed, dict) and all(_is_id(index) for index in listed.values())
    pairs = isinstance(listed, list) and all(
        isinstance(entry, list) and entry and isinstance(entry[0], str) for entry in listed
    )
    if not ids and not pairs:
        raise InputError(f"{path}: is not a tokenizer file: expected 'model' with 'vocab', tokens and their ids")
    return data


def _is_added(entry: object) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("content"), str) and _is_id(entry.get("id"))


def _is_id(index: object) -> bool:
    return isinstance(index, int) and not isinstance(index, bool) and 0 <= index < 2**31


def tokenizer_config(folder: Path) -> dict[str, Any]:
    """tokenizer_config.json; empty where there is none. Raises InputError for entries of another kind."""
    data = _if_there(folder / TOKENIZER_CONFIG)
    decoder, template = data.get("added_tokens_decoder", {}), data.get("chat_template")
    if not isinstance(decoder, dict):
        raise InputError(f"{folder / TOKENIZER_CONFIG}: added_tokens_decoder: expected an object")
    named = isinstance(template, list) and all(
        isinstance(one, dict) and isinstance(one.get("name"), str) and isinstance(one.get("template"), str)
        for one in template
    )
    if template is not None and not isinstance(template, str) and not named:
        raise InputError(f"{folder / TOKENIZER_CONFIG}: chat_template: expected a text, or a list of named ones")
    return data


def listed_tokens(folder: Path) -> dict[str, Any]:
    """added_tokens.json; empty where there is none."""
    return _if_there(folder / ADDED)


def generation_config(folder: Path) -> dict[str, Any]:
    """generation_config.json; empty where there is none."""
    return _if_there(folder / GENERATION)


def end_tokens(folder: Path) -> list[int]:
    """The tokens that end a generation, by generation_config.json. Raises InputError where it lists anything else."""
    ends = generation_config(folder).get("eos_token_id")
    listed = ends if isinstance(ends, list) else [] if ends is None else [ends]
    if not all(_is_id(token) for token in listed):
        raise InputError(f"{folder / GENERATION}: eos_token_id: expected the id of a token, or a list of them")
    return listed


def _if_there(path: Path) -> dict[str, Any]:
    return read_json(path) if os.path.lexists(path) else {}
