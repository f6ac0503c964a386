"""Scores per candidate, dataset and sample, and whether the answer is right."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch

from olmfast.evaluation import metrics
from olmfast.evaluation.encoding import Dataset, Sample


class Answer(NamedTuple):
    """What one candidate did with one sample: its score, whether it is fully right, whether it was cut off."""

    score: torch.Tensor | float
    right: bool = False
    truncated: bool = False


def picked(mode: str, option_logits: torch.Tensor, sample: Sample) -> Answer:
    """The answer to a multiple choice, by a mode of `metrics.CHOICES`, from the logits of its options (options,)."""
    right = sample.options.index(sample.response[0])
    score = metrics.CHOICES[mode](option_logits, right)
    return Answer(score, int(option_logits.argmax()) == right)


@dataclass(frozen=True)
class Scores:
    """Per dataset, (candidates, samples): scores, NaN where `evaluated` is False; which generations were cut off.

    `right` says which answers are fully right; it lacks the datasets whose mode knows no right answer.
    """

    samples: dict[str, torch.Tensor]
    evaluated: dict[str, torch.Tensor]
    truncated: dict[str, torch.Tensor]
    right: dict[str, torch.Tensor] = field(default_factory=dict)

    def mean(self, dataset: str) -> torch.Tensor:
        """(candidates,): the mean over the evaluated samples; NaN where there is none, or where one is NaN."""
        evaluated = self.evaluated[dataset]
        return torch.where(evaluated, self.samples[dataset], 0).sum(dim=1) / evaluated.sum(dim=1)

    def accuracy(self, dataset: str) -> torch.Tensor | None:
        """(candidates,): the share of the evaluated samples whose answer is right; None where no answer can be."""
        if dataset not in self.right:
            return None
        return self.right[dataset].sum(dim=1) / self.evaluated[dataset].sum(dim=1)

    def rows(self, rows: Sequence[int]) -> Scores:
        """The scores of some candidates."""
        return self._each(lambda _, tensor: tensor[list(rows)])

    def only(self, datasets: Sequence[str]) -> Scores:
        """The scores on some datasets."""
        return Scores(*({name: part[name] for name in datasets if name in part} for part in self.parts))

    def followed_by(self, below: Scores) -> Scores:
        """These candidates followed by those of `below`, on the same datasets."""
        pairs = zip(self.parts, below.parts, strict=True)
        return Scores(*({name: torch.cat([a[name], b[name]]) for name in a} for a, b in pairs))

    def at(self, samples: Mapping[str, Sequence[int]]) -> Scores:
        """The scores on some samples (indices per dataset)."""
        return self.only(list(samples))._each(lambda name, tensor: tensor[:, list(samples[name])])

    def limited_to(self, samples: Mapping[str, Sequence[int]]) -> Scores:
        """These scores with all samples but the given ones (indices per dataset) not evaluated."""
        wanted = {name: torch.zeros_like(values) for name, values in self.evaluated.items()}
        for name, own in samples.items():
            wanted[name][:, list(own)] = True
        left = self._each(lambda name, tensor: torch.where(wanted[name], tensor, _nothing(tensor)))
        return replace(left, evaluated=wanted)

    def filled_by(self, other: Scores) -> Scores:
        """These scores, and where they are not evaluated those of `other`: the same candidates and datasets."""
        own = self.evaluated
        pairs = zip(self.parts, other.parts, strict=True)
        return Scores(*({name: torch.where(own[name], a[name], b[name]) for name in a} for a, b in pairs))

    def spread(self, rows: Sequence[int], n: int) -> Scores:
        """These candidates as the given rows of `n`; the other rows are not evaluated."""

        def spread(_: str, tensor: torch.Tensor) -> torch.Tensor:
            result = torch.full((n, tensor.shape[1]), _nothing(tensor), dtype=tensor.dtype)
            result[list(rows)] = tensor
            return result

        return self._each(spread)

    @classmethod
    def joined(cls, parts: Sequence[Scores]) -> Scores:
        """The same candidates on the datasets of all parts."""
        found = cls({}, {}, {})
        for part in parts:
            for target, source in zip(found.parts, part.parts, strict=True):
                target.update(source)
        return found

    @property
    def parts(self) -> tuple[dict[str, torch.Tensor], ...]:
        return self.samples, self.evaluated, self.truncated, self.right

    def _each(self, change: Callable[[str, torch.Tensor], torch.Tensor]) -> Scores:
        return Scores(*({name: change(name, tensor) for name, tensor in part.items()} for part in self.parts))

    def set(self, row: int, dataset: str, index: int, answer: Answer) -> None:
        """Enter what one candidate did with one sample. What has no score is not right."""
        self.samples[dataset][row, index] = answer.score
        self.evaluated[dataset][row, index] = True
        self.truncated[dataset][row, index] = answer.truncated
        if dataset in self.right:
            self.right[dataset][row, index] = answer.right and not math.isnan(answer.score)

    def put(self, row: int, one: Scores) -> None:
        """Enter all scores of the one candidate of `one`."""
        for target, source in zip(self.parts, one.parts, strict=True):
            for name, values in source.items():
                target[name][row] = values[0]

    def enter(self, rows: Sequence[int], samples: Mapping[str, Sequence[int]], own: Scores) -> None:
        """Enter the scores of some candidates (rows) on some samples (indices per dataset): those of `own`, all."""
        at = torch.tensor(list(rows))[:, None]
        for target, source in zip(self.parts, own.parts, strict=True):
            for name, values in source.items():
                target[name][at, torch.tensor(list(samples[name]), dtype=torch.long)] = values

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values that `from_json` reads back exactly: dtype, scores, truncated, and right where there is."""
        flags = {name: [own, self.right[name]] if name in self.right else [own] for name, own in self.truncated.items()}
        return {
            name: [str(values.dtype).removeprefix("torch."), values.tolist(), *(x.int().tolist() for x in flags[name])]
            for name, values in self.samples.items()
        }

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Scores:
        """Scores of samples that have all been evaluated, as `to_json` wrote them."""
        samples = {name: torch.tensor(x, dtype=getattr(torch, dtype)) for name, (dtype, x, *_) in data.items()}
        evaluated = {name: torch.ones_like(values, dtype=torch.bool) for name, values in samples.items()}
        flags = ({name: torch.tensor(own[i]).bool() for name, own in data.items() if len(own) > i} for i in (2, 3))
        return cls(samples, evaluated, *flags)

    @classmethod
    def empty(cls, n: int, datasets: Mapping[str, Dataset], dtype: torch.dtype) -> Scores:
        """Nothing evaluated of n candidates; scores in `dtype`, or float32 if that is less precise."""
        shapes = {name: (n, len(dataset.samples)) for name, dataset in datasets.items()}
        dtype = torch.promote_types(dtype, torch.float32)
        judged = [name for name, dataset in datasets.items() if dataset.config.mode not in metrics.GENERATIVE]
        flags = ({name: torch.zeros(shapes[name]).bool() for name in names} for names in (shapes, shapes, judged))
        return cls({name: torch.full(shape, torch.nan, dtype=dtype) for name, shape in shapes.items()}, *flags)


def _nothing(values: torch.Tensor) -> float | bool:
    """What stands for a sample that is not evaluated."""
    return torch.nan if values.dtype.is_floating_point else False


def wanted_samples(
    all_datasets: Mapping[str, Dataset],
    datasets: Sequence[str] | None,
    samples: Mapping[str, Sequence[int]] | None,
) -> dict[str, list[int]]:
    """Dataset -> indices of the samples that `Scorer.score` is asked for."""
    names = all_datasets if datasets is None else datasets
    samples = samples or {}
    return {name: list(samples.get(name, range(len(all_datasets[name].samples)))) for name in names}
