"""Data-flow files: a path through the blocks of several models, and what is done to what each block adds.

docs/data-flow.md tells users what the keys mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import isfinite
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict, Field, PrivateAttr, ValidationError, model_validator

from olmfast.config.documents import FromFile
from olmfast.config.loading import absolute, explain, parse_yaml
from olmfast.config.tagged import TaggedLoader, is_dataflow_file
from olmfast.errors import InputError, did_you_mean, show, shown
from olmfast.weights.affine import Given
from olmfast.weights.files import read_text


@dataclass(frozen=True)
class Placed:
    """Numbers that lie in a safetensors file: the part of `tensor` that the indices of `place` select.

    The first dimensions of the tensor have these `sizes`.
    """

    file: Path
    tensor: str
    place: tuple[int, ...]
    sizes: tuple[int, ...]


Factor = float | Given | Placed


@dataclass(frozen=True)
class Stop:
    """One entry of `layer_mask` in use: block `block` of model `model` (its place in `model_paths`).

    What comes to it is `scale * d + bias`, d being what the block before it (or the embedding) adds. `where` names the
    entry in messages.
    """

    model: int
    block: int
    scale: Factor | None
    bias: Factor | None
    where: str


def _parse_path(value: object) -> object:
    """A model's name of `name`, `[name]` or `[name, revision]`; a revision is written `name@revision`."""
    if isinstance(value, list) and 1 <= len(value) <= 2 and isinstance(value[0], str):
        revision = value[1] if len(value) == 2 else None
        if revision is None:
            return value[0]
        if isinstance(revision, str):
            return f"{value[0]}@{revision}"
    if isinstance(value, str):
        return value
    raise ValueError(f"expected a model as [name, revision or null], got {shown(value)}")


def _parse_flag(value: object) -> object:
    """An entry of the mask: true or false, or 1 or 0."""
    if isinstance(value, bool) or (isinstance(value, int) and value in (0, 1)):
        return bool(value)
    raise ValueError(f"expected true or false, got {shown(value)}")


def _parse_number(value: object) -> object:
    number = _number(value)
    if number is None:
        raise ValueError(f"expected a finite number, got {shown(value)}")
    return number


Flag = Annotated[bool, BeforeValidator(_parse_flag)]


