"""A merged model as data: output tensor -> the expression it is worth, and what its config says. JSON in and out.

Everything that is saved, resumed, replayed or sent to another process is a recipe; it says nothing about files of the
machine it was made on except for refined tensors, which are stored next to the record that names them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import xxhash

from olmfast.errors import InputError, show
from olmfast.weights.sources import Expression, expression_from_json

VERSION = 1  # of a recipe's JSON


@dataclass(frozen=True)
class Recipe:
    """The base (whose config and other files the result carries) and an expression per canonical tensor.

    `config_edits` are keys in which the result's config.json differs from the base's, such as the number of blocks.
    A tensor that the base also has is saved in the base's dtype, any other in its expression's own.
    """

    base: str
    tensors: Mapping[str, Expression]
    config_edits: Mapping[str, Any] = field(default_factory=dict)

    def with_values(self, values: Mapping[str, Expression]) -> Recipe:
        """The recipe with some tensors' expressions replaced."""
        return Recipe(self.base, {**self.tensors, **values}, self.config_edits)

    def config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The result's config.json, made from the base's."""
        return {**base, **self.config_edits}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, readable back by `from_json`."""
        tensors = {name: expression.to_json() for name, expression in self.tensors.items()}
        return {"version": VERSION, "base": self.base, "config_edits": dict(self.config_edits), "tensors": tensors}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """Read what `to_json` wrote. Raises InputError for an unknown version or expression."""
        if data.get("version") != VERSION:
            raise InputError(
                f"recipe: expected version {VERSION}, got {show(data.get('version'))}; use a newer olmfast"
            )
        tensors = {name: expression_from_json(entry) for name, entry in data["tensors"].items()}
        return cls(data["base"], tensors, data["config_edits"])

    def digest(self) -> str:
        """xxh3-128 of the recipe's JSON: of one pool, equal digests make equal models."""
        return xxhash.xxh3_128(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
