"""What a static merge writes, decided before any weight is read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from olmfast import _shards
from olmfast.output.writer import Content
from olmfast.weights.checkpoint import read_json
from olmfast.weights.chunks import CHUNK
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Sources
from olmfast.weights.vocabulary import Vocabulary


@dataclass(frozen=True)
class Plan:
    """What a static merge writes, decided before any weight is read.

    `buffers` are integer tensors (model, tensor) that must be the same in all models; `recipe_text` is the merge file
    or the command, kept in the result as `recipe_file` if that is given. `token_rows` are the tensors of the result
    whose rows are those of `vocabulary`. `warnings` are what a user is told although the merge can be done. `read` are
    the files read besides the models: what each is called -> its paths. `outlines` keeps what stands in for models that
    are still to be made for as long as the plan is there.
    """

    title: str
    pool: Pool
    content: Content
    recipe_text: str
    recipe_file: str | None = None
    buffers: Sequence[Sequence[tuple[str, str]]] = ()
    notes: Sequence[str] = ()
    vocabulary: Vocabulary | None = None
    token_rows: Sequence[str] = ()
    warnings: Sequence[str] = ()
    read: Mapping[str, Sequence[Path]] = field(default_factory=dict)
    outlines: object = None

    @property
    def paths(self) -> dict[str, Sequence[Path]]:
        """Everything that is read: what it is called -> its paths."""
        return {**{f"the model {donor.name}": donor.paths for donor in self.pool}, **self.read}

    @property
    def n_bytes(self) -> int:
        """Bytes of the result's weights."""
        return self.content.n_bytes

    def account(self) -> str:
        """One line that says of every tensor where it comes from."""
        return self.content.account()

    @property
    def n_bytes_read(self) -> int:
        """Bytes of the models' weights that go into it, counted each time they do."""
        sources = Sources(self.pool, Path())
        return sum(info.n_bytes for tensor in self.content.tensors for info in tensor.expression.places(sources))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        content = self.content
        return {
            "method": self.title,
            "models": self.pool.names,
            "base": content.base.name,
            "tokenizer": content.tokenizer.name,
            "tensors": dict(content.origins()),
            "left_out": dict(content.left_out),
            "config": dict(content.config),
            "vocabulary": None if self.vocabulary is None else vocabulary_json(self.vocabulary),
            "result_bytes": self.n_bytes,
            "read_bytes": self.n_bytes_read,
            "memory_bytes": memory_bytes(self),
            "notes": [*self.warnings, *self.notes],
        }


def check_copied(content: Content) -> None:
    """Raise InputError for a JSON file that the result would have as it is, and that nobody could read."""
    for name in content.tokenizer.companions:
        if name.endswith(".json") and name not in content.texts:
            read_json(content.tokenizer.companion(name))


def memory_bytes(plan: Plan) -> int:
    """An upper estimate of the memory that a merge takes besides Python and torch: what is read at a time."""
    sources, tensors = Sources(plan.pool, Path()), plan.content.tensors
    most = max((len(list(t.expression.places(sources))) for t in tensors), default=0)
    row = max((tensor.shape[-1] for tensor in tensors if tensor.shape), default=1)
    held = max((tensor.expression.held_bytes(sources) for tensor in tensors), default=0)
    # Each term has a buffer, and its thinned or weighted form; half a dozen more hold masks and sums. Then what is
    # written at a time. Pages of files are not counted: the system can reclaim them at any time.
    return (2 * most + 8) * max(CHUNK, row) * 8 + 3 * _shards.ROOM_BYTES + held


def vocabulary_json(vocabulary: Vocabulary) -> dict[str, Any]:
    """What `check` says of a vocabulary."""
    return {
        "source": vocabulary.source,
        "rows": vocabulary.n_rows,
        "tokens": len(vocabulary.ids),
        "added": [entry["content"] for entry in vocabulary.added],
        "models": dict(vocabulary.model_rows),
    }
