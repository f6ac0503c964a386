"""Everything a run reads, opened and checked before anything is written."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import cached_property
from typing import Any

from olmfast.cluster.on_ray import check_installed
from olmfast.config.originals import BOUNDARY
from olmfast.config.run import RunConfig
from olmfast.errors import InputError, show
from olmfast.evaluation.conversations import conversations_of
from olmfast.evaluation.division import PARTS
from olmfast.evaluation.open import Questions, Settings, environment, order_of_tensors
from olmfast.observer import Observer
from olmfast.output.folder import OutputFolder, check_space, partial_of
from olmfast.runs.harness import check_tasks
from olmfast.runs.start import Start, file_of
from olmfast.runs.trackers import load_tracker
from olmfast.search.halves import Indices, set_aside
from olmfast.weights.digests import DIGESTS, DigestCache
from olmfast.weights.expressions import whole
from olmfast.weights.hub import common_model
from olmfast.weights.pool import Pool


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads, opened and checked; nothing has been written yet.

    `order` are the tensors in the order in which the model declares its parameters; `start` is what a joint search may
    begin with.
    """

    config: RunConfig
    pool: Pool
    questions: Questions
    settings: Settings
    order: tuple[str, ...]
    start: Start | None = None

    @classmethod
    def open(cls, config: RunConfig, observer: Observer, download: bool = True, weights: bool = True) -> Inputs:
        """Open donors (downloaded where missing and allowed) and datasets; with `weights`, search these for NaN.

        Raises InputError with a line for everything that is unusable, unless one fault hides another.
        """
        if config.prune is not None:
            raise InputError("prune: this config prunes a model, which is done by olmfast.pruning.prune")
        faults: list[str] = []
        pool = settings = None
        with _noted(faults):
            limits = {key: getattr(config, key) for key in ("batch_tokens", "max_ram", "max_vram", "scorer")}
            parts = PARTS if config.divides_questions else 1
            settings = Settings.of(config.device, config.dtype, **limits, parts=parts)
        start: Start | None = None
        with _noted(faults):
            start = Start.of(config)
        others = [ancestor_of(config), *(start.models if start else [])]
        names = list(dict.fromkeys([config.base_name, *config.models, *(name for name in others if name is not None)]))
        digests = DigestCache()
        with suppress(InputError):  # a name that no folder can have is told with the rest
            digests.load([partial_of(config.output_dir) / DIGESTS])
        with _noted(faults):
            pool = Pool.open(names, config.models_dir, config.config_dir, digests=digests, download=download)
        entries = config.questions
        if pool is None:  # what can be checked of the datasets without a tokenizer
            for name, entry in entries.items():
                with _noted(faults):
                    conversations_of(entry.path(config.dataset_dir, name), entry)
            raise InputError("\n".join(faults))
        for warning in pool.warnings:
            observer.note(warning)
        if len(config.models) == 1 and not (config.es_svd or config.es_norm or config.section):
            observer.note(f"models: {config.models[0]} is the only one: there is nothing to choose from")
        order: tuple[str, ...] = ()
        if settings is not None:
            with _noted(faults):
                order = order_of_tensors(whole(config.base_name, pool.tensors), pool, settings)
            for donor in pool:  # scored whole, it may be built by its own config
                if donor.name not in pool.blocks_only and donor.config != pool[config.base_name].config:
                    with _noted(faults):
                        order_of_tensors(whole(donor.name, pool.tensors), pool, settings)
        if start is not None:
            with _noted(faults):
                start.values(pool)
        questions = Questions(None, (), {})
        with _noted(faults):
            _ = pool[config.base_name].companions  # before they are used: what is used has to be what is recorded
            questions = Questions.load(pool[config.base_name], config.dataset_dir, entries)
        for note in questions.notes:
            observer.note(note)
        for check in (check_apart, check_units, check_evolve):
            with _noted(faults):
                check(config, pool)
        with _noted(faults):
            check_searches(config)
        if config.final_eval is not None:
            with _noted(faults):
                check_tasks(config.final_eval.tasks, config.task_folder, config.final_eval.limit)
        if config.has_workers:
            with _noted(faults):
                check_installed()
        with _noted(faults):
            load_tracker(config.track)
        with _noted(faults):
            check_space(config.output_dir, max(donor.n_bytes for donor in pool))
        if faults or settings is None:
            raise InputError("\n".join(faults))
        if weights:
            pool.check_finite()
        return cls(config, pool, questions, settings, order, start)

    @property
    def ancestor(self) -> str | None:
        """The model that task vectors are taken from, if it is known."""
        return ancestor_of(self.config)

    @property
    def donors(self) -> list[str]:
        """The models that are merged, the base first."""
        return [name for name in self.pool.names if name in self.config.models]

    @property
    def models(self) -> list[str]:
        """Those of them that are whole models and can be scored."""
        return [name for name in self.donors if name not in self.pool.blocks_only]

    @cached_property
    def _divided(self) -> tuple[Indices, Indices]:
        datasets = self.questions.only(self.config.dataset).datasets
        sizes = {name: len(dataset.samples) for name, dataset in datasets.items()}
        return set_aside(sizes, self.config.validation_share, self.config.seed, self.config.sources)

    @property
    def selection(self) -> Questions:
        """The questions that decide; in a joint search without those that are set aside."""
        return self.questions.only(self.config.dataset).part(self._divided[0])

    @property
    def validation(self) -> Questions:
        """The questions that no step of a joint search uses, on which its end is compared with its start."""
        if self.config.validation_sets:
            return self.questions.only(self.config.validation_sets)
        return self.questions.only(self.config.dataset).part(self._divided[1])

    @property
    def holdout(self) -> Questions:
        """The questions that do not."""
        return self.questions.only(self.config.holdout)

    def header(self) -> dict[str, Any]:
        """What identifies the run, all that its scores and its result depend on: a resumed run must have the same."""
        every, output = self.questions.datasets, self.config.output_dir
        places = {"models_dir": self.config.models_dir, "config_dir": self.config.config_dir}
        return {
            "version": 1,
            "config": self.config.decisive() | ({"start": self.start.identity} if self.start else {}),
            # From the result's folder, and free to change: where the donors were.
            "places": {key: os.path.relpath(place, output) for key, place in places.items()},
            "donors": {donor.name: donor.fingerprint() for donor in self.pool},
            "tokenizer": self.pool[self.config.base_name].companions,
            "datasets": {name: dataset.digest for name, dataset in every.items()},
            "samples": {name: len(dataset.samples) for name, dataset in every.items()},
            "left_out": {name: dataset.left_out for name, dataset in every.items() if dataset.left_out},
            "environment": environment(self.settings),
        }


