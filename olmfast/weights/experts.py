"""LoRA of parameters, such as the experts that Transformers fuses into one: PEFT's `target_parameters`.

A layer's experts are a parameter (experts, rows, columns), stored as such or as matrices for each expert. PEFT has for
it an A (experts * rank, .), in which an expert's ranks lie together, and a B (., rank * experts), in which a rank's
experts do; expert e is W + scale * B_e A_e or, where the first dimension of W counts inputs, W + scale * A_e' B_e'
(`ParamWrapper.get_delta_weight` of PEFT 0.21). A matrix (outputs, inputs) counts as one expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from olmfast.weights.adapted import Adapted, Product
from olmfast.weights.checkpoint import Tensor, TensorInfo
from olmfast.weights.chunks import Readable

FIRST_HALF, SECOND_HALF = ("gate_proj", "w1"), ("up_proj", "w3")  # of `gate_up_proj`, as Transformers fuses them


@dataclass(frozen=True)
class ExpertsLowRank(Adapted):
    """All experts (experts, rows, columns) or a part of one (rows, columns), which begins at `row` of the expert
    `first`. `turned` says that the first dimension of an expert counts inputs."""

    a: TensorInfo
    b: TensorInfo
    scale: float
    n_experts: int
    turned: bool
    first: int = 0
    row: int = 0

    @property
    def parts(self) -> tuple[TensorInfo, ...]:
        """See `Adapted`."""
        return (self.a, self.b)

    @property
    def settings(self) -> tuple[float | bool | tuple[int, ...], ...]:
        """See `Adapted`."""
        return (self.scale, self.n_experts, self.turned, self.first, self.row)

    def open(self) -> Readable:
        """See `Tensor.open`."""
        return _OneByOne(self)


class _OneByOne:
    """The experts of a tensor one after another; the factors of the last one are kept."""

    def __init__(self, tensor: ExpertsLowRank) -> None:
        self.tensor, self.base = tensor, tensor.base.open()
        self.shape, self.dtype = tensor.shape, tensor.dtype
        self.n_rows, self.n_columns = tensor.shape[-2:]
        self.left, self.right = self._factors()
        self.at = -1
        self.product: Product | None = None

    def _factors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(experts, rows, rank) and (experts, rank, columns) of the tensor's own experts."""
        tensor = self.tensor
        a, b, n, row = tensor.a, tensor.b, tensor.n_experts, tensor.row
        rank, last = a.shape[0] // n, row + self.n_rows
        experts = slice(None)
        if len(tensor.shape) == 2:  # of the others nothing is read that can be left
            experts = slice(tensor.first, tensor.first + 1)
            a = a.rows(tensor.first * rank, (tensor.first + 1) * rank)
        by_expert = a.read().to(tensor.computed_in).view(-1, rank, a.shape[1])
        if tensor.turned:
            every = b.read().view(-1, rank, n)[:, :, experts].to(tensor.computed_in)
            return by_expert[:, :, row:last].transpose(1, 2), every.permute(2, 1, 0)
        every = b.rows(row, last).read().view(-1, rank, n)[:, :, experts].to(tensor.computed_in)
        return every.permute(2, 0, 1), by_expert

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """See `Readable`."""
        size, done = self.n_rows * self.n_columns, 0
        while done < len(out):
            expert, begin = divmod(start + done, size)
            part = out[done : done + size - begin]
            self._product(expert).read_into(part, begin)
            done += len(part)

    def _product(self, at: int) -> Product:
        if self.product is None or at != self.at:
            offset = at * self.n_rows * self.n_columns
            self.at = at
            self.product = Product(self.tensor, self.base, self.left[at], self.right[at], self.tensor.scale, offset)
        return self.product


class Place(NamedTuple):
    """A tensor of the checkpoint in a fused parameter: all of it, or rows of an expert from `row` on."""

    name: str
    tensor: Tensor
    expert: int = 0
    row: int = 0


@dataclass(frozen=True)
class FusedExperts:
    """A fused parameter (`n_experts`, rows, columns) and the tensors of a checkpoint that lie in it."""

    places: tuple[Place, ...]
    n_experts: int
    rows: int
    columns: int

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor]) -> FusedExperts | None:
        """From the tensors that fill it, by name; None for what is no fused experts, or fused in an unknown way."""
        if len(tensors) == 1:
            ((name, tensor),) = tensors.items()
            sizes = (1, *tensor.shape) if len(tensor.shape) == 2 else tensor.shape
            return cls((Place(name, tensor),), *sizes) if len(sizes) == 3 else None
        places: list[Place] = []
        experts = _by_expert(tensors)
        for number, own in sorted(experts.items()):
            row = 0
            for name in own:
                places.append(Place(name, tensors[name], number, row))
                row += tensors[name].shape[0]
        shapes = {(sum(tensors[name].shape[0] for name in own), tensors[own[0]].shape[-1]) for own in experts.values()}
        if sorted(experts) != list(range(len(experts))) or len(shapes) != 1 or not _are_matrices(tensors):
            return None
        return cls(tuple(places), len(experts), *shapes.pop())

    def fits(self, a: TensorInfo, b: TensorInfo) -> Iterator[bool]:
        """In which ways (`turned`) an A and a B fit: none, one or, where an expert is square, both.

        A matrix counts its outputs first.
        """
        is_matrix = len(self.places) == 1 and len(self.places[0].tensor.shape) == 2
        if len(a.shape) != 2 or len(b.shape) != 2:
            return
        for turned in (False,) if is_matrix else (False, True):
            if (self.rows, self.columns) == ((a.shape[1], b.shape[0]) if turned else (b.shape[0], a.shape[1])):
                yield turned


def _are_matrices(tensors: Mapping[str, Tensor]) -> bool:
    return all(len(tensor.shape) == 2 for tensor in tensors.values())


def _by_expert(names: Sequence[str] | Mapping[str, Tensor]) -> dict[int, list[str]]:
    """Number of an expert -> its tensors, as they lie in a fused parameter; empty if they are not understood."""
    experts: dict[int, list[str]] = {}
    for name in names:
        found = re.fullmatch(r".*\.(\d+)\.(\w+)\.weight", name)
        if not found:
            return {}
        experts.setdefault(int(found[1]), []).append(name)
    for own in experts.values():
        own.sort(key=lambda name: name.split(".")[-2] not in FIRST_HALF)
        parts = [name.split(".")[-2] for name in own]
        if len(own) > 2 or (len(own) == 2 and not (parts[0] in FIRST_HALF and parts[1] in SECOND_HALF)):
            return {}
    return experts
