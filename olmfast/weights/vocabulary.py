"""The vocabulary of a merge of models whose tokenizers differ: which row of which model each token gets.

Works on tokenizer.json and on the tokens' names alone; docs/mergekit.md has the rules, which are mergekit's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any

from olmfast.errors import InputError, did_you_mean, show
from olmfast.weights.checkpoint import Checkpoint, read_json
from olmfast.weights.expressions import Copy, MeanRow, Rows, merge
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Expression
from olmfast.weights.tokenizer_files import (
    ADDED,
    TOKENIZER,
    TOKENIZER_CONFIG,
    added_tokens,
    listed_tokens,
    token_ids,
    tokenizer_config,
)

# Where a row comes from: a model and a row of it, the same row of several models on average, or nothing (zeros).
Origin = tuple[tuple[str, int], ...]
# The origin of a token that a tokenizer has and no embedding: the mean of the model's rows.
MEAN: Origin = (("", -1),)


@dataclass(frozen=True)
class Given:
    """What a config says of one token: its origin (None: by the rules), and whether models that have it obey."""

    origin: Origin | None
    force: bool


@dataclass(frozen=True)
class Vocabulary:
    """The vocabulary of the result.

    `source` is the model whose tokenizer files it has, with `added` tokens (entries of tokenizer.json) appended.
    `ids` maps tokens to rows, of which there are `n_rows`; those from `n_padded_from` on are padding of mean rows.
    `of_models` are the rows of each model's tokens; `rowless` are its tokens whose id is past its embedding.
    """

    source: str
    ids: Mapping[str, int]
    n_rows: int
    n_padded_from: int
    added: Sequence[dict[str, Any]]
    of_models: Mapping[str, Mapping[str, int]]
    model_rows: Mapping[str, int]
    given: Mapping[str, Given] = field(default_factory=dict)
    rowless: Mapping[str, Sequence[str]] = field(default_factory=dict)

    @property
    def is_as_it_was(self) -> bool:
        """Whether all models have this vocabulary already, so that no row moves."""
        if self.added or self.given or {*self.model_rows.values()} != {self.n_rows}:
            return False
        return all(ids.get(token) == i for ids in self.of_models.values() for token, i in self.ids.items())

    def notes(self) -> list[str]:
        """What a user should know: tokens whose id is past the embedding, and what they get."""
        return [
            f"{model}: {len(tokens)} tokens of the tokenizer have no row in the embedding, which has "
            f"{self.model_rows[model]}, the first {show(tokens[0])}; they get the row of a model that has one, else "
            "the mean of the rows"
            for model, tokens in ((m, [t for t in lost if t in self.ids]) for m, lost in self.rowless.items())
            if tokens
        ]

    def rows(
        self,
        model: str,
        models: Sequence[str],
        base: str | None,
        place: Callable[[str], Copy],
        others: Sequence[str] = (),
    ) -> Expression:
        """One model's tensor with the rows of this vocabulary; `place` says where a model has that tensor.

        `models` are those it is merged with: tokens that it lacks come from them, and from `others` if none has them.
        """
        origins = self._origins(model, models, base, others)
        runs: list[tuple[Expression | None, int, int]] = []
        for group in _runs(origins):
            first = group[0]
            if first == MEAN:
                runs += [(MeanRow(place(model)), 0, 1)] * len(group)
                continue
            sources = [Rows(((place(name), row, row + len(group)),)) for name, row in first]
            if not sources:
                runs.append((None, 0, len(group)))
            elif len(sources) == 1:
                runs.append((place(first[0][0]), first[0][1], first[0][1] + len(group)))
            else:
                runs.append((merge("linear", sources, weight=1.0), 0, len(group)))
        if self.n_rows > self.n_padded_from:
            mean = MeanRow(Rows(tuple(runs)))
            runs += [(mean, 0, 1)] * (self.n_rows - self.n_padded_from)
        source, begin, end = runs[0]
        if len(runs) == 1 and isinstance(source, Copy) and (begin, end) == (0, self.model_rows[source.donor]):
            return source
        return Rows(tuple(runs))

    def counts(self, model: str, models: Sequence[str], base: str | None) -> dict[str, int]:
        """How many rows of a model are its own, come from another, are averaged, are zeros."""
        found = {"kept": 0, "from others": 0, "averaged": 0, "the mean": 0, "zero": 0}
        for origin in self._origins(model, models, base):
            if origin == MEAN:
                found["the mean"] += 1
                continue
            kinds = ("zero", "kept" if origin and origin[0][0] == model else "from others")
            found["averaged" if len(origin) > 1 else kinds[len(origin)]] += 1
        return found

    def _origins(self, model: str, models: Sequence[str], base: str | None, others: Sequence[str] = ()) -> list[Origin]:
        """Where each row of `model`, aligned with this vocabulary, comes from."""
        tokens = {index: token for token, index in self.ids.items()}
        own, used = self.of_models[model], set(self.of_models[model].values())
        origins: list[Origin] = []
        for row in range(self.n_padded_from):
            token = tokens.get(row)
            if token is None:  # padding that a model was trained with
                padded = model if row < self.model_rows[model] and row not in used else self.source
                origins.append(((padded, row),) if row < self.model_rows[padded] else ())
            elif token in own and not (token in self.given and self.given[token].force):
                origins.append(((model, own[token]),))
            else:
                origins.append(self._from_others(token, models, base, others))
        return origins

    def _from_others(self, token: str, models: Sequence[str], base: str | None, others: Sequence[str]) -> Origin:
        """What replaces a token that a model lacks: what the config says, the base's, or the others' mean."""
        given = self.given.get(token)
        if given and given.origin is not None:
            return given.origin
        holders = [name for name in models if token in self.of_models[name]]
        holders = holders or [name for name in others if token in self.of_models[name]]
        if not holders and any(token in tokens for tokens in self.rowless.values()):
            return MEAN  # but a token that only the config names is a row of zeros, as in mergekit
        if len(holders) > 1 and base in holders:
            holders = [name for name in holders if name == base]
        return tuple((name, self.of_models[name][token]) for name in holders)


def _runs(origins: Sequence[Origin]) -> Iterator[list[Origin]]:
    """Runs of rows that are consecutive in the same models."""
    key = lambda pair: tuple((name, row - pair[0]) for name, row in pair[1])  # noqa: E731
    for _, pairs in groupby(enumerate(origins), key):
        yield [origin for _, origin in pairs]


def plan_vocabulary(
    pool: Pool,
    models: Sequence[str],
    base: str,
    source: str,
    tokens: Mapping[str, Given],
    pad_to_multiple_of: int | None,
    rows: Mapping[str, int],
) -> Vocabulary:
    """What `tokenizer` of a merge file asks for. `source` is `base`, `union` or a model; `rows` are embedding rows.

    Raises InputError for a model without tokenizer.json, or a token that is not where the config says it is.
    """
    every = {name: _ids(pool[name]) for name in models}
    of_models = {name: {t: i for t, i in ids.items() if i < rows[name]} for name, ids in every.items()}
    rowless = {name: [t for t, i in ids.items() if i >= rows[name]] for name, ids in every.items()}
    chosen = base if source in ("base", "union") else source
    ids, added = dict(every[chosen]), list[dict[str, Any]]()
    following = max(ids.values(), default=-1) + 1
    if source == "union":
        entries = {token: None for name in models for token in every[name]}
        special = {e["content"]: e for name in reversed(models) for e in added_tokens(pool[name].tokenizer_folder)}
        plain = [token for token in entries if token not in special]
        wanted = [*plain, *(token for token in entries if token in special)]
    else:
        special, wanted = {}, []
    for token in [*wanted, *tokens]:
        if token not in ids:
            ids[token] = following
            added.append({**_PLAIN, **special.get(token, {}), "id": following, "content": token})
            following += 1
    n_rows = n_filled = max(following, rows[chosen])
    if pad_to_multiple_of:
        n_rows = -(-n_rows // pad_to_multiple_of) * pad_to_multiple_of
    for token, given in tokens.items():
        for model, row in given.origin or ():
            if not 0 <= row < rows[model]:
                raise InputError(f"tokenizer.tokens.{token}: {model} has no row {row}; it has {rows[model]}")
    return Vocabulary(chosen, ids, n_rows, n_filled, added, of_models, rows, tokens, rowless)


_PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


def row_of(pool: Pool, model: str, token: str, where: str) -> int:
    """The row of a model's token. Raises InputError if it has none."""
    ids = token_ids(pool[model].tokenizer_folder)
    if token not in ids:
        raise InputError(f"{where}: {model} has no token {show(token)}{did_you_mean(token, ids)}")
    return ids[token]


