"""A merged model as data: output tensor -> the expression it is worth, and what its config says. JSON in and out.

Everything that is saved, resumed, replayed or sent to another process is a recipe; it says nothing about files of the
machine it was made on except for refined tensors, which lie beside the record that names them.
"""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import xxhash

from olmfast.errors import InputError

if TYPE_CHECKING:
    from olmfast.weights.checkpoint import TensorInfo
    from olmfast.weights.chunks import Readable, Scratch
    from olmfast.weights.sources import Sources

VERSION = 1  # of a recipe's JSON


class Expression(ABC):
    """What one tensor is worth: small, immutable, hashable and picklable, so that it can be sent anywhere.

    One kind of expression is one class, and nothing else knows of it. It is told in JSON by `key`, the first key of
    its entry. Its values are the same bytes wherever and however often they are computed.
    """

    key: ClassVar[str]
    # Whether its values are to be kept in a file once they are chosen: what is costly to compute, or to compute alike.
    is_transient: ClassVar[bool] = False
    kinds: ClassVar[dict[str, type[Expression]]] = {}

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "key" in cls.__dict__:
            Expression.kinds[cls.key] = cls

    @property
    @abstractmethod
    def parts(self) -> tuple[Expression, ...]:
        """The expressions it is directly made of."""

    @abstractmethod
    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, `key` first, readable back by `from_json`."""

    @classmethod
    @abstractmethod
    def from_json(cls, entry: Mapping[str, Any]) -> Expression:
        """Read what `to_json` wrote."""

    @abstractmethod
    def open(self, sources: Sources, memory: Scratch | None = None) -> Readable:
        """Its values, to be read a chunk at a time.

        What is opened with the same `memory` must be read one after the other. Raises ValueError or TypeError for
        shapes or settings that do not fit.
        """

    def value(self, sources: Sources) -> torch.Tensor:
        """The whole tensor on the CPU, in the dtype it is or would be saved with; not the caller's to change."""
        readable = self.open(sources)
        out = torch.empty(prod(readable.shape), dtype=readable.dtype)
        readable.read_into(out, 0)
        return out.view(readable.shape)

    @classmethod
    def stack(cls, several: Sequence[Expression], sources: Sources) -> torch.Tensor | None:  # noqa: ARG003
        """(K, *shape) of K expressions of this class at once, on any device; None where nothing is gained by it."""
        return None

    def operand(self, sources: Sources) -> Readable:
        """Its values as a part of another expression, which may read them several times."""
        return self.open(sources)

    def info(self, sources: Sources) -> TensorInfo | None:  # noqa: ARG002
        """Where its bytes lie in a file, if they do."""
        return None

    def places(self, sources: Sources) -> Iterator[TensorInfo]:
        """Every tensor of a file that it is made of, however deep."""
        for part in self.parts:
            yield from part.places(sources)

    def identity(self, sources: Sources) -> str:
        """A digest that says, without computing anything, whether two expressions are worth the same bytes.

        Equal digests, equal bytes. The other way round it holds for tensors that lie in a file; bytes that were
        computed in different ways may be equal all the same.
        """

        def told(value: object) -> object:
            if isinstance(value, list):
                return [told(item) for item in value]
            if isinstance(value, dict) and next(iter(value), None) in Expression.kinds:
                return expression_from_json(value).identity(sources)
            return value

        entry = {name: told(value) for name, value in self.to_json().items()}
        return xxhash.xxh3_128(str(entry).encode()).hexdigest()

    @property
    def origin(self) -> str:
        """Where a tensor of this expression comes from, in the words of the closing line."""
        return "computed"


def expression_from_json(entry: Mapping[str, Any]) -> Expression:
    """The expression that an entry tells. Raises InputError for a kind that is not known."""
    kind = Expression.kinds.get(next(iter(entry), ""))
    if kind is None:
        raise InputError(f"recipe: unknown expression {str(entry)[:300]}; it was written by a newer version")
    return kind.from_json(entry)


def leaves(expression: Expression) -> Iterator[Expression]:
    """The expressions without parts, such as tensors in files, that an expression is made of, however deep."""
    if not expression.parts:
        yield expression
    for part in expression.parts:
        yield from leaves(part)


@dataclass(frozen=True)
class Recipe:
    """The base (whose config and other files the result carries) and an expression per canonical tensor.

    `config_edits` are keys of the base's config.json that the result has in its own way, such as the number of its
    blocks. A tensor that the base has too is saved in the base's dtype, another in its expression's own.
    """

    base: str
    tensors: Mapping[str, Expression]
    config_edits: Mapping[str, Any] = field(default_factory=dict)

    def with_values(self, values: Mapping[str, Expression]) -> Recipe:
        """The recipe with some tensors' expressions replaced."""
        return Recipe(self.base, {**self.tensors, **values}, self.config_edits)

    def config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The result's config.json, of which the base's is given."""
        return {**base, **self.config_edits}

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values, readable back by `from_json`."""
        tensors = {name: expression.to_json() for name, expression in self.tensors.items()}
        return {"version": VERSION, "base": self.base, "config_edits": dict(self.config_edits), "tensors": tensors}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Recipe:
        """Read what `to_json` wrote. Raises InputError for a version or an expression that is not known."""
        if data.get("version") != VERSION:
            raise InputError(f"recipe: expected version {VERSION}, got {data.get('version')!r}; use a newer olmfast")
        tensors = {name: expression_from_json(entry) for name, entry in data["tensors"].items()}
        return cls(data["base"], tensors, data["config_edits"])

    def digest(self) -> str:
        """xxh3-128 of the recipe's JSON: of one pool, equal digests make equal models."""
        return xxhash.xxh3_128(json.dumps(self.to_json(), sort_keys=True).encode()).hexdigest()
