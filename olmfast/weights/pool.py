"""The donors of a merge: resolved to folders, opened once, and checked against each other."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from olmfast.errors import InputError, show
from olmfast.weights.adapters import open_model
from olmfast.weights.architecture import Architecture
from olmfast.weights.checkpoint import Checkpoint, Tensor
from olmfast.weights.digests import DigestCache
from olmfast.weights.tokenizer_files import token_ids

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
LANGUAGE_MODELS = ("ForCausalLM", "LMHeadModel")  # how the names of their classes end
# What may differ, although a block that was trained with another value suffers from it.
SOFT = ("rope_theta", "rope_scaling", "rope_parameters", "rms_norm_eps", "hidden_act", "sliding_window")


class Pool:
    """Donors by name, in the order of the config, with the same canonical tensors.

    The head is one of those tensors if any donor has a head of its own (`tied` is False); a tied donor then
    offers its embedding as its head.

    A donor that is stored for another task, such as a classifier, is in `blocks_only`: what lies outside its blocks is
    the first donor's, and it is no model that could be scored as a whole.

    Neither is the pool tied if `result`, the tensors that a merge of it has, holds the head.

    With `alike=False` nothing of this is checked or changed: the donors are of any family and shape.
    """

    def __init__(self, donors: Sequence[Checkpoint], alike: bool = True, result: Container[str] = ()) -> None:
        self.donors = {donor.name: donor for donor in donors}
        self.digests: DigestCache = donors[0].digests
        first = donors[0]
        self.architecture: Architecture = first.architecture
        self.warnings: list[str] = list(dict.fromkeys(note for donor in donors for note in donor.notes))
        self.blocks_only: list[str] = []
        if alike:
            for donor in donors:
                self._leave_out_other_heads(donor)
        self.tied = (
            alike
            and self.architecture.family.head not in result
            and all(donor.is_tied for donor in donors if donor.name not in self.blocks_only)
        )
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
        result: Container[str] = (),
        places: Mapping[str, Path] | None = None,
    ) -> Pool:
        """Find, download where needed (and allowed), open and check the named donors; `folder` resolves relative paths.

        A name is that of a model, or `model+adapter`; `places` are folders of models that are known already, by name.
        They share `digests`, which may know their tensors from an earlier run.

        Raises InputError that lists every donor that is missing or differs.
        """
        donors: list[Checkpoint] = []
        faults: list[str] = []
        digests = digests or DigestCache()
        known = (places or {}).items()
        opened = {name: Checkpoint(place, name, digests, any_family=not alike) for name, place in known}
        for name in names:
            progress(name)
            try:
                donors.append(open_model(name, models_dir, folder, digests, opened, not alike, download))
            except InputError as error:
                faults.append(str(error))
        if faults:
            raise InputError("\n".join(faults))
        return cls(donors, alike, result)

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

    def made_of(self, names: Iterable[str]) -> list[str]:
        """The models and adapters that these donors are, each once."""
        return list(dict.fromkeys(part for name in names for part in self[name].made_of))

    def settings_differ(self, name: str, other: str) -> bool:
        """Whether two donors' configs differ in what acts on the values without changing their shapes."""
        return bool(_soft_differences(self[name], self[other]))

    def check_finite(self, progress: Callable[[str], None] = lambda _: None) -> None:
        """Raise InputError naming the donor, file and tensor that holds NaN or infinity."""
        checked = set[Tensor]()
        for donor in self:
            progress(donor.name)
            donor.check_finite(checked)

    def _leave_out_other_heads(self, donor: Checkpoint) -> None:
        """Take what is stored beside the model out of a donor; of one for another task, keep the blocks alone."""
        architecture, first = donor.architecture, self.donors[self.names[0]]
        outside = [name for name in donor.tensors if architecture.block_of(name) is None]
        beside = [name for name in outside if not architecture.is_boundary(name) and not architecture.is_ignored(name)]
        task = _other_task(donor, beside)
        if not beside and not task:
            return
        listed = f" ({', '.join(beside[:3])}{', ...' if len(beside) > 3 else ''})" if beside else ""
        if task and donor is first:
            raise InputError(
                f"{donor.name}: is stored as {task}{listed}: it can give its blocks, but not be the base; name another "
                "base_model_name"
            )
        for name in beside:
            del donor.tensors[name], donor.file_names[name]
        if not task:
            self.warnings.append(f"{donor.name}: what is stored beside the model is left out{listed}")
            return
        self.blocks_only.append(donor.name)
        donor.tensors = {n: info for n, info in donor.tensors.items() if not architecture.is_boundary(n)}
        donor.tensors |= {n: info for n, info in first.tensors.items() if architecture.is_boundary(n)}
        self.warnings.append(
            f"{donor.name}: is stored as {task}, so it gives its blocks alone and is not scored as a whole; embedding, "
            f"final norm and what is beside them are left out{listed}"
        )

    def _align_heads(self) -> None:
        family = self.architecture.family
        for donor in self:
            if self.tied:
                donor.tensors.pop(family.head, None)
            elif family.head not in donor.tensors and family.embedding in donor.tensors:
                donor.tensors[family.head] = donor.tensors[family.embedding]

    def _check_alike(self) -> None:
        first, *others = self
        faults = []
        for donor in others:
            whole = donor.name not in self.blocks_only  # else its vocabulary is not used
            differences = [*_config_differences(first, donor, whole), *_tensor_differences(first, donor)]
            differences += vocabulary_differences(first, donor) if whole else []
            if differences:
                listed = "; ".join(differences)
                faults.append(f"{donor.name}: cannot be merged with {first.name}: {listed}")
            self.warnings += _soft_differences(first, donor)
        if faults:
            raise InputError("\n".join(faults))


