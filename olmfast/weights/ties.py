"""Parameters that are one, such as a head and the embedding: which of them a model stores, and how they are parted."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from olmfast.weights.checkpoint import Checkpoint, Tensor
from olmfast.weights.skeletons import Skeletons

KEY = "tie_word_embeddings"


@dataclass(frozen=True)
class Ties:
    """Groups of names of parameters that are one tensor of a model, which is stored under the first name of a group.

    `lasting` are the groups that stay one where config.json unties, of names too. `in_config` says that config.json
    has to untie for a result whose parameters are no longer one, which otherwise whoever writes it sees to.
    """

    groups: Sequence[Sequence[str]] = ()
    lasting: Sequence[Sequence[str]] = ()
    in_config: bool = False

    def stored(self, name: str) -> str:
        """The name under which a parameter's tensor is stored: its own, unless it is tied."""
        return next((group[0] for group in self.groups if name in group), name)

    def with_(self, name: str) -> Sequence[str]:
        """The names of the parameters that are one with this one, its own among them; empty if none are."""
        return next((group for group in self.groups if name in group), ())

    def parted(
        self, tensors: Mapping[str, Tensor], changed: Mapping[str, Tensor]
    ) -> tuple[dict[str, Tensor], list[str]]:
        """Every tied parameter on its own, as changed or else as it is in `tensors`; and what cannot be parted."""
        found, faults = dict[str, Tensor](), list[str]()
        for group in self.groups:
            left = list(group)
            while left:
                together = next((one for one in self.lasting if left[0] in one), [left[0]])
                together = [name for name in left if name in together]
                left = [name for name in left if name not in together]
                first, others = together[0], [name for name in together if name not in changed]
                if len(together) > 1 and len(others) < len(together):
                    which = next(name for name in together if name in changed)
                    one = next(name for name in together if name != which)
                    faults.append(
                        f"changes {which}, which is one with {one} in every model of this type; merge it with PEFT "
                        "first, which changes both"
                    )
                    continue
                found[first] = changed.get(first, tensors[group[0]])
        return found, faults


def ties_of(model: Checkpoint, skeletons: Skeletons | None) -> Ties:
    """What a model ties: of types that the table of families has not, and where `skeletons` are given, as Transformers
    says. A parameter that is stored with values of its own is not tied."""
    family = model.architecture.family
    if skeletons is not None:
        shapes = {name: tensor.shape for name, tensor in model.tensors.items()}
        skeleton = skeletons.examine(model.config, shapes)
        if not skeleton.unknown:
            after = skeletons.examine(untied(model.config), shapes)
            names = {place: name for name, place in skeleton.modules.items()}
            groups = [_stored_first(model, group) for group in tied_groups([_named(skeleton.tied, names)])]
            return Ties([g for g in groups if len(g) > 1], tied_groups([_named(after.tied, names)]), in_config=True)
    if family.embedding in model.tensors and model.is_tied:
        return Ties([[family.embedding, family.head]])
    return Ties()


def tied_groups(ties: Iterable[Mapping[str, str]]) -> list[list[str]]:
    """Parameters that are one, the one that holds the values first, of mappings of a parameter to that one."""
    groups: dict[str, dict[str, None]] = {}
    for tied in ties:
        for target, source in tied.items():
            groups.setdefault(source, {source: None})[target] = None
    return [list(group) for group in groups.values()]


def untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json that unties head and embedding, of its text part too."""
    config = {**config, KEY: False}
    inner = config.get("text_config")
    if isinstance(inner, dict) and inner.get(KEY):
        config["text_config"] = {**inner, KEY: False}
    return config


def _named(tied: Mapping[str, str], names: Mapping[str, str]) -> dict[str, str]:
    """The same, by the names that the model's files have for parameters of the module."""
    return {names.get(target, target): names.get(source, source) for target, source in tied.items()}


def _stored_first(model: Checkpoint, group: Sequence[str]) -> list[str]:
    """The members of a group that have the values of the first that is stored, that one first; empty if none is."""
    stored = [name for name in group if name in model.tensors]
    if not stored:
        return []
    first = stored[0]
    own = [name for name in stored[1:] if model.digest(name) != model.digest(first)]
    return [first, *(name for name in group if name != first and name not in own)]
