"""Trackers: told of each step and of the end, never the end of a run, and named before it if they are missing."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from olmfast import InputError, load_config, run
from olmfast.runs.trackers import MODULES
from olmfast.runs.tracking import Tracking
from olmfast.search.record import Record
from olmfast.testing import tiny_run


class Stub(ModuleType):
    """Stands for a tracker's package: what it is called with is kept."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.calls: list[tuple[str, tuple, dict]] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def call(*args: Any, **keys: Any) -> Stub:
            self.calls.append((name, args, keys))
            return self

        return call

    def named(self, *names: str) -> list[tuple[tuple, dict]]:
        return [(args, keys) for name, args, keys in self.calls if name in names]


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """The result of a run that nobody is told of."""
    return run(tiny_run(tmp_path_factory.mktemp("plain"), 2, layer_swap=True)).output_dir


@pytest.fixture
def config(plain, tmp_path) -> Path:
    """The same run, to be told."""
    shutil.copytree(plain.parent, tmp_path, dirs_exist_ok=True, ignore=lambda *_: ["out"])
    return tmp_path / "cfg.yaml"


def numbers(stub: Stub, tracker: str) -> list[tuple[int, dict[str, float]]]:
    """What was logged, step by step."""
    if tracker == "tensorboard":
        found: dict[int, dict[str, float]] = {}
        for (key, value, step), _ in stub.named("add_scalar"):
            found.setdefault(step, {})[key] = value
        return list(found.items())
    return [(keys["step"], args[0]) for args, keys in stub.named("log", "log_metrics")]


@pytest.mark.parametrize(
    ("tracker", "begins", "ends"),
    [
        ("trackio", "init", "finish"),
        ("wandb", "init", "finish"),
        ("mlflow", "start_run", "end_run"),
        ("tensorboard", "SummaryWriter", "close"),
    ],
)
def test_a_tracker_is_told_of_every_step_and_of_the_end(plain, config, monkeypatch, tracker, begins, ends):
    stub = Stub(tracker)
    monkeypatch.setitem(sys.modules, MODULES[tracker], stub)
    result = run(load_config(config, {"track": tracker}))
    called = [name for name, _, _ in stub.calls]
    assert begins in called[:2]
    assert called[-1] == ends
    *steps, (last, closing) = numbers(stub, tracker)
    assert [step for step, _ in steps] == list(range(1, len(result.record.steps) + 1))
    assert last == len(steps) + 1
    for (_, values), outcome in zip(steps, result.record.steps.values(), strict=True):
        assert values["score/sums.json"] == outcome.metrics["sums.json"][outcome.winner]
        assert values["changed"] == outcome.changed
    assert steps[-1][1]["evaluations"] == result.record.evaluations
    assert closing["holdout/merged/heldout.json"] == pytest.approx(result.holdout.rows["merged"]["heldout.json"])
    assert closing["selection/plain average/sums.json"] > 0
    for name in ("model.safetensors", "evaluations.jsonl", "report.html", "README.md"):  # nothing depends on it
        assert (result.output_dir / name).read_bytes() == (plain / name).read_bytes()


@pytest.mark.parametrize("tracker", ["trackio", "wandb", "mlflow", "tensorboard"])
def test_a_tracker_that_is_not_installed_is_named_before_anything_begins(config, monkeypatch, tracker, olmfast):
    monkeypatch.setitem(sys.modules, MODULES[tracker], None)
    for more in ([], ["--dry-run"]):
        code, out, err = olmfast("run", config, "--set", f"track={tracker}", "-q", *more)
        assert (code, out) == (2, "")
        assert f"track: {tracker} cannot be imported" in err
        assert f"pip install 'olmfast[{tracker}]'" in err
    assert not (config.parent / "out.partial").exists()


def test_a_tracker_that_fails_is_told_no_more_and_the_run_goes_on(plain):
    record, notes = Record.load(plain), []
    sent = []

    class Failing:
        def log(self, values: dict[str, float], step: int) -> None:
            sent.append((values, step))
            raise ConnectionError("no network")

        def end(self, summary: dict[str, float], step: int) -> None:
            sent.append((summary, step))

    tracking = Tracking(Failing, "wandb", record, notes.append)
    for outcome in record.steps.values():
        tracking.chosen(outcome)
    tracking.end()
    assert len(sent) == 1
    assert notes == ["track: wandb failed and is told no more: no network"]
    Tracking(lambda: 1 / 0, "mlflow", record, notes.append).end()
    assert notes[1:] == ["track: mlflow failed and is told no more: division by zero"]


def test_tensorboard_itself_reads_what_was_told(config):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    result = run(load_config(config, {"track": "tensorboard"}))
    events = accumulator.EventAccumulator(str(config.parent / "tensorboard" / "out"))
    events.Reload()
    told = events.Scalars("evaluations")
    assert [one.step for one in told] == list(range(1, len(result.record.steps) + 1))
    assert told[-1].value == result.record.evaluations


def test_an_unknown_tracker_is_an_error_of_the_config(config):
    with pytest.raises(InputError, match="track: expected 'trackio'"):
        load_config(config, {"track": "clearml"})