class DataflowConfig(FromFile):
    """A data-flow file. `layer_mask` is indexed by (r, model, layer), and so are both kinds of factors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model_paths: list[Annotated[str, BeforeValidator(_parse_path)]] = Field(min_length=1)
    num_r: int = Field(default=0, ge=1, lt=2**31)
    layer_mask: list[list[list[Flag]]] = Field(min_length=1)
    scaling_factors: Any
    bias_factors: Any = None
    input_layer_model: int = 0
    output_layer_model: int = 0
    add_last_layer: bool = True
    last_layer_scale: Annotated[float, BeforeValidator(_parse_number)] = 1.0
    _stops: tuple[Stop, ...] = PrivateAttr(())

    @property
    def input_model(self) -> str:
        """The model that gives embedding, config and tokenizer."""
        return self.model_paths[self.input_layer_model]

    @property
    def output_model(self) -> str:
        """The model that gives final norm and head."""
        return self.model_paths[self.output_layer_model]

    @property
    def stops(self) -> tuple[Stop, ...]:
        """The entries of `layer_mask` in use, in the order in which they run."""
        return self._stops

    @property
    def factor_files(self) -> list[Path]:
        """The files that factors in use lie in."""
        factors = (factor for stop in self.stops for factor in (stop.scale, stop.bias))
        return list(dict.fromkeys(factor.file for factor in factors if isinstance(factor, Placed)))

    @model_validator(mode="after")
    def _check(self) -> DataflowConfig:
        faults = list(self._mask_faults())
        if not faults:
            faults += self._level_faults("scaling_factors", self.scaling_factors)
            if self.bias_factors is not None:
                faults += self._level_faults("bias_factors", self.bias_factors)
        for key in ("input_layer_model", "output_layer_model"):
            index = getattr(self, key)
            if not 0 <= index < len(self.model_paths):
                faults.append(f"{key}: expected 0 to {len(self.model_paths) - 1}, as model_paths counts, got {index}")
        if faults:
            raise ValueError("\n".join(faults))
        self._stops = tuple(self._walk(faults))
        if not self._stops and not self.add_last_layer:
            faults.append("layer_mask: uses no layer, and add_last_layer is off; a path needs at least one")
        if faults:
            raise ValueError("\n".join(dict.fromkeys(faults)))  # what all share is said once
        return self

    def _mask_faults(self) -> Iterator[str]:
        n_models, mask = len(self.model_paths), self.layer_mask
        if self.num_r and len(mask) != self.num_r:
            yield f"layer_mask: expected {self.num_r} entries, as num_r says, got {len(mask)}"
        for r, models in enumerate(mask):
            if len(models) != n_models:
                yield f"layer_mask[{r}]: expected {n_models} lists, one for each of model_paths, got {len(models)}"
        if any(len(models) != n_models for models in mask):
            return
        for r, models in enumerate(mask):
            for m, layers in enumerate(models):
                if len(layers) != len(mask[0][m]) or not layers:
                    wanted = f"{len(mask[0][m])} entries, as layer_mask[0][{m}] has" if mask[0][m] else "entries"
                    yield f"layer_mask[{r}][{m}]: expected {wanted}, got {len(layers)}"

    def _level_faults(self, key: str, given: object) -> Iterator[str]:
        """Lists of factors that are not as long as the mask's; where all layers are masked, nothing need be there."""

        def descend(node: object, mask: Sequence[Any] | bool, where: str, level: int) -> Iterator[str]:
            if isinstance(node, dict) or isinstance(mask, bool):
                return
            if not _any(mask) and (node is None or node == []):
                return
            what = ("num_r", "model_paths", "layer_mask")[level]
            if not isinstance(node, list) or len(node) != len(mask):
                got = f"{len(node)} entries" if isinstance(node, list) else show(node)
                yield f"{where}: expected a list of {len(mask)} entries, as many as {what} says, got {got}"
                return
            for i, (inner, below) in enumerate(zip(node, mask, strict=True)):
                yield from descend(inner, below, f"{where}[{i}]", level + 1)

        yield from descend(given, self.layer_mask, key, 0)

    def _walk(self, faults: list[str]) -> Iterator[Stop]:
        """Every entry in use, with its factors; what is wrong with them is added to `faults`."""
        deepest = max(len(layers) for layers in self.layer_mask[0])
        for r, models in enumerate(self.layer_mask):
            for m, layers in enumerate(models):
                for layer, is_used in enumerate(layers):
                    if not is_used:
                        continue
                    place, factors = (r, m, layer), {}
                    sizes = [(len(self.layer_mask), len(models), deepest), (len(models), deepest), (len(layers),), ()]
                    for key, given in (("scaling_factors", self.scaling_factors), ("bias_factors", self.bias_factors)):
                        try:
                            factors[key] = None if given is None else _factor(given, place, sizes, key)
                        except ValueError as error:
                            faults.append(str(error))
                    where = f"[{r}][{m}][{layer}]"
                    yield Stop(m, layer, factors.get("scaling_factors"), factors.get("bias_factors"), where)


def _any(mask: Sequence[Any] | bool) -> bool:
    return mask if isinstance(mask, bool) else any(map(_any, mask))


