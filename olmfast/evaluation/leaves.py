"""Several candidates' values in one forward pass: only the leaf modules of a unit know that there are several.

Rows of K candidates lie one candidate after another in the batch. The unit's leaves multiply each candidate's rows
by its own weights; everything else sees an ordinary batch of K times the rows.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch.nn.functional import linear

from olmfast import kernels
from olmfast.evaluation.forwards import replaced
from olmfast.evaluation.fusing import unfused
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.transit import sent
from olmfast.weights.offspring import NormOffspring
from olmfast.weights.sources import Expression


class Leaf(Protocol):
    """A leaf module in which candidates differ. Candidates are given by their rows in the stack."""

    module: Any

    def each(self, x: torch.Tensor, candidates: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """x (rows, ..., in), of which `counts[i]` rows are candidate `candidates[i]`'s -> (rows, ..., out)."""
        ...

    def shared(self, x: torch.Tensor, candidates: Sequence[int]) -> torch.Tensor:
        """x (batch, ..., in), the same for all candidates -> (K * batch, ..., out)."""
        ...

    def prepare(self, candidates: Sequence[int], counts: Sequence[int]) -> Any:
        """Send to the device what `each` needs there for these: while it is captured nothing can be sent. Returns what
        has to be kept as long as that is replayed."""
        ...


