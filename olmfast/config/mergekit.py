"""mergekit's merge files, unchanged: every key is checked before anything is opened.

docs/mergekit.md tells users what works here and what differs.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from graphlib import CycleError
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, PrivateAttr, ValidationError, model_validator

from olmfast.config.documents import FromFile, by_name, in_order, read_documents
from olmfast.config.entries import (
    MergedModel,
    Model,
    Slice,
    SliceSource,
    Strict,
    TokenConfig,
    TokenizerConfig,
    TokenSource,
)
from olmfast.config.groups import Group, Source, group_faults, unread_parameters
from olmfast.config.loading import explain, unknown_key
from olmfast.config.naming import parse_model
from olmfast.config.parameters import NAMES, Parameters
from olmfast.config.tagged import refuse_dataflow
from olmfast.errors import InputError, did_you_mean, show, shown
from olmfast.weights.methods import METHODS, Method

Dtype = Literal["float32", "bfloat16", "float16", "float64"]


def _strip_torch(value: object) -> object:
    return value.removeprefix("torch.") if isinstance(value, str) else value


DtypeKey = Annotated[Dtype | None, BeforeValidator(_strip_torch)]


def _parse_tokenizer_source(value: object) -> object:
    """mergekit's first versions wrote `model:` before a model's name."""
    return parse_model(value.removeprefix("model:") if isinstance(value, str) else value)


def _check_method(value: str) -> str:
    if value not in METHODS:
        raise ValueError(f"expected one of {', '.join(METHODS)}, got {show(value)}{did_you_mean(value, METHODS)}")
    return value


TokenizerSource = Annotated[str, BeforeValidator(_parse_tokenizer_source)]


class MergeConfig(Strict, FromFile):
    """A merge file. Models are named as they are written there; paths are relative to its folder."""

    name: str | None = None
    merge_method: Annotated[str, AfterValidator(_check_method)]
    base_model: Model | None = None
    models: list[MergedModel] | None = Field(None, min_length=1)
    slices: list[Slice] | None = Field(None, min_length=1)
    parameters: Parameters = Field(default_factory=dict)
    dtype: DtypeKey = None
    out_dtype: DtypeKey = None
    tokenizer_source: TokenizerSource | None = None
    tokenizer: TokenizerConfig | None = None
    chat_template: str | None = None
    _earlier: tuple[MergeConfig, ...] = PrivateAttr(())
    _meant: dict[str, str] = PrivateAttr({})  # path without a folder -> the document that it means

    @property
    def earlier(self) -> tuple[MergeConfig, ...]:
        """The documents before this one in its file, whose names stand for their results."""
        return self._earlier

    @property
    def method(self) -> Method:
        """What `merge_method` names."""
        return METHODS[self.merge_method]

    @property
    def model_names(self) -> list[str]:
        """Every model named, each once: the base first, then in the order of the file."""
        named = [*([self.base_model] if self.base_model else []), *(entry.model for entry in self.models or ())]
        for part in self.slices or ():
            named += [source.model for source in part.sources]
        vocabulary = self.vocabulary
        if vocabulary and vocabulary.source not in ("union", "base"):
            named.append(vocabulary.source)
        return list(dict.fromkeys(named))

    @property
    def vocabulary(self) -> TokenizerConfig | None:
        """`tokenizer`, or what the older `tokenizer_source` says; None leaves the vocabulary alone."""
        if self.tokenizer_source is not None:
            return TokenizerConfig(source=self.tokenizer_source)
        return self.tokenizer

    @model_validator(mode="after")
    def _check(self) -> MergeConfig:
        if (self.models is None) == (self.slices is None):
            raise ValueError("expected either models or slices, got " + ("both" if self.models else "neither"))
        if self.tokenizer is not None and self.tokenizer_source is not None:
            raise ValueError("tokenizer and tokenizer_source: one is the newer form of the other; give one of them")
        faults = [
            *self._slice_faults(),
            *self._parameter_faults(),
            *(f for group in self.groups() for f in group_faults(self.merge_method, group, self.parameters)),
        ]
        if faults:
            raise ValueError("\n".join(faults))
        return self

    def groups(self) -> list[Group]:
        """What is merged with what: one group for `models`, one per slice. Without layer ranges, all layers."""
        if self.slices is not None:
            groups = []
            for i, part in enumerate(self.slices):
                sources = [Source(s.model, s.parameters, s.layer_range) for s in part.sources]
                groups.append(Group(f"slices[{i}]", sources, part.base_model or self.base_model, part.parameters))
            return groups
        sources = [Source(entry.model, entry.parameters) for entry in self.models or ()]
        if self.base_model and self.base_model not in [source.model for source in sources]:
            sources.append(Source(self.base_model, {}))
        return [Group("models", sources, self.base_model, {})]

    def notes(self) -> list[str]:
        """What is told of a file that can be merged: what a path means, parameters and keys that have no effect."""
        residual = any(part.residual_weight is not None for part in self.slices or ())
        unread = ["slices: residual_weight: not read, as in mergekit"] if residual else []
        meant = [f"{path}: no such folder, so the document {name} is meant" for path, name in self._meant.items()]
        return [*meant, *unread_parameters(self.merge_method, self.groups(), self.parameters), *unread]

    def _slice_faults(self) -> Iterator[str]:
        """Slices without layers, of which only the first and the last say something (whose embedding or head is
        taken), and slices of another method."""
        slices: Sequence[Slice] = self.slices or ()
        empty = [i for i, part in enumerate(slices) if part.n_layers == 0]
        if empty and len(empty) == len(slices):
            yield f"slices[0]: an empty layer_range, {list(slices[0].sources[0].layer_range)}: no layers at all"
        elif any(i not in (0, len(slices) - 1) for i in empty):
            yield (
                f"slices[{empty[0]}]: an empty layer_range; only the first slice (for what comes before the layers) "
                "and the last (for what follows them) may have one"
            )
        for i, part in enumerate(slices):
            if part.merge_method not in (None, self.merge_method):
                yield (
                    f"slices[{i}].merge_method: the file's is {self.merge_method}, got {show(part.merge_method)}; "
                    "another method needs a document of its own"
                )

    def _parameter_faults(self) -> Iterator[str]:
        places = [("parameters", self.parameters)]
        places += [(f"models[{i}].parameters", entry.parameters) for i, entry in enumerate(self.models or ())]
        for i, part in enumerate(self.slices or ()):
            places.append((f"slices[{i}].parameters", part.parameters))
            places += [(f"slices[{i}].sources[{j}].parameters", s.parameters) for j, s in enumerate(part.sources)]
        for place, parameters in places:
            for name in parameters:
                if name not in NAMES:
                    yield f"{place}.{name}: {unknown_key(name, NAMES, _PLACES)}"


def is_merge_file(data: Mapping[str, Any]) -> bool:
    """Whether a YAML file is a merge file, perhaps with misspelt keys or of another command of mergekit's, rather than
    a run's configuration."""
    models = data.get("models")
    described = isinstance(models, list) and any(isinstance(entry, dict) for entry in models)
    other = described or any(key in data for key in _OTHER_FILES)
    return (other and "dataset" not in data) or any(key in data for key in ("merge_method", "slices"))


