"""What olmfast is measured against: a plain driver that searches as the first tool of its kind did.

Each candidate's donor is loaded whole from its folder with Transformers and the unit's values are copied out of it;
the model sees one sample at a time; `exact_match` runs one full forward for each generated token, the other metrics
one forward with the logits of every position; offspring are made by plain torch expressions; the whole model is
saved after each choice. Nothing waits, and nothing is done twice that the original did once: the score of what is
there is kept from one decision to the next, and the model is saved once, not twice, for each of them.

Datasets, formulas of metrics, random numbers and the rule of selection are olmfast's, so that decisions can be
compared; nothing of its scorers is used but the container of their results.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from olmfast.evaluation import metrics
from olmfast.evaluation.encoding import Dataset, Sample
from olmfast.evaluation.scores import Answer, Scores
from olmfast.kernels import offspring_count
from olmfast.search.evolve import NORM_DECAY, SVD_DECAY
from olmfast.search.ranking import Rules, choose, order
from olmfast.weights.draws import normal


@dataclass
class Decision:
    """One step: the candidates' names, the first being the current model; the winner, and every mean score."""

    key: str
    winner: str
    means: dict[str, dict[str, float]]  # dataset -> candidate -> mean over samples


@dataclass(frozen=True)
class Offspring:
    """A generation: how many there are, and what computes each."""

    count: int
    child: Callable[[int], torch.Tensor]


