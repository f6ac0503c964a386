"""What a run or a merge would do, said before it is done."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, overload

from olmfast.config.documents import read_documents
from olmfast.config.mergekit import MergeConfig, is_merge_file, load_merge_config
from olmfast.config.run import RunConfig, load_config
from olmfast.config.tagged import refuse_dataflow
from olmfast.errors import InputError
from olmfast.observer import Observer
from olmfast.runs.estimate import Estimate, estimate
from olmfast.static.documents import plan_documents
from olmfast.static.loading import check_result
from olmfast.static.plan import Plan


@overload
def check(config: RunConfig, *, observer: Observer | None = None) -> Estimate: ...
@overload
def check(config: MergeConfig, *, observer: Observer | None = None, allow_mismatch: Collection[str] = ()) -> Plan: ...
@overload
def check(
    config: Mapping[str, Any] | str | Path, *, observer: Observer | None = None, allow_mismatch: Collection[str] = ()
) -> Estimate | Plan: ...
def check(
    config: RunConfig | MergeConfig | Mapping[str, Any] | str | Path,
    *,
    observer: Observer | None = None,
    allow_mismatch: Collection[str] = (),
) -> Estimate | Plan:
    """Check a run or a merge, and say what it would do: an Estimate of the run, or the Plan of the merge.

    `config` is the path of a run's config or of a merge file, what one of them holds, or either loaded. Writes nothing,
    but for donors of a run that have to be downloaded, and reads no weights; `observer` is told what is noteworthy.
    `allow_mismatch` is that of `merge`.
    Raises InputError that lists everything that does not fit.
    """
    if not isinstance(config, (RunConfig, MergeConfig)):
        config = read_config(config)
    if isinstance(config, MergeConfig):
        plan = plan_documents(config, allow_mismatch=allow_mismatch)[-1]
        check_result(plan.content)
        return plan
    return estimate(config, observer)


def read_config(
    source: Mapping[str, Any] | str | Path, overrides: Mapping[str, Any] | None = None
) -> RunConfig | MergeConfig:
    """The config of a run or the merge file, whichever it is; `overrides` are those of `load_config`.

    Raises InputError that lists every fault, or for overrides of a merge file.
    """
    refuse_dataflow(source)
    held = source if isinstance(source, Mapping) else read_documents(Path(source))[-1].data
    if not is_merge_file(held):
        return load_config(source, overrides)
    if overrides:
        where = "the merge" if isinstance(source, Mapping) else source
        raise InputError(f"{where}: is a merge file, whose keys are not overridden here, got {', '.join(overrides)}")
    return load_merge_config(source)
