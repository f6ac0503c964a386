"""What a run, a merge or a path would do, said before it is done: the checks of every kind of file."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from olmfast.config.dataflow import DataflowConfig, load_dataflow_config
from olmfast.config.mergekit import MergeConfig
from olmfast.config.run import RunConfig
from olmfast.config.tagged import holds_dataflow, is_dataflow_file
from olmfast.dataflow.plan import plan_dataflow
from olmfast.errors import InputError
from olmfast.observer import Observer
from olmfast.runs import check as others
from olmfast.static.plan import Plan

if TYPE_CHECKING:
    from olmfast.runs.estimate import Estimate

Loaded = RunConfig | MergeConfig | DataflowConfig


@overload
def check(config: RunConfig, *, observer: Observer | None = None) -> Estimate: ...
@overload
def check(
    config: MergeConfig | DataflowConfig,
    *,
    observer: Observer | None = None,
    allow_mismatch: Collection[str] = (),
    classification: bool = False,
) -> Plan: ...
@overload
def check(
    config: Mapping[str, Any] | str | Path,
    *,
    observer: Observer | None = None,
    allow_mismatch: Collection[str] = (),
    classification: bool = False,
) -> Estimate | Plan: ...
def check(
    config: Loaded | Mapping[str, Any] | str | Path,
    *,
    observer: Observer | None = None,
    allow_mismatch: Collection[str] = (),
    classification: bool = False,
) -> Estimate | Plan:
    """Check a run, a merge or a path, and say what it would do: an Estimate of the run, or the Plan of the others.

    `config` is the path of a run's config, a merge file or a data-flow file, what one of them holds, or one loaded.
    Writes nothing, but for donors of a run that have to be downloaded, and reads no weights (of a path's factors those
    in use); `observer` is told what is noteworthy. `allow_mismatch` is that of `merge`, `classification` that of a
    path whose output model is a sequence classifier.
    Raises InputError that lists everything that does not fit.
    """
    if not isinstance(config, (RunConfig, MergeConfig, DataflowConfig)):
        config = read_config(config)
    if isinstance(config, DataflowConfig):
        return plan_dataflow(config, allow_mismatch=allow_mismatch, classification=classification)
    if classification:
        raise InputError("--classification: is said of a data-flow file, and this is none")
    if isinstance(config, RunConfig):
        return others.check(config, observer=observer)
    return others.check(config, observer=observer, allow_mismatch=allow_mismatch)


def read_config(source: Mapping[str, Any] | str | Path, overrides: Mapping[str, Any] | None = None) -> Loaded:
    """The config of a run, the merge file or the data-flow file, whichever it is; `overrides` are a run's.

    Raises InputError that lists every fault, or for overrides of another file.
    """
    if not (is_dataflow_file(source) if isinstance(source, Mapping) else holds_dataflow(Path(source))):
        return others.read_config(source, overrides)
    if overrides:
        where = "the path" if isinstance(source, Mapping) else source
        raise InputError(
            f"{where}: is a data-flow file, whose keys are not overridden here, got {', '.join(overrides)}"
        )
    return load_dataflow_config(source)
