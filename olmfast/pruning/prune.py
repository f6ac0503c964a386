"""A model pruned: its layers' alphas read, found or given, the result planned and written."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from olmfast.config.pruning import Pruning
from olmfast.config.run import RunConfig, load_config
from olmfast.errors import InputError
from olmfast.evaluation.mmlu import Subject, read_mmlu
from olmfast.observer import Observer
from olmfast.output.folder import OutputFolder
from olmfast.pruning import alphas as files
from olmfast.pruning.report import report_text
from olmfast.pruning.target import Target
from olmfast.report.history import History
from olmfast.report.write import PAGE, made
from olmfast.search.log import strict
from olmfast.search.record import REPORT
from olmfast.static.plan import Plan
from olmfast.static.write import Written, check_output, read_options, write_merge
from olmfast.weights.recipe import Recipe

if TYPE_CHECKING:
    from olmfast.evaluation.blocks import BlockwiseModel
    from olmfast.evaluation.open import Questions, Settings
    from olmfast.pruning.depths import Depths
    from olmfast.pruning.session import Measured, Searched
    from olmfast.runs.mmlu import Board

RESULTS = "mmlu_results.json"
QUESTIONS = 1  # of each subject, that similarity asks
MOST_ASKED = 200  # of a search's questions, at most


@dataclass(frozen=True)
class Pruned:
    """A pruned model that is on the disk: where, what of, the alphas of its steps, and its scores on MMLU, if asked."""

    written: Written
    mmlu: Board | None
    n_layers: int
    steps: tuple[tuple[int, int], ...]
    alphas: tuple[float, ...]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        steps = [[into, removed, alpha] for (into, removed), alpha in zip(self.steps, self.alphas, strict=True)]
        scores = {} if self.mmlu is None else {"mmlu": self.mmlu.to_json()}
        return {**self.written.to_json(), "layers": self.n_layers, "steps": steps, **scores}


def prune(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    command: str = "",
    observer: Observer | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Pruned | Searched:
    """Prune a model as the section `prune` of a run's config says, and write it to `output_dir`.

    `config` is what `load_config` returned or takes; `command` what the model card says of how it was made. A search
    is resumed with `resume`, and asks `stop_requested` between two rounds.
    Raises InputError, before anything is written, for what does not fit: see docs/pruning.md; a search also what `run`
    raises.
    """
    config = config if isinstance(config, RunConfig) else load_config(config)
    pruning, observer = _pruning(config), observer or Observer()
    command = command or f"prune: {pruning.model_dump(mode='json', exclude_unset=True)}"
    if pruning.is_search:
        from olmfast.pruning.questions import with_objective
        from olmfast.pruning.session import search

        config = with_objective(config)
        models, subjects = _open(config), mmlu_of(pruning)
        return search(
            config,
            models,
            subjects,
            lambda questions: _measure(config, models, questions),
            resume=resume,
            overwrite=overwrite,
            command=command,
            observer=observer,
            stop_requested=stop_requested,
        )
    if resume:
        raise InputError(f"--resume: method {pruning.way} is done in one go; the same command starts it again")
    return _prune(config, overwrite, command, observer)


def _prune(config: RunConfig, overwrite: bool, command: str, observer: Observer) -> Pruned:
    """Prune without a search."""
    pruning = _pruning(config)
    target = Target.open(config, evaluated=pruning.is_evaluated)
    alphas = _known(target)
    plan = plan_of(target, alphas or [0.5] * target.n_steps, command)
    read_options(config.device)
    check_output(plan, OutputFolder(config.output_dir, overwrite=overwrite), config.max_ram)
    subjects = mmlu_of(pruning)
    told: dict[str, Any] = {"method": pruning.way}
    if alphas is None:
        from olmfast.pruning.similarity import alphas_by

        similarity = _similarities(config, target, _calibration(target))
        alphas = alphas_by(similarity, target.steps)
        told["similarity"] = similarity.mean(axis=1).tolist()
    plan, recipe = plan_of(target, alphas, command), _recipe(target, alphas)
    board = None if subjects is None else _score(config, target, recipe, subjects, observer)
    texts = {
        files.ALPHAS: files.to_json(target.first, alphas),
        REPORT: report_text(config, target, recipe, alphas, config.output_dir, told),
    }
    page = made(lambda: History.from_report(json.loads(texts[REPORT])["olmfast"], REPORT), observer)
    texts |= {} if page is None else {PAGE: page}
    if board is not None:
        texts[RESULTS] = json.dumps(strict(board.results()), indent=2) + "\n"
    plan = replace(plan, content=replace(plan.content, texts=texts))
    device = config.device if config.device != "auto" else "cpu"
    written = write_merge(plan, config.output_dir, device=device, overwrite=overwrite, observer=observer)
    n_layers = target.base.architecture.n_blocks - target.n_steps
    return Pruned(written, board, n_layers, tuple(target.steps), tuple(alphas))


def plan_pruning(config: RunConfig, command: str = "") -> Plan:
    """What pruning would write, decided before any weight is read; alphas that are still to be found are 0.5."""
    pruning = _pruning(config)
    if pruning.is_search:
        models = _open(config)
        notes, warnings = _plan_of_search(config, models), models.notes
        content = models.content(models.example)
        return Plan(f"pruned by {pruning.way}", models.pool, content, command, notes=notes, warnings=warnings)
    target = Target.open(config, evaluated=pruning.is_evaluated)
    known = _known(target)
    plan = plan_of(target, known or [0.5] * target.n_steps, command)
    if known is None:
        last = target.first + target.n_steps
        note = f"Layers {target.first} to {last} become one; {_pruning(config).way} decides by which alphas"
        plan = replace(plan, notes=[note])
    return plan


def _open(config: RunConfig) -> Target | Depths:
    from olmfast.pruning.depths import Depths

    return Depths.open(config) if _pruning(config).way == "joint" else Target.open(config, evaluated=True)


def _plan_of_search(config: RunConfig, models: Target | Depths) -> list[str]:
    """What a search would go by, in lines; its questions are read."""
    from olmfast.pruning.questions import Divided, with_objective
    from olmfast.pruning.session import DEFAULT_BUDGET

    config = with_objective(config)
    sizes = Divided.load(config, models.base).sizes()
    budget = config.budget or DEFAULT_BUDGET
    limit = f"{budget.evaluations} evaluations" if budget.evaluations else f"{budget.seconds:g} s"
    if isinstance(models, Target):
        last, way = models.first + models.n_steps, models.pruning.way
        what = f"Layers {models.first} to {last} become one; {way} searches their alphas within {limit}"
    else:
        what = f"{models.n_steps} of {models.n_blocks} layers go; which, and into what, is searched within {limit}"
    return [
        what,
        *(f"{name}: {decide} questions decide, {held} are held out" for name, (decide, held) in sizes.items()),
    ]


def plan_of(target: Target, alphas: Sequence[float], command: str) -> Plan:
    """The plan of a model that is pruned with these alphas."""
    pruning = target.pruning
    last = target.first + target.n_steps
    told = ", ".join(f"{alpha:.4g}" for alpha in alphas)
    notes = [
        f"Layers {target.first} to {last} of {target.base.architecture.n_blocks} become layer {target.first}, merged "
        f"from the last down with alpha {told}"
    ]
    read = {} if pruning.alphas_file is None else {"the alpha file": [pruning.alphas_file]}
    if pruning.data_dir is not None:
        read["the questions of MMLU"] = [pruning.data_dir]
    return Plan(
        f"pruned by {pruning.way}",
        target.pool,
        target.content(_recipe(target, alphas)),
        command,
        notes=notes,
        warnings=target.notes,
        read=read,
    )


def mmlu_of(pruning: Pruning) -> list[Subject] | None:
    """The questions of MMLU that the result is scored on, if any. Raises InputError where they cannot be read."""
    if pruning.data_dir is None:
        return None
    return read_mmlu(pruning.data_dir, n_shots=pruning.ntrain, style=pruning.mmlu_as)


def _score(config: RunConfig, target: Target, recipe: Recipe, subjects: Sequence[Subject], observer: Observer) -> Board:
    """The scores of the pruned model on MMLU."""
    from olmfast.evaluation.open import Evaluation
    from olmfast.runs.mmlu import score_mmlu

    observer.note(f"scored on {sum(len(one.questions) for one in subjects)} questions of MMLU")
    evaluation = Evaluation(recipe, target.pool, _settings(config))
    return score_mmlu(str(config.output_dir), evaluation, subjects, target.pruning.ntrain)


def _settings(config: RunConfig) -> Settings:
    from olmfast.evaluation.open import Settings

    limits = {key: getattr(config, key) for key in ("batch_tokens", "max_ram", "max_vram")}
    return Settings.of(config.device, config.dtype, **limits)


def _recipe(target: Target, alphas: Sequence[float]) -> Recipe:
    return target.recipe(files.weights_of(alphas))


def _pruning(config: RunConfig) -> Pruning:
    if config.prune is None:
        raise InputError("prune: the section is missing: it says which layers are merged")
    return config.prune


def _known(target: Target) -> list[float] | None:
    """The alphas, where they are known before anything is evaluated."""
    n = target.n_steps
    if target.pruning.way == "file" and target.given is not None:
        return list(target.given)
    return {"uniform": files.alphas_of([1 / (n + 1)] * (n + 1)), "drop": [1.0] * n}.get(target.pruning.way)


def _calibration(target: Target) -> list[str]:
    """A few questions of MMLU without worked examples, that similarity asks."""
    pruning = target.pruning
    if pruning.data_dir is None:
        raise InputError("similarity: data_dir, the folder of MMLU, is missing: its questions tell layers apart")
    subjects = read_mmlu(pruning.data_dir, limit=pruning.num_samples or QUESTIONS)[: pruning.num_tasks]
    return [subject.before(0) + question.text for subject in subjects for question in subject.questions]


def _similarities(config: RunConfig, target: Target, texts: Sequence[str]) -> np.ndarray:
    """NPIB of each two layers, on these texts."""
    from olmfast.evaluation.open import load_tokenizer
    from olmfast.pruning.similarity import entering, similarities

    tokenizer, _ = load_tokenizer(target.base)
    inputs = [tuple(tokenizer(text)["input_ids"]) for text in texts]
    with _taken_apart(config, target) as blockwise:
        return similarities(entering(blockwise, _fitting(blockwise, inputs), config.batch_tokens))


def _measure(config: RunConfig, models: Target | Depths, questions: Questions) -> Measured:
    """The alphas of similarity on some questions' prompts, unless these are too few, and the layers' influence."""
    from olmfast.pruning.session import Measured
    from olmfast.pruning.similarity import OF_ENTROPY, alphas_by, entering, influences, similarities

    prompts = {sample.prompt: None for dataset in questions.datasets.values() for sample in dataset.samples}
    alphas, n, n_steps = None, models.base.architecture.n_blocks, models.n_steps
    steps = models.steps if isinstance(models, Target) else files.steps_of(n - n_steps - 1, n_steps)
    with _taken_apart(config, models) as blockwise:
        inputs = _fitting(blockwise, [prompt for prompt in prompts if len(prompt) > 1][:MOST_ASKED])
        if len(inputs) > OF_ENTROPY:
            alphas = alphas_by(similarities(entering(blockwise, inputs, config.batch_tokens)), steps)
        influence = influences(blockwise, inputs or list(prompts), config.batch_tokens)
    return Measured(alphas, influence)


def _fitting(blockwise: BlockwiseModel, inputs: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    return [ids[-blockwise.context :] for ids in inputs]


@contextmanager
def _taken_apart(config: RunConfig, models: Target | Depths) -> Iterator[BlockwiseModel]:
    """The whole model, block by block; no gradients."""
    from olmfast.evaluation.blocks import BlockwiseModel
    from olmfast.evaluation.open import Evaluation

    model = Evaluation(models.whole, models.pool, _settings(config)).model
    with torch.inference_mode():
        yield BlockwiseModel(model.module, model.architecture, model.residency)
