"""What a static merge writes, decided before any weight is read."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmfast.output.writer import AT_ONCE, OutputTensor
from olmfast.weights.chunks import STRETCH
from olmfast.weights.methods import Sources
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Copy, Expression, Merge
from olmfast.weights.vocabulary import Vocabulary


@dataclass(frozen=True)
class Plan:
    """What a static merge writes, decided before any weight is read.

    `base` is the model whose config and other files the result has, with `config` in place of its own keys.
    `texts` are files that are written in place of copies of `tokenizer`'s. `left_out` says of tensors of the models
    that the result has not why; `buffers` are integer tensors that have to be the same in all models.
    """

    title: str
    pool: Pool
    base: str
    tensors: Sequence[OutputTensor]
    config: Mapping[str, Any]
    tokenizer: str
    texts: Mapping[str, str] = field(default_factory=dict)
    recipe_text: str = ""
    recipe_file: str | None = None
    left_out: Mapping[str, str] = field(default_factory=dict)
    buffers: Sequence[Sequence[tuple[str, str]]] = ()
    notes: Sequence[str] = ()
    vocabulary: Vocabulary | None = None

    @property
    def n_bytes(self) -> int:
        """Bytes of the result's weights."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    @property
    def n_bytes_read(self) -> int:
        """Bytes of the models' weights that go into it, each time they do."""
        sources = Sources(self.pool, Path())
        return sum(info.n_bytes for tensor in self.tensors for info in sources.places(tensor.expression))

    def account(self) -> str:
        """One line that says of every tensor where it comes from."""
        counts: Counter[str] = Counter(_origin(tensor.expression) for tensor in self.tensors)
        parts = [f"{n} {what}" for what, n in counts.items()]
        parts += [f"{n} {why}" for why, n in Counter(self.left_out.values()).items()]
        return f"{len(self.tensors)} tensors written: {', '.join(parts)}"

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        counts = Counter(_origin(tensor.expression) for tensor in self.tensors)
        return {
            "method": self.title,
            "models": self.pool.names,
            "base": self.base,
            "tokenizer": self.tokenizer,
            "tensors": dict(counts),
            "left_out": dict(self.left_out),
            "config": dict(self.config),
            "vocabulary": None if self.vocabulary is None else vocabulary_json(self.vocabulary),
            "result_bytes": self.n_bytes,
            "read_bytes": self.n_bytes_read,
            "memory_bytes": memory_bytes(self),
            "notes": list(self.notes),
        }


def memory_bytes(plan: Plan) -> int:
    """An upper estimate of the memory that a merge takes beside Python and torch: what is read at a time."""
    most = max((len(list(Sources(plan.pool, Path()).places(t.expression))) for t in plan.tensors), default=0)
    row = max((tensor.shape[-1] for tensor in plan.tensors if tensor.shape), default=1)
    # Each term has a buffer, and its thinned or weighted form; half a dozen more hold masks and sums. Then what is
    # written at a time. Pages of files are not counted: the system takes them back when it wants.
    return (2 * most + 8) * max(STRETCH, row) * 8 + AT_ONCE * 8


def _origin(expression: Expression) -> str:
    """What the closing line says of a tensor: merged how, or copied from where."""
    if isinstance(expression, Merge):
        return "scaled" if expression.method == "passthrough" else f"merged by {expression.method}"
    if isinstance(expression, Copy):
        return f"copied from {expression.donor}"
    return "put together of rows"


def vocabulary_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """What `check` says of a vocabulary."""
    return {
        "source": vocabulary.source,
        "rows": vocabulary.n_rows,
        "tokens": len(vocabulary.ids),
        "added": [entry["content"] for entry in vocabulary.added],
        "models": dict(vocabulary.model_rows),
    }
