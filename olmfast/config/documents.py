"""Files of YAML: several documents, keys that are there only to be repeated, and what was read from where."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, PrivateAttr

from olmfast.config.loading import parse_yaml
from olmfast.errors import InputError
from olmfast.weights.files import read_text
from olmfast.weights.hub import folders_of

INTERMEDIATES = "intermediates"  # the folder that mergekit-multi's users keep documents' results in
_OF_MODELS = ("model", "path", "base_model", "tokenizer_source", "source", "chat_template")  # keys that name one

Named = TypeVar("Named")


class FromFile(BaseModel):
    """A model of a file, which knows what it was read from."""

    _folder: Path = PrivateAttr(Path())
    _text: str = PrivateAttr("")
    _file: Path | None = PrivateAttr(None)

    @property
    def folder(self) -> Path:
        """The folder that relative paths are taken from."""
        return self._folder

    @property
    def file(self) -> Path | None:
        """The file it was read from."""
        return self._file

    @property
    def text(self) -> str:
        """The file as it was written."""
        return self._text


@dataclass(frozen=True)
class Document:
    """One document of a file: its mapping, its text, and its keys whose value is repeated elsewhere (`&x`, `*x`)."""

    data: dict[str, Any]
    text: str
    anchored: tuple[str, ...]

    def without_anchors(self, known: Collection[str]) -> dict[str, Any]:
        """The mapping without keys that nobody knows and that only hold what others repeat."""
        return {key: value for key, value in self.data.items() if key in known or key not in self.anchored}


def read_documents(path: Path) -> list[Document]:
    """Every document of a YAML file, safely loaded; empty ones are left out. Raises InputError naming file and line."""
    text = read_text(path)
    # A document may begin on the line of its dashes, and directives (%YAML) stand before them.
    begins = [0, *(found.start() for found in re.finditer(r"(?m)^(?:%[^\n]*\n)*---(?=\s|$)", text)), len(text)]
    found, line = [], 0
    for begin, end in pairwise(begins):
        part = text[begin:end]
        if part.strip():
            data = parse_yaml("\n" * line + part, path)
            if data is not None:
                found.append(_document(data, re.sub(r"\A---[ \t]*(#[^\n]*)?\n", "", part), path))
        line += part.count("\n")
    if not found:
        raise InputError(f"{path}: expected a mapping of keys to values, got nothing")
    if len(found) == 1:
        return [Document(found[0].data, text, found[0].anchored)]
    return found


def in_order(documents: Sequence[tuple[str | None, Named, Collection[str]]]) -> list[Named]:
    """Documents in the order that they are made in, the result's last: the one without a name, else the last unused.

    Each is its name, itself and the models that it names, perhaps with a revision or an adapter; what it uses of other
    documents comes before it. Raises graphlib.CycleError for those that use each other.
    """
    places = {name: place for place, (name, _, _) in enumerate(documents) if name is not None}
    order, used = TopologicalSorter[int](), set[int]()
    for place, (_, _, models) in enumerate(documents):
        named = {re.split("[+@]", model)[0] for model in models}
        uses = [places[name] for name in places if name in named and places[name] != place]
        order.add(place, *uses)
        used |= {*uses}
    last = max((place for place in range(len(documents)) if place not in used), default=0)
    result = next((place for place, (name, _, _) in enumerate(documents) if name is None), last)
    made = [place for place in order.static_order() if place != result]
    return [documents[place][1] for place in (*made, result)]


def by_name(value: Any, names: Collection[str], folder: Path, meant: dict[str, str], key: str = "") -> Any:
    """The same data with the names of the other documents for the paths that mean them: `meant` gets path -> name.

    `./intermediates/NAME` is how mergekit-multi's users name what another document made, in the folder that it keeps
    such results in. Nothing is kept there here, so that a path without a folder means the document; a hub id does not.
    `folder` is that of the file.
    """
    if isinstance(value, dict):
        return {inner: by_name(held, names, folder, meant, inner) for inner, held in value.items()}
    if isinstance(value, list):
        return [by_name(held, names, folder, meant, key) for held in value]
    if not isinstance(value, str) or key not in _OF_MODELS:
        return value
    model, *adapters = value.split("+")
    path = Path(model)
    is_path = path.is_absolute() or model.startswith((".", "~")) or path.parts[:-1] == (INTERMEDIATES,)
    if not is_path or path.name not in names or folders_of(model, folder, folder):
        return value
    meant[model] = path.name
    return "+".join([path.name, *adapters])


def _document(data: object, text: str, path: Path) -> Document:
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a mapping of keys to values, got {type(data).__name__}")
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    return Document(data, text, tuple(_anchored(root)) if isinstance(root, yaml.MappingNode) else ())


def _anchored(root: yaml.MappingNode) -> Iterator[str]:
    """Keys of which a part is repeated under another key: the same node, which is how YAML reads `*x`."""
    inside = [(key.value, _nodes(value)) for key, value in root.value]
    for key, nodes in inside:
        if any(nodes & others for other, others in inside if other != key):
            yield str(key)


def _nodes(root: yaml.Node) -> set[int]:
    """The identities of a node and of all below it, each visited once."""
    seen, waiting = set[int](), [root]
    while waiting:
        node = waiting.pop()
        if id(node) not in seen:
            seen.add(id(node))
            below = node.value if isinstance(node, (yaml.MappingNode, yaml.SequenceNode)) else []
            waiting += [part for entry in below for part in (entry if isinstance(entry, tuple) else (entry,))]
    return seen
