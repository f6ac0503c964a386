"""The report of the original OLM: its decisions, as the first steps of a run."""

from __future__ import annotations

from typing import Any

from olmfast.errors import InputError
from olmfast.search.record import REPORT


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
