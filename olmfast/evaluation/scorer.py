"""The one door between search and evaluation: candidates of a unit in, scores per sample out.

`SequentialScorer` is the plain reference: candidate by candidate, every dataset in full, batched over samples.
Every faster scorer is tested against it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from olmfast.evaluation import metrics
from olmfast.evaluation.batches import Dataset, Sample, make_batches
from olmfast.evaluation.decode import greedy
from olmfast.evaluation.model import WorkingModel
from olmfast.weights.architecture import Unit
from olmfast.weights.methods import Values


@dataclass(frozen=True)
class Candidate:
    """A unit's proposed values: canonical name -> values. Without values it is what is there now.

    `settings` names the donor whose config.json the module is built by, for a donor that is scored whole; None is
    the base's, which every merge has.
    """

    label: str
    values: Mapping[str, Values] = field(default_factory=dict)
    settings: str | None = None


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

    def stacked_on(self, below: Scores) -> Scores:
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
        return Scores(samples_, wanted, {name: wanted[name] & cut for name, cut in self.truncated.items()})

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
        return {name: [values.tolist(), self.truncated[name].int().tolist()] for name, values in self.samples.items()}

    @classmethod
    def from_json(cls, data: Mapping[str, Any], dtype: torch.dtype) -> Scores:
        """Scores of samples that have all been evaluated, as `to_json` wrote them."""
        dtype = torch.promote_types(dtype, torch.float32)
        samples = {name: torch.tensor(values, dtype=dtype) for name, (values, _) in data.items()}
        evaluated = {name: torch.ones_like(values, dtype=torch.bool) for name, values in samples.items()}
        return cls(samples, evaluated, {name: torch.tensor(cut, dtype=torch.bool) for name, (_, cut) in data.items()})

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


class Scorer(Protocol):
    """Whoever evaluates candidates: sequential, batched or distributed."""

    @property
    def sizes(self) -> Mapping[str, int]:
        """Dataset -> number of samples."""
        ...

    def score(
        self,
        unit: Unit,
        candidates: Sequence[Candidate],
        datasets: Sequence[str] | None = None,
        samples: Mapping[str, Sequence[int]] | None = None,
    ) -> Scores:
        """Score all candidates of one unit; `datasets` and `samples` (indices per dataset) narrow it down."""
        ...

    def decided(self, label: str) -> None:
        """The step is over: the model is now as the candidate of this label, out of those just scored, was."""
        ...

    @property
    def state(self) -> Any:
        """What a scorer of a resumed run has to know to go on in the same way: plain JSON values."""
        ...

    @state.setter
    def state(self, state: Any) -> None: ...


class SequentialScorer:
    """One candidate after another, in place on the working model, which is left as it was."""

    def __init__(
        self,
        model: WorkingModel,
        datasets: Mapping[str, Dataset],
        tokenizer: Any,
        stop_tokens: Sequence[int],
        batch_tokens: int,
        progress: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.model, self.datasets, self.tokenizer = model, datasets, tokenizer
        self.sizes = {name: len(dataset.samples) for name, dataset in datasets.items()}
        self.stop_tokens, self.batch_tokens, self.progress = tuple(stop_tokens), batch_tokens, progress

    def score(
        self,
        unit: Unit,  # noqa: ARG002 (the reference evaluates whole models)
        candidates: Sequence[Candidate],
        datasets: Sequence[str] | None = None,
        samples: Mapping[str, Sequence[int]] | None = None,
    ) -> Scores:
        """See `Scorer.score`. Samples not asked for are NaN and marked as not evaluated."""
        wanted = wanted_samples(self.datasets, datasets, samples)
        result = Scores.empty(len(candidates), {name: self.datasets[name] for name in wanted}, self.model.dtype)
        for row, candidate in enumerate(candidates):
            with self.model.trial(candidate.values, candidate.settings):
                if row + 1 < len(candidates):
                    self.model.prefetch(candidates[row + 1].values)
                for name, indices in wanted.items():
                    if not indices:
                        continue
                    scores, truncated = self._score_dataset(self.datasets[name], indices)
                    result.samples[name][row, indices] = scores.to(result.samples[name].dtype)
                    result.evaluated[name][row, indices] = True
                    result.truncated[name][row, indices] = truncated
            self.progress(candidate.label)
        return result

    def decided(self, label: str) -> None:
        """See `Scorer.decided`. Nothing is kept from one step to the next here."""

    state: None = None

    def _score_dataset(self, dataset: Dataset, wanted: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
        samples = [dataset.samples[index] for index in wanted]
        mode = dataset.config.mode
        truncated = torch.zeros(len(samples), dtype=torch.bool)
        if mode in metrics.GENERATIVE:
            return self._generate(dataset, samples)
        if mode == "exact_match":
            return self._exact_match(dataset, samples), truncated
        return self._teacher_forced(mode, samples), truncated

    @torch.inference_mode()
    def _teacher_forced(self, mode: str, samples: list[Sample]) -> torch.Tensor:
        """Right-padded: padding comes after every scored token and so cannot reach it (causal attention)."""
        found: dict[int, torch.Tensor] = {}
        inputs = [sample.prompt + sample.response[:-1] for sample in samples]
        for batch in make_batches([len(ids) for ids in inputs], self.batch_tokens):
            width = len(inputs[batch[0]])
            ids = torch.zeros(len(batch), width, dtype=torch.long)
            for row, index in enumerate(batch):
                ids[row, : len(inputs[index])] = torch.tensor(inputs[index])
            logits = self.model.module(input_ids=ids.to(self.model.device), use_cache=False).logits
            for row, index in enumerate(batch):
                sample = samples[index]
                rows = logits[row, len(sample.prompt) - 1 : len(inputs[index])]
                found[index] = _score_response(mode, rows, sample).cpu()
        return torch.stack([found[index] for index in range(len(samples))])

    def _exact_match(self, dataset: Dataset, samples: list[Sample]) -> torch.Tensor:
        found: dict[int, torch.Tensor] = {}
        lengths = [len(sample.prompt) + len(sample.response) for sample in samples]
        for batch in make_batches(lengths, self.batch_tokens):
            chosen = [samples[index] for index in batch]
            limits = [len(s.response) for s in chosen]
            decoded = greedy(self.model.module, [s.prompt for s in chosen], limits, self.model.context)
            tokens, max_prob = decoded.tokens.cpu(), decoded.max_prob.cpu()
            for row, (index, sample) in enumerate(zip(batch, chosen, strict=True)):
                n = len(sample.response)
                right = tokens[row, :n] == torch.tensor(sample.response)
                found[index] = metrics.exact_match(max_prob[row, :n], right, dataset.config.strict)
        return torch.stack([found[index] for index in range(len(samples))])

    def _generate(self, dataset: Dataset, samples: list[Sample]) -> tuple[torch.Tensor, torch.Tensor]:
        """A generation that reaches `max_new_tokens`, or the model's context, is counted as truncated."""
        scores = torch.zeros(len(samples), dtype=torch.float64)
        truncated = torch.zeros(len(samples), dtype=torch.bool)
        formula = metrics.GENERATIVE[dataset.config.mode]
        longest = dataset.config.max_new_tokens
        for batch in make_batches([len(s.prompt) + longest for s in samples], self.batch_tokens):
            prompts = [samples[index].prompt for index in batch]
            limits = [min(longest, self.model.context - len(prompt)) for prompt in prompts]
            decoded = greedy(self.model.module, prompts, limits, self.model.context, self.stop_tokens)
            for row, index in enumerate(batch):
                length = int(decoded.lengths[row])
                text = self.tokenizer.decode(decoded.tokens[row, :length].tolist(), skip_special_tokens=True)
                failed = bool(decoded.max_prob[row, : length + 1].isnan().any())
                scores[index] = torch.nan if failed else formula(text, dataset.config.forbid)
                truncated[index] = not bool(decoded.stopped[row])
        return scores, truncated


def _score_response(mode: str, logits: torch.Tensor, sample: Sample) -> torch.Tensor:
    if mode == "choice":
        options = torch.tensor(sample.options, device=logits.device)
        return metrics.choice(logits[0, options], sample.options.index(sample.response[0]))
    labels = torch.tensor(sample.response, device=logits.device)
    return metrics.TEACHER_FORCED[mode](metrics.token_scores(logits, labels))
