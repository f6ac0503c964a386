"""`olmfast run` of any config, and the session of one that has a section `dataflow`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import yaml

from olmfast.config.run import RunConfig, load_config
from olmfast.dataflow.gains import own_spans
from olmfast.dataflow.kinds import LayerKinds
from olmfast.dataflow.repeats import RepeatSweep
from olmfast.dataflow.running import PathModel
from olmfast.dataflow.scoring import PathScorer
from olmfast.dataflow.searching import PathSearch
from olmfast.evaluation.open import Evaluation, Questions
from olmfast.evaluation.scorer import Candidate, Scorer
from olmfast.observer import Observer
from olmfast.output.writer import write_text, writing
from olmfast.report import paths as picture
from olmfast.report.write import write_report
from olmfast.runs.session import Result, Session, run_as
from olmfast.runs.steps import HELD_OUT, SELECTION
from olmfast.search.acceptance import Scale
from olmfast.search.halves import Halves

PATH = "path.yml"  # in a run's folder: the path of its result, as a data-flow file


def run(
    config: RunConfig | Mapping[str, Any] | str | Path,
    *,
    resume: bool = False,
    overwrite: bool = False,
    report: str | Path | None = None,
    observer: Observer | None = None,
    stop_requested: Callable[[], bool] = lambda: False,
) -> Result:
    """Search for the best merge of the config's pool, or the best path through it, and write it to `output_dir`.

    `config` is what `load_config` returned or takes. `resume` goes on with an unfinished run, `overwrite` replaces a
    result that is there, and `report` is a `merge_report.json` of the original OLM whose choices a new run begins with
    (one in the output folder is resumed); `observer` is told of each step, `stop_requested` asked between two steps.

    Raises InputError before anything is written when the input is unusable, Interrupted when
    `stop_requested` said so between two steps, OlmfastError when the run failed; what was decided is kept.
    """
    if not isinstance(config, RunConfig):
        config = load_config(config)
    kind = PathSession if config.dataflow is not None else Session
    return run_as(
        kind,
        config,
        resume=resume,
        overwrite=overwrite,
        report=report,
        observer=observer,
        stop_requested=stop_requested,
        at_end=write_report,
    )


class PathSession(Session):
    """A run that searches paths: candidates run over shared blocks, and nothing of them is written."""

    def _scorer(self, questions: Questions, note: Callable[[str], None] = lambda _: None) -> Scorer:
        """A scorer of paths; what is no path is scored as in every run. The plain reference builds each path anew."""
        others = partial(super()._scorer, questions, note)
        if self.config.scorer == "sequential":
            return others()
        if not hasattr(self, "paths"):
            self._check_memory()
            base = self.config.base_name
            assert isinstance(self.evaluation, Evaluation)  # a config with workers has no paths
            self.paths = PathModel(self.evaluation.model, base, base, self.skeletons)
        told = (questions.datasets, questions.tokenizer, questions.stop_tokens, self.config.batch_tokens)
        return PathScorer(self.paths, *told, others, self.observer.candidate)

    @cached_property
    def skeletons(self) -> LayerKinds:
        """What Transformers makes of the layers of paths."""
        return LayerKinds()

    def _check_memory(self) -> None:
        """Raise InputError where the blocks of the other models do not fit beside the first."""
        pool, settings, base = self.inputs.pool, self.inputs.settings, self.inputs.pool[self.config.base_name]
        names = [name for name in base.tensors if pool.architecture.block_of(name) is not None]
        n_values = sum(math.prod(base.tensors[name].shape) for name in names)
        needed = (len(self.inputs.donors) - 1) * n_values * settings.dtype.itemsize
        if needed:
            settings.memory().check(needed, "the other models' blocks, which paths use and which are not streamed,")

    def _search_with_tests(self) -> None:
        search, config = self.search, self.config
        assert config.dataflow is not None
        means = self.selection.rows[config.base_name]
        spans = own_spans(means, self._modes)
        if left_out := [name for name in means if name not in spans]:
            self.observer.note(f"the model is perfect on them, so left out: {', '.join(left_out)}")
        search.rules = replace(search.rules, spans=spans)
        if not spans:
            self.observer.note("the model is perfect on all questions: there is nothing to search by")
        elif config.dataflow.repeat:
            self.sweep = RepeatSweep(search, config.dataflow, self.skeletons)
            self.sweep.run()
        else:
            models = (config.base_name, *(name for name in self.inputs.donors if name != config.base_name))
            self.path_search = PathSearch(search, config.dataflow, models, self.skeletons)
            self.path_search.run()

    @property
    def _modes(self) -> dict[str, str]:
        return {name: entry.mode for name, entry in self.config.questions.items()}

    def _validate(self) -> None:
        """Choose among the paths that were current once by questions that no step has used."""
        questions, snapshots = self.inputs.validation, self.record.snapshots
        if len(snapshots) < 2 or not questions.datasets:
            return
        candidates = [Candidate(label, recipe=recipe) for label, recipe in snapshots.items()]
        scores = self.evaluation.scorer(questions).score(self.path_search.unit, candidates)
        rows = [{name: float(scores.mean(name)[row]) for name in questions.datasets} for row in range(len(candidates))]
        scale = Scale(own_spans(rows[0], self._modes), self.search.rules.weights)
        skills = {label: scale.skill(row) for label, row in zip(snapshots, rows, strict=True)}
        result = max(skills, key=lambda label: skills[label] if math.isfinite(skills[label]) else -math.inf)
        self.record.update(validation={"skill": skills, "result": result})
        if result == next(iter(snapshots)):
            self.observer.note("on the validation questions no path is better than the first model: it is the result")

    def _closing(self) -> list[str]:
        """Score the best on held-out questions, which is recorded, and write tables, picture and file."""
        sections, folder = [], self.record.folder
        if hasattr(self, "sweep"):
            report = self._told("repeats", self.sweep.report, self.sweep.halves)
            sections.append(picture.markdown(report))
            with writing(folder, "--resume"):
                write_text(folder / picture.PICTURE, picture.heat_map(report))
        if hasattr(self, "path_search"):
            found = self.path_search
            sections.append(picture.front_markdown(self._told("paths", found.report, found.halves)))
            chosen = self.record.values.get("validation", {}).get("result") or [*self.record.snapshots][-1]
            data = found.space.file(found.kept[chosen], [self._place(name) for name in found.space.models])
            with writing(folder, "--resume"):
                write_text(folder / PATH, yaml.safe_dump(data, sort_keys=False, default_flow_style=None, width=120))
        return sections

    def _place(self, name: str) -> str:
        """Where a model lies, and after a `+` each of its adapters, from the result's folder."""
        folders = self.inputs.pool[name].folders
        return "+".join(os.path.relpath(folder, self.config.output_dir) for folder in folders)

    def _told(
        self, key: str, report: Callable[[Scorer, dict[str, str]], dict[str, Any]], halves: Halves
    ) -> dict[str, Any]:
        """A search's report on held-out questions, or where there are none on those that did not pick; recorded."""
        held = self.inputs.holdout
        kind = HELD_OUT if held.datasets else SELECTION
        questions = held if held.datasets else self.inputs.selection.part(halves.second)
        self.observer.step(kind, key, 1)
        n = sum(len(dataset.samples) for dataset in questions.datasets.values())
        found = report(self._scorer(questions), self._modes)
        self.record.update(None, **{key: found | {"questions": f"{n} {kind}"}})
        told: dict[str, Any] = self.record.values[key]
        return told
