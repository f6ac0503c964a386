"""The safety net under a merge: what will be written is what Transformers will load, told before it is written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from olmfast.errors import InputError
from olmfast.output.writer import OutputTensor
from olmfast.static.spelling import shapes_of
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.skeletons import Skeleton, Skeletons

DTYPE_KEYS = ("dtype", "torch_dtype")


def check_loads(
    base: Checkpoint, config: Mapping[str, Any], tensors: Sequence[OutputTensor], skeletons: Skeletons
) -> list[str]:
    """Hold the names and shapes of a result against the module of its config.json; returns what could not be checked.

    A result with the base's own config, names and shapes is the base to Transformers and is not looked at. What the
    base itself has too many or too few stays as it is. Raises InputError for any other tensor that fills nothing,
    parameter that nothing fills, or shape that does not fit.
    """
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    own = {base.file_names.get(name, name): shape for name, shape in shapes_of(base).items()}
    if shapes == own and _told(config) == _told(base.config):
        return []
    result = skeletons.examine(config, shapes, "load")
    before = skeletons.examine(base.config, own, "load")
    if before.unknown:
        return [f"Transformers cannot say whether it will load the result: {before.unknown}"]
    faults = [result.unknown] if result.unknown else list(_faults(result, before))
    if faults:
        raise InputError(
            f"the result would not be what Transformers loads from its config.json: {'; '.join(faults)}; nothing has "
            "been written"
        )
    return []


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in DTYPE_KEYS}


def _faults(result: Skeleton, base: Skeleton) -> list[str]:
    """What is wrong with the result and not already with the base, whatever the layer."""
    found = []
    for what, names, known in (
        ("parameters that nothing fills", result.missing, base.missing),
        ("tensors that fill nothing", result.unexpected, base.unexpected),
        ("tensors of another shape", list(result.mismatched), list(base.mismatched)),
        ("conversions that fail", result.failed, base.failed),
    ):
        alike = {_without_numbers(name) for name in known}
        new = [name for name in names if _without_numbers(name) not in alike]
        if new:
            found.append(f"{len(new)} {what}, the first {new[0]}{_shapes(result, new[0])}")
    return found


def _shapes(result: Skeleton, name: str) -> str:
    both = result.mismatched.get(name)
    return f" {both[0]} instead of {both[1]}" if both else ""


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)
