"""A worker: one process with a live model of its own, which does errands for the driver of a run.

Nothing here knows of Ray. A worker is told what has changed since its last errand together with the next one, so that
it is in step whenever it computes, and needs no message when it does not.
"""

from __future__ import annotations

import os
import socket
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from olmfast.cluster.donors import Described, Shelf
from olmfast.errors import OlmfastError
from olmfast.evaluation.batched import BatchedScorer
from olmfast.evaluation.memory import Shares
from olmfast.evaluation.open import Evaluation, Questions, Settings, environment
from olmfast.evaluation.planning import Call, Way, Work
from olmfast.evaluation.scorer import Candidate, Direction, Scorer, Slopes
from olmfast.evaluation.scores import Scores
from olmfast.evaluation.trajectories import Expected, Generated
from olmfast.weights.digests import Digests
from olmfast.weights.expressions import Stored
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression, leaves

Method = Callable[..., Any]


@dataclass(frozen=True)
class Opening:
    """What a worker has to know before its first errand.

    `folder` is where the run stores tensors, `digests` those of tensors that the driver knows; `threads` is the number
    that the driver computes with.
    """

    donors: tuple[Described, ...]
    settings: Settings
    folder: Path
    digests: Digests
    threads: int


@dataclass(frozen=True)
class Report:
    """What a worker says of itself: `missing` are donors that it has to be sent, `sees_folder` whether it can read the
    tensors that the run has stored."""

    host: str
    environment: dict[str, Any]
    missing: tuple[str, ...]
    sees_folder: bool


@dataclass(frozen=True)
class News:
    """What has changed since a worker's last errand.

    `recipe` holds the tensors whose expressions changed, or all where it `is_whole`, and `files` the stored ones among
    these where the worker cannot read the run's folder: name -> bytes. `expected`: see `Trajectories.expect`.
    """

    recipe: Recipe | None = None
    is_whole: bool = False
    files: Mapping[str, bytes] | None = None
    expected: Expected | None = None
    closed: tuple[int, ...] = ()  # scorers that nobody will ask any more


class Asked(NamedTuple):
    """Which scorer an errand is for, and the shares of memory that all have agreed on, where they have."""

    scorer: int
    shares: Shares | None


@dataclass(frozen=True)
class Worked:
    """What came of a Work: the scores of its rows on `samples` (indices per dataset), and what was generated."""

    scores: Scores
    samples: dict[str, list[int]]
    generated: Generated


