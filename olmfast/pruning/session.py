"""A search from beginning to end: recorded, resumed, its result scored beside what needs no search, and written."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from olmfast.config.resources import Budget
from olmfast.config.run import RunConfig
from olmfast.evaluation.mmlu import Subject
from olmfast.evaluation.open import Evaluation, Questions, Settings, order_of_tensors
from olmfast.observer import Observer
from olmfast.output.card import merge_card
from olmfast.output.folder import check_space
from olmfast.output.writer import Content, write_folder, write_text, writing
from olmfast.pruning import alphas as files
from olmfast.pruning.closing import Asked, Closing
from olmfast.pruning.depths import Depths
from olmfast.pruning.joint import JointSearch
from olmfast.pruning.questions import Divided
from olmfast.pruning.searches import Alphas, AlphaSearch, load_optuna
from olmfast.pruning.target import Target
from olmfast.report.write import write_report
from olmfast.runs.answers import answered
from olmfast.runs.benchmarks import write_results
from olmfast.runs.folder import RunFolder, told_failures
from olmfast.runs.inputs import Inputs
from olmfast.runs.mmlu import RESULTS, Board, score_mmlu
from olmfast.runs.scoreboard import Scoreboard
from olmfast.runs.trackers import load_tracker
from olmfast.runs.tracking import tracked
from olmfast.runs.verdict import HELD_OUT, SELECTION
from olmfast.search.log import strict
from olmfast.search.loop import BudgetSpent, Search
from olmfast.search.ranking import Rules
from olmfast.search.record import Record
from olmfast.weights.recipe import Recipe

DEFAULT_BUDGET = Budget(evaluations=100)
FLAT = 0.6225  # every alpha at the start, where no file gives them: what similarity makes of equal layers
WHOLE, RESULT, JOINT = "original", "searched", "joint"
ORDER = (WHOLE, "drop", "uniform", "file", "similarity")  # of the closing table; what was searched comes last


@dataclass(frozen=True)
class Searched:
    """A finished (or, with a budget, stopped) search: where its result is, its alphas, and how models compare.

    `front` maps a number of layers to the best model of a joint search that has so many. `closing` is None in a report
    that an older version wrote.
    """

    output_dir: Path
    status: str
    alphas: Alphas
    selection: Scoreboard
    holdout: Scoreboard
    mmlu: Mapping[str, Any] | None
    front: Mapping[str, Any]
    closing: Closing | None

    @classmethod
    def of(cls, record: Record, output: Path) -> Searched:
        """What a record says."""
        values = record.values
        selection, holdout = (Scoreboard.from_json(values[name]) for name in ("selection", "holdout"))
        pruned = values["pruned"]
        told = values.get("closing")
        closing = told and Closing.from_json(told, holdout if told["held_out"] else selection)
        rest = (values.get("mmlu"), pruned.get("front", {}), closing)
        return cls(output, record.status, tuple(pruned["alphas"]), selection, holdout, *rest)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        told: dict[str, Any] = {"output_dir": str(self.output_dir), "status": self.status, "alphas": list(self.alphas)}
        told |= {} if self.closing is None else {"closing": self.closing.to_json()}
        boards = {"selection": self.selection.to_json(), "holdout": self.holdout.to_json()}
        return strict({**told, **boards, **({} if self.mmlu is None else {"mmlu": self.mmlu})})  # type: ignore[no-any-return]


@dataclass(frozen=True)
class Measured:
    """What the whole model's activations say: the alphas of similarity, where questions are enough, and how much each
    layer changes of what enters it."""

    alphas: Sequence[float] | None
    influence: Sequence[float]


Measure = Callable[[Questions], Measured]


def search(
    config: RunConfig,
    models: Target | Depths,
    subjects: Sequence[Subject] | None,
    measure: Measure,
    *,
    resume: bool,
    overwrite: bool,
    command: str,
    observer: Observer,
    stop_requested: Callable[[], bool],
) -> Searched:
    """Search the alphas of a target, or which layers go, and write the model that they make, or go on with a search
    that was begun.

    `measure` is asked once, on the questions that decide; `subjects` are those of MMLU that the result is scored on.
    Raises what `run` raises.
    """
    if config.prune is not None and config.prune.way == "bayes":
        load_optuna()
    load_tracker(config.track)
    config = config if config.budget is not None else config.model_copy(update={"budget": DEFAULT_BUDGET})
    limits = {key: getattr(config, key) for key in ("batch_tokens", "max_ram", "max_vram", "scorer")}
    settings = Settings.of(config.device, config.dtype, **limits)
    divided = Divided.load(config, models.base)
    order = order_of_tensors(models.example, models.pool, settings)
    check_space(config.output_dir, models.base.n_bytes)
    models.pool.check_finite()
    folder = RunFolder(config.output_dir, resume=resume, overwrite=overwrite)
    folder.check_apart(_read(config, models))
    for note in models.notes:
        observer.note(note)
    for name, (decide, held) in divided.sizes().items():
        observer.note(f"{name}: {decide} questions decide, {held} are held out")
    every = Questions(divided.selection.tokenizer, (), {**divided.holdout.datasets, **divided.selection.datasets})
    header = _header(Inputs(config, models.pool, every, settings, order), divided)
    with told_failures(folder.partial), folder.locked(header, models.pool) as record:
        if record.status != "finished":
            with tracked(config, record, observer) as told:
                watched = _Watched(config, divided, settings, order, record, told, stop_requested)
                session = (
                    _AlphaSession(watched, models) if isinstance(models, Target) else _JointSession(watched, models)
                )
                status = session.search(measure)
                session.write(subjects, command)
            record.update(status=status)
        if record.folder != folder.output:
            write_report(record, observer)
        folder.publish(record)
    return Searched.of(Record.load(config.output_dir), config.output_dir)


@dataclass(frozen=True)
class _Watched:
    """What every session needs beside its models."""

    config: RunConfig
    divided: Divided
    settings: Settings
    order: tuple[str, ...]
    record: Record
    observer: Observer
    stop_requested: Callable[[], bool]


class _Session(ABC):
    """One process's share of a search."""

    models: Target | Depths

    def __init__(self, watched: _Watched) -> None:
        self.watched, self.config, self.record = watched, watched.config, watched.record
        self.observer = watched.observer

    def search(self, measure: Measure) -> str:
        """Walk the rounds; returns `finished`, or `stopped` when the budget is spent."""
        if "measured" not in self.record.values:
            found = measure(self.watched.divided.selection)
            alphas = None if found.alphas is None else list(found.alphas)
            self.record.update(measured={"alphas": alphas, "influence": list(found.influence)})
        try:
            self.run(Measured(**self.record.values["measured"]))
        except BudgetSpent:
            return "finished" if self.config.budget == DEFAULT_BUDGET else "stopped"
        return "finished"

    def begin(self, start: Recipe) -> Search:
        """The search, at the recipe that it starts from or has come to."""
        watched, recipe = self.watched, self.record.recipe or start
        self.evaluation = Evaluation(recipe, self.models.pool, watched.settings, self.record.folder)
        scorer = self.evaluation.scorer(watched.divided.selection, self.observer.candidate, self.observer.note)
        rules, sources = Rules("mean", 0.0, None, {}), self.evaluation.sources
        rest = (scorer, self.record, rules, self.observer, watched.stop_requested)
        return Search(self.config, recipe, watched.order, sources, *rest)

    @abstractmethod
    def run(self, measured: Measured) -> None:
        """Search. Raises BudgetSpent."""

    @property
    @abstractmethod
    def rows(self) -> dict[str, Recipe]:
        """Models that need no search, by name, and the result as the last."""

    @property
    @abstractmethod
    def told(self) -> dict[str, Any]:
        """What the report says of the result."""

    def texts(self) -> dict[str, str]:
        """Files of the result that say what it is."""
        return {}

    def write(self, subjects: Sequence[Subject] | None, command: str) -> None:
        """Score the result beside models that need no search, and write it."""
        models, record, divided = self.models, self.record, self.watched.divided
        known = {WHOLE: models.whole, **self.rows}
        recipe = list(known.values())[-1]
        rows: dict[str, Recipe | None] = {name: known[name] for name in sorted(known, key=_place)}
        boards = {}
        for part, questions in (("selection", divided.selection), ("holdout", divided.holdout)):
            boards[part] = Scoreboard([WHOLE])
            if questions.datasets:
                self.observer.step(part, "result", len(rows))
                scorer = self.evaluation.scorer(questions, self.observer.candidate)
                boards[part].score(scorer, rows, list(questions.datasets), models.pool)
        held_out = bool(divided.holdout.datasets)
        told_by = boards["holdout" if held_out else "selection"]
        questions = divided.holdout if held_out else divided.selection
        asked = Asked.load(self.config, models.base, questions, held_out)
        closing = Closing.score(told_by, asked, self.evaluation, rows)
        compared, kind = {list(known)[-1]: recipe, WHOLE: models.whole}, HELD_OUT if held_out else SELECTION
        answers = answered(self.evaluation, questions, kind, told_by, compared, self.config.answers)
        content, mmlu, texts = models.content(recipe), {}, self.texts()
        if subjects is not None:
            board = self._mmlu(recipe, subjects)
            texts[RESULTS] = json.dumps(strict(board.results()), indent=2) + "\n"
            mmlu = {"mmlu": board.to_json()}
        self._write_folder(replace(content, texts=texts), command)
        write_results(record.folder, self.config.benchmarks, self.config.holdout, boards["holdout"], list(known)[-1])
        account = content.account()
        told = {"pruned": self.told, "account": account, **{part: own.to_json() for part, own in boards.items()}}
        told |= {"answers": answers, "closing": closing.to_json()}
        record.update(recipe, **told, **mmlu)

    def _mmlu(self, recipe: Recipe, subjects: Sequence[Subject]) -> Board:
        self.evaluation.model.set_recipe(recipe)
        assert self.config.prune is not None
        shots, label = self.config.prune.ntrain, str(self.config.output_dir)
        return score_mmlu(label, self.evaluation, subjects, shots, self.observer.candidate)

    def _write_folder(self, content: Content, command: str) -> None:
        pool, folder = self.models.pool, self.record.folder
        assert self.config.prune is not None
        title = f"pruned by {self.config.prune.way}"
        card = merge_card(pool.names, pool.made_of(pool.names), title, command, content.account(), [self.note])
        with writing(folder, "--resume"):
            write_folder(content, self.evaluation.sources, folder, self.config.shard_size)
            write_text(folder / "README.md", card)

    @property
    @abstractmethod
    def note(self) -> str:
        """What the card says was done."""


