"""The Scorer of a run with workers: the decisions are made here, what they need is computed by the crew."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from olmfast.cluster.crew import Crew, Desk, Errand, Fleet
from olmfast.cluster.donors import Described
from olmfast.cluster.worker import Opening, Worked, surroundings
from olmfast.evaluation.memory import Shares
from olmfast.evaluation.open import Questions, Settings
from olmfast.evaluation.planning import Call, Planner, Way, Work
from olmfast.evaluation.scorer import Candidate, Direction, Slopes
from olmfast.evaluation.scores import Scores, wanted_samples
from olmfast.evaluation.trajectories import Trajectories
from olmfast.weights.architecture import Architecture, Unit
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression, Sources

AT_ONCE = 3, 4  # of the parts that are a worker's by right, this share is one errand; the others are single ones
Answer = TypeVar("Answer")


class ClusterEvaluation:
    """An `Evaluation` whose models are the workers'; this process has none."""

    def __init__(
        self,
        fleet: Fleet,
        n: int,
        recipe: Recipe,
        pool: Pool,
        settings: Settings,
        folder: Path,
        note: Callable[[str], None],
    ) -> None:
        """Start n workers; `folder` is where tensors that the recipe stores lie."""
        self.settings, self.sources = settings, Sources(pool, folder)
        try:
            donors = tuple(Described.of(donor) for donor in pool)
            opening = Opening(donors, settings, folder.absolute(), pool.digests.known, torch.get_num_threads())
            self.crew = Crew(fleet, n, opening, recipe, surroundings(settings), note)
        except BaseException:
            fleet.close()
            raise
        self._n_scorers = 0

    @property
    def recipe(self) -> Recipe:
        """What the live models are."""
        return self.crew.recipe

    def scorer(
        self,
        questions: Questions,
        progress: Callable[[str], None] = lambda _: None,
        note: Callable[[str], None] = lambda _: None,  # noqa: ARG002 (what a scorer notes, each worker's would)
    ) -> ClusterScorer:
        """See `Evaluation.scorer`."""
        self._n_scorers += 1
        return ClusterScorer(self, questions, self._n_scorers, progress)

    def replies(
        self, candidate: Candidate, questions: Questions, chosen: Mapping[str, Sequence[int]]
    ) -> dict[str, list[str]]:
        """See `Evaluation.replies`."""
        found: dict[str, list[str]] = self.scorer(questions)._ask("replies", candidate, chosen)
        return found

    def close(self) -> None:
        """End the workers."""
        self.crew.close()


