"""Scores per candidate, dataset and sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from olmfast.evaluation.encoding import Dataset


@dataclass(frozen=True)
class Scores:
    """Per dataset: scores (candidates, samples), NaN where `evaluated` is False, and cut-off generations."""

    samples: dict[str, torch.Tensor]
    evaluated: dict[str, torch.Tensor]
    truncated: dict[str, torch.Tensor]

    def mean(self, dataset: str) -> torch.Tensor:
        """(candidates,): the mean over the evaluated samples; NaN where there is none, or where one is NaN."""
        evaluated = self.evaluated[dataset]
        return torch.where(evaluated, self.samples[dataset], 0).sum(dim=1) / evaluated.sum(dim=1)

    def rows(self, rows: Sequence[int]) -> Scores:
        """The scores of some candidates."""
        return self._each(lambda tensor: tensor[list(rows)])

    def only(self, datasets: Sequence[str]) -> Scores:
        """The scores on some datasets."""
        return Scores(*({name: part[name] for name in datasets} for part in self.parts))

    def followed_by(self, below: Scores) -> Scores:
        """These candidates followed by those of `below`, on the same datasets."""
        pairs = zip(self.parts, below.parts, strict=True)
        return Scores(*({name: torch.cat([a[name], b[name]]) for name in a} for a, b in pairs))

    def at(self, samples: Mapping[str, Sequence[int]]) -> Scores:
        """The scores on some samples (indices per dataset)."""
        return Scores(*({name: part[name][:, list(own)] for name, own in samples.items()} for part in self.parts))

    def limited_to(self, samples: Mapping[str, Sequence[int]]) -> Scores:
        """These scores with all samples but the given ones (indices per dataset) not evaluated."""
        wanted = {name: torch.zeros_like(values) for name, values in self.evaluated.items()}
        for name, own in samples.items():
            wanted[name][:, list(own)] = True
        samples_ = {name: torch.where(wanted[name], values, torch.nan) for name, values in self.samples.items()}
        return Scores(samples_, wanted, {name: wanted[name] & own for name, own in self.truncated.items()})

    def filled_by(self, other: Scores) -> Scores:
        """These scores, and where they are not evaluated those of `other`: the same candidates and datasets."""
        own = self.evaluated
        pairs = zip(self.parts, other.parts, strict=True)
        return Scores(*({name: torch.where(own[name], a[name], b[name]) for name in a} for a, b in pairs))

    def spread(self, rows: Sequence[int], n: int) -> Scores:
        """These candidates as the given rows of `n`; the other rows are not evaluated."""

        def spread(tensor: torch.Tensor) -> torch.Tensor:
            fill = torch.nan if tensor.dtype.is_floating_point else False
            result = torch.full((n, tensor.shape[1]), fill, dtype=tensor.dtype)
            result[list(rows)] = tensor
            return result

        return self._each(spread)

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """The same candidates on the datasets of all parts."""
        merged: tuple[dict[str, torch.Tensor], ...] = ({}, {}, {})
        for part in parts:
            for target, source in zip(merged, part.parts, strict=True):
                target.update(source)
        return cls(*merged)

    @property
    def parts(self) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor], dict[str, torch.Tensor]]:
        return self.samples, self.evaluated, self.truncated

    def _each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> Scores:
        return Scores(*({name: change(tensor) for name, tensor in part.items()} for part in self.parts))

    def set(self, row: int, dataset: str, index: int, score: torch.Tensor, truncated: bool = False) -> None:
        """Enter the score of one candidate on one sample."""
        self.samples[dataset][row, index] = score
        self.evaluated[dataset][row, index] = True
        self.truncated[dataset][row, index] = truncated

    def put(self, row: int, one: Scores) -> None:
        """Enter all scores of the one candidate of `one`."""
        for target, source in zip(self.parts, one.parts, strict=True):
            for name, values in source.items():
                target[name][row] = values[0]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values that `from_json` reads back exactly."""
        return {
            name: [str(values.dtype).removeprefix("torch."), values.tolist(), self.truncated[name].int().tolist()]
            for name, values in self.samples.items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scores:
        """Scores of samples that have all been evaluated, as `to_json` wrote them."""
        samples = {name: torch.tensor(x, dtype=getattr(torch, dtype)) for name, (dtype, x, _) in data.items()}
        evaluated = {name: torch.ones_like(values, dtype=torch.bool) for name, values in samples.items()}
        return cls(samples, evaluated, {name: torch.tensor(own, dtype=torch.bool) for name, (*_, own) in data.items()})

    @classmethod
    def empty(cls, n: int, datasets: Mapping[str, Dataset], dtype: torch.dtype) -> Scores:
        """Nothing evaluated of n candidates; scores in `dtype`, or float32 if that is less precise."""
        shapes = {name: (n, len(dataset.samples)) for name, dataset in datasets.items()}
        dtype = torch.promote_types(dtype, torch.float32)
        return cls(
            {name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in shapes.items()},
            {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()},
            {name: torch.zeros(shape, dtype=torch.bool) for name, shape in shapes.items()},
        )


def wanted_samples(
    all_datasets: Mapping[str, Dataset],
    datasets: Sequence[str] | None,
    samples: Mapping[str, Sequence[int]] | None,
) -> dict[str, list[int]]:
    """Dataset -> indices of the samples that `Scorer.score` is asked for."""
    names = all_datasets if datasets is None else datasets
    samples = samples or {}
    return {name: list(samples.get(name, range(len(all_datasets[name].samples)))) for name in names}
