"""The typed configuration of `olmfast run`: one YAML file, every key checked before anything is opened.

docs/config.md describes each key for users; this file declares them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    model_validator,
)

from olmfast.config.loading import Location, absolute, explain, parse_size, read_yaml, set_key, show
from olmfast.errors import InputError, did_you_mean

Mode = Literal["exact_match", "bigram_loss", "diversity", "exact", "bigram", "quality", "perplexity", "choice"]
Template = Literal["auto", "tokenizer", "chatml", "raw"]
Scale = Literal["model", "depth", "kind", "boundary", "block", "tensor"]
HAN = "[\u4e00-\u9fff]"
MODES: tuple[str, ...] = Mode.__args__  # type: ignore[attr-defined]

# Keys that a resumed run may change: where things are and how long it may take, not what is decided.
FREE_TO_CHANGE = {
    "models_dir",
    "output_dir",
    "dataset_dir",
    "budget",
    "load_merge_report",
    "metric_dir",
    "max_ram",
    "max_vram",
    "batch_tokens",  # running out of memory must not be the end of a run
}


class Budget(BaseModel):
    """How much a run may spend: seconds of wall time, or a number of candidate evaluations."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    evaluations: int | None = Field(default=None, ge=1)


@dataclass(frozen=True)
class Blend:
    """One way to make candidates of a donor: what its number means, its default, and what is allowed."""

    default: float
    allowed: str
    is_allowed: Callable[[float], bool]


# How a unit's current values and a donor's make a candidate. `swap` takes the donor's alone and has no number.
BLENDS: dict[str, Blend] = {
    "linear": Blend(0.5, "shares of the donor between 0 and 1", lambda x: 0 < x < 1),
    "slerp": Blend(0.5, "t between 0 and 1", lambda x: 0 < x < 1),
    "ties": Blend(0.5, "densities above 0, at most 1", lambda x: 0 < x <= 1),
    "task_arithmetic": Blend(0.5, "weights other than 0", lambda x: x != 0),
}


class CandidateKind(BaseModel):
    """An entry of `candidates`: `swap`, or a blend with the numbers to try."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    method: str
    values: tuple[float, ...] = ()


def _parse_candidates(value: object) -> list[CandidateKind]:
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a list such as [swap, {{linear: [0.25, 0.5]}}], got {show(value)}")
    kinds = [entry if isinstance(entry, CandidateKind) else _parse_kind(entry) for entry in value]
    methods = [kind.method for kind in kinds]
    twice = next((method for method in methods if methods.count(method) > 1), None)
    if twice is not None:
        raise ValueError(f"{twice!r} is listed twice; give its numbers as one list")
    return kinds


def _parse_kind(entry: object) -> CandidateKind:
    method, numbers = entry, None
    if isinstance(entry, dict) and len(entry) == 1:
        ((method, numbers),) = entry.items()
    known = ["swap", *BLENDS]
    if not isinstance(method, str) or method not in known:
        hint = did_you_mean(method, known) if isinstance(method, str) else ""
        raise ValueError(f"expected one of {', '.join(known)}, got {show(entry)}{hint}")
    if method == "swap":
        if numbers is not None:
            raise ValueError(f"swap takes a donor's values unchanged and has no numbers, got {show(numbers)}")
        return CandidateKind(method="swap")
    blend = BLENDS[method]
    listed = [blend.default] if numbers is None else numbers if isinstance(numbers, list) else [numbers]
    try:
        values = tuple(float(x) for x in listed if not isinstance(x, bool))
    except (TypeError, ValueError, OverflowError):
        values = ()
    if not len(values) == len(listed) > 0 or not all(math.isfinite(x) and blend.is_allowed(x) for x in values):
        raise ValueError(f"{method}: expected {blend.allowed}, got {show(numbers)}")
    if len(set(values)) != len(values):
        raise ValueError(f"{method}: a number is given twice in {numbers!r}")
    return CandidateKind(method=method, values=values)


def _parse_budget(value: object) -> object:
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return Budget(evaluations=value)
    if isinstance(value, str):
        parts = re.fullmatch(r"\s*0*([1-9][0-9]{0,17})\s*", value)
        if parts:
            return Budget(evaluations=int(parts[1]))
        parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", value)
        if parts and 0 < float(parts[1]) < math.inf:
            unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}[parts[2]]
            return Budget(seconds=float(parts[1]) * unit)
    if value is None or isinstance(value, (Budget, dict)):
        return value
    raise ValueError(f"expected a time such as '2h' or '30m', or a number of evaluations above 0, got {value!r}")


def _parse_limit(value: object) -> int | None:
    return None if value is None else parse_size(value)


def _parse_selection(value: object) -> object:
    return "copeland" if value == "ranks" else value  # the original's word for it


class Racing(BaseModel):
    """Racing: after how many samples candidates may be dropped, and how sure that must be."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    rungs: list[Annotated[int, Field(ge=2)]] = Field(default=[25, 50, 100, 200, 400], min_length=1)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Racing:
        if any(a >= b for a, b in pairwise(self.rungs)):
            raise ValueError(f"rungs: expected growing numbers of samples, got {self.rungs}")
        return self