class _AlphaSession(_Session):
    """A search of the alphas of a run of layers."""

    def __init__(self, watched: _Watched, target: Target) -> None:
        super().__init__(watched)
        self.models: Target = target
        self.target = target

    def run(self, measured: Measured) -> None:
        """See `_Session.run`."""
        target, n = self.target, self.target.n_steps
        self.starts: dict[str, Alphas] = {
            "uniform": tuple(files.alphas_of([1 / (n + 1)] * (n + 1))),
            "drop": (1.0,) * n,
        }
        if measured.alphas is not None:
            self.starts["similarity"] = tuple(measured.alphas)
        self.start = tuple(target.given or measured.alphas or (FLAT,) * n)
        search = self.begin(target.recipe(files.weights_of(self.start)))
        self.found = AlphaSearch(search, target, self.start)
        self.found.run(target.pruning.way, {name: own for name, own in self.starts.items() if own != self.start})

    @property
    def rows(self) -> dict[str, Recipe]:
        """See `_Session.rows`."""
        named = {**self.starts, **({"file": self.start} if self.target.given is not None else {})}
        named[RESULT] = self.found.best
        return {name: self.target.recipe(files.weights_of(own)) for name, own in named.items()}

    @property
    def told(self) -> dict[str, Any]:
        """See `_Session.told`."""
        told = {"first": self.target.first, "steps": self.target.n_steps, "alphas": list(self.found.best)}
        return {**told, "method": self.target.pruning.way, "objective": self.found.value}

    def texts(self) -> dict[str, str]:
        """See `_Session.texts`."""
        return {files.ALPHAS: files.to_json(self.target.first, self.found.best)}

    @property
    def note(self) -> str:
        """See `_Session.note`."""
        first, last = self.target.first, self.target.first + self.target.n_steps
        return f"Layers {first} to {last} became layer {first}"