def _ids(model: Checkpoint) -> dict[str, int]:
    """Every token and its id. Raises InputError without tokenizer.json, or if two tokens share an id."""
    path = model.tokenizer_folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"{model.tokenizer_folder}: no tokenizer.json, which the merge of vocabularies needs; make it with "
            "AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
        )
    ids = dict(token_ids(model.tokenizer_folder))
    shared = shared_ids(ids)
    if shared:
        index, tokens = shared[0]
        raise InputError(f"{path}: the tokens {show(tokens[0])} and {show(tokens[1])} have the same id {index}")
    return ids


def shared_ids(ids: Mapping[str, int]) -> list[tuple[int, list[str]]]:
    """The ids that several tokens have, with these."""
    if len(set(ids.values())) == len(ids):
        return []
    tokens: dict[int, list[str]] = {}
    for token, index in ids.items():
        tokens.setdefault(index, []).append(token)
    return [(index, found) for index, found in tokens.items() if len(found) > 1]


def tokenizer_texts(vocabulary: Vocabulary, folder: Path) -> dict[str, str]:
    """File name -> text of the tokenizer files that added tokens change; the others are copied unchanged."""
    if not vocabulary.added:
        return {}
    data = read_json(folder / TOKENIZER)
    data["added_tokens"] = [*added_tokens(folder), *vocabulary.added]
    texts = {TOKENIZER: json.dumps(data, ensure_ascii=False, indent=2) + "\n"}
    config = tokenizer_config(folder)
    if "added_tokens_decoder" in config:
        entries = {str(e["id"]): {k: v for k, v in e.items() if k != "id"} for e in vocabulary.added}
        config["added_tokens_decoder"] |= entries
        texts[TOKENIZER_CONFIG] = json.dumps(config, ensure_ascii=False, indent=2) + "\n"
    if listed := listed_tokens(folder):
        listed |= {entry["content"]: entry["id"] for entry in vocabulary.added}
        texts[ADDED] = json.dumps(listed, ensure_ascii=False, indent=2) + "\n"
    return texts
