"""The typed configuration of `olmfast run`: one YAML file, every key checked before anything is opened.

docs/config.md describes each key for users; this file declares them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
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

from olmfast.config.benchmarks import Benchmark
from olmfast.config.candidates import CandidateKind, parse_candidates
from olmfast.config.datasets import (
    DATASET_DEFAULTS,
    HAN,
    LM_EVAL_PATH,
    DatasetConfig,
    Template,
    check_pattern,
    with_tasks,
    written_out,
)
from olmfast.config.loading import Location, absolute, explain, parse_size, read_yaml
from olmfast.config.originals import DATASETS, STAGE_KEYS, read_original
from olmfast.config.overriding import override
from olmfast.config.pruning import Pruning
from olmfast.config.resources import Budget, Ray, parse_budget
from olmfast.config.searches import (
    Dataflow,
    Evolve,
    FinalEval,
    Racing,
    Windows,
    lift_genome,
    parse_final_eval,
    parse_racing,
    parse_windows,
)
from olmfast.config.tagged import refuse_dataflow
from olmfast.errors import InputError, did_you_mean, show

Scale = Literal["model", "depth", "kind", "boundary", "block", "tensor"]

# Keys that a resumed run may change: where things are and how long it may take, not what is decided.
FREE_TO_CHANGE = {
    "models_dir",
    "output_dir",
    "dataset_dir",
    "budget",
    "load_merge_report",
    "max_ram",
    "max_vram",
    "batch_tokens",  # running out of memory must not be the end of a run
    "workers",
    "ray",
    *("answers", "benchmarks", "track"),  # what is told of it, and to whom
}


def _parse_limit(value: object) -> int | None:
    return None if value is None else parse_size(value)


def _parse_selection(value: object) -> object:
    names = {"ranks": "copeland", "borda": "average_rank"}  # `ranks` is the original's word
    return names.get(value, value) if isinstance(value, str) else value


def _parse_switch(value: object) -> object:
    """A switch, or the name of what decides; `none` is off."""
    if not isinstance(value, str):
        return value
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False, "none": False, "": False}
    return words.get(value.lower(), value)


def _parse_significance(value: object) -> object:
    return None if value is False else value


# Where things are, unless the config says otherwise.
PLACES = {"models_dir": "models", "output_dir": "merged", "dataset_dir": "."}
SIGNIFICANCE = 0.05  # of a joint search, unless the config says otherwise


class RunConfig(BaseModel):
    """The keys of `olmfast run`. Paths are absolute once loaded (relative to the config's folder)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    models_dir: Path
    output_dir: Path
    dataset_dir: Path
    models: list[str] = Field(min_length=1)
    dataset: dict[str, DatasetConfig] = Field(json_schema_extra={"minProperties": 1})  # none to prune
    holdout: dict[str, DatasetConfig] = {}
    final_eval: Annotated[FinalEval | None, BeforeValidator(parse_final_eval)] = None
    lm_eval_path: str | None = None
    validation: Annotated[float, Field(ge=0, le=0.5)] | dict[str, DatasetConfig] = 0.2
    base_model_name: str | None = None
    ancestor: str | None = None
    start: str | None = None
    prune: Pruning | None = None

    search: Literal["joint", "stages"] | None = None
    evolve: Evolve | None = None
    dataflow: Dataflow | None = None
    base_select: Annotated[bool | str, BeforeValidator(_parse_switch)] = False
    boundary_select: Annotated[bool | str, BeforeValidator(_parse_switch)] = False
    layer_swap: bool = False
    tensor_swap: bool = False
    skip_norm: bool = False
    es_svd: bool = False
    es_norm: bool = False
    load_merge_report: bool = False

    candidates: Annotated[list[CandidateKind], BeforeValidator(parse_candidates)] = [CandidateKind(method="swap")]
    scales: list[Scale] = []
    direction: Literal["forward", "backward"] = "forward"
    samples: int = Field(200, ge=1)
    improve_all: str | None = None
    markov: Annotated[Windows, BeforeValidator(parse_windows)] = Windows(window=0)
    max_models: int | None = Field(None, ge=1)
    units: list[str] = ["*"]
    es_svd_generations: int = Field(1, ge=1)
    es_svd_sigma: float = Field(0.1, gt=0)
    es_norm_generations: int = Field(3, ge=1)
    es_norm_sigma: float = Field(0.005, gt=0)
    es_accept: Literal["selection", "any"] = "selection"

    selection: Annotated[Literal["copeland", "mean", "average_rank"], BeforeValidator(_parse_selection)] = "copeland"
    significance: Annotated[Annotated[float, Field(gt=0, lt=1)] | None, BeforeValidator(_parse_significance)] = None
    tie_tolerance: float | None = Field(None, ge=0)
    racing: Annotated[Racing | None, BeforeValidator(parse_racing)] = None

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
    workers: Annotated[int, Field(ge=1)] | Literal["auto"] | None = None
    ray: Ray | None = None
    budget: Annotated[Budget | None, BeforeValidator(parse_budget)] = None
    shard_size: Annotated[PositiveInt, BeforeValidator(parse_size)] = 5_000_000_000
    answers: int = Field(5, ge=0, le=100)
    benchmarks: dict[str, Benchmark] = {}
    track: Literal["trackio", "wandb", "mlflow", "tensorboard"] | None = None
    _config_dir: Path = PrivateAttr(Path())
    _notes: tuple[str, ...] = PrivateAttr(())
    _file: Path | None = PrivateAttr(None)

    def __eq__(self, other: object) -> bool:
        """Whether both say the same: which file that was read from makes no difference."""
        if not isinstance(other, RunConfig):
            return NotImplemented
        mine, others = ((own._config_dir, own.model_dump()) for own in (self, other))
        return mine == others

    @property
    def config_dir(self) -> Path:
        """The folder that relative paths are taken from."""
        return self._config_dir

    @property
    def notes(self) -> tuple[str, ...]:
        """What was read as something else than it says, and what is ignored."""
        return self._notes

    @property
    def file(self) -> Path | None:
        """The file it was read from."""
        return self._file

    @property
    def base_name(self) -> str:
        """The donor that is the base before any selection, and whose tokenizer and template are used."""
        if self.base_select in self.models:
            return str(self.base_select)
        return self.base_model_name or self.models[0]

    def chosen_by(self, switch: bool | str) -> list[str]:
        """The datasets that decide where `base_select` or `boundary_select` is so; none where nothing is chosen."""
        if isinstance(switch, bool):
            return list(self.dataset) if switch else []
        return [name for name, entry in self.dataset.items() if switch in (name, entry.mode)]

    @property
    def is_joint(self) -> bool:
        """Whether the coefficients of all donors are searched: unless it prunes, or has keys of another search."""
        if self.prune is not None:
            return False
        if self.search is not None or self.section is not None:
            return self.search == "joint"
        by_rank = "selection" in self.model_fields_set and self.selection != "mean"
        return not by_rank and not self.model_fields_set.intersection(STAGE_KEYS)

    @property
    def section(self) -> str | None:
        """The section that stands for a search of its own."""
        return next((name for name in ("evolve", "dataflow") if getattr(self, name) is not None), None)

    @property
    def is_tested(self) -> bool:
        """Whether what is chosen must be better on questions that did not pick it: in all searches but by stages."""
        return self.is_joint or self.section is not None

    @property
    def has_workers(self) -> bool:
        """Whether other processes do the work."""
        return self.workers not in (None, 1) or self.ray is not None

    @property
    def divides_questions(self) -> bool:
        """Whether all is computed in parts that any number of processes could share: `workers: 1` is this one alone."""
        return self.workers is not None or self.ray is not None

    @property
    def is_validated(self) -> bool:
        """Whether questions are set aside on which the end is compared with the start."""
        return self.is_tested and not (self.dataflow is not None and self.dataflow.repeat)

    @property
    def races(self) -> Racing | None:
        """The racing of the candidates that are scored on all questions of a step."""
        return self.dataflow.racing if self.dataflow is not None else self.racing

    @property
    def counts_questions(self) -> bool:
        """Whether an evaluation is that of all questions once, however many candidates share them."""
        return self.is_tested or self.prune is not None

    @property
    def required_p(self) -> float | None:
        """How unlikely a gain by luck must be: `significance`, which a search that tests has a default for."""
        if self.significance is None and self.is_tested and "significance" not in self.model_fields_set:
            return SIGNIFICANCE
        return self.significance

    @property
    def validation_share(self) -> float:
        """The share of the selection questions that is set aside; 0 where there are datasets for it."""
        return self.validation if self.is_validated and isinstance(self.validation, float) else 0.0

    @property
    def validation_sets(self) -> dict[str, DatasetConfig]:
        """The datasets of its own that the validation has."""
        return self.validation if self.is_validated and isinstance(self.validation, dict) else {}

    @property
    def questions(self) -> dict[str, DatasetConfig]:
        """Every dataset that is read."""
        return {**self.dataset, **self.holdout, **self.validation_sets}

    @property
    def sources(self) -> dict[str, str]:
        """Dataset -> what tells its questions from others': several modes of one file have the same."""
        return {name: entry.source(name) for name, entry in self.questions.items()}

    @property
    def task_folder(self) -> Path | None:
        """Where files of lm-evaluation-harness' tasks are, beside its own."""
        return None if self.lm_eval_path is None else self.dataset_dir / self.lm_eval_path

    @property
    def walk(self) -> list[Scale]:
        """The scales whose units are walked, in order: those listed, then those that only a switch asks for."""
        switches: dict[Scale, bool] = {
            "boundary": bool(self.boundary_select),
            "block": self.layer_swap,
            "tensor": self.tensor_swap,
        }
        return [*self.scales, *(scale for scale, on in switches.items() if on and scale not in self.scales)]

    @model_validator(mode="after")
    def _check(self) -> RunConfig:
        if len(set(self.models)) != len(self.models):
            twice = next(name for name in self.models if self.models.count(name) > 1)
            raise ValueError(f"models: {show(twice)} is listed twice")
        if not self.dataset and self.prune is None:
            raise ValueError("dataset: expected 1 or more entries, got {}")
        if self.prune is not None:
            self._check_pruning(self.prune)
        used = [*dict.fromkeys(entry.mode for entry in self.dataset.values()), *self.dataset]
        _check_word(
            "improve_all", self.improve_all, "'all', 'base', a mode in use or a dataset", ["all", "base", *used]
        )
        for key in ("base_select", "boundary_select"):
            given = getattr(self, key)
            word = None if isinstance(given, bool) else given
            _check_word(key, word, "true, false, a mode in use, a dataset or a model", [*used, *self.models])
        again = next((scale for scale in self.scales if self.scales.count(scale) > 1), None)
        if again is not None:
            raise ValueError(f"scales: {show(again)} is listed twice")
        joined = next((name for name in self.models if " + " in name), None)
        if joined is not None:
            raise ValueError(f"models: {show(joined)}: ' + ' joins the names of a window's donors; rename the folder")
        both = set(self.dataset) & set(self.holdout)
        if both:
            raise ValueError(f"holdout: {show(sorted(both)[0])} is used for selection too, so it is not held out")
        scored = [name for name, entry in {**self.dataset, **self.validation_sets}.items() if entry.split == "test"]
        if scored:
            raise ValueError(
                f"dataset {show(scored[0])}: split: test is what a task is scored by; search by train or validation, "
                "and give test as holdout"
            )
        both = set(self.validation_sets) & {*self.dataset, *self.holdout}
        if both:
            raise ValueError(f"validation: {show(sorted(both)[0])} is used for something else too")
        stray = next((name for name in self.benchmarks if name not in self.holdout), None)
        if stray is not None:
            raise ValueError(f"benchmarks: {show(stray)} is not in holdout; what chose the result tells too much of it")
        self._check_searches()
        if self.racing and self.selection == "average_rank":
            raise ValueError("racing: who has the lowest average rank depends on all; use selection: copeland or mean")
        for name, entry in self.questions.items():
            check_pattern(name, entry.forbid)
        return self

    def _check_searches(self) -> None:
        """Raise ValueError for keys of two searches at once."""
        given = self.model_fields_set
        sections = [name for name in ("evolve", "dataflow", "prune") if getattr(self, name) is not None]
        if len(sections) > 1:
            raise ValueError(f"{', '.join(sections)}: each is a search of its own; give one of them")
        if self.dataflow is not None and self.dataflow.of_one and len(self.models) > 1:
            raise ValueError(f"dataflow.models: is one, and models lists {len(self.models)}; leave one")
        others = ("search", *STAGE_KEYS, "start", *(["ancestor"] if self.dataflow is not None else []))
        if self.section is not None and (keys := [key for key in others if key in given]):
            raise ValueError(f"{', '.join(keys)}: {self.section} is a search of its own; leave them out")
        if self.ancestor and not self.is_tested:
            raise ValueError("ancestor: only a joint search has one; add search: joint")
        if self.start and not self.is_joint:
            raise ValueError("start: only a joint search has one; add search: joint")
        if self.has_workers and (self.dataflow is not None or self.prune is not None):
            raise ValueError("workers, ray: a search of paths and pruning run in one process; leave them out")
        if self.is_joint and (self.improve_all or self.racing):
            raise ValueError("improve_all, racing: a search by stages has them; leave them out, or add search: stages")

    def _check_pruning(self, pruning: Pruning) -> None:
        """Raise ValueError for keys that this way of pruning has no use for."""
        if self.final_eval is not None:
            raise ValueError("final_eval: is of runs that merge; use olmfast evaluate OUT --lm-eval TASKS")
        unused = [key for key in ("dataset", "holdout", "budget") if getattr(self, key)]
        if unused and not pruning.is_search:
            raise ValueError(f"{unused[0]}: method {pruning.way} searches nothing; leave it out")
        if len(self.models) > 1 and pruning.way != "joint":
            raise ValueError(
                f"models: method {pruning.way} prunes one model, got {len(self.models)}; joint takes a pool"
            )

    def decisive(self) -> dict[str, Any]:
        """The keys that a resumed run must not change, as plain JSON values."""
        return self.model_dump(mode="json", exclude=FREE_TO_CHANGE)


def _check_word(key: str, word: str | None, expected: str, allowed: Sequence[str]) -> None:
    if word is not None and word not in allowed:
        raise ValueError(f"{key}: expected {expected}, got {show(word)}{did_you_mean(word, allowed)}")


def load_config(source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """Read and check a run's configuration; `overrides` maps dotted keys to values and wins over the file.

    `source` is the YAML file, or what one holds, whose paths are then relative to the working directory.
    Raises InputError that lists every fault at once, unknown keys with a suggestion.
    """
    refuse_dataflow(source)
    path = Path("config" if isinstance(source, Mapping) else source)
    data = deepcopy(dict(source)) if isinstance(source, Mapping) else read_yaml(path)
    if "merge_method" in data:
        raise InputError(f"{path}: is a merge file, not a run's configuration; use: olmfast merge {path} OUT")
    for dotted, value in (overrides or {}).items():
        override(data, dotted, value, RunConfig)
    config = parse_config(data, where=str(path), folder=path.parent.absolute())
    if not isinstance(source, Mapping):
        config._file = path.absolute()
    return config


def parse_config(data: dict[str, Any], where: str, folder: Path) -> RunConfig:
    """Check plain data as a RunConfig; relative paths are taken from `folder`."""
    data, notes = read_original(data)
    data = lift_genome(_without_blanks(data), where)
    notes += _join_base(data)
    for key, place in PLACES.items():
        data.setdefault(key, place)
        if isinstance(data.get(key), (str, Path)):
            data[key] = absolute(folder, data[key], f"{where}: {key}")
    if isinstance(data.get("prune"), dict):
        data["prune"] = _with_places(data["prune"], folder, f"{where}: prune")
        data.setdefault("dataset", {})
    if data.get("improve_all") is False:
        data["improve_all"] = None
    defaults = {key: data[key] for key in DATASET_DEFAULTS if key in data}
    inherited = set()
    for key in DATASETS:
        if isinstance(data.get(key), dict):
            data[key] = with_tasks(written_out(data[key], key), data.get(LM_EVAL_PATH))
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
        raise explain(where, faults, _known_keys, _OF_EVOLVE) from error
    config._config_dir, config._notes = folder, tuple(notes)
    return config


def _with_places(section: dict[str, Any], folder: Path, where: str) -> dict[str, Any]:
    """The section `prune` with its paths taken from `folder`."""
    named = {key: section[key] for key in ("alphas_file", "data_dir") if isinstance(section.get(key), (str, Path))}
    return {**section, **{key: absolute(folder, path, f"{where}.{key}") for key, path in named.items()}}


def _without_blanks(data: Mapping[str, Any]) -> dict[str, Any]:
    """The data without blank values, which mean the default. `forbid` may be null: then nothing is forbidden.

    A blank key of a search by stages is given its default: the config is one of such a search.
    """
    kept: dict[str, Any] = {}
    for key, value in data.items():
        if key in STAGE_KEYS and value is None:
            kept[key] = RunConfig.model_fields[key].get_default()
        elif value is not None or key == "forbid" or key not in RunConfig.model_fields:
            kept[key] = _filled(value, within=key in DATASETS)
    return kept


def _filled(value: Any, within: bool = False) -> Any:
    """A value without its blank parts; `within`: those of its own values instead."""
    if isinstance(value, dict) and within:
        return {name: _filled(entry) for name, entry in value.items()}
    if isinstance(value, dict):
        return {key: part for key, part in value.items() if part is not None or key == "forbid"}
    return [part for part in value if part is not None] if isinstance(value, list) else value


def _join_base(data: dict[str, Any]) -> Iterator[str]:
    """A base that is not listed joins the pool."""
    base, models = data.get("base_model_name"), data.get("models")
    if isinstance(base, str) and isinstance(models, list) and base not in models:
        data["models"] = [*models, base]
        listed = [name for name in models if isinstance(name, str)]
        yield f"base_model_name: {base} is not in models and joins them{did_you_mean(base, listed)}"


# Keys of mergekit-evolve's files -> where what they hold belongs.
_OF_EVOLVE = {
    "genome": "what it holds belongs below evolve",
    "tasks": "tasks of lm-evaluation-harness belong below dataset, as NAME: {lm_eval: TASK}",
}


def _known_keys(location: Location) -> Iterable[str]:
    nested: dict[str, type[BaseModel]] = dict.fromkeys(("dataset", "holdout", "validation"), DatasetConfig)
    nested |= {"budget": Budget, "racing": Racing, "markov": Windows, "prune": Pruning, "ray": Ray}
    nested |= {"evolve": Evolve, "dataflow": Dataflow, "benchmarks": Benchmark, "final_eval": FinalEval}
    model: type[BaseModel] = nested[str(location[0])] if len(location) > 1 else RunConfig
    return model.model_fields