def load_merge_config(source: str | Path | Mapping[str, Any]) -> MergeConfig:
    """Read and check a merge file, or what one holds, whose paths are then relative to the working directory.

    Of a file with several documents, the one without a name, or else the last that no other uses, which has the others
    as `earlier`, in the order that they are made in.
    Raises InputError that lists every fault, unknown keys with a suggestion.
    """
    refuse_dataflow(source)
    if isinstance(source, Mapping):
        return parse_merge_config(dict(source), "config", Path.cwd())
    path = Path(source)
    documents = read_documents(path)
    if "dataset" in documents[-1].data and not is_merge_file(documents[-1].data):
        raise InputError(f"{path}: is a run's configuration, not a merge file; use: olmfast run {path}")
    configs, faults = list[MergeConfig](), list[str]()
    folder = path.parent.absolute()
    names = {name for document in documents if isinstance(name := document.data.get("name"), str)}
    for place, document in enumerate(documents):
        where = str(path) if len(documents) == 1 else f"{path}: document {place + 1}"
        meant = dict[str, str]()
        others = {name for name in names if name != document.data.get("name")}
        try:
            data = by_name(document.without_anchors(_TOP), others, folder, meant)
            config = parse_merge_config(data, where, folder)
        except InputError as error:
            faults.append(str(error))
            continue
        config._text, config._file, config._meant = document.text, path.absolute(), meant
        configs.append(config)
    faults += _name_faults(configs, str(path))
    if faults:
        raise InputError("\n".join(faults))
    try:
        *earlier, last = in_order([(one.name, one, one.model_names) for one in configs])
    except CycleError as error:
        circle = ", ".join(str(configs[place].name) for place in error.args[1])
        raise InputError(f"{path}: documents use each other: {circle}") from error
    last._earlier = tuple(earlier)
    return last


