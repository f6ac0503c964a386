"""Alphas searched: all of a run's at once, by CMA-ES, by Bayesian optimisation, or along the gradient.

A round is a step of the search (`olmfast.search.loop`): the best alphas so far are its first candidate, and what is
better by the objective, the weighted mean of the datasets' mean scores, takes their place. So a resumed run tells the
optimiser what it was told before, and goes on with the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch

from olmfast.errors import InputError, OlmfastError
from olmfast.evaluation.scorer import Candidate, Direction
from olmfast.evaluation.scores import Scores
from olmfast.pruning.alphas import weights_of
from olmfast.pruning.target import Target
from olmfast.search.loop import GRADIENT, Search, Step, Trained
from olmfast.weights.draws import normal
from olmfast.weights.expressions import Copy

Alphas = tuple[float, ...]
SIGMA = 0.15  # of CMA-ES at first
RANDOM, GUIDED = 5, 5  # points of Bayesian optimisation: at random before it begins, and in each round
# The gradient: steps between two times that all questions are asked, questions of each dataset in a step, how far a
# logit moves in a step of a steady gradient, and the decays of Adam's means (arXiv 1412.6980).
STEPS, BATCH, RATE, DECAYS = 10, 8, 0.1, (0.9, 0.99)
EDGE = 0.02  # how near to 0 and 1 an alpha is at first, whose logit would be infinite


class AlphaSearch:
    """One search. `best` are the alphas of the current model, `value` what they score."""

    def __init__(self, search: Search, target: Target, start: Alphas) -> None:
        self.search, self.target, self.best = search, target, start
        self.unit = target.unit
        weights = {name: entry.weight for name, entry in search.config.dataset.items()}
        total = math.fsum(weights.values())
        if not total:
            raise InputError("dataset: every weight is 0, so nothing is searched by")
        self.weights = {name: weight / total for name, weight in weights.items()}
        self.value = math.nan

    def run(self, method: str, starts: Mapping[str, Alphas]) -> None:
        """Search until the budget is spent; the start, and other alphas that need no search, are tried first."""
        self.round("start", list(starts.items()))
        getattr(self, f"_by_{method}")()

    def round(self, key: str, tried: Sequence[tuple[str, Alphas]]) -> list[float]:
        """The objective of each of these alphas; the best of them and of the current ones become the current ones."""

        def propose() -> list[Candidate]:
            own = [Candidate(label, self.target.values(weights_of(alphas))) for label, alphas in tried]
            return [Candidate("current"), *own]

        step = Step(key, self.target.pruning.way, self.unit, propose, accept=self._accept, tested=False)
        return self._taken(step, tried)

    def _taken(self, step: Step, tried: Sequence[tuple[str, Alphas]]) -> list[float]:
        outcome = self.search.take(step)
        if outcome.dropped:
            label, why = next(iter(outcome.dropped.items()))
            raise OlmfastError(f"{step.key}: the alphas {label}: {why}; use another --dtype")
        values = [self._objective(outcome.metrics, label) for label, _ in tried]
        self.value = self._objective(outcome.metrics, outcome.winner)
        if outcome.changed:
            self.best = dict(tried)[outcome.winner]
        return values

    def _objective(self, metrics: Mapping[str, Mapping[str, float | None]], label: str) -> float:
        return math.fsum(weight * float(metrics[name][label] or 0.0) for name, weight in self.weights.items())

    def _accept(self, scores: Scores, alive: list[int]) -> list[int]:
        values = sum(weight * scores.mean(name).double() for name, weight in self.weights.items())
        return sorted(alive, key=lambda row: (float(values[row]), row))  # type: ignore[index]

    # By CMA-ES

    def _by_cma(self) -> None:
        from cmaes import CMA

        n = len(self.best)
        size = max(2, n)  # the package wants two numbers: the second of one is ignored
        bounds = np.array([[0.0, 1.0]] * size)
        mean = np.resize(np.array(self.best), size)
        optimizer = CMA(mean=mean, sigma=SIGMA, bounds=bounds, seed=self._seed("cma"))
        for number in count(1):
            points = [optimizer.ask() for _ in range(optimizer.population_size)]
            values = self.round(f"cma/{number}", self._numbered([point[:n] for point in points]))
            optimizer.tell(list(zip(points, values, strict=True)))
            if optimizer.should_stop():
                return

    # By Bayesian optimisation

    def _by_bayes(self) -> None:
        optuna = load_optuna()
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        names = [f"alpha_{k}" for k in range(len(self.best))]
        space = {name: optuna.distributions.FloatDistribution(0.0, 1.0) for name in names}
        sampler = optuna.samplers.TPESampler(
            seed=self._seed("bayes"), multivariate=True, constant_liar=True, n_startup_trials=RANDOM
        )
        study = optuna.create_study(sampler=sampler)
        start = dict(zip(names, self.best, strict=True))
        study.add_trial(optuna.trial.create_trial(params=start, distributions=space, value=self.value))
        for number in count():
            trials = [study.ask(space) for _ in range(GUIDED if number else RANDOM)]
            points = [[trial.params[name] for name in names] for trial in trials]
            values = self.round(f"bayes/{number}", self._numbered(points))
            for trial, value in zip(trials, values, strict=True):
                study.tell(trial, value)

    # Along the gradient

    def _by_gradient(self) -> None:
        logits = torch.tensor([_logit(alpha) for alpha in self.best], dtype=torch.float64)
        state = {"logits": logits, "first": torch.zeros_like(logits), "second": torch.zeros_like(logits)}
        streams = {name: self._endless(name) for name in self.search.scorer.sizes}
        for number in count(1):
            batches = [self._batch(streams) for _ in range(STEPS)]
            key, n_asked = f"gradient/{number}", sum(len(own) for batch in batches for own in batch.values())
            cost = Trained(GRADIENT * n_asked / sum(self.search.scorer.sizes.values()))
            propose = partial(self._descended, state, batches, number, key, n_asked)
            step = Step(key, "gradient", self.unit, propose, accept=self._accept, tested=False, trained=cost)
            outcome = self.search.take(step)
            alphas = self._recall(key, state)
            if outcome.changed:
                self.best = alphas
            self.value = self._objective(outcome.metrics, outcome.winner)

    def _descended(
        self, state: dict[str, torch.Tensor], batches: Any, number: int, key: str, n_asked: int
    ) -> list[Candidate]:
        """The current alphas, and those that a round's descent leads to.

        These are recorded before they are scored: a run that is killed meanwhile scores the very same numbers.
        """
        if key in self.search.record.values:
            self.search.count_gradient(n_asked)
        else:
            self._descend(state, batches, number)
            self.search.record.update(None, **{key: {name: own.tolist() for name, own in state.items()}})
        return [Candidate("current"), Candidate("1", self.target.values(weights_of(self._recall(key, state))))]

    def _recall(self, key: str, state: dict[str, torch.Tensor]) -> Alphas:
        """Put the state back that was recorded under a key; the alphas that it stands for."""
        known = self.search.record.values[key]
        state.update({name: torch.tensor(own, dtype=torch.float64) for name, own in known.items()})
        return tuple(state["logits"].sigmoid().tolist())

    def _descend(self, state: dict[str, torch.Tensor], batches: Sequence[dict[str, list[int]]], number: int) -> None:
        """Adam's steps on the logits of the alphas, each on a batch of questions, through the merged weights."""
        for step, questions in enumerate(batches, (number - 1) * STEPS + 1):
            logits = state["logits"].clone().requires_grad_()
            weights = torch.ones(1, dtype=torch.float64)
            for alpha in logits.sigmoid():  # as `weights_of` does
                weights = torch.cat([alpha[None], (1 - alpha) * weights])
            slopes = self._slopes(weights.tolist(), questions)
            (weights @ slopes).backward()  # type: ignore[no-untyped-call]
            assert logits.grad is not None
            gradient = logits.grad.nan_to_num(0.0, 0.0, 0.0)
            first = DECAYS[0] * state["first"] + (1 - DECAYS[0]) * gradient
            second = DECAYS[1] * state["second"] + (1 - DECAYS[1]) * gradient.square()
            size = (second / (1 - DECAYS[1] ** step)).sqrt() + 1e-12
            moved = state["logits"] - RATE * first / (1 - DECAYS[0] ** step) / size
            state.update(logits=moved, first=first, second=second)

    def _slopes(self, weights: Sequence[float], questions: dict[str, list[int]]) -> torch.Tensor:
        """How the loss changes with the weight of each layer of the run, (layers,) float64, that of the lowest 0."""
        values = self.target.values(weights)
        directions = {name: self._directions(name) for name in self.unit.tensors}
        found = self.search.slopes(values, directions, questions, {}, self.weights)
        along = torch.stack([found.along[name] for name in self.unit.tensors]).sum(dim=0)
        return torch.cat([along.new_zeros(1), along])

    def _directions(self, tensor: str) -> list[Direction]:
        target, model = self.target, self.target.base.name
        before = f"{target.base.architecture.family.blocks}."
        after = tensor.removeprefix(f"{before}{target.first}")
        layers = [Copy(model, f"{before}{target.first + k}{after}") for k in range(target.n_steps + 1)]
        return [Direction(layers[0], layer) for layer in layers[1:]]

    def _batch(self, streams: Mapping[str, Iterator[int]]) -> dict[str, list[int]]:
        sizes = self.search.scorer.sizes
        return {name: sorted(next(stream) for _ in range(min(BATCH, sizes[name]))) for name, stream in streams.items()}

    def _endless(self, name: str) -> Iterator[int]:
        order = normal(self.search.scorer.sizes[name], self.search.config.seed, "gradient", name).argsort().tolist()
        while True:
            yield from order

    # What they share

    def _numbered(self, points: Sequence[Sequence[float]]) -> list[tuple[str, Alphas]]:
        clipped = [tuple(min(1.0, max(0.0, float(x))) for x in point) for point in points]
        return [(str(index), alphas) for index, alphas in enumerate(clipped, 1)]

    def _seed(self, address: str) -> int:
        return int(normal(1, self.search.config.seed, address).abs().item() * 2**20)


def load_optuna() -> Any:
    """The library of Bayesian optimisation. Raises InputError where it is not installed."""
    try:
        import optuna
    except ImportError as error:
        raise InputError("method bayes: needs optuna, which is not installed; pip install 'olmfast[bayes]'") from error
    return optuna


def _logit(alpha: float) -> float:
    inside = min(1 - EDGE, max(EDGE, alpha))
    return math.log(inside / (1 - inside))