def _parse_significance(value: object) -> object:
    return None if value is False else value


def _parse_racing(value: object) -> object:
    if value is False or value is None:
        return None
    return Racing() if value is True else value


class DatasetConfig(BaseModel):
    """How one dataset file is read and scored."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    mode: Mode
    think: bool = True
    weight: float = Field(default=1.0, ge=0)
    strict: bool = False
    include_eos: bool = False
    forbid: str | None = HAN
    template: Template = "auto"
    max_new_tokens: int = Field(default=1024, ge=1)
    samples: int = Field(default=200, ge=1)


# Dataset keys that may be given at the top level, as the default of every dataset.
DATASET_DEFAULTS = ("forbid", "template", "max_new_tokens", "samples")


# Keys of a search by stages: a config that gives one of them searches as the original tool does.
STAGE_KEYS = (
    "base_select",
    "boundary_select",
    "layer_swap",
    "tensor_swap",
    "es_svd",
    "es_norm",
    "candidates",
    "scales",
    "direction",
    "markov",
    "max_models",
    "improve_all",
    "racing",
)
SIGNIFICANCE = 0.05  # of a joint search, unless the config says otherwise


class RunConfig(BaseModel):
    """The keys of `olmfast run`. Paths are absolute once loaded (relative to the config's folder)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    models_dir: Path
    output_dir: Path
    dataset_dir: Path
    models: list[str] = Field(min_length=1)
    dataset: dict[str, DatasetConfig] = Field(min_length=1)
    holdout: dict[str, DatasetConfig] = {}
    validation: Annotated[float, Field(ge=0, le=0.5)] | dict[str, DatasetConfig] = 0.2
    base_model_name: str | None = None
    ancestor: str | None = None
    start: str | None = None

    search: Literal["joint", "stages"] | None = None
    base_select: bool = False
    boundary_select: bool = False
    layer_swap: bool = False
    tensor_swap: bool = False
    skip_norm: bool = False
    es_svd: bool = False
    es_norm: bool = False
    load_merge_report: bool = False

    candidates: Annotated[list[CandidateKind], BeforeValidator(_parse_candidates)] = [CandidateKind(method="swap")]
    scales: list[Scale] = []
    direction: Literal["forward", "backward"] = "forward"
    samples: int = Field(200, ge=1)
    improve_all: str | None = None
    markov: int = Field(0, ge=0)
    max_models: int | None = Field(None, ge=1)
    units: list[str] = ["*"]
    es_svd_generations: int = Field(1, ge=1)
    es_svd_sigma: float = Field(0.1, gt=0)
    es_norm_generations: int = Field(3, ge=1)
    es_norm_sigma: float = Field(0.005, gt=0)
    es_accept: Literal["selection", "any"] = "selection"

    selection: Annotated[Literal["copeland", "mean"], BeforeValidator(_parse_selection)] = "copeland"
    significance: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, BeforeValidator(_parse_significance)] = None
    tie_tolerance: float | None = Field(None, ge=0)
    racing: Annotated[Racing | None, BeforeValidator(_parse_racing)] = None

    seed: int = Field(0, ge=0, lt=2**63)
    scorer: Literal["batched", "sequential"] = "batched"
    device: str = "auto"
    dtype: Literal["auto", "float32", "bfloat16", "float16", "float64"] = "auto"
    batch_tokens: int = Field(8192, ge=1)
    max_ram: Annotated[PositiveInt | None, BeforeValidator(_parse_limit)] = None
    max_vram: Annotated[PositiveInt | None, BeforeValidator(_parse_limit)] = None
    forbid: str | None = HAN
    template: Template = "auto"
    max_new_tokens: int = Field(1024, ge=1)
    budget: Annotated[Budget | None, BeforeValidator(_parse_budget)] = None
    shard_size: Annotated[PositiveInt, BeforeValidator(parse_size)] = 5_000_000_000
    metric_dir: str | None = None
    _config_dir: Path = PrivateAttr(Path())

    @property
    def config_dir(self) -> Path:
        """The folder that relative paths are taken from."""
        return self._config_dir

    @property
    def base_name(self) -> str:
        """The donor that is the base before any selection, and whose tokenizer and template are used."""
        return self.base_model_name or self.models[0]

    @property
    def is_joint(self) -> bool:
        """Whether the coefficients of all donors are searched: unless the config has keys of a search by stages."""
        if self.search is not None:
            return self.search == "joint"
        copeland = "selection" in self.model_fields_set and self.selection == "copeland"
        return not copeland and not self.model_fields_set.intersection(STAGE_KEYS)

    @property
    def required_p(self) -> float | None:
        """How unlikely a gain by luck must be: `significance`, which a joint search has a default for."""
        if self.significance is None and self.is_joint and "significance" not in self.model_fields_set:
            return SIGNIFICANCE
        return self.significance

    @property
    def validation_share(self) -> float:
        """The share of the selection questions that a joint search sets aside; 0 where there are datasets for it."""
        return self.validation if self.is_joint and isinstance(self.validation, float) else 0.0

    @property
    def validation_sets(self) -> dict[str, DatasetConfig]:
        """The datasets of its own that the validation has."""
        return self.validation if self.is_joint and isinstance(self.validation, dict) else {}

    @property
    def questions(self) -> dict[str, DatasetConfig]:
        """Every dataset that is read."""
        return {**self.dataset, **self.holdout, **self.validation_sets}

    @property
    def walk(self) -> list[Scale]:
        """The scales whose units are walked, in order: those listed, then those that only a switch asks for."""
        switches: dict[Scale, bool] = {
            "boundary": self.boundary_select,
            "block": self.layer_swap,
            "tensor": self.tensor_swap,
        }
        return [*self.scales, *(scale for scale, on in switches.items() if on and scale not in self.scales)]

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if len(set(self.models)) != len(self.models):
            twice = next(name for name in self.models if self.models.count(name) > 1)
            raise ValueError(f"models: {twice!r} is listed twice")
        if self.base_name not in self.models:
            raise ValueError(
                f"base_model_name: {self.base_name!r} is not in models{did_you_mean(self.base_name, self.models)}"
            )
        allowed = ["all", "base", *{entry.mode for entry in self.dataset.values()}, *self.dataset]
        if self.improve_all is not None and self.improve_all not in allowed:
            raise ValueError(
                f"improve_all: expected 'all', 'base', a mode in use or a dataset, got {self.improve_all!r}"
                f"{did_you_mean(self.improve_all, allowed)}"
            )
        again = next((scale for scale in self.scales if self.scales.count(scale) > 1), None)
        if again is not None:
            raise ValueError(f"scales: {again!r} is listed twice")
        joined = next((name for name in self.models if " + " in name), None)
        if joined is not None:
            raise ValueError(f"models: {joined!r}: ' + ' joins the names of a window's donors; rename the folder")
        both = set(self.dataset) & set(self.holdout)
        if both:
            raise ValueError(f"holdout: {sorted(both)[0]!r} is used for selection too, so it is not held out")
        both = set(self.validation_sets) & {*self.dataset, *self.holdout}
        if both:
            raise ValueError(f"validation: {sorted(both)[0]!r} is used for something else too")
        unfit = next((key for key in ("ancestor", "start") if getattr(self, key) and not self.is_joint), None)
        if unfit is not None:
            raise ValueError(f"{unfit}: only a joint search has one; add search: joint")
        if self.is_joint and (self.improve_all or self.racing):
            raise ValueError("improve_all, racing: a search by stages has them; leave them out, or add search: stages")
        for name, entry in self.questions.items():
            _check_pattern(name, entry.forbid)
        return self

    def decisive(self) -> dict[str, Any]:
        """The keys that a resumed run must not change, as plain JSON values."""
        return self.model_dump(mode="json", exclude=FREE_TO_CHANGE)