class _JointSession(_Session):
    """A search of which layers go, and of what those that stay are blended."""

    def __init__(self, watched: _Watched, depths: Depths) -> None:
        super().__init__(watched)
        self.models: Depths = depths
        self.depths = depths

    def run(self, measured: Measured) -> None:
        """See `_Session.run`."""
        depths, n = self.depths, self.depths.n_steps
        given = {
            "similarity": depths.run(files.weights_of(measured.alphas or (FLAT,) * n)),
            "uniform": depths.run([1 / (n + 1)] * (n + 1)),
            "drop": depths.run([1.0, *[0.0] * n]),
        }
        if depths.given is not None:
            given["file"] = depths.run(files.weights_of(depths.given))
        start = given.get("file", given["similarity"])
        search = self.begin(depths.recipe(start))
        self.found = JointSearch(search, depths, measured.influence, start)
        self.starts = self.found.starts(given)
        self.found.run({name: point for name, point in given.items() if point != start})

    @property
    def rows(self) -> dict[str, Recipe]:
        """See `_Session.rows`."""
        return {name: self.depths.recipe(point) for name, point in {**self.starts, JOINT: self.found.best}.items()}

    @property
    def told(self) -> dict[str, Any]:
        """See `_Session.told`."""
        front = {
            str(self.depths.n_blocks - n): {
                "objective": value,
                **point.to_json(),
                "recipe": self.depths.recipe(point).to_json(),
            }
            for n, (point, value) in sorted(self.found.front.items())
        }
        told = {"method": JOINT, "objective": self.found.value, **self.found.best.to_json(), "alphas": []}
        return {**told, "front": front}

    @property
    def note(self) -> str:
        """See `_Session.note`."""
        gone = ", ".join(map(str, self.found.best.gone))
        return f"Layers {gone} of {self.depths.n_blocks} went into those below them"


def _place(name: str) -> int:
    return {**{name: place for place, name in enumerate(ORDER)}, RESULT: 9, JOINT: 9}.get(name, len(ORDER))


def _header(inputs: Inputs, divided: Divided) -> dict[str, Any]:
    """What identifies the search: that of a run, the division of the questions, and the optimiser's version."""
    header = inputs.header()
    assert inputs.config.prune is not None
    used = {"cma": ["cmaes"], "joint": ["cmaes"], "bayes": ["optuna"]}.get(inputs.config.prune.way, [])
    header["environment"] |= {name: version(name) for name in used}
    header["samples"] = {name: list(sizes) for name, sizes in divided.sizes().items()}
    return header


def _read(config: RunConfig, models: Target | Depths) -> dict[str, list[Path]]:
    """What is read: what each is called -> its paths."""
    assert config.prune is not None
    read = {f"the model {donor.name}": list(donor.paths) for donor in models.pool}
    read["the datasets"] = [entry.path(config.dataset_dir, name) for name, entry in config.questions.items()]
    places = (config.prune.alphas_file, config.prune.data_dir)
    return read | {"what is pruned by": [place for place in places if place is not None]}
