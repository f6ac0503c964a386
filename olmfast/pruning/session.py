"""A search of alphas from beginning to end: recorded, resumed, its result written, and scored beside other alphas."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from olmfast.config.run import Budget, RunConfig
from olmfast.evaluation.mmlu import Subject
from olmfast.evaluation.open import Evaluation, Questions, Settings, order_of_tensors
from olmfast.observer import Observer
from olmfast.output.card import merge_card
from olmfast.output.folder import check_space
from olmfast.output.writer import Content, write_folder, write_text, writing
from olmfast.pruning import alphas as files
from olmfast.pruning.questions import Divided
from olmfast.pruning.searches import Alphas, AlphaSearch, load_optuna
from olmfast.pruning.target import Target
from olmfast.runs.folder import RunFolder, told_failures
from olmfast.runs.inputs import Inputs
from olmfast.runs.mmlu import RESULTS, Board, score_mmlu
from olmfast.runs.scoreboard import Scoreboard
from olmfast.search.log import strict
from olmfast.search.loop import BudgetSpent, Search
from olmfast.search.ranking import Rules
from olmfast.search.record import Record
from olmfast.weights.recipe import Recipe

DEFAULT_BUDGET = Budget(evaluations=100)
FLAT = 0.6225  # every alpha at the start, where no file gives them: what similarity makes of equal layers
WHOLE, RESULT = "original", "searched"


@dataclass(frozen=True)
class Searched:
    """A finished (or, with a budget, stopped) search: where its result is, its alphas, and how models compare."""

    output_dir: Path
    status: str
    alphas: Alphas
    selection: Scoreboard
    holdout: Scoreboard
    mmlu: Mapping[str, Any] | None

    @classmethod
    def of(cls, record: Record, output: Path) -> Searched:
        """What a record says."""
        values = record.values
        selection, holdout = (Scoreboard.from_json(values[name]) for name in ("selection", "holdout"))
        return cls(output, record.status, tuple(values["pruned"]["alphas"]), selection, holdout, values.get("mmlu"))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        told = {"output_dir": str(self.output_dir), "status": self.status, "alphas": list(self.alphas)}
        boards = {"selection": self.selection.to_json(), "holdout": self.holdout.to_json()}
        return strict({**told, **boards, **({} if self.mmlu is None else {"mmlu": self.mmlu})})  # type: ignore[no-any-return]


def search_alphas(
    config: RunConfig,
    target: Target,
    subjects: Sequence[Subject] | None,
    similarity: Callable[[Questions], Alphas | None],
    *,
    resume: bool,
    overwrite: bool,
    command: str,
    observer: Observer,
    stop_requested: Callable[[], bool],
) -> Searched:
    """Search the alphas of a target and write the model that they make, or go on with a search that was begun.

    `similarity` gives the alphas of similarity on the questions that decide, where there are enough of them;
    `subjects` are those of MMLU that the result is scored on. Raises what `run` raises.
    """
    if target.pruning.way == "bayes":
        load_optuna()
    config = config if config.budget is not None else config.model_copy(update={"budget": DEFAULT_BUDGET})
    limits = {key: getattr(config, key) for key in ("batch_tokens", "max_ram", "max_vram", "scorer")}
    settings = Settings.of(config.device, config.dtype, **limits)
    divided = Divided.load(config, target.base)
    order = order_of_tensors(target.recipe(files.weights_of((FLAT,) * target.n_steps)), target.pool, settings)
    check_space(config.output_dir, target.base.n_bytes)
    target.pool.check_finite()
    folder = RunFolder(config.output_dir, resume=resume, overwrite=overwrite)
    read = {"the model": target.base.paths, "the datasets": _files(config)}
    folder.check_apart(read | {"the alpha file": [p] if (p := target.pruning.alphas_file) else []})
    for name, (decide, held) in divided.sizes().items():
        observer.note(f"{name}: {decide} questions decide, {held} are held out")
    every = Questions(divided.selection.tokenizer, (), {**divided.holdout.datasets, **divided.selection.datasets})
    header = _header(Inputs(config, target.pool, every, settings, order), target, divided)
    with folder.locked(header, target.pool) as record, told_failures(folder.partial):
        if record.status != "finished":
            session = _Session(config, target, divided, settings, order, record, observer, stop_requested)
            status = session.search(similarity)
            session.write(subjects, command)
            record.update(status=status)
        folder.publish(record)
    return Searched.of(Record.load(config.output_dir), config.output_dir)


class _Session:
    """One process's share of a search."""

    def __init__(
        self,
        config: RunConfig,
        target: Target,
        divided: Divided,
        settings: Settings,
        order: tuple[str, ...],
        record: Record,
        observer: Observer,
        stop_requested: Callable[[], bool],
    ) -> None:
        self.config, self.target, self.divided, self.settings = config, target, divided, settings
        self.order, self.record, self.observer, self.stop_requested = order, record, observer, stop_requested

    def search(self, similarity: Callable[[Questions], Alphas | None]) -> str:
        """Walk the rounds; returns `finished`, or `stopped` when the budget is spent."""
        target, n = self.target, self.target.n_steps
        if "starts" not in self.record.values:
            starts = {"uniform": files.alphas_of([1 / (n + 1)] * (n + 1)), "drop": [1.0] * n}
            by_similarity = similarity(self.divided.selection)
            if by_similarity is not None:
                starts["similarity"] = list(by_similarity)
            self.record.update(starts=starts)
        self.starts: dict[str, Alphas] = {name: tuple(own) for name, own in self.record.values["starts"].items()}
        start = target.given or self.starts.get("similarity") or (FLAT,) * n
        self.start = tuple(start)
        recipe = self.record.recipe or target.recipe(files.weights_of(start))
        self.evaluation = Evaluation(recipe, target.pool, self.settings, self.record.folder)
        scorer = self.evaluation.scorer(self.divided.selection, self.observer.candidate, self.observer.note)
        rules = Rules("mean", 0.0, None, {})
        self.search_ = Search(
            self.config, recipe, self.order, self.evaluation.sources, scorer, self.record, rules, self.observer,
            self.stop_requested,
        )  # fmt: skip
        self.found = AlphaSearch(self.search_, target, self.start)
        try:
            self.found.run(target.pruning.way, {k: v for k, v in self.starts.items() if v != self.start})
        except BudgetSpent:
            return "finished" if self.config.budget == DEFAULT_BUDGET else "stopped"
        return "finished"

    def write(self, subjects: Sequence[Subject] | None, command: str) -> None:
        """Score the result beside models that need no search, and write it."""
        target, record = self.target, self.record
        recipe, alphas = target.recipe(files.weights_of(self.found.best)), list(self.found.best)
        rows: dict[str, Recipe | None] = {WHOLE: target.whole}
        named = {**self.starts, **({"file": self.start} if target.given is not None else {})}
        rows |= {name: target.recipe(files.weights_of(own)) for name, own in named.items()}
        rows[RESULT] = recipe
        boards = {}
        for part, questions in (("selection", self.divided.selection), ("holdout", self.divided.holdout)):
            boards[part] = Scoreboard([WHOLE])
            if questions.datasets:
                self.observer.step(part, "result", len(rows))
                scorer = self.evaluation.scorer(questions, self.observer.candidate)
                boards[part].score(scorer, rows, list(questions.datasets), target.pool)
        told: dict[str, Any] = {"first": target.first, "steps": target.n_steps, "alphas": alphas}
        told |= {"method": target.pruning.way, "objective": self.found.value}
        content, mmlu = target.content(recipe), {}
        texts = {files.ALPHAS: files.to_json(target.first, alphas)}
        if subjects is not None:
            board = self._mmlu(recipe, subjects)
            texts[RESULTS] = json.dumps(strict(board.results()), indent=2) + "\n"
            mmlu = {"mmlu": board.to_json()}
        self._write_folder(replace(content, texts=texts), command)
        record.update(
            recipe, pruned=told, account=content.account(), **{k: b.to_json() for k, b in boards.items()}, **mmlu
        )

    def _mmlu(self, recipe: Recipe, subjects: Sequence[Subject]) -> Board:
        self.evaluation.model.set_recipe(recipe)
        shots = self.target.pruning.ntrain
        return score_mmlu(str(self.config.output_dir), self.evaluation, subjects, shots, self.observer.candidate)

    def _write_folder(self, content: Content, command: str) -> None:
        target, folder = self.target, self.record.folder
        notes = [f"Layers {target.first} to {target.first + target.n_steps} became layer {target.first}"]
        names = [target.base.name]
        title = f"pruned by {target.pruning.way}"
        card = merge_card(names, target.pool.made_of(names), title, command, content.account(), notes)
        with writing(folder, "--resume"):
            write_folder(content, self.evaluation.sources, folder, self.config.shard_size)
            write_text(folder / "README.md", card)


def _header(inputs: Inputs, target: Target, divided: Divided) -> dict[str, Any]:
    """What identifies the search: that of a run, the division of the questions, and the optimiser's version."""
    header = inputs.header()
    used = {"cma": ["cmaes"], "bayes": ["optuna"]}.get(target.pruning.way, [])
    header["environment"] |= {name: version(name) for name in used}
    header["samples"] = {name: list(sizes) for name, sizes in divided.sizes().items()}
    return header


def _files(config: RunConfig) -> list[Path]:
    return [entry.path(config.dataset_dir, name) for name, entry in config.questions.items()]
