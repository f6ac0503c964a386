"""The start that a joint search is given: a model, or a merge as a merge file says it, of which nothing is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from olmfast.config.mergekit import load_merge_config
from olmfast.config.run import RunConfig
from olmfast.errors import InputError, cut
from olmfast.static.loading import DTYPE_KEYS
from olmfast.static.mergekit import plan_merge
from olmfast.static.plan import Plan
from olmfast.weights.adapters import open_model
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.digests import DigestCache
from olmfast.weights.expressions import Copy
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Expression, Sources, expression_from_json, leaves


@dataclass(frozen=True)
class Start:
    """The model or file that `start` names; the models it is made of, by the names that the run gives them; and what
    each tensor is worth, or None for a model."""

    name: str
    models: tuple[str, ...]
    planned: Mapping[str, Expression] | None = None

    @classmethod
    def of(cls, config: RunConfig) -> Start | None:
        """Read what the config names. A merge file is taken for one where a file of its name is.

        Raises InputError for a merge file that cannot be read, or whose result is not shaped as the run's base.
        """
        name = config.start
        if name is None:
            return None
        path = file_of(config)
        if path is None:
            return cls(name, (name,))
        if not path.is_file():
            raise InputError(f"start: {cut(name)}: no such merge file in {config.config_dir}")
        merge = load_merge_config(path)
        if merge.earlier:
            raise InputError(f"start: {cut(name)}: holds several documents; a start is one merge")
        plan = plan_merge(merge, seed=config.seed)
        _check_shape(name, plan)
        names = _names(config, plan.pool)
        stored = {spelled: canonical for canonical, spelled in plan.content.base.file_names.items()}
        planned = {
            stored.get(tensor.name, tensor.name): expression_from_json(_renamed(tensor.expression.to_json(), names))
            for tensor in plan.content.tensors
        }
        return cls(name, tuple(dict.fromkeys(names.values())), planned)

    def values(self, pool: Pool) -> dict[str, Expression]:
        """Tensor -> what it is worth, of each of the pool's tensors. Raises InputError for one that does not fit."""
        if self.planned is None:
            return {name: Copy(self.name, name) for name in pool.tensors}
        sources, found = Sources(pool, Path()), {}
        for name in pool.tensors:
            value, shape = self.planned.get(name), tuple(next(iter(pool)).tensors[name].shape)
            unknown = value is None or any(
                isinstance(leaf, Copy) and leaf.tensor not in pool[leaf.donor].tensors for leaf in leaves(value)
            )
            if value is None or unknown or tuple(value.open(sources).shape) != shape:
                raise InputError(f"start: {cut(self.name)}: gives no {name} of the shape {shape}")
            found[name] = value
        return found

    @property
    def identity(self) -> str:
        """Its name, and what a merge file says of its tensors."""
        if self.planned is None:
            return self.name
        told = {name: value.to_json() for name, value in self.planned.items()}
        return f"{self.name} ({xxhash.xxh3_128(json.dumps(told, sort_keys=True).encode()).hexdigest()})"


def file_of(config: RunConfig) -> Path | None:
    """The merge file that `start` names, or would by its ending; None where it names a model, or nothing."""
    if config.start is None:
        return None
    path = config.config_dir / os.path.expanduser(config.start)
    named = path.suffix in (".yml", ".yaml") and not path.is_dir()
    return path if named or path.is_file() else None


def _check_shape(name: str, plan: Plan) -> None:
    if plan.vocabulary is not None:
        raise InputError(f"start: {cut(name)}: makes a vocabulary of its own; a search keeps its base's")
    configs = plan.content.base.config, plan.content.config
    before, now = ({k: v for k, v in one.items() if k not in DTYPE_KEYS} for one in configs)
    changed = sorted(key for key in {*before, *now} if before.get(key) != now.get(key))
    if changed:
        raise InputError(
            f"start: {cut(name)}: its result has another {', '.join(changed)} than {plan.content.base.name}; a search "
            "keeps the shape of its base"
        )


def _names(config: RunConfig, pool: Pool) -> dict[str, str]:
    """The run's name of each model of a merge file: that of a donor that lies in the same place, else its path."""
    digests, known = DigestCache(), {}
    for name in dict.fromkeys([config.base_name, *config.models]):
        try:
            donor = open_model(name, config.models_dir, config.config_dir, digests, {}, False, False)
        except InputError:
            continue  # told when the pool is opened, or downloaded there
        known[_places(donor)] = name
    return {model.name: known.get(_places(model)) or _path(config, model) for model in pool}


def _places(model: Checkpoint) -> tuple[Path, ...]:
    return tuple(folder.resolve() for folder in model.folders)


def _path(config: RunConfig, model: Checkpoint) -> str:
    return "+".join(os.path.relpath(folder, config.config_dir) for folder in model.folders)


def _renamed(entry: Any, names: Mapping[str, str]) -> Any:
    """An expression's JSON with other names of the models."""
    if isinstance(entry, list):
        return [_renamed(one, names) for one in entry]
    if not isinstance(entry, dict):
        return entry
    renamed = {key: _renamed(value, names) for key, value in entry.items()}
    return renamed | {"copy": names[entry["copy"]]} if "copy" in entry else renamed
