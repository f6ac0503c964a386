"""The safety net under a merge: what will be written is what Transformers will load, told before it is written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from olmfast.errors import InputError
from olmfast.output.writer import Content, OutputTensor
from olmfast.static.spelling import shapes_of
from olmfast.weights.architecture import Architecture, is_known
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.skeletons import Skeleton, Skeletons

DTYPE_KEYS = ("dtype", "torch_dtype")


def check_loads(
    base: Checkpoint, config: Mapping[str, Any], tensors: Sequence[OutputTensor], skeletons: Skeletons
) -> list[str]:
    """Hold the names and shapes of a result against the module of its config.json; returns what could not be checked.

    A result with the base's own config, names and shapes is the base to Transformers and is not checked. Tensors that
    fill nothing in the base either are kept and told. Raises InputError for any other tensor that fills nothing, a
    parameter that nothing fills, or a shape that does not fit.
    """
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    own = {base.file_names.get(name, name): shape for name, shape in shapes_of(base).items()}
    if shapes == own and _told(config) == _told(base.config):
        return []
    result = skeletons.examine(config, shapes, "load")
    before = skeletons.examine(base.config, own, "load")
    if before.unknown:
        return [f"Transformers cannot say whether it will load the result: {before.unknown}"]
    faults = _faults(result, before)
    if faults:
        raise InputError(
            f"the result would not be what Transformers loads from its config.json: {'; '.join(faults)}; nothing has "
            "been written"
        )
    odd = len(result.unexpected)
    return [f"{odd} tensors fill nothing, as in {base.name}, the first {result.unexpected[0]}"] if odd else []


def check_result(content: Content) -> None:
    """Raise InputError with everything in which the result's config.json does not fit its weights.

    Of model types that the table of families knows; of others only the tensors are checked.
    """
    if not is_known(content.config):
        return
    from olmfast.evaluation.blueprint import check_fit  # Transformers, which no merge needs

    where = content.base.folder / "config.json"
    architecture = Architecture.from_config(dict(content.config), str(where))
    shapes = {tensor.name: tensor.shape for tensor in content.tensors}
    named = {name: shapes[stored] for name, stored in architecture.canonical(shapes).items()}
    check_fit(content.config, architecture, named, where, tied=architecture.family.head not in named)


def _told(config: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in DTYPE_KEYS}


def _faults(result: Skeleton, base: Skeleton) -> list[str]:
    """What is wrong with the result; tensors that fill nothing may be of the base, whatever the layer."""
    known = {_without_numbers(name) for name in base.unexpected}
    new = [name for name in result.unexpected if _without_numbers(name) not in known]
    return replace(result, unexpected=new).faults


def _without_numbers(name: str) -> str:
    return re.sub(r"\d+", "*", name)