def _check_pattern(dataset: str, pattern: str | None) -> None:
    try:
        re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"dataset {dataset!r}: forbid: not a regular expression: {error}") from error


class _Datasets(BaseModel):
    dataset: dict[str, DatasetConfig]

    @model_validator(mode="after")
    def _check(self) -> _Datasets:
        for name, entry in self.dataset.items():
            _check_pattern(name, entry.forbid)
        return self


def parse_datasets(entries: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, DatasetConfig]:
    """Check plain data as dataset entries: file name -> how it is scored. Raises InputError with all faults."""
    try:
        return _Datasets.model_validate({"dataset": entries}).dataset
    except ValidationError as error:
        raise explain(where, error.errors(), _known_keys) from error


def load_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read and check a run's configuration; `overrides` maps dotted keys to values and wins over the file.

    `source` is the YAML file, or what one holds, whose paths are then relative to the working directory.
    Raises InputError that lists every fault at once, unknown keys with a suggestion.
    """
    path = Path("config" if isinstance(source, Mapping) else source)
    data = deepcopy(dict(source)) if isinstance(source, Mapping) else read_yaml(path)
    if "merge_method" in data:
        raise InputError(f"{path}: is a merge file, not a run's configuration; use: olmfast merge {path} OUT")
    for dotted, value in (overrides or {}).items():
        set_key(data, dotted, value)
    return parse_config(data, where=str(path), folder=path.parent.absolute())


def parse_config(data: dict[str, Any], where: str, folder: Path) -> RunConfig:
    """Check plain data as a RunConfig; relative paths are taken from `folder`."""
    data = dict(data)
    data.setdefault("dataset_dir", ".")
    for key in ("models_dir", "output_dir", "dataset_dir"):
        if isinstance(data.get(key), (str, Path)):
            data[key] = absolute(folder, data[key], f"{where}: {key}")
    if data.get("improve_all") is False:
        data["improve_all"] = None
    defaults = {key: data[key] for key in DATASET_DEFAULTS if key in data}
    inherited = set()
    for key in ("dataset", "holdout", "validation"):
        if isinstance(data.get(key), dict):
            inherited |= {
                (key, name, default)
                for name, entry in data[key].items()
                for default in defaults
                if isinstance(entry, dict) and default not in entry
            }
            data[key] = {
                name: {**defaults, **entry} if isinstance(entry, dict) else entry for name, entry in data[key].items()
            }
    try:
        config = RunConfig.model_validate(data)
    except ValidationError as error:
        # A wrong default is reported where it is given, not once more for each dataset that takes it.
        faults = [fault for fault in error.errors() if fault["loc"][:3] not in inherited]
        raise explain(where, faults, _known_keys) from error
    config._config_dir = folder
    return config


def _known_keys(location: Location) -> Iterable[str]:
    nested: dict[str, type[BaseModel]] = dict.fromkeys(("dataset", "holdout", "validation"), DatasetConfig)
    nested |= {"budget": Budget, "racing": Racing}
    model: type[BaseModel] = nested[str(location[0])] if len(location) > 1 else RunConfig
    return model.model_fields
