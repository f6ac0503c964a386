"""The report of the original OLM: its decisions, as the first steps of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from olmfast.errors import InputError
from olmfast.search.log import STEPS
from olmfast.search.record import REPORT


def read_original(folder: Path) -> dict[str, Any] | None:
    """The original tool's report in a folder; None where there is no report, or it is ours and has its log.

    Raises InputError for one that cannot be read, is not a merge report, or is ours and has lost its log.
    """
    path = folder / REPORT
    if not path.is_file() or (folder / STEPS).is_file():
        return None
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read: {error}") from error
    if not isinstance(data, dict) or not isinstance(data.get("base_model", {}), dict):
        raise InputError(f"{path}: is not a merge report")
    if "olmfast" in data:
        raise InputError(
            f"{folder / STEPS}: is missing, and {REPORT} alone cannot be continued; put it back, or use --overwrite "
            "to start anew"
        )
    return data


def original_choices(data: dict[str, Any], tensors: list[str], known: list[str]) -> dict[str, Any]:
    """The decisions in a report of the original tool, checked: base, boundary, layers {index: donor}, tensors.

    Raises InputError naming a donor of the report that is not in the pool.
    """
    choices: dict[str, Any] = {"base": data.get("base_model", {}).get("name")}
    choices["boundary"] = data.get("boundary_layers", {}).get("name")
    choices["layers"] = {int(i): e["best_model"] for i, e in data.get("layers", {}).items() if "best_model" in e}
    choices["tensors"] = {
        name.removesuffix(".weight").removesuffix(".bias"): e["best_model"]
        for name, e in data.get("tensors", {}).items()
        if e.get("best_model") is not None
    }
    used = [choices["base"], choices["boundary"], *choices["layers"].values(), *choices["tensors"].values()]
    for name in used:
        if name is not None and name not in known:
            raise InputError(f"{REPORT}: names the donor {name!r}, which is not in models")
    for name in choices["tensors"]:
        if not any(tensor.startswith(f"{name}.") for tensor in tensors):
            raise InputError(f"{REPORT}: names the tensor {name!r}, which the models do not have")
    return choices