def _factor(given: object, place: tuple[int, ...], sizes: Sequence[tuple[int, ...]], key: str) -> Factor:
    """The factor at a place: numbers, or where they lie. Raises ValueError that says what was expected.

    `sizes` are those of the first dimensions of a tensor that holds all factors, those of one r, model or layer.
    """
    node, where = given, key
    for level in range(len(place) + 1):
        if isinstance(node, dict):
            return _placed(node, place[level:], sizes[level], where)
        if level < len(place):
            assert isinstance(node, list)
            node, where = node[place[level]], f"{where}[{place[level]}]"
    number = _number(node)
    if number is not None:
        return number
    wide = "" if key == "bias_factors" else " or D lists of D numbers"
    if not isinstance(node, list) or not node:
        raise ValueError(f"{where}: expected a finite number, D numbers{wide}, got {shown(node)}")
    rows = node if isinstance(node[0], list) and key != "bias_factors" else [node]
    if any(not isinstance(row, list) or len(row) != len(rows[0]) for row in rows):
        raise ValueError(f"{where}: expected D lists of D numbers, got lists of different lengths")
    values = [_number(value) for row in rows for value in row]
    if None in values:
        odd = next(value for row in rows for value in row if _number(value) is None)
        raise ValueError(f"{where}: expected finite numbers, got {shown(odd)} among them")
    shape = (len(rows), len(rows[0])) if rows is node else (len(node),)
    return Given(tuple(value for value in values if value is not None), shape)


def _placed(entry: dict[Any, Any], place: tuple[int, ...], sizes: tuple[int, ...], where: str) -> Placed:
    """Where the numbers of `{safetensors: file, tensor: name}` lie; the path is still as it was written."""
    for key in entry:
        if key not in ("safetensors", "tensor"):
            meant = did_you_mean(str(key), ["safetensors", "tensor"])
            raise ValueError(f"{where}: unknown key {show(key)}{meant}; expected {{safetensors: FILE, tensor: NAME}}")
    for key in ("safetensors", "tensor"):
        if not isinstance(entry.get(key), str):
            raise ValueError(f"{where}.{key}: expected a text, got {shown(entry.get(key))}")
    return Placed(Path(entry["safetensors"]), entry["tensor"], place, sizes)


def _number(value: object) -> float | None:
    """A finite number; YAML reads `1e-5` as text. None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if isfinite(number) else None


def load_dataflow_config(
    source: str | Path | Mapping[str, Any], overrides: Mapping[str, Any] | None = None
) -> DataflowConfig:
    """Read and check a data-flow file, or what one holds, whose paths are then relative to the working directory.

    `overrides` are keys that are given another value. Raises InputError that lists every fault, unknown keys with a
    suggestion.
    """
    if isinstance(source, Mapping):
        data = _plain(source)
        return _parse(data, overrides, "config", Path.cwd(), json.dumps(data, indent=2, default=str))
    path = Path(source)
    text = read_text(path)
    data = parse_yaml(text, path, TaggedLoader)
    if not isinstance(data, dict):
        kind = "nothing" if data is None else type(data).__name__
        raise InputError(f"{path}: expected a mapping of keys to values, got {kind}")
    if not is_dataflow_file(data):
        raise InputError(
            f"{path}: expected a data-flow file, with model_paths and layer_mask, got the keys "
            f"{', '.join(map(str, data)) or 'none'}; a run is olmfast run, a merge file olmfast merge"
        )
    config = _parse(data, overrides, str(path), path.parent.absolute(), text)
    config._file = path.absolute()
    return config


def _parse(
    data: dict[str, Any], overrides: Mapping[str, Any] | None, where: str, folder: Path, text: str
) -> DataflowConfig:
    try:
        config = DataflowConfig.model_validate({**data, **(overrides or {})})
    except ValidationError as error:
        raise explain(where, error.errors(), lambda _: list(DataflowConfig.model_fields)) from error
    config._folder, config._text = folder, text
    config._stops = tuple(_with_paths(stop, folder, where) for stop in config.stops)
    return config


def _with_paths(stop: Stop, folder: Path, where: str) -> Stop:
    def full(factor: Factor | None) -> Factor | None:
        if not isinstance(factor, Placed):
            return factor
        return replace(factor, file=absolute(folder, factor.file, where))

    return replace(stop, scale=full(stop.scale), bias=full(stop.bias))


def _plain(value: Any) -> Any:
    """Lists and mappings of Python's own, whatever kind they were: tuples, ordered mappings, arrays, tensors."""
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value.tolist() if hasattr(value, "tolist") else value