def _name_faults(configs: Sequence[MergeConfig], where: str) -> Iterator[str]:
    """All documents but the one that gives the result need names; those of several are folders' names and differ."""
    names = [config.name for config in configs]
    if names.count(None) > 1:
        yield f"{where}: several documents have no name, so that nothing could use them; only the result's needs none"
    made = [name for name in names if name is not None] if len(names) > 1 else []
    for name in made:
        if not re.fullmatch(r"[\w.-]+", name) or name in (".", ".."):
            yield f"{where}: name: expected letters, digits, dots and dashes, got {show(name)}"
        elif made.count(name) > 1:
            yield f"{where}: two documents have the name {show(name)}"


# Keys of files of mergekit's other commands -> what these are, and what to do.
_OTHER_FILES = {
    "experts": "is a mixture-of-experts file (mergekit-moe), which builds a model of another architecture; "
    "olmfast merges models of one architecture",
    "experts_per_token": "is a mixture-of-experts file (mergekit-moe); olmfast merges models of one architecture",
    **dict.fromkeys(
        ("genome", "multi_method_genome"),
        "is a file of mergekit-evolve; a search is a run here: see olmfast run",
    ),
    "stages": "is not a merge file of mergekit's; each stage is a document here (--- begins one), and its name stands "
    "for its result in the others",
}


def parse_merge_config(data: dict[str, Any], where: str, folder: Path) -> MergeConfig:
    """Check plain data as a merge file; relative paths are taken from `folder`."""
    other = next((key for key in _OTHER_FILES if key in data), None)
    if other is not None:
        raise InputError(f"{where}: {other}: {_OTHER_FILES[other]}")
    try:
        config = MergeConfig.model_validate(_flattened(data, where))
    except ValidationError as error:
        raise explain(where, error.errors(), lambda _: _KEYS, _PLACES) from error
    config._folder = folder
    config._text = json.dumps(data, indent=2, default=str)
    return config


def _flattened(data: dict[str, Any], where: str) -> dict[str, Any]:
    """`modules: {default: {slices: ...}}` is the same as `slices`, for models of one module."""
    if "modules" not in data:
        return data
    modules = data["modules"]
    if (
        not isinstance(modules, dict)
        or len(modules) != 1
        or not isinstance(inner := next(iter(modules.values())), dict)
    ):
        raise InputError(
            f"{where}: modules: expected one, such as {{default: {{slices: ...}}}}, got {shown(modules)}; models of "
            "several modules are merged whole with models; slices cut their text model, the rest is the base_model's"
        )
    twice = [key for key in inner if key in data]
    if twice:
        raise InputError(f"{where}: {twice[0]}: given beside modules and in it; give it once")
    return {**{key: value for key, value in data.items() if key != "modules"}, **inner}


_KEYS = sorted(
    {
        key
        for model in (MergeConfig, MergedModel, SliceSource, Slice, TokenizerConfig, TokenConfig, TokenSource)
        for key in model.model_fields
    }
)
_TOP = {*MergeConfig.model_fields, "modules", *_OTHER_FILES}
_OF_GENOMES = ("allow_negative_weights", "smooth", "layer_granularity", "filters")
# Keys that are given where they are none -> where they belong; later ones win.
_PLACES: dict[str, str] = {
    "out_path": "the result's folder is an argument of the command, and documents use each other by name",
    **dict.fromkeys(("random_seed", "seed"), "the seed is an option of the command: --seed"),
    **dict.fromkeys(_OF_GENOMES, "it is a key of mergekit-evolve's genomes and changes no merge: leave it out"),
    **dict.fromkeys(SliceSource.model_fields, "it belongs in an entry of sources, beside model"),
    **dict.fromkeys(Slice.model_fields, "it belongs in an entry of slices"),
    **dict.fromkeys(TokenConfig.model_fields, "it belongs below tokenizer.tokens and the token"),
    **dict.fromkeys(TokenizerConfig.model_fields, "it belongs below tokenizer"),
    **dict.fromkeys(NAMES, "it belongs below parameters"),
    **dict.fromkeys(MergeConfig.model_fields, "it belongs at the top of the file"),
}
