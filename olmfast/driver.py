"""The lean driver: config -> pool -> working model -> stages -> writer."""

from __future__ import annotations

import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from olmfast import __version__
from olmfast.card import write_card
from olmfast.config import RunConfig, parse_config
from olmfast.errors import InputError, OlmfastError
from olmfast.evaluation.batches import Dataset, load_datasets
from olmfast.evaluation.model import WorkingModel, pick_device, pick_dtype
from olmfast.evaluation.scorer import SequentialScorer
from olmfast.report import Report
from olmfast.run_folder import RunFolder
from olmfast.scoreboard import AVERAGE, RESULT, Scoreboard, plain_average
from olmfast.search.evolve import offspring_count, refine
from olmfast.search.ranking import Rules
from olmfast.search.stage import BudgetSpent, Observer, Search, Silent
from olmfast.search.swap import (
    choose_blocks,
    choose_boundary,
    module_units,
    score_donors,
    select_units,
    swap,
    whole,
)
from olmfast.weights.checkpoint import Checkpoint, read_json
from olmfast.weights.methods import Sources
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe
from olmfast.weights.writer import write_model


@dataclass(frozen=True)
class Result:
    """A finished (or, with a budget, stopped) run: where it lies, what it is and how it scored."""

    output_dir: Path
    status: str
    recipe: Recipe
    report: Report
    selection: Scoreboard
    holdout: Scoreboard