class ClusterScorer(Planner):
    """The scores of the Scorer that each worker has, byte for byte: a part of the questions is computed alike whoever
    does it."""

    def __init__(
        self, evaluation: ClusterEvaluation, questions: Questions, number: int, progress: Callable[[str], None]
    ) -> None:
        settings, self.crew = evaluation.settings, evaluation.crew
        self.pool, self.is_plain = evaluation.sources.pool, settings.scorer == "sequential"
        context = self.architecture.context
        shares = Shares(0, settings.batch_tokens, settings.batch_tokens)
        trajectories = Trajectories(
            questions.datasets, context, questions.tokenizer, questions.stop_tokens, shares, settings.parts
        )
        super().__init__(trajectories, settings.dtype, progress)
        self.desk = Desk(number, self.crew.fleet.share(questions), lambda: trajectories.expected)
        weakref.finalize(self, self.crew.close_desk, number)
        if not self.is_plain:
            found = self.crew.everywhere(self.desk, "shares") or [self._ask("shares")]
            self.desk.shares = Shares.agreed_by(found)
            shares.take(self.desk.shares)
        trajectories.arrange(set(questions.datasets))

    @property
    def architecture(self) -> Architecture:
        """See `Planner.architecture`."""
        return self.pool.architecture.edited(self.crew.recipe.config_edits)

    @property
    def state(self) -> Mapping[str, Any]:
        """See `Scorer.state`."""
        return {} if self.is_plain else self.trajectories.state

    @state.setter
    def state(self, state: Mapping[str, Any]) -> None:
        self.trajectories.state = state

    def score(
        self,
        unit: Unit,
        candidates: Sequence[Candidate],
        datasets: Sequence[str] | None = None,
        samples: Mapping[str, Sequence[int]] | None = None,
    ) -> Scores:
        """See `Scorer.score`."""
        if not self.is_plain:
            return super().score(unit, candidates, datasets, samples)
        wanted = wanted_samples(self.datasets, datasets, samples)
        scores = Scores.empty(len(candidates), {name: self.datasets[name] for name in wanted}, self.dtype)
        works = [Work((row,), "apart", ()) for row in range(len(candidates))]
        self.carry_out(Call(unit, tuple(candidates), wanted), works, scores)
        return scores

    def begin(self) -> None:
        """See `Planner.begin`: workers begin by themselves."""

    def together(self, call: Call, rows: Sequence[int]) -> list[tuple[tuple[int, ...], Way]]:
        """See `Planner.together`: what a module's parts can do, a worker knows."""
        found: list[tuple[tuple[int, ...], Way]] = self._ask("together", self.crew.fleet.share(call), list(rows))
        return found

    def carry_out(self, call: Call, works: Sequence[Work], scores: Scores) -> None:
        """See `Planner.carry_out`: errands for all workers."""
        shared = self.crew.fleet.share(call)
        left = [0] * len(works)
        errands: list[Errand] = []

        def errand(at: int, parts: tuple[Any, ...], owner: int | None) -> Errand:
            work = Work(works[at].rows, works[at].way, parts)

            def done(worked: Worked) -> None:
                scores.enter(work.rows, worked.samples, worked.scores)
                self.trajectories.take_over(worked.generated)
                left[at] -= 1
                if not left[at]:
                    self.tell(call, work.rows)

            left[at] += 1
            size = max(1, sum(map(len, parts))) * len(work.rows)
            return Errand("score", (shared, work), done, owner, size=size)

        n = max(1, len(self.crew.members))
        alone = [at for at, work in enumerate(works) if work.way == "alone"]
        undivided = {
            *alone[: len(alone) - len(alone) % n],
            *(at for at, work in enumerate(works) if work.way == "apart"),
        }
        for at, work in enumerate(works):
            if at in undivided:
                errands.append(errand(at, work.parts, None))
        for at, work in enumerate(works):
            if at not in undivided:
                errands += [errand(at, parts, owner) for owner, parts in _shared_out(work.parts, n)]
            if not left[at]:  # no question is asked
                self.tell(call, work.rows)
        self.crew.do(self.desk, errands)

    def slopes(
        self,
        candidate: Candidate,
        directions: Mapping[str, Sequence[Direction]],
        samples: Mapping[str, Sequence[int]],
        weights: Mapping[str, float],
        teachers: Mapping[str, Candidate],
    ) -> Slopes:
        """See `Scorer.slopes`: one worker's errand, beside which others may do others'."""
        found: Slopes = self._ask("slopes", candidate, directions, samples, weights, teachers)
        return found

    def value(self, expression: Expression) -> torch.Tensor:
        """See `Scorer.value`."""
        found: torch.Tensor = self._ask("value", expression)
        return found

    def commit(self, recipe: Recipe, label: str | None = None) -> None:
        """See `Scorer.commit`."""
        self.crew.commit(recipe)
        self.trajectories.commit(label)

    def side_by_side(self, jobs: Sequence[Callable[[], Answer]]) -> list[Answer]:
        """What jobs return that ask for slopes, one call after another: each has a worker of its own meanwhile."""
        found: dict[int, Answer] = {}
        failed: list[BaseException] = []

        def run(number: int) -> None:
            try:
                found[number] = jobs[number]()
            except BaseException as error:  # raised below
                failed.append(error)

        threads = [threading.Thread(target=run, args=(number,), daemon=True) for number in range(len(jobs))]
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads) and not failed:
            for thread in threads:
                thread.join(0.05)  # short, so that Ctrl-C is heard
        if failed:
            raise failed[0]
        return [found[number] for number in range(len(jobs))]

    def _ask(self, method: str, *args: Any) -> Any:
        found: list[Any] = []
        self.crew.do(self.desk, [Errand(method, args, found.append)])
        return found[0]


def _shared_out(parts: tuple[Any, ...], n: int) -> list[tuple[int, tuple[Any, ...]]]:
    """Parts for n workers, who come back to the same ones call after call and so keep what enters a block of them: most
    of a worker's at once, the others singly, so that who is done first can help."""
    found: list[tuple[int, tuple[Any, ...]]] = []
    bounds = [len(parts) * i // n for i in range(n + 1)]
    for owner in range(n):
        own = parts[bounds[owner] : bounds[owner + 1]]
        n_first = -(-len(own) * AT_ONCE[0] // AT_ONCE[1])
        found += [(owner, own[:n_first])] if n_first else []
        found += [(owner, (part,)) for part in own[n_first:]]
    return found
