"""An evo checkpoint, whose own code walks a path through the blocks it stores, made a plain one."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from olmfast.dataflow.hops import Hop, check_shape, simplest, width_of
from olmfast.dataflow.plan import CLASSIFIER, plan_path
from olmfast.errors import InputError, show
from olmfast.static.plan import Plan
from olmfast.weights.architecture import FAMILIES, N_BLOCKS, Architecture
from olmfast.weights.checkpoint import Checkpoint, Tensor
from olmfast.weights.digests import DigestCache
from olmfast.weights.expressions import Stored
from olmfast.weights.hub import resolve
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Expression

LAYERS, SCALES, BIAS = "input_layers", "input_scales", "input_bias"
_OWN_KEYS = re.compile(r"num_hops|num_input_layers|input_(layers|scales|bias)|auto_map")


def plan_unfolded(
    model: str, *, dtype: str = "bfloat16", allow_mismatch: Collection[str] = (), models_dir: Path | None = None
) -> Plan:
    """The plan of a plain model that does what an evo checkpoint does: `model` is a folder or a Hub id.

    Such a checkpoint stores blocks and, in `input_layers`, `input_scales` and perhaps `input_bias`, the path through
    them. Raises InputError for a model that is none, and for all that `plan_dataflow` raises it for.
    """
    here = models_dir or Path.cwd()
    donor = Checkpoint(resolve(model, here, here, download=False), model, DigestCache(), any_family=True)
    walk = _Walk.taken_from(donor)
    _make_plain(donor)
    hops = list(walk.hops(donor))
    classifies = any(str(name).endswith(CLASSIFIER) for name in donor.config.get("architectures") or ())
    plan = plan_path(
        hops,
        Pool([donor], alike=False),
        model,
        model,
        text=f"olmfast dataflow --unfold {model}",
        dtype=dtype,
        classification=classifies,
        allow_mismatch=allow_mismatch,
    )
    return replace(plan, recipe_file=None)  # no file says this path


@dataclass(frozen=True)
class _Walk:
    """The tensors of the path: the block of each hop, its scale and its bias."""

    layers: Tensor
    scales: Tensor
    bias: Tensor | None

    @classmethod
    def taken_from(cls, donor: Checkpoint) -> _Walk:
        """The walk of a checkpoint, whose tensors are from then on those of a plain model."""
        found = {name.rpartition(".")[2]: name for name in donor.tensors}
        if LAYERS not in found or SCALES not in found:
            raise InputError(
                f"{donor.name}: has no tensors {LAYERS} and {SCALES}, which say the path of an evo checkpoint; a "
                "data-flow file is executed without --unfold"
            )
        names = [found.get(part, "") for part in (LAYERS, SCALES, BIAS)]
        for name in names:
            donor.file_names.pop(name, None)
        layers, scales, bias = (donor.tensors.pop(name, None) for name in names)
        assert layers is not None
        assert scales is not None
        return cls(layers, scales, bias)

    def hops(self, donor: Checkpoint) -> Iterator[Hop]:
        """The path. Raises InputError for a block that is not stored, and factors that are not one for each hop."""
        blocks, where = self.layers.read(), str(self.layers.file)
        n_blocks = donor.architecture.n_blocks
        numbers = blocks.flatten().long()
        told = blocks.dim() == 1 and len(blocks) and torch.equal(numbers.to(blocks.dtype), blocks)
        if not told or not 0 <= int(numbers.min()) <= int(numbers.max()) < n_blocks:
            raise InputError(
                f"{where}: {self.layers.name}: expected a list of blocks from 0 to {n_blocks - 1}, got "
                f"{show(blocks.tolist())}"
            )
        for factor in (self.scales, self.bias):
            if factor is not None and factor.shape[:1] != (len(blocks),):
                raise InputError(
                    f"{where}: {factor.name}: expected one for each of {len(blocks)} hops, got {list(factor.shape)}"
                )
        width = width_of(Pool([donor], alike=False), donor.name)
        for place, block in enumerate(numbers.tolist()):
            bias = None if self.bias is None else _factor(self.bias, place, width, 1)
            yield Hop(donor.name, block, _factor(self.scales, place, width, 2), bias, f"[{place}]")


def _factor(tensor: Tensor, place: int, width: int, dims: int) -> float | Expression:
    """The factor of one hop: a number, or where its numbers lie, in at most `dims` dimensions."""
    info = tensor.in_file
    assert info is not None
    part = info.at((place,))
    values = part.read()
    if values.numel() != 1:
        check_shape(part.shape, width, dims, f" in {info.name} of {info.file}")
    if not values.dtype.is_floating_point or not bool(values.isfinite().all()):
        raise InputError(f"{info.file}: {info.name}[{place}]: expected finite numbers, got {show(values.tolist())}")
    return simplest(values, Stored(str(info.file.absolute()), info.name, part.digest(), (place,)))


def _make_plain(donor: Checkpoint) -> None:
    """Give an evo checkpoint the config of the model type that it was made of."""
    config: dict[str, Any] = {key: value for key, value in donor.config.items() if not _OWN_KEYS.fullmatch(key)}
    names = [re.sub(r"^Evo|Affine", "", str(name)) for name in config.get("architectures") or ()]
    spelt = [re.sub(r"evo|affine", "", str(config.get("model_type")).lower()), *(re.split("For", n)[0] for n in names)]
    known = {re.sub("_", "", name): name for name in FAMILIES}
    kinds = (known.get(re.sub(r"[_-]", "", name.lower())) for name in spelt)
    kind = next((kind for kind in kinds if kind), None)
    where = f"{donor.folder / 'config.json'}"
    if kind is None:
        raise InputError(
            f"{where}: model_type {show(config.get('model_type'))} is none of {', '.join(sorted(FAMILIES))} with 'evo' "
            "before it"
        )
    config |= {"model_type": kind, "architectures": names or None}
    family = FAMILIES[kind]
    numbers = (re.match(rf"{re.escape(family.blocks)}\.(\d+)\.", name) for name in donor.tensors)
    n_blocks = max((int(found[1]) + 1 for found in numbers if found), default=0)
    for key in [key for key in N_BLOCKS if key in config] or ["num_hidden_layers"]:
        config[key] = n_blocks
    donor.config, donor.architecture = config, Architecture.from_config(config, where)