def _dimension(config: dict[str, Any], keys: tuple[str, ...]) -> Any:
    return next((config[key] for key in keys if key in config), None)


def _other_task(donor: Checkpoint, beside: Sequence[str]) -> str:
    """What a donor is stored as, if that is no language model; else empty."""
    stored = donor.config.get("architectures")
    names = [name for name in stored if isinstance(name, str)] if isinstance(stored, list) else []
    if names:
        # The bare decoder is all of a model whose head is its embedding.
        bare = names[0].endswith("Model") and donor.architecture.tied_in_config and not beside
        return "" if bare or any(name.endswith(LANGUAGE_MODELS) for name in names) else names[0]
    has_head = donor.architecture.family.head in donor.tensors
    return "a model for another task" if beside and not has_head else ""


def _config_differences(first: Checkpoint, other: Checkpoint, vocabulary: bool = True) -> list[str]:
    found = []
    for label, keys in DIMENSIONS:
        if label == "vocabulary" and not vocabulary:
            continue
        ours, theirs = _dimension(first.config, keys), _dimension(other.config, keys)
        if ours != theirs and None not in (ours, theirs):
            found.append(f"{label} {show(theirs)} instead of {show(ours)}")
    return found


def _soft_differences(first: Checkpoint, other: Checkpoint) -> list[str]:
    return [
        f"{other.name}: {key} is {show(other.config[key])}, {first.name} has {show(first.config[key])}; "
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


def vocabulary_differences(first: Checkpoint, other: Checkpoint) -> list[str]:
    """One line if tokens of the first model's tokenizer have another id in the other's, none if they have not."""
    ours, theirs = token_ids(first.tokenizer_folder), token_ids(other.tokenizer_folder)
    moved = [token for token, index in ours.items() if theirs.get(token, index) != index]
    if not moved:
        return []
    token = moved[0]
    return [
        f"{len(moved)} tokens have another id in the tokenizer, the first {show(token)} {theirs[token]} "
        f"instead of {ours[token]}"
    ]