class Worker:
    """See the module. `open` is called first, then `receive` and `build`, then `errand`."""

    def __init__(self) -> None:
        # Ray lets a worker import from the driver's working folder; what lies there has nothing to do with it.
        sys.path[:] = [place for place in sys.path if place not in ("", os.getcwd())]
        self._scorers: dict[int, Scorer] = {}
        self._questions: dict[Scorer, Questions] = {}

    def open(self, opening: Opening) -> Report:
        """Look for the donors."""
        import transformers

        transformers.logging.set_verbosity_error()
        transformers.logging.disable_progress_bar()
        torch.set_num_threads(opening.threads)
        self.settings, self._folder = opening.settings, opening.folder
        if self.settings.device.type == "cuda":  # the one that it was given, whatever the driver's has for a number
            self.settings = replace(self.settings, device=torch.device("cuda"))
        sees_folder = opening.folder.is_dir()
        if not sees_folder:
            self._scratch = tempfile.TemporaryDirectory(prefix="olmfast-")
            self._folder = Path(self._scratch.name)
        self._shelf = Shelf(opening.donors, opening.digests)
        missing = tuple(self._shelf.missing())
        return Report(socket.gethostname(), surroundings(self.settings), missing, sees_folder)

    def receive(self, donor: str, part: int, file: str, data: bytes) -> None:
        """More bytes of a file of a missing donor's."""
        self._shelf.receive(donor, part, file, data)

    def build(self, recipe: Recipe, files: Mapping[str, bytes]) -> None:
        """Build the model. Raises OlmfastError for donors that are others than the driver's."""
        self._keep(files)
        self.evaluation = Evaluation(recipe, self._shelf.pool(), self.settings, self._folder)

    def errand(self, news: News, asked: Asked, questions: Questions | None, method: str, *args: Any) -> Any:
        """Learn the news, and then do what is asked; `questions` come with the first errand for a scorer."""
        for number in news.closed:
            if number in self._scorers:
                del self._questions[self._scorers.pop(number)]
        if news.recipe is not None:
            self._keep(news.files or {})
            model, told = self.evaluation.model, news.recipe
            model.set_recipe(told if news.is_whole else model.recipe.with_values(told.tensors))
        if questions is not None:
            self._scorers[asked.scorer] = self.evaluation.scorer(questions)
            self._questions[self._scorers[asked.scorer]] = questions
        scorer = self._scorers[asked.scorer]
        if isinstance(scorer, BatchedScorer):
            if asked.shares is not None and not scorer.shares.agreed:
                scorer.agree(asked.shares)
            if news.expected:
                scorer.trajectories.expect(news.expected)
        return getattr(self, method)(scorer, *args)

    # Errands

    def shares(self, scorer: Scorer) -> Shares | None:
        """What this worker's memory would have the work split into."""
        return scorer.shares if isinstance(scorer, BatchedScorer) else None

    def together(self, scorer: Scorer, call: Call, rows: Sequence[int]) -> list[tuple[tuple[int, ...], Way]]:
        """See `Planner.together`."""
        assert isinstance(scorer, BatchedScorer)
        scorer.begin()
        return scorer.together(call, rows)

    @torch.inference_mode()
    def score(self, scorer: Scorer, call: Call, work: Work) -> Worked:
        """Do some work of a call."""
        if not isinstance(scorer, BatchedScorer):
            (row,) = work.rows
            found = scorer.score(call.unit, [call.candidates[row]], list(call.wanted), call.wanted)
            return Worked(found.at(call.wanted), dict(call.wanted), {})
        scorer.begin()
        scores = Scores.empty(len(call.candidates), {name: scorer.datasets[name] for name in call.wanted}, scorer.dtype)
        scorer.carry_out(call, [work], scores)
        samples = dict(call.wanted)
        if work.way != "apart":
            samples = {}
            for number in (number for part in work.parts for batch in part for number in batch):
                task = scorer.trajectories.tasks[number]
                samples.setdefault(task.name, []).append(task.index)
        return Worked(scores.rows(work.rows).at(samples), samples, scorer.trajectories.hand_over())

    def slopes(
        self,
        scorer: Scorer,
        candidate: Candidate,
        directions: Mapping[str, Sequence[Direction]],
        samples: Mapping[str, Sequence[int]],
        weights: Mapping[str, float],
        teachers: Mapping[str, Candidate],
    ) -> Slopes:
        """See `Scorer.slopes`."""
        return scorer.slopes(candidate, directions, samples, weights, teachers)

    def value(self, scorer: Scorer, expression: Expression) -> torch.Tensor:
        """See `Scorer.value`."""
        return scorer.value(expression)

    def replies(
        self, scorer: Scorer, candidate: Candidate, chosen: Mapping[str, Sequence[int]]
    ) -> dict[str, list[str]]:
        """See `Evaluation.replies`: to the scorer's questions."""
        return self.evaluation.replies(candidate, self._questions[scorer], chosen)

    def _keep(self, files: Mapping[str, bytes]) -> None:
        for name, data in files.items():
            path = self._folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def surroundings(settings: Settings) -> dict[str, Any]:
    """What a process's scores depend on besides what it was told."""
    return {**environment(settings), "processor": torch.backends.cpu.get_cpu_capability()}


def news_of(before: Recipe | None, after: Recipe) -> News:
    """What a worker whose model is `before` has to be told."""
    if before is after:
        return News()
    if before is None or (before.base, before.config_edits, set(before.tensors)) != (
        after.base,
        after.config_edits,
        set(after.tensors),
    ):
        return News(after, is_whole=True)
    changed = {name: value for name, value in after.tensors.items() if before.tensors[name] != value}
    return News(Recipe(after.base, changed, after.config_edits))


def stored_files(recipe: Recipe, folder: Path) -> dict[str, bytes]:
    """The files of a run's folder that a recipe's expressions are made of, with their bytes."""
    names = {leaf.file for value in recipe.tensors.values() for leaf in leaves(value) if isinstance(leaf, Stored)}
    try:
        return {name: (folder / name).read_bytes() for name in sorted(names)}
    except OSError as error:
        raise OlmfastError(f"{error.filename}: {error.strerror}; it holds a tensor that the run has refined") from error
