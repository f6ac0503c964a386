"""`olmfast run` of any config, and the session of one that has a section `dataflow`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from olmfast.config.run import RunConfig, load_config
from olmfast.dataflow.kinds import LayerKinds
from olmfast.dataflow.picture import PICTURE, heat_map, markdown
from olmfast.dataflow.repeats import RepeatSweep, own_spans
from olmfast.dataflow.running import PathModel
from olmfast.dataflow.scoring import PathScorer
from olmfast.evaluation.open import Questions
from olmfast.evaluation.scorer import Scorer
from olmfast.observer import Observer
from olmfast.output.writer import write_text, writing
from olmfast.runs.session import Result, Session, run_as


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
    )


class PathSession(Session):
    """A run that searches paths: candidates run over shared blocks, and nothing of them is written."""

    def _scorer(self, questions: Questions, note: Callable[[str], None] = lambda _: None) -> Scorer:
        """A scorer of paths; what is no path is scored as in every run."""
        if not hasattr(self, "paths"):
            base = self.config.base_name
            self.skeletons = LayerKinds()
            self.paths = PathModel(self.evaluation.model, base, base, self.skeletons)
        told = (questions.datasets, questions.tokenizer, questions.stop_tokens, self.config.batch_tokens)
        others = partial(super()._scorer, questions, note)
        return PathScorer(self.paths, *told, others, self.observer.candidate)

    def _search_with_tests(self) -> None:
        search, config = self.search, self.config
        assert config.dataflow is not None
        modes = {name: entry.mode for name, entry in config.questions.items()}
        means = self.selection.rows[config.base_name]
        spans = own_spans(means, modes)
        left_out = [name for name in means if name not in spans]
        if left_out:
            self.observer.note(f"the model is perfect on them, so left out: {', '.join(left_out)}")
        search.rules = replace(search.rules, spans=spans)
        self.sweep = RepeatSweep(search, config.dataflow, self.skeletons)
        if not spans:
            self.observer.note("the model is perfect on all questions: there is nothing to search by")
            return
        self.sweep.run()

    def _closing(self) -> list[str]:
        """Score the best ranges on held-out questions; the table is recorded, and the picture written."""
        if not hasattr(self, "sweep"):
            return []  # the budget ended the run before it
        if "repeats" not in self.record.values:
            held = self.inputs.holdout
            kind = "held-out" if held.datasets else "selection"
            questions = held if held.datasets else self.inputs.selection.part(self.sweep.halves.second)
            self.observer.step(kind, "ranges", 1 + min(len(self.sweep.best), self.sweep.config.shown))
            modes = {name: entry.mode for name, entry in self.config.questions.items()}
            report = self.sweep.report(self._scorer(questions), modes)
            n = sum(len(dataset.samples) for dataset in questions.datasets.values())
            self.record.update(repeats=report | {"questions": f"{n} {kind}"})
        report = self.record.values["repeats"]
        with writing(self.record.folder, "--resume"):
            write_text(self.record.folder / PICTURE, heat_map(report))
        return [markdown(report)]
