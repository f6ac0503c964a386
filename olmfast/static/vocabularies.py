"""The vocabulary of a static merge: which tensors have a row per token, what config.json says of it, and a last look
at what was written."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmfast.config.entries import TokenSource
from olmfast.config.mergekit import MergeConfig
from olmfast.errors import InputError, OlmfastError, did_you_mean, show
from olmfast.static.spelling import shapes_of
from olmfast.weights import chat_templates
from olmfast.weights.architecture import FAMILIES
from olmfast.weights.checkpoint import Checkpoint, read_header
from olmfast.weights.pool import Pool
from olmfast.weights.skeletons import Skeletons
from olmfast.weights.tokenizer_files import TOKENIZER_CONFIG, token_ids, tokenizer_config
from olmfast.weights.vocabulary import Given, Origin, Vocabulary, plan_vocabulary, row_of, shared_ids

SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id")


@dataclass(frozen=True)
class TokenTensors:
    """The tensors of a merge that have a row per token, the embedding first; `keys` are where config.json states how
    many there are. `fault` is why they cannot be told all."""

    rows: Sequence[str]
    keys: Sequence[Sequence[str]]
    fault: str = ""


def plan_tokens(
    config: MergeConfig, pool: Pool, base: Checkpoint, skeletons: Skeletons
) -> tuple[Vocabulary | None, TokenTensors]:
    """The vocabulary that a merge file asks for, and the tensors whose rows it moves: none if it moves no row.

    Raises InputError for what cannot be told of a vocabulary that changes.
    """
    if config.vocabulary is None:
        return None, TokenTensors((), ())
    embedding = base.architecture.family.embedding
    known = FAMILIES.get(base.architecture.model_type) is not None and embedding in base.tensors
    tensors = TokenTensors((embedding,), ()) if known else _found(base, skeletons)
    vocabulary = _vocabulary(config, pool, base, tensors.rows[0])
    if vocabulary.is_as_it_was:
        return vocabulary, TokenTensors((), ())
    if known:  # only now: most merges move no row, and Transformers need not be asked
        tensors = _found(base, skeletons)
    if tensors.fault:
        raise InputError(f"tokenizer: {tensors.fault}")
    return vocabulary, tensors


def _found(base: Checkpoint, skeletons: Skeletons) -> TokenTensors:
    """What Transformers' class says for the base's config; for an unknown type, the table and the sizes."""
    skeleton = skeletons.examine(base.config, shapes_of(base), "vocabulary")
    if skeleton.unknown:
        return _by_size(base, skeleton.unknown)
    where = f"{base.name} ({base.config.get('model_type')})"
    embedding = [name for name in skeleton.rows if skeleton.modules.get(name) == skeleton.embedding_module]
    embedding = embedding or [name for name in skeleton.rows if len(base.tensors[name].shape) == 2]
    if not embedding:
        what = skeleton.vocabulary_fault or "has no tensor that is the embedding of its tokens"
        raise InputError(f"tokenizer: {where} {what}, so its vocabulary cannot be told")
    fault = ""
    if skeleton.columns:
        fault = f"{where}: {skeleton.columns[0]} grows with the vocabulary, but has no row per token"
    elif skeleton.other_vocabularies:
        other = skeleton.other_vocabularies[0]
        fault = f"{where}: config.json states {other} too, another vocabulary of the same tokens, which cannot follow"
    rows = [embedding[0], *(name for name in skeleton.rows if name != embedding[0])]
    return TokenTensors(rows, skeleton.vocabulary_keys, fault)


def _by_size(base: Checkpoint, why: str) -> TokenTensors:
    """The embedding and the head that the names tell; another tensor of as many rows is an error."""
    family = base.architecture.family
    if family.embedding not in base.tensors:
        raise InputError(f"{base.name}: no embedding was found among its tensors, so its vocabulary is unknown")
    known = [family.embedding, family.head, f"{family.head.rpartition('.')[0]}.bias"]
    n_rows = base.tensors[family.embedding].shape[0]
    others = [n for n, info in base.tensors.items() if info.shape[:1] == (n_rows,) and n not in known]
    fault = ""
    if others:
        fault = (
            f"{base.name}: {why}, and {others[0]} has {n_rows} rows as the embedding has; whether these are tokens' "
            "cannot be told"
        )
    inside = "vocab_size" not in base.config and isinstance(base.config.get("text_config"), dict)
    return TokenTensors(known, (("text_config", "vocab_size") if inside else ("vocab_size",),), fault)


def _vocabulary(config: MergeConfig, pool: Pool, base: Checkpoint, embedding: str) -> Vocabulary:
    wanted = config.vocabulary
    assert wanted is not None
    rows = {}
    for donor in pool:
        if embedding not in donor.tensors:
            raise InputError(f"{donor.name}: no embedding was found among its tensors, so its vocabulary is unknown")
        rows[donor.name] = donor.tensors[embedding].shape[0]
    tokens = {
        token: Given(_token_origin(entry.source, token, pool), entry.force) for token, entry in wanted.tokens.items()
    }
    return plan_vocabulary(pool, pool.names, base.name, wanted.source, tokens, wanted.pad_to_multiple_of, rows)


def _token_origin(source: TokenSource | None, token: str, pool: Pool) -> Origin | None:
    where = f"tokenizer.tokens.{token}"
    if source is None:
        return None
    if source.kind == "zero":
        return ()
    model = str(source.model)
    if model not in pool.donors:
        raise InputError(f"{where}: {show(model)} is not one of the models{did_you_mean(model, pool.names)}")
    if source.token_id is not None:
        return ((model, source.token_id),)
    return ((model, row_of(pool, model, source.token or token, where)),)


def with_vocabulary(
    config: Mapping[str, Any], vocabulary: Vocabulary, keys: Sequence[Sequence[str]], pool: Pool, base: Checkpoint
) -> dict[str, Any]:
    """The size of the vocabulary, the special tokens of the model whose tokenizer is taken, and the ids of tokens that
    have moved."""
    changed = deepcopy(dict(config))
    _move_tokens(changed, token_ids(base.tokenizer_folder), vocabulary.ids)
    for *path, key in keys or [["vocab_size"]] if vocabulary.n_rows != vocabulary.model_rows[base.name] else []:
        part = changed
        for step in path:
            part = part.setdefault(step, {})
        part[key] = vocabulary.n_rows
    theirs = pool[vocabulary.source].config
    inside = isinstance(changed.get("text_config"), dict) and "vocab_size" not in changed
    for own, given in ((changed, theirs), (changed.get("text_config") if inside else None, theirs.get("text_config"))):
        if isinstance(own, dict) and isinstance(given, dict):
            own.update({key: given[key] for key in SPECIAL_IDS if key in given})
    return changed


def _move_tokens(part: dict[str, Any], before: Mapping[str, int], now: Mapping[str, int]) -> None:
    """Keys such as image_token_id name the same token as before."""
    tokens = {index: token for token, index in before.items()}
    for key, value in part.items():
        if isinstance(value, dict):
            _move_tokens(value, before, now)
        elif re.search(r"_token_(id|index)$", key) and isinstance(value, int) and key not in SPECIAL_IDS:
            part[key] = now.get(tokens.get(value, ""), value)


def chat_template_texts(config: MergeConfig, pool: Pool, tokenizer: str, texts: Mapping[str, str]) -> dict[str, str]:
    """chat_template.jinja, and tokenizer_config.json without a template of its own."""
    folder = pool[tokenizer].tokenizer_folder
    merged = list(dict.fromkeys(source.model for group in config.groups() for source in group.sources))
    text = chat_templates.choose(str(config.chat_template), {name: pool[name].tokenizer_folder for name in merged})
    if text is None:
        return {}
    changed = {"chat_template.jinja": text}
    if TOKENIZER_CONFIG in texts or os.path.lexists(folder / TOKENIZER_CONFIG):
        own = json.loads(texts[TOKENIZER_CONFIG]) if TOKENIZER_CONFIG in texts else dict(tokenizer_config(folder))
        if own.pop("chat_template", None) is not None:
            changed[TOKENIZER_CONFIG] = json.dumps(own, ensure_ascii=False, indent=2) + "\n"
    return changed


def check_written(vocabulary: Vocabulary, rows: Sequence[str], folder: Path) -> None:
    """Read the written tokenizer and embedding back: every token has a row of its own, and no other.

    Raises OlmfastError if not, which would be a fault of this program.
    """
    ids = token_ids(folder)
    held = {info.name: info.shape[0] for path in folder.glob("*.safetensors") for info in read_header(path)}
    wrong = [f"{name} has {held[name]} rows" for name in rows if name in held and held[name] != vocabulary.n_rows]
    wrong += [
        f"{show(token)} has the id {ids.get(token)}" for token, i in vocabulary.ids.items() if ids.get(token) != i
    ][:1]
    wrong += [f"two tokens have the id {index}" for index, _ in shared_ids(ids)[:1]]
    wrong += [f"{show(token)} has the id {i}" for token, i in ids.items() if i >= vocabulary.n_rows][:1]
    if wrong:
        raise OlmfastError(
            f"{folder}: this is a bug in olmfast: the tokenizer and the {vocabulary.n_rows} rows of the embedding do "
            f"not agree: {'; '.join(wrong)}"
        )
