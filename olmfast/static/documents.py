"""Merge files of several documents: each but the last makes a model that later ones may name.

All are planned before the first is written: of a model that is still to be made, its config, tokenizer and the header
of its weights stand in for it.
"""

from __future__ import annotations

import shutil
import weakref
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from olmfast.config.mergekit import MergeConfig
from olmfast.errors import InputError
from olmfast.output.writer import write_outline
from olmfast.static.mergekit import plan_merge
from olmfast.static.plan import Plan


def plan_documents(config: MergeConfig, **options: Any) -> list[Plan]:
    """The plan of every document of a file, `config` being the last; `options` are those of `plan_merge`.

    Reads and writes no weights. Raises InputError that says which document does not fit.
    """
    if not config.earlier:
        return [plan_merge(config, **options)]
    plans: list[Plan] = []
    outlines, made = _Outlines(), dict[str, Path]()
    for document in (*config.earlier, config):
        plans.append(replace(_planned(document, made, options), outlines=outlines))
        if document is not config:
            made[str(document.name)] = outlines.folder / str(document.name)
            write_outline(plans[-1].content, made[str(document.name)])
    notes = list[str]()
    for document, plan in zip(config.earlier, plans, strict=False):
        notes.append(f"{document.name}: made first, by {plan.title} of {len(plan.pool)} models")
        notes += [f"{document.name}: {warning}" for warning in plan.warnings]
    plans[-1] = replace(plans[-1], notes=[*plans[-1].notes, *notes])
    return plans


class _Outlines:
    """The folder of what stands in for models that are still to be made; it goes with the last plan that reads it."""

    def __init__(self) -> None:
        self.folder = Path(mkdtemp(prefix="olmfast-"))
        weakref.finalize(self, shutil.rmtree, self.folder, ignore_errors=True)


def _planned(document: MergeConfig, made: Mapping[str, Path], options: Mapping[str, Any]) -> Plan:
    try:
        return plan_merge(document, made=made, **options)
    except InputError as error:
        which = document.name or "the last document"
        raise InputError("\n".join(f"{which}: {line}" for line in str(error).splitlines())) from error


def output_of(document: MergeConfig, output: Path) -> Path:
    """Where an earlier document's model goes: beside the result, with the document's name after a dash."""
    return output.with_name(f"{output.name}-{document.name}")
