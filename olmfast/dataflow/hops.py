"""A path through the blocks of several models, hop after hop, and where a file says it.

A block hands on two things: d, which it adds to the stream last, and r, the stream before that. Hop t begins with the
stream `r + A_t d + b_t`, where d is what hop t - 1 adds; the first hop begins with `A_0 e + b_0`, where e is the
embedding of the token. What the last hop adds is not changed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from olmfast.config.dataflow import DataflowConfig, Factor, Placed
from olmfast.errors import InputError
from olmfast.weights.affine import Given
from olmfast.weights.checkpoint import FLOATS, TensorInfo, read_header
from olmfast.weights.expressions import Stored
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Expression, Sources


@dataclass(frozen=True)
class Hop:
    """One block of one donor, and what is done to d before it: `scale * d + bias`.

    `scale` is a number, an expression of shape (D,), a diagonal, or one of shape (D, D), whose row i gives value i;
    `bias` a number or an expression of shape (D,). None leaves d as it is. `where` names the hop in messages.
    """

    donor: str
    block: int
    scale: float | Expression | None = None
    bias: float | Expression | None = None
    where: str = ""

    @property
    def changes(self) -> bool:
        """Whether it does anything to d."""
        return self.scale not in (None, 1.0) or self.bias not in (None, 0.0)

    def act(self, d: torch.Tensor, sources: Sources) -> torch.Tensor:
        """`scale * d + bias` for d of shape (..., D), in the dtype and on the device of d."""
        scale, bias = (
            factor.value(sources).to(d) if isinstance(factor, Expression) else factor
            for factor in (self.scale, self.bias)
        )
        if isinstance(scale, torch.Tensor) and scale.dim() == 2:
            d = torch.matmul(d, scale.T)
        elif scale is not None:
            d = d * scale
        return d if bias is None else d + bias


def hops_of(config: DataflowConfig, pool: Pool) -> list[Hop]:
    """The path of a data-flow file through the models it names, which are those of `pool`.

    Factors that lie in files are checked, not kept. Raises InputError with everything that does not fit the models.
    """
    where = str(config.file or "config")
    hops, files = list[Hop](), _Files(width_of(pool, config.input_model), config.factor_files)
    faults = [*_depth_faults(config, pool, where), *(f"{where}: {fault}" for fault in files.faults)]
    for stop in [] if faults else config.stops:
        factors: dict[str, float | Expression | None] = {}
        for key, given, dims in (("scaling_factors", stop.scale, 2), ("bias_factors", stop.bias, 1)):
            try:
                factors[key] = files.resolved(given, dims)
            except InputError as error:
                faults.append(f"{where}: {key}{stop.where}: {error}")
        scale, bias = factors.get("scaling_factors"), factors.get("bias_factors")
        hops.append(Hop(config.model_paths[stop.model], stop.block, scale, bias, stop.where))
    if faults:
        raise InputError("\n".join(faults))
    if config.add_last_layer:
        output = pool[config.output_model]
        last = output.architecture.n_blocks - 1
        scale = None if config.last_layer_scale == 1.0 else config.last_layer_scale
        hops.append(Hop(output.name, last, scale, where="last_layer_scale"))
    return hops


def check_shape(shape: tuple[int, ...], width: int, dims: int, of: str = "") -> None:
    """Raise InputError for a factor that is neither a number nor D of them nor, with two `dims`, D x D."""
    if shape not in [(), (width,), (width, width)][: dims + 1]:
        more = f" or {width} lists of {width}" if dims == 2 else ""
        got = " x ".join(map(str, shape))
        raise InputError(f"expected a number, {width} numbers, the width of the model,{more}, got {got}{of}")


def simplest(values: torch.Tensor, factor: Expression) -> float | Expression:
    """What has the values of a factor: the number that a diagonal or a bias is all over, the diagonal that a D x D is
    alone, or the factor itself. A family may have a place for the simpler one only."""
    if values.dim() == 2 and torch.equal(values, torch.diag(values.diagonal())):
        values = values.diagonal()
        factor = Given(tuple(values.tolist()), tuple(values.shape))
    if values.dim() < 2 and bool((values == values.flatten()[0]).all()):
        return float(values.flatten()[0])
    return factor


def width_of(pool: Pool, model: str) -> int:
    """D, the width of the stream. Raises InputError for a model whose embedding is not known."""
    donor = pool[model]
    embedding = donor.tensors.get(donor.architecture.family.embedding)
    if embedding is None:
        raise InputError(f"{model}: has no {donor.architecture.family.embedding or 'embedding'}, so it has no input")
    return embedding.shape[-1]


def _depth_faults(config: DataflowConfig, pool: Pool, where: str) -> Sequence[str]:
    """Models that have more or fewer layers than the mask."""
    return [
        f"{where}: layer_mask[0][{m}]: has {len(config.layer_mask[0][m])} entries, and {name} has "
        f"{pool[name].architecture.n_blocks} layers"
        for m, name in enumerate(config.model_paths)
        if len(config.layer_mask[0][m]) != pool[name].architecture.n_blocks
    ]


class _Files:
    """The factors' files, each opened once; `faults` says which cannot be. D is the width that factors must have."""

    def __init__(self, width: int, paths: Sequence[Path]) -> None:
        self.width = width
        self.faults: list[str] = []
        self._headers: dict[Path, dict[str, TensorInfo]] = {}
        for path in paths:
            try:
                self._headers[path] = {info.name: info for info in read_header(path)}
            except InputError as error:
                self.faults.append(str(error))

    def resolved(self, factor: Factor | None, dims: int) -> float | Expression | None:
        """The factor with its shape checked: a number, or an expression of at most `dims` dimensions.

        Raises InputError that says what was expected.
        """
        if factor is None or isinstance(factor, float):
            return factor
        if not isinstance(factor, Placed):
            check_shape(factor.shape, self.width, dims)
            return simplest(torch.tensor(factor.values, dtype=torch.float64).view(factor.shape), factor)
        info = self._info(factor)
        of = f" at {list(factor.place)} of {factor.tensor} in {factor.file}" if factor.place else f" in {factor.file}"
        check_shape(info.shape, self.width, dims, of)
        values = info.read()
        if info.dtype not in FLOATS or not bool(values.isfinite().all()):
            raise InputError(f"expected finite numbers, got {info.dtype} with NaN or infinity{of}")
        return simplest(values, Stored(str(factor.file), factor.tensor, info.digest(), factor.place))

    def _info(self, factor: Placed) -> TensorInfo:
        held = self._headers[factor.file]
        if factor.tensor not in held:
            raise InputError(f"{factor.file}: has no tensor {factor.tensor}; it has {', '.join(held) or 'none'}")
        info, place = held[factor.tensor], factor.place
        if info.shape[: len(place)] != factor.sizes:
            raise InputError(
                f"{factor.file}: {factor.tensor}: expected a shape that begins with {list(factor.sizes)}, as the mask "
                f"has it, got {list(info.shape)}"
            )
        return info.at(place)
