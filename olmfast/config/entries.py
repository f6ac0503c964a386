"""Short ways to write datasets: several modes of one file, and a task of lm-evaluation-harness as the whole section."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from olmfast.errors import InputError

SCORED = "test"  # the split that a task is scored by, which no choice may be made by


def written_out(entries: Any, section: str) -> Any:
    """A section of datasets with an entry for each mode of a file; what is no mapping stays as it is.

    `{math.json: {mode: [exact, perplexity]}}` has `math.json:exact` and `math.json:perplexity`; `{lm_eval: T}` has `T`.
    A task of the section `holdout` is asked by the split that it is scored by, unless it says another.
    """
    if not isinstance(entries, dict):
        return entries
    if isinstance(entries.get("lm_eval"), str):
        split = entries.get("split") or (SCORED if section == "holdout" else None)
        entries = {entries["lm_eval"] + (f" {split}" if split else ""): entries}
    found: dict[Any, Any] = {}
    for name, entry in entries.items():
        if isinstance(entry, dict) and entry.get("lm_eval") and section == "holdout" and entry.get("split") is None:
            entry = {**entry, "split": SCORED}
        modes = entry.get("mode") if isinstance(entry, dict) else None
        if isinstance(modes, list) and modes:
            file = {} if entry.get("lm_eval") else {"file": entry.get("file") or name}
            found |= {f"{name}:{mode}": {**entry, "mode": mode, **file} for mode in modes}
        else:
            found[name] = entry
    return found


def by_name(given: Iterable[tuple[str, Mapping[str, Any]]], option: str) -> dict[str, dict[str, Any]]:
    """Datasets of a command line, (file, entry): under the file's name, or `FILE:MODE` where it is given again.

    Raises InputError for a file that is given twice in one mode.
    """
    found: dict[str, dict[str, Any]] = {}
    listed = list(given)
    files = [file for file, _ in listed]
    for file, entry in listed:
        name = file if files.count(file) == 1 else f"{file}:{entry['mode']}"
        if name in found:
            raise InputError(f"{option} {file}:{entry['mode']}: is given twice")
        found[name] = dict(entry) if name == file else {**entry, "file": file}
    return found