@dataclass
class Baseline:
    """A search over donors (name -> folder) by the datasets; `model` is the merge so far."""

    donors: Mapping[str, Path]
    datasets: Mapping[str, Dataset]
    folder: Path  # where the whole model is saved after each choice
    rules: Rules = field(default_factory=lambda: Rules("copeland", 1e-6))
    seed: int = 0
    svd_sigma: float = 0.1
    norm_sigma: float = 0.005
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  # of the merge; donors stay on the CPU
    dtype: torch.dtype = torch.float32
    decisions: list[Decision] = field(default_factory=list)

    def select_base(self) -> None:
        """Score every donor whole; the best is where the search starts."""
        scores = [self.score(self._load(name).to(self.device)) for name in self.donors]
        means = {name: [float(one.mean(name)) for one in scores] for name in self.datasets}
        self.rules = Rules(
            self.rules.selection,
            self.rules.tie_tolerance,
            spans={name: (min(values), max(values)) for name, values in means.items()},
        )
        names = list(self.donors)
        winner = order(_stack(scores), range(len(names)), self.rules)[0]
        self.start(names[winner], scores[winner])
        self._record("base", names, _stack(scores), winner)

    def start(self, donor: str, scores: Scores | None = None) -> None:
        """Begin with one donor; its scores are found first if they are not given."""
        self.model, self.base = self._load(donor).to(self.device), donor
        self.owner = dict.fromkeys(self.model.state_dict(), donor)
        self.current = scores or self.score(self.model)

    def swap(self, key: str, tensors: Sequence[str]) -> None:
        """Try every other donor's values for the tensors and keep the best."""
        owners = {self.owner[name] for name in tensors}
        now = owners.pop() if len(owners) == 1 else "current"
        others = [name for name in self.donors if name != now]
        scores = [self.current, *(self.score_donor(name, tensors) for name in others)]
        winner = choose(_stack(scores), range(len(scores)), self.rules)
        if winner:
            self._copy(self._values_of(others[winner - 1], tensors))
            self.owner.update(dict.fromkeys(tensors, others[winner - 1]))
        self._decide(key, [now, *others], scores, winner)

    def score_donor(self, donor: str, tensors: Sequence[str]) -> Scores:
        """The model with a donor's values for some tensors; it is left as it was."""
        return self._score_with(self._values_of(donor, tensors))

    def evolve(self, key: str, tensor: str, method: str, generations: int = 1) -> None:
        """(1+lambda) on one matrix: `svd_es` in singular-value space, `norm_es` on row norms."""
        successes = 0
        for generation in range(generations):
            offspring = self.offspring(tensor, method, generation, successes)
            children = [offspring.child(index) for index in range(offspring.count)]
            scores = [self.current, *(self._score_with({tensor: child}) for child in children)]
            winner = choose(_stack(scores), range(len(scores)), self.rules)
            if winner:
                self._copy({tensor: children[winner - 1]})
                self.owner[tensor] = "current"
                successes += 1
            labels = ["current", *(f"{method}/{generation}/{index}" for index in range(offspring.count))]
            self._decide(f"{key}/{method}/{generation}", labels, scores, winner)

    def offspring(self, tensor: str, method: str, generation: int = 0, successes: int = 0) -> Offspring:
        """One generation of offspring of a matrix as it is now."""
        weight = self._parameter(tensor).detach().float().clone()
        if method == "svd_es":
            dimensions, make = _svd_offspring(weight, self.svd_sigma * SVD_DECAY**successes)
        else:
            dimensions, make = _norm_offspring(weight, self.norm_sigma * NORM_DECAY**successes)
        address = (self.seed, tensor, method, generation)

        def child(index: int) -> torch.Tensor:
            return make(normal(dimensions, *address, index).float().to(self.device))

        return Offspring(offspring_count(dimensions), child)

    def score_child(self, tensor: str, child: torch.Tensor) -> Scores:
        """The model with one matrix replaced; it is left as it was."""
        return self._score_with({tensor: child})

    def _score_with(self, values: Mapping[str, torch.Tensor]) -> Scores:
        before = {name: self._parameter(name).detach().clone() for name in values}
        self._copy(values)
        scores = self.score(self.model)
        self._copy(before)
        return scores

    def _values_of(self, donor: str, tensors: Sequence[str]) -> dict[str, torch.Tensor]:
        state = self._load(donor).state_dict()
        return {name: state[name] for name in tensors}

    def _copy(self, values: Mapping[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in values.items():
                self._parameter(name).copy_(value)

    def _load(self, donor: str) -> Any:
        return load(self.donors[donor], self.dtype)

    def _parameter(self, name: str) -> torch.Tensor:
        parameter: torch.Tensor = self.model.get_parameter(name)
        return parameter

    def _decide(self, key: str, labels: list[str], scores: list[Scores], winner: int) -> None:
        self.current = scores[winner]
        self.model.save_pretrained(self.folder)
        self._record(key, labels, _stack(scores), winner)

    def _record(self, key: str, labels: list[str], scores: Scores, winner: int) -> None:
        means = {name: dict(zip(labels, scores.mean(name).tolist(), strict=True)) for name in self.datasets}
        self.decisions.append(Decision(key, labels[winner], means))

    def score(self, model: Any) -> Scores:
        """One model's scores on all samples."""
        scores = Scores.empty(1, self.datasets, torch.float32)
        for name, dataset in self.datasets.items():
            for index, sample in enumerate(dataset.samples):
                scores.set(0, name, index, Answer(score_sample(model, dataset, sample)))
        return scores


def _svd_offspring(weight: torch.Tensor, sigma: float) -> tuple[int, Callable[[torch.Tensor], torch.Tensor]]:
    """W * exp(clamp(U diag(d * g) Vh, -3, 3)), d ~ N(0, (sigma std(S))^2), g inverse damping of mean 1."""
    u, s, vh = torch.linalg.svd(weight / weight.abs().max(), full_matrices=False)
    k = int((s > s.max() * max(weight.shape) * 2**-23).sum())
    u, s, vh = u[:, :k], s[:k], vh[:k]
    damping = torch.sqrt(s.max() / (s + 1e-10))
    step = sigma * max(float(s.std()), 1e-10) * damping / damping.mean()
    return k, lambda draws: weight * torch.exp((u @ torch.diag(draws * step) @ vh).clamp(-3, 3))


def _norm_offspring(weight: torch.Tensor, sigma: float) -> tuple[int, Callable[[torch.Tensor], torch.Tensor]]:
    """Rows of the same direction, their norms scaled by exp(N(0, sigma^2)); rows of zeros stay."""
    norms = weight.norm(dim=1, keepdim=True)
    directions = torch.where(norms > 0, weight / norms, weight)

    def make(draws: torch.Tensor) -> torch.Tensor:
        scaled = torch.exp(torch.log(norms) + sigma * draws[:, None])
        return torch.where(norms > 0, directions * scaled, weight)

    return len(weight), make


def load(folder: Path, dtype: torch.dtype = torch.float32) -> Any:
    """A donor, whole, as Transformers loads it, on the CPU."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.inference_mode()
def score_sample(model: Any, dataset: Dataset, sample: Sample) -> torch.Tensor:
    """One sample's score: batch of one, no KV cache, the logits of every position."""
    mode = dataset.config.mode
    labels = torch.tensor(sample.response)
    if mode == "exact_match":
        ids = list(sample.prompt)
        top = []
        for _ in sample.response:
            logits = _logits(model, ids)[-1].float()
            probability, token = torch.softmax(logits, dim=0).max(dim=0)
            top.append(probability.cpu())
            ids.append(int(token))
        right = torch.tensor(ids[len(sample.prompt) :]) == labels
        return metrics.exact_match(torch.stack(top), right, dataset.config.strict)
    ids = [*sample.prompt, *sample.response[:-1]]
    logits = _logits(model, ids)[len(sample.prompt) - 1 :]
    return metrics.TEACHER_FORCED[mode](metrics.response_logits(logits, labels.to(logits.device))).cpu()


def _logits(model: Any, ids: Sequence[int]) -> torch.Tensor:
    """At every position of one input: (tokens, vocabulary)."""
    logits: torch.Tensor = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    return logits


def _stack(scores: Sequence[Scores]) -> Scores:
    together = scores[0]
    for one in scores[1:]:
        together = together.followed_by(one)
    return together