class StackedLeaf:
    """A module that takes and returns one tensor, with K values (name -> (K, *shape)) of some parameters, of which
    `bring` fills those that are wanted."""

    def __init__(
        self, module: Any, values: Mapping[str, torch.Tensor], bring: Callable[[Sequence[int]], None] = lambda _: None
    ) -> None:
        self.module, self.values, self._bring = module, dict(values), bring
        self._plain = unfused(module)  # goes on computing by its own forward while the module's is replaced

    def each(self, x: torch.Tensor, candidates: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """See `Leaf.each`."""
        k, values = len(candidates), self._together(candidates)
        if values is not None and len(set(counts)) == 1:
            if isinstance(self.module, torch.nn.Linear):
                return self._linear(x.reshape(k, -1, x.shape[-1]), values, k).reshape(*x.shape[:-1], -1)
            out: torch.Tensor = torch.vmap(self._call)(values, x.reshape(k, -1, *x.shape[1:]))
            return out.flatten(0, 1)
        parts = zip(candidates, torch.split(x, list(counts)), strict=True)
        own = [self._call({name: value[c] for name, value in self.values.items()}, part) for c, part in parts]
        return torch.cat(own)

    def shared(self, x: torch.Tensor, candidates: Sequence[int]) -> torch.Tensor:
        """See `Leaf.shared`."""
        k, batch = len(candidates), x.shape[0]
        values = self._together(candidates)
        if values is not None and isinstance(self.module, torch.nn.Linear):
            out = self._linear(x.reshape(-1, x.shape[-1]), values, k)
            return out.reshape(k * batch, *x.shape[1:-1], -1)
        return self.each(tile(x, k), candidates, [batch] * k)

    def prepare(self, candidates: Sequence[int], counts: Sequence[int]) -> Any:  # noqa: ARG002
        """See `Leaf.prepare`."""
        self._bring(candidates)

    def _together(self, candidates: Sequence[int]) -> dict[str, torch.Tensor] | None:
        """The values of several candidates that are next to each other in the stacks: others would be copied."""
        self._bring(candidates)
        first, last = candidates[0], candidates[-1]
        if first == last or list(candidates) != list(range(first, last + 1)):
            return None
        return {name: value[first : last + 1] for name, value in self.values.items()}

    def _linear(self, x: torch.Tensor, values: dict[str, torch.Tensor], k: int) -> torch.Tensor:
        weight, bias = self.module.weight, self.module.bias
        weights = values.get("weight", weight.expand(k, *weight.shape))
        biases = values.get("bias", bias.expand(k, *bias.shape) if bias is not None else None)
        return kernels.stacked_linear(x, weights, biases)

    def _call(self, values: dict[str, torch.Tensor], x: torch.Tensor) -> Any:
        if isinstance(self.module, torch.nn.Linear):
            return linear(x, values.get("weight", self.module.weight), values.get("bias", self.module.bias))
        return torch.func.functional_call(self._plain, values, (x,))


class ScaledLeaf:
    """A Linear whose rows each candidate scales by factors (K, out): its output scaled instead, in one product."""

    def __init__(self, module: Any, factors: torch.Tensor) -> None:
        self.module, self.factors = module, factors

    def each(self, x: torch.Tensor, candidates: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        """See `Leaf.each`."""
        factors = self.factors[self._rows_of(candidates, counts)]
        return self._shift(linear(x, self.module.weight) * factors.view(len(x), *[1] * (x.dim() - 2), -1))

    def prepare(self, candidates: Sequence[int], counts: Sequence[int]) -> Any:
        """See `Leaf.prepare`."""
        return self._rows_of(candidates, counts)

    def _rows_of(self, candidates: Sequence[int], counts: Sequence[int]) -> torch.Tensor:
        rows = [candidate for candidate, count in zip(candidates, counts, strict=True) for _ in range(count)]
        return _rows(tuple(rows), self.factors.device)

    def shared(self, x: torch.Tensor, candidates: Sequence[int]) -> torch.Tensor:
        """See `Leaf.shared`."""
        factors = self.factors[_rows(tuple(candidates), x.device)].view(len(candidates), *[1] * (x.dim() - 1), -1)
        return self._shift((linear(x, self.module.weight) * factors).flatten(0, 1))

    def _shift(self, out: torch.Tensor) -> torch.Tensor:
        return out if self.module.bias is None else out.add_(self.module.bias)


@functools.lru_cache(maxsize=64)
def _rows(rows: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Rows of a stack, to index it by: sent to the device once, before a step of decoding is captured (`prepare`)."""
    with torch.inference_mode(False):
        return sent(rows, device)


def is_stackable(model: WorkingModel, name: str) -> bool:
    """Whether a tensor is a whole parameter of a module that takes and returns one tensor."""
    architecture = model.architecture
    slot = architecture.slot(name)
    module = slot.parameter.rsplit(".", 1)[0]
    kind = type(model.module.get_submodule(module))
    return not slot.index and (kind.__name__ in ("Linear", "Conv1D") or architecture.is_norm(module))


def stack_leaves(model: WorkingModel, values: Sequence[Mapping[str, Expression]]) -> list[Leaf]:
    """The leaves in which candidates differ, given each candidate's values of the same tensors, all of them stacked."""
    if len(values[0]) == 1:
        (name,) = values[0]
        factors = _output_factors(model, name, [own[name] for own in values])
        if factors is not None:
            module = model.architecture.slot(name).parameter.rsplit(".", 1)[0]
            return [ScaledLeaf(model.module.get_submodule(module), factors)]
    modules: dict[str, dict[str, torch.Tensor]] = {}
    stack = model.stack(values)
    for name, stacked in stack.values.items():
        module, parameter = model.architecture.slot(name).parameter.rsplit(".", 1)
        modules.setdefault(module, {})[parameter] = stacked
    return [StackedLeaf(model.module.get_submodule(name), own, stack.bring) for name, own in modules.items()]


def _output_factors(model: WorkingModel, name: str, values: Sequence[Expression]) -> torch.Tensor | None:
    """(K, out) where scaling a Linear's outputs is the same as scaling its rows: if these are not rounded more."""
    leaf = model.module.get_submodule(model.architecture.slot(name).parameter.rsplit(".", 1)[0])
    scaled = [value for value in values if isinstance(value, NormOffspring) and value.axis == 0]
    if len(scaled) < len(values) or not isinstance(leaf, torch.nn.Linear):
        return None
    parent = scaled[0].weight(model.sources)
    if not (parent.dtype == model.dtype in (torch.float32, torch.float64) and model.equals(name, parent)):
        return None
    return torch.stack([value.log_scale(model.sources) for value in scaled]).to(leaf.weight).exp()


@contextmanager
def computing_for(leaves: Sequence[Leaf], candidates: Sequence[int], counts: Sequence[int]) -> Iterator[None]:
    """Let the leaves' modules compute for candidates of different numbers of rows, until the block ends."""
    forwards = {leaf.module: lambda x, leaf=leaf: leaf.each(x, candidates, counts) for leaf in leaves}
    with replaced(forwards):
        yield


def tile(x: torch.Tensor, k: int) -> torch.Tensor:
    """x (batch, ...) -> (k * batch, ...), one copy after another; x itself for k = 1."""
    return x if k == 1 else x.expand(k, *x.shape).flatten(0, 1)