def run(
    config: RunConfig,
    *,
    resume: bool = False,
    overwrite: bool = False,
    observer: Observer | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Result:
    """Search for the best merge of the config's pool and write it to `output_dir`.

    Raises InputError before anything is written when the input is unusable, Interrupted when
    `stop_requested` said so between two steps, OlmfastError when the run failed; what was decided is kept.
    """
    observer = observer or Silent()
    folder = RunFolder(config.output_dir, resume=resume or config.load_merge_report, overwrite=overwrite)
    inputs = Inputs.open(config, observer)
    with folder.locked(inputs.header(), inputs.pool) as report:
        if report.status == "finished":
            return _result(config, report)
        session = Session(config, inputs, report, observer, stop_requested)
        status = session.search_all()
        account = session.write()
        observer.note(account)
        report.update(status=status)
        folder.publish()
    return _result(config, Report.load(config.output_dir))


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads, opened and checked; nothing has been written yet."""

    config: RunConfig
    pool: Pool
    tokenizer: Any
    datasets: Mapping[str, Dataset]
    holdout: Mapping[str, Dataset]
    stop_tokens: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def open(cls, config: RunConfig, observer: Observer) -> Inputs:
        """Open donors and datasets. Raises InputError naming what is unusable."""
        device = pick_device(config.device)
        dtype = pick_dtype(config.dtype, device)
        names = [config.base_name, *(name for name in config.models if name != config.base_name)]
        pool = Pool.open(names, config.models_dir, config.config_dir)
        for warning in pool.warnings:
            observer.note(warning)
        tokenizer, stop_tokens = load_tokenizer(pool[config.base_name])
        context = pool.architecture.context
        datasets = load_datasets(config.dataset_dir, config.dataset, tokenizer, context)
        holdout = load_datasets(config.dataset_dir, config.holdout, tokenizer, context)
        for name, dataset in {**datasets, **holdout}.items():
            if dataset.left_out:
                observer.note(f"{name}: {dataset.left_out} samples longer than {context} tokens are left out")
        pool.check_finite()
        check_space(config.output_dir, pool)
        if config.metric_dir is not None:
            observer.note("metric_dir: accepted for compatibility and ignored; metrics lie in the output folder")
        return cls(config, pool, tokenizer, datasets, holdout, stop_tokens, device, dtype)

    def header(self) -> dict[str, Any]:
        """What identifies the run: a resumed run must have the same config, donors and datasets."""
        every = {**self.datasets, **self.holdout}
        return {
            "version": 1,
            "config": self.config.decisive(),
            "donors": {donor.name: donor.fingerprint() for donor in self.pool},
            "datasets": {name: dataset.digest for name, dataset in every.items()},
            "samples": {name: len(dataset.samples) for name, dataset in every.items()},
            "left_out": {name: dataset.left_out for name, dataset in every.items() if dataset.left_out},
            "environment": environment(self.device, self.dtype),
        }


class Session:
    """One process's share of a run: builds the working model and walks the stages."""

    def __init__(
        self,
        config: RunConfig,
        inputs: Inputs,
        report: Report,
        observer: Observer,
        stop_requested: Callable[[], bool],
    ) -> None:
        self.config, self.inputs, self.report, self.observer = config, inputs, report, observer
        self.sources = Sources(inputs.pool, report.folder)
        recipe = report.recipe or whole(config.base_name, inputs.pool.tensors)
        self.model = WorkingModel(recipe, self.sources, inputs.device, inputs.dtype)
        tolerance = 1e-6 if inputs.dtype in (torch.float32, torch.float64) else 1e-3
        rules = Rules(
            config.selection,
            tolerance if config.tie_tolerance is None else config.tie_tolerance,
            config.significance,
            {name: entry.weight for name, entry in config.dataset.items()},
        )
        scorer = self._scorer(inputs.datasets)
        self.search = Search(config, self.model, scorer, report, rules, observer, stop_requested)
        self.selection = Scoreboard(inputs.pool.names)
        self.holdout = Scoreboard(inputs.pool.names)

    def _scorer(self, datasets: Mapping[str, Dataset]) -> SequentialScorer:
        return SequentialScorer(
            self.model,
            datasets,
            self.inputs.tokenizer,
            self.inputs.stop_tokens,
            self.config.batch_tokens,
            self.observer.candidate,
        )

    def search_all(self) -> str:
        """Walk the stages in order; returns `finished`, or `stopped` when the budget is spent."""
        self._score_holdout_of_donors()
        try:
            self._choose_base()
            if self.config.boundary_select:
                choose_boundary(self.search)
            if self.config.layer_swap:
                choose_blocks(self.search)
            for unit in module_units(self.search):
                if self.config.tensor_swap:
                    swap(self.search, "tensors", unit)
                refine(self.search, unit)
        except BudgetSpent:
            self.observer.note("the budget is spent; this is the best so far, --resume with a larger one goes on")
            return "stopped"
        return "finished"

    def write(self) -> str:
        """Score the result beside its donors and write it; returns the line that accounts for every tensor."""
        pool, recipe = self.inputs.pool, self.model.recipe
        average = {AVERAGE: plain_average(recipe.base, self.selection.donors, pool)} if len(pool) > 1 else {}
        rows: dict[str, Recipe | None] = {**average, RESULT: None}
        for board, datasets in ((self.selection, self.inputs.datasets), (self.holdout, self.inputs.holdout)):
            if datasets and board.donors:
                board.score(self._scorer(datasets), rows, list(datasets), pool)
        tokenizer = pool[self.config.base_name].folder
        account = write_model(recipe, self.sources, self.report.folder, tokenizer, self.config.shard_size)
        boards = {"Selection": self.selection, "Held-out": self.holdout}
        self.report.update(selection=self.selection.to_json(), holdout=self.holdout.to_json(), account=account)
        card = write_card(self.config, self.report, recipe.base, boards, account)
        (self.report.folder / "README.md").write_text(card, encoding="utf-8")
        return account

    def _score_holdout_of_donors(self) -> None:
        pool = self.inputs.pool
        if not self.inputs.holdout:
            return
        if "donors_holdout" not in self.report.own:
            self.observer.step("held-out", "donors", len(pool))
            recipes = {name: whole(name, pool.tensors) for name in pool.names}
            names = list(self.inputs.holdout)
            self.holdout.score(self._scorer(self.inputs.holdout), dict(recipes), names, pool)
            self.report.update(donors_holdout=self.holdout.to_json())
        self.holdout = Scoreboard.from_json(self.report.own["donors_holdout"])

    def _choose_base(self) -> None:
        search, pool = self.search, self.inputs.pool
        outcome = score_donors(search)
        scored = [name for name in pool.names if name not in outcome.dropped]
        rows = {name: {dataset: float(by[name] or 0.0) for dataset, by in outcome.metrics.items()} for name in scored}
        truncated = {
            name: {dataset: by[name] for dataset, by in outcome.truncated.items() if by.get(name)} for name in scored
        }
        self.selection = Scoreboard(scored, rows, truncated)
        search.set_scale(self.selection.spans, self.selection.rows[outcome.winner])
        if outcome.winner != self.model.recipe.base:
            search.rebase(whole(outcome.winner, pool.tensors))
        if self.config.max_models is not None:
            search.donors = [outcome.winner, *outcome.order][: self.config.max_models]


def load_tokenizer(donor: Checkpoint) -> tuple[Any, tuple[int, ...]]:
    """The donor's tokenizer and the tokens that end a generation. Raises InputError if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(donor.folder)
    except Exception as error:  # many types, depending on the tokenizer's class
        raise InputError(f"{donor.folder}: the tokenizer cannot be loaded: {error}") from None
    generation = donor.folder / "generation_config.json"
    ends = read_json(generation).get("eos_token_id") if generation.is_file() else None
    listed = ends if isinstance(ends, list) else [ends]
    stops = {token for token in (*listed, tokenizer.eos_token_id) if isinstance(token, int)}
    return tokenizer, tuple(sorted(stops))


def check_space(output_dir: Path, pool: Pool) -> None:
    """Raise InputError when the disk cannot hold the result."""
    parent = next(folder for folder in output_dir.absolute().parents if folder.is_dir())
    needed = max(donor.n_bytes for donor in pool)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(
            f"{output_dir}: the result needs {needed / 1e9:.2f} GB and {parent} has {free / 1e9:.2f} GB free"
        )


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the result's bytes depend on beside config, donors and datasets."""
    import transformers

    return {
        "olmfast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }


def _result(config: RunConfig, report: Report) -> Result:
    recipe = report.recipe
    if recipe is None:
        raise OlmfastError(f"{report.folder}: the report holds no recipe")
    boards = [Scoreboard.from_json(report.own[key]) for key in ("selection", "holdout")]
    return Result(config.output_dir, report.status, recipe, report, *boards)


@dataclass(frozen=True)
class Plan:
    """What a run would do: stage -> (units, candidates), and what it reads and writes."""

    stages: dict[str, tuple[int, int]]
    datasets: dict[str, tuple[str, int]]
    n_bytes: int
    output_dir: Path

    @property
    def n_candidates(self) -> int:
        """Candidates of all stages together."""
        return sum(n for _, n in self.stages.values())

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "stages": {name: {"units": u, "candidates": n} for name, (u, n) in self.stages.items()},
            "datasets": {name: {"mode": m, "samples": n} for name, (m, n) in self.datasets.items()},
            "result_bytes": self.n_bytes,
            "output_dir": str(self.output_dir),
        }


def plan(config: RunConfig, observer: Observer | None = None) -> Plan:
    """Check a config and everything it names, and say what a run would do. Writes nothing."""
    inputs = Inputs.open(config, observer or Silent())
    datasets = {name: (d.config.mode, len(d.samples)) for name, d in {**inputs.datasets, **inputs.holdout}.items()}
    n_bytes = inputs.pool[config.base_name].n_bytes
    return Plan(plan_stages(config, inputs.pool), datasets, n_bytes, config.output_dir)


def plan_stages(config: RunConfig, pool: Pool) -> dict[str, tuple[int, int]]:
    """Stage -> (units, candidates at most); a step has fewer where donors' bytes are equal."""
    n = min(len(pool), config.max_models or len(pool))
    stages = {"base": (1, len(pool))}
    if config.boundary_select:
        stages["boundary"] = (1, n)
    if config.layer_swap:
        size = config.markov + 1
        full, rest = divmod(pool.architecture.n_blocks, size)
        stages["layers"] = (full + bool(rest), full * n**size + (n**rest if rest else 0))
    units = select_units(config, pool.architecture, pool.tensors)
    if config.tensor_swap:
        stages["tensors"] = (len(units), len(units) * n)
    shapes = [pool[config.base_name].tensors[name].shape for unit in units for name in unit.tensors]
    matrices = [shape for shape in shapes if len(shape) == 2]
    if config.es_svd:
        per = sum(1 + offspring_count(min(shape)) for shape in matrices)
        stages["svd_es"] = (len(matrices), per * config.es_svd_generations)
    if config.es_norm:
        per = sum(1 + offspring_count(shape[0]) for shape in matrices)
        stages["norm_es"] = (len(matrices), per * config.es_norm_generations)
    return stages


def evaluate(
    model: str,
    datasets: Mapping[str, Mapping[str, Any]],
    against: Sequence[str] = (),
    *,
    models_dir: Path = Path("models"),
    device: str = "auto",
    dtype: str = "auto",
) -> Scoreboard:
    """Score a model on datasets (file -> the keys of a config's dataset entry), beside donors if any are given.

    With donors, the board also has their plain average, and skill retained is on their scale.
    Raises InputError naming what is unusable.
    """
    names = list(dict.fromkeys([*against, model]))
    keys = {"models_dir": models_dir.absolute(), "output_dir": ".", "models": names, "base_model_name": model}
    keys |= {"dataset": {name: dict(entry) for name, entry in datasets.items()}, "device": device, "dtype": dtype}
    config = parse_config(keys, where="evaluate", folder=Path.cwd())
    pool = Pool.open(names, config.models_dir, config.config_dir)
    tokenizer, stop_tokens = load_tokenizer(pool[model])
    loaded = load_datasets(config.dataset_dir, config.dataset, tokenizer, pool.architecture.context)
    chosen = pick_device(device)
    recipe = whole(model, pool.tensors)
    working = WorkingModel(recipe, Sources(pool, Path()), chosen, pick_dtype(dtype, chosen))
    scorer = SequentialScorer(working, loaded, tokenizer, stop_tokens, config.batch_tokens)
    rows: dict[str, Recipe | None] = {name: whole(name, pool.tensors) for name in against}
    donors = list(against) or [model]
    if len(against) > 1:
        rows[AVERAGE] = plain_average(against[0], against, pool)
    rows[model] = None
    board = Scoreboard(donors)
    board.score(scorer, rows, list(loaded), pool)
    return board