def ancestor_of(config: RunConfig) -> str | None:
    """The ancestor that the config names, or the model that all donors of a joint search are adapters of."""
    if config.ancestor is not None or not config.is_tested:
        return config.ancestor
    return common_model(config.models, config.models_dir, config.config_dir)


def check_apart(config: RunConfig, pool: Pool) -> None:
    """Raise InputError when the output folder holds what the run reads: replacing it would delete that."""
    read = {f"the donor {donor.name}": donor.paths for donor in pool}
    read |= {f"the dataset {name}": [entry.path(config.dataset_dir, name)] for name, entry in config.questions.items()}
    if (start := file_of(config)) is not None:
        read["the start"] = [start]
    read["the config"] = [config.config_dir, *([config.file] if config.file else [])]
    OutputFolder(config.output_dir, overwrite=False).check_apart(read)


def check_units(config: RunConfig, pool: Pool) -> None:
    """Raise InputError when a pattern of `units` matches nothing, as a misspelt one does."""
    units = pool.architecture.module_units(pool.tensors)
    names = [name for unit in units for name in (unit.name, *unit.tensors)]
    for pattern in config.units:
        if pattern != BOUNDARY and not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(f"units: {show(pattern)} matches no module inside the blocks, such as {units[0].name}")


def check_evolve(config: RunConfig, pool: Pool) -> None:
    """Raise InputError when `evolve` has nothing to search, or a filter that matches no tensor."""
    if config.evolve is None:
        return
    if len({*config.models, *([config.ancestor] if config.ancestor else [])}) < 2:
        raise InputError(f"models: {config.models[0]} is the only one: evolve merges several")
    for wanted in config.evolve.filters:
        if not any(wanted in name for name in pool.tensors):
            raise InputError(f"evolve.filters: no tensor's name contains {show(wanted)}, such as {pool.tensors[-1]}")
    if config.evolve.layer_granularity > pool.architecture.n_blocks:
        raise InputError(
            f"evolve.layer_granularity: {config.evolve.layer_granularity}, but the models have "
            f"{pool.architecture.n_blocks} blocks"
        )


def check_searches(config: RunConfig) -> None:
    """Raise InputError when a search by stages has nothing to search: it would end as it began."""
    searched = config.is_tested or config.es_svd or config.es_norm or config.load_merge_report
    if not searched and not config.walk and not config.chosen_by(config.base_select):
        raise InputError(
            "this config searches nothing: its keys are of a search by stages, and no stage is on; switch on some of "
            "base_select, boundary_select, layer_swap, tensor_swap, es_svd and es_norm, or add search: joint"
        )


@contextmanager
def _noted(faults: list[str]) -> Iterator[None]:
    """Add an InputError raised inside to the faults, and continue."""
    try:
        yield
    except InputError as error:
        faults.append(str(error))
