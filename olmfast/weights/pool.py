"""The donors of a merge: resolved to folders, opened once, and checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from olmfast.errors import InputError
from olmfast.weights.architecture import Architecture
from olmfast.weights.checkpoint import Checkpoint, read_json
from olmfast.weights.digests import DigestCache
from olmfast.weights.hub import resolve

# What two donors must share: (what a user calls it, the keys that model types spell it with).
DIMENSIONS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("architecture", ("model_type",)),
    ("number of blocks", ("num_hidden_layers", "n_layer")),
    ("hidden size", ("hidden_size", "n_embd")),
    ("vocabulary", ("vocab_size",)),
    ("attention heads", ("num_attention_heads", "n_head")),
    ("key-value heads", ("num_key_value_heads",)),
    ("head size", ("head_dim",)),
    ("MLP width", ("intermediate_size", "n_inner")),
)
# What may differ, although a block that was trained with another value suffers from it.
SOFT = ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "hidden_act", "sliding_window")


class Pool:
    """Donors by name, in the order of the config, with the same canonical tensors.

    The head is one of those tensors if any donor has a head of its own (`tied` is False); a tied donor then
    offers its embedding as its head.

    With `alike=False` nothing of this is checked or changed: the donors are of any family and shape.
    """

    def __init__(self, donors: Sequence[Checkpoint], alike: bool = True) -> None:
        self.donors = {donor.name: donor for donor in donors}
        self.digests: DigestCache = donors[0].digests
        first = donors[0]
        self.architecture: Architecture = first.architecture
        self.warnings: list[str] = []
        self.tied = alike and all(donor.is_tied for donor in donors)
        if alike:
            self._align_heads()
            self._check_alike()
        # What only some donors store is a buffer that the module computes: no part of the merge.
        self.tensors: tuple[str, ...] = tuple(
            name for name in first.tensors if all(name in donor.tensors for donor in donors)
        )

    @classmethod
    def open(
        cls,
        names: Sequence[str],
        models_dir: Path,
        folder: Path,
        progress: Callable[[str], None] = lambda _: None,
        digests: DigestCache | None = None,
        alike: bool = True,
        download: bool = True,
    ) -> Pool:
        """Find, download where needed (and allowed), open and check the named donors; `folder` resolves relative paths.

        They share `digests`, which may know their tensors from an earlier run.

        Raises InputError that lists every donor that is missing or differs.
        """
        donors: list[Checkpoint] = []
        faults: list[str] = []
        digests = digests or DigestCache()
        for name in names:
            progress(name)
            try:
                donors.append(
                    Checkpoint(resolve(name, models_dir, folder, download), name, digests, any_family=not alike)
                )
            except InputError as error:
                faults.append(str(error))
        if faults:
            raise InputError("\n".join(faults))
        return cls(donors, alike)

    def __getitem__(self, name: str) -> Checkpoint:
        return self.donors[name]

    def __iter__(self) -> Iterator[Checkpoint]:
        return iter(self.donors.values())

    def __len__(self) -> int:
        return len(self.donors)

    @property
    def names(self) -> list[str]:
        """The donors' names in the order of the config."""
        return list(self.donors)

    def settings_differ(self, name: str, other: str) -> bool:
        """Whether two donors' configs differ in what acts on the values without changing their shapes."""
        return bool(_soft_differences(self[name], self[other]))

    def check_finite(self, progress: Callable[[str], None] = lambda _: None) -> None:
        """Raise InputError naming the donor, file and tensor that holds NaN or infinity."""
        for donor in self:
            progress(donor.name)
            donor.check_finite()

    def _align_heads(self) -> None:
        family = self.architecture.family
        for donor in self:
            if self.tied:
                donor.tensors.pop(family.head, None)
            elif family.head not in donor.tensors and family.embedding in donor.tensors:
                donor.tensors[family.head] = donor.tensors[family.embedding]

    def _check_alike(self) -> None:
        first, *others = self
        faults = _check_blocks(first)
        for donor in others:
            differences = [*_config_differences(first, donor), *_tensor_differences(first, donor)]
            differences += vocabulary_differences(first, donor)
            if differences:
                listed = "; ".join(differences)
                faults.append(f"{donor.name}: cannot be merged with {first.name}: {listed}")
            self.warnings += _soft_differences(first, donor)
        if faults:
            raise InputError("\n".join(faults))


def _dimension(config: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((config[key] for key in keys if key in config), None)


def _config_differences(first: Checkpoint, other: Checkpoint) -> list[str]:
    found = []
    for label, keys in DIMENSIONS:
        ours, theirs = _dimension(first.config, keys), _dimension(other.config, keys)
        if ours != theirs and None not in (ours, theirs):
            found.append(f"{label} {theirs!r} instead of {ours!r}")
    return found


def _soft_differences(first: Checkpoint, other: Checkpoint) -> list[str]:
    return [
        f"{other.name}: {key} is {other.config[key]!r}, {first.name} has {first.config[key]!r}; "
        "scored whole it keeps its own value, in a merge its tensors get the base's"
        for key in SOFT
        if key in first.config and key in other.config and first.config[key] != other.config[key]
    ]


def _tensor_differences(first: Checkpoint, other: Checkpoint) -> list[str]:
    ours = {n: i.shape for n, i in first.tensors.items() if not first.architecture.is_ignored(n)}
    theirs = {n: i.shape for n, i in other.tensors.items() if not other.architecture.is_ignored(n)}
    found = []
    if missing := sorted(set(ours) - set(theirs)):
        found.append(f"{len(missing)} tensors missing, the first {missing[0]}")
    if extra := sorted(set(theirs) - set(ours)):
        found.append(f"{len(extra)} tensors too many, the first {extra[0]}")
    shapes = [name for name in ours if name in theirs and ours[name] != theirs[name]]
    if shapes:
        name = shapes[0]
        found.append(
            f"{len(shapes)} tensors of another shape, the first {name} {list(theirs[name])} "
            f"instead of {list(ours[name])}"
        )
    return found


def _check_blocks(donor: Checkpoint) -> list[str]:
    architecture = donor.architecture
    held = {architecture.block_of(name) for name in donor.tensors} - {None}
    if held == set(range(architecture.n_blocks)):
        return []
    return [
        f"{donor.name}: config.json says {architecture.n_blocks} blocks, the weights hold {len(held)} "
        f"(named {architecture.family.blocks}.N)"
    ]


def vocabulary_differences(first: Checkpoint, other: Checkpoint) -> list[str]:
    """One line if tokens of the first model's tokenizer have another id in the other's, none if they have not."""
    ours, theirs = token_ids(first.folder), token_ids(other.folder)
    moved = [token for token, index in ours.items() if theirs.get(token, index) != index]
    if not moved:
        return []
    token = moved[0]
    return [
        f"{len(moved)} tokens have another id in the tokenizer, the first {token!r} {theirs[token]} "
        f"instead of {ours[token]}"
    ]


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
