"""Which token has which id."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from olmfast.errors import InputError
from olmfast.weights.checkpoint import read_json


@lru_cache(maxsize=16)
def token_ids(folder: Path) -> dict[str, int]:
    """Token -> id from tokenizer.json, where there is one and its model lists its tokens."""
    path = folder / "tokenizer.json"
    return token_ids_in(read_json(path), path) if path.is_file() else {}


def token_ids_in(data: dict[str, Any], path: Path) -> dict[str, int]:
    """Token -> id of what a tokenizer.json holds. Raises InputError if it is something else."""
    try:
        listed = data["model"].get("vocab", {})
        if isinstance(listed, list):  # unigram models list (token, score) pairs in the order of the ids
            listed = {entry[0]: index for index, entry in enumerate(listed)}
        return {**listed, **{entry["content"]: entry["id"] for entry in data.get("added_tokens", [])}}
    except (AttributeError, IndexError, KeyError, TypeError) as error:
        raise InputError(f"{path}: is not a tokenizer file") from error
