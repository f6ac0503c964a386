"""The log of a run: what it holds, what a kill or damage does to it, how it grows, and the report made from it."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from olmfast import load_config, run
from olmfast.config.run import RunConfig
from olmfast.errors import InputError, Interrupted
from olmfast.evaluation.encoding import load_datasets
from olmfast.evaluation.open import load_tokenizer
from olmfast.runs.original import Choices
from olmfast.search.log import Change, Outcome, RunEntry, Standing, StepEntry, ValuesEntry, parse, sealed
from olmfast.search.record import Record, _as_the_original
from olmfast.testing import tiny_run
from olmfast.weights.expressions import Copy, Stored, merge, whole
from olmfast.weights.recipe import Recipe

METRICS = {"sums.json": {"donor0": 0.1 + 0.2, "donor1": None}}
OUTCOME = Outcome("layers", "0", "donor0", False, METRICS, {"donor1": "scored NaN"})
BLEND = merge("ties", [Copy("donor0", "a"), Stored("refined/x", "a", "0f")], Copy("donor0", "a"), density=0.5)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run with all stages."""
    stages = {"boundary_select": True, "layer_swap": True, "tensor_swap": True, "es_svd": True, "es_norm": True}
    path = tiny_run(tmp_path_factory.mktemp("finished"), units=["*.0.self_attn.q_proj"], **stages)
    return run(load_config(path)).output_dir


def lines(folder: Path) -> list[bytes]:
    return (folder / "steps.jsonl").read_bytes().splitlines(keepends=True)


def report(folder: Path) -> dict:
    return json.loads((folder / "merge_report.json").read_text())


def begun(folder: Path, n_tensors: int = 3, n_questions: int = 2, **keys) -> Record:
    """A record whose first step, which names all tensors and questions, has been taken."""
    record = Record.create(folder, {"config": {}}, **keys)
    record.add("base", OUTCOME, standing(n_tensors, n_questions), 3, 0.5)
    return record


def standing(n_tensors: int, n_questions: int) -> Standing:
    recipe = whole("donor0", tuple(f"model.layers.{index}.weight" for index in range(n_tensors)))
    scores = {"talk.json": [[[index / 7 for index in range(n_questions)]], [[0] * n_questions]]}
    return Standing(recipe, scores, {f"talk.json/{index}": [[5, 6, 7], [5, 6, 8]] for index in range(n_questions)})


def assert_same(one: Record, other: Record) -> None:
    assert one.data == other.data
    assert one.standing == other.standing


# What it holds


@pytest.mark.parametrize(
    "entry",
    [
        RunEntry({"config": {"seed": 0}, "donors": {"donor0": "0f"}}),
        StepEntry("layers/0", OUTCOME, 7, 1.25, 400, Change(Recipe("donor0", {"a": Copy("donor1", "a"), "b": BLEND}))),
        StepEntry("layers/1", OUTCOME, 7, 1.25, 400, Change(None, Recipe("donor0", {"b": BLEND}), {"x": [[1.5], [0]]})),
        StepEntry("layers/2", OUTCOME),
        ValuesEntry({"status": "stopped"}, Change(scorer={"talk.json/0": [[1, 2], None], "talk.json/1": None})),
    ],
)
def test_an_entry_comes_back_from_its_json_as_it_was(entry):
    assert parse(json.loads(json.dumps(entry.to_json()))) == entry


def test_a_record_that_is_loaded_is_the_one_that_was_written(tmp_path):
    record = begun(tmp_path)
    recipe = record.recipe.with_values({"model.layers.1.weight": BLEND})
    scorer = {"talk.json/1": [[1], None], "talk.json/9": [[], []]}  # one changes, one goes, one is new
    assert recipe != record.recipe
    record.add("layers/0", OUTCOME, Standing(recipe, {}, scorer), 5, 1.23456)
    record.update(holdout={"rows": {"merged": {"sums.json": float("nan")}}}, donors=("a", "b"))
    assert record.standing == Standing(recipe, {}, scorer)
    assert record.values == {"holdout": {"rows": {"merged": {"sums.json": None}}}, "donors": ["a", "b"]}
    assert (record.evaluations, record.elapsed_s) == (5, 1.235)
    assert_same(Record.load(tmp_path), record)


def test_what_training_goes_on_from_is_written_when_it_changes_and_read_back(tmp_path):
    record = begun(tmp_path)
    one, two = whole("donor0", ("a", "b")), whole("donor1", ("a", "b"))
    kept = replace(record.standing, lines=(one, two), crossed={"a": ["float64", [[0.1, 1 / 3]], [[0, 1]]]})
    for index, now in enumerate((kept, kept, replace(kept, lines=(), crossed={}))):
        record.add(f"layers/{index}", OUTCOME, now, 5, 1.0)
        assert Record.load(tmp_path).standing == record.standing == now
    written = [json.loads(line)["change"].keys() & {"lines", "crossed"} for line in lines(tmp_path)[-3:]]
    assert written == [{"lines", "crossed"}, set(), {"lines", "crossed"}]


@pytest.mark.parametrize(
    "changed",
    [whole("donor1", ("a", "b")), whole("donor0", ("a",)), whole("donor0", ("a", "b", "c"))],
    ids=["another base", "a tensor fewer", "a tensor more"],
)
def test_a_recipe_that_differs_in_more_than_expressions_is_written_whole(changed):
    before = Standing(whole("donor0", ("a", "b")))
    change = before.change_to(Standing(changed))
    assert change == Change(changed)
    assert before.changed_by(change).recipe == changed


def test_a_recipe_set_by_no_step_is_recorded_and_has_no_scores_yet(tmp_path):
    record = begun(tmp_path)
    scorer = record.standing.scorer
    record.update(record.recipe, account="all")
    assert record.standing == standing(3, 2)
    record.update(whole("donor1", ("a",)))
    assert Record.load(tmp_path).standing == Standing(whole("donor1", ("a",)), {}, scorer)


def test_a_scorers_state_has_an_entry_per_question_that_runs_freely_and_goes_back_as_it_was(tmp_path):
    from olmfast.evaluation.batched import BatchedScorer
    from olmfast.evaluation.model import WorkingModel
    from olmfast.evaluation.scorer import Candidate
    from olmfast.weights.pool import Pool
    from olmfast.weights.sources import Sources

    config = load_config(tiny_run(tmp_path))
    pool = Pool.open(config.models, config.models_dir, config.config_dir)
    tokenizer, stops = load_tokenizer(pool["donor0"])
    datasets = load_datasets(config.dataset_dir, config.dataset, tokenizer, 128)
    model = WorkingModel(whole("donor0", pool.tensors), Sources(pool, tmp_path), torch.device("cpu"), torch.float32)
    first, second = (BatchedScorer(model, datasets, tokenizer, stops, 512) for _ in range(2))
    unit = pool.architecture.model_unit(pool.tensors)
    first.score(unit, [Candidate("current")])
    keys = {f"{name}/{index}" for name, n in (("sums.json", 6), ("talk.json", 3)) for index in range(n)}
    assert set(first.state) == set(second.state) == keys
    assert first.state != second.state
    second.state = json.loads(json.dumps(first.state))
    assert second.state == first.state


# Kills and damage


def test_wherever_a_kill_cuts_the_last_line_what_was_before_it_counts(tmp_path):
    record = begun(tmp_path)
    before, complete = record.data, len(b"".join(lines(tmp_path)))
    record.update(status="stopped")
    content = (tmp_path / "steps.jsonl").read_bytes()
    for end in range(complete, len(content)):
        (tmp_path / "steps.jsonl").write_bytes(content[:end])
        assert Record.load(tmp_path).data == before
    for tail in (b"\0\0\0", b'{"half\n', b"\xff\n"):
        (tmp_path / "steps.jsonl").write_bytes(content[:complete] + tail)
        again = Record.load(tmp_path)
        assert again.data == before
        again.update(status="stopped")
        assert (tmp_path / "steps.jsonl").read_bytes() == content


def test_a_write_that_failed_halfway_leaves_nothing_for_the_next(tmp_path):
    record = begun(tmp_path)
    with (tmp_path / "steps.jsonl").open("ab") as file:
        file.write(b'{"entry": "values", "val')
    record.update(status="stopped")
    assert_same(Record.load(tmp_path), record)
    for line in lines(tmp_path):
        json.loads(line)


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        (b'{"entry": "st', "is damaged: Unterminated string"),
        (b"", "is damaged: Expecting value"),
        (b"\xff", "is damaged: 'utf-8' codec"),
        (b"[]", "is damaged: list indices must be"),
        (b'{"entry": "step", "key": "layers/0"}', "is damaged: has no 'evaluations'"),
        (b'{"entry": "run", "format": 1, "header": {}}', "is damaged: the entry 'run' belongs in the first line"),
        (b'{"entry": "dream"}', "unknown entry 'dream'; it was written by a newer version"),
        (
            b'{"entry": "values", "values": {}, "change": {"part": {"version": 1, "base": "x", "tensors": {"a": {}}}}}',
            "recipe: ",
        ),
        (
            b'{"entry": "values", "values": {}, "change": {"part": '
            b'{"version": 1, "base": "x", "config_edits": {}, "tensors": {}}}}',
            "is damaged: changes",
        ),
    ],
)  # fmt: skip
def test_damage_before_the_last_line_is_an_error_that_names_the_line(tmp_path, line, reason):
    begun(tmp_path)
    first, *others = lines(tmp_path)
    whole, _ = sealed(line, json.loads(first)["seal"]) if line.endswith(b"}") else (line + b"\n", "")
    (tmp_path / "steps.jsonl").write_bytes(b"".join([first, whole, *others]))
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'steps.jsonl'}: line 2: {reason}")):
        Record.load(tmp_path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "holds no whole line"),
        (b'{"entry": "run"', "holds no whole line"),
        (b'{"entry": "run"\n', "line 1: is damaged: Expecting"),
        (b'{"entry": "values", "values": {}, "change": {}}\n', "line 1: is damaged: the entry 'run' belongs in"),
        (b'{"entry": "run", "format": 2, "header": {}}\n', "line 1: has format 2, but this version reads format 1"),
    ],
)
def test_a_log_without_its_first_line_is_an_error(tmp_path, content, reason):
    whole = content.endswith(b"}\n")
    (tmp_path / "steps.jsonl").write_bytes(sealed(content, "")[0] if whole else content)
    with pytest.raises(InputError, match=re.escape(f"{tmp_path / 'steps.jsonl'}: {reason}")):
        Record.load(tmp_path)


@pytest.mark.parametrize("place", ["out", "out.partial"])
def test_a_report_of_ours_without_its_log_is_refused_and_left_as_it_is(tmp_path, place):
    config = tiny_run(tmp_path, layer_swap=True)
    folder = tmp_path / place
    if place == "out":
        run(load_config(config))
    else:
        interrupted(load_config(config), 2)
    (folder / "steps.jsonl").unlink()
    before = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    message = f"{folder / 'steps.jsonl'}: is missing, and merge_report.json alone cannot be continued; put it back"
    with pytest.raises(InputError, match=re.escape(message)):
        run(load_config(config), resume=True)
    assert {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    assert place == "out.partial" or not (tmp_path / "out.partial").exists()
    assert run(load_config(config), overwrite=True).status == "finished"


def interrupted(config: RunConfig, after: int) -> None:
    asked = iter([False] * after)
    with pytest.raises(Interrupted):
        run(config, stop_requested=lambda: next(asked, True))


def test_a_report_that_is_behind_its_log_does_no_harm(tmp_path, finished):
    """As a SIGKILL leaves it: written when the run began, and not since."""
    stale = Record(finished)
    stale.header = Record.load(finished).header
    out, partial = tmp_path / "out", tmp_path / "out.partial"
    config = load_config(finished.parent / "cfg.yaml", {"output_dir": str(out)})
    interrupted(config, 4)
    assert len(report(partial)["olmfast"]["steps"]) == 4
    (partial / "merge_report.json").write_text(json.dumps(stale.data))
    run(config, resume=True)
    assert report(out)["olmfast"]["steps"] == report(finished)["olmfast"]["steps"]
    assert (out / "model.safetensors").read_bytes() == (finished / "model.safetensors").read_bytes()
    # Between the last line and the report, just before the folder gets its name:
    complete = (out / "merge_report.json").read_bytes()
    out.rename(partial)
    (partial / "merge_report.json").write_text(json.dumps(stale.data))
    assert run(config, resume=True).status == "finished"
    assert (out / "merge_report.json").read_bytes() == complete


def test_a_run_that_stopped_after_changing_its_base_goes_on_as_one_that_did_not_stop(tmp_path):
    """The scores of the base that was left are not those of the one that was taken."""
    path = tiny_run(tmp_path, layer_swap=True, base_select=True, base_model_name="donor2")
    straight = run(load_config(path, {"output_dir": "straight"}))
    stopped = run(load_config(path, {"budget": 3}))
    assert stopped.status == "stopped"
    assert stopped.recipe.base == straight.recipe.base != "donor2"
    resumed = run(load_config(path, {"budget": 1000}), resume=True)
    assert resumed.record.steps == straight.record.steps


# How it grows


def test_a_step_that_changes_nothing_adds_the_same_short_line_however_large_the_model(tmp_path):
    sizes = {}
    for size in (3, 3000):
        record = begun(tmp_path / str(size), size, size)
        for index in range(3):
            record.add(f"layers/{index}", OUTCOME, standing(size, size), 7, 1.0)
        sizes[size] = [len(line) for line in lines(record.folder)[2:]]
        assert_same(Record.load(record.folder), record)
    assert sizes[3] == sizes[3000]
    assert max(sizes[3]) < 400


def test_the_log_grows_by_what_each_step_changes(tmp_path):
    """Two tensors and one question's tokens in each step, of 2,000 each."""
    size = 2000
    record = begun(tmp_path, size, size)
    now = standing(size, size)
    for index in range(40):
        values = {f"model.layers.{number}.weight": Copy("donor1", "x") for number in (100 + index, 200 + index)}
        scorer = {**now.scorer, f"talk.json/{100 + index}": [[9, 9, 9], [9, 9, 8]]}
        now = Standing(now.recipe.with_values(values), now.scores, scorer)
        record.add(f"layers/{100 + index}", OUTCOME, now, 100 + index, 1.5)
    sizes = [len(line) for line in lines(tmp_path)[2:]]
    assert len(sizes) == 40
    assert max(sizes) - min(sizes) == 0
    assert max(sizes) < 700
    assert_same(Record.load(tmp_path), record)


def test_a_whole_runs_lines_are_of_its_steps_and_not_of_its_model(finished):
    entries = [json.loads(line) for line in lines(finished)]
    steps = [entry for entry in entries if entry["entry"] == "step"]
    names = [set(step["change"].get("part", {"tensors": {}})["tensors"]) for step in steps]
    assert "recipe" in steps[0]["change"]
    assert not any("recipe" in step["change"] for step in steps[1:])
    for step, changed in zip(steps, names, strict=True):
        assert bool(changed) == step["outcome"]["changed"]
        if step["outcome"]["stage"] in ("svd_es", "norm_es", "tensors"):
            assert changed <= {f"{step['outcome']['unit']}.weight"}
    kept = [step for step in steps[1:] if not step["outcome"]["changed"]]
    assert kept
    assert not any("scores" in step["change"] for step in kept)


# The report


def test_the_report_has_the_originals_layout_and_beside_it_what_olmfast_knows(finished):
    data = report(finished)
    assert list(data) == ["base_model", "boundary_layers", "layers", "tensors", "olmfast"]
    datasets, donors = {"sums.json", "more.json", "talk.json"}, {"donor0", "donor1", "donor2"}
    assert set(data["base_model"]) == {"name", "metrics"}
    assert set(data["base_model"]["metrics"]) == datasets
    assert all(isinstance(value, float) for value in data["base_model"]["metrics"].values())
    assert set(data["boundary_layers"]) == {"name", "metrics"}
    assert set(data["layers"]) == {"0", "1"}
    assert all(isinstance(value, float) for value in data["boundary_layers"]["metrics"].values())
    assert set(data["boundary_layers"]["metrics"]) == datasets
    for entry in [*data["layers"].values(), *data["tensors"].values()]:
        assert set(entry["metrics"]) == datasets
        for by_model in entry["metrics"].values():
            assert donors >= set(by_model)
            assert all(isinstance(value, float) for value in by_model.values())
    for entry in data["layers"].values():
        assert set(entry) == {"metrics", "best_model"}
        assert entry["best_model"] in donors
    (refined,) = data["tensors"].values()
    assert list(data["tensors"]) == ["model.layers.0.self_attn.q_proj.weight"]
    assert set(refined) == {"metrics", "best_model", "svd_es", "norm_es"}
    assert all(set(entry) == {"winner", "changed"} for entry in refined["svd_es"] + refined["norm_es"])
    assert list(data["olmfast"]) == [
        *("version", "config", "places", "donors", "tokenizer", "datasets", "samples", "left_out", "environment"),
        *("status", "steps", "recipe", "evaluations", "ledger_bytes", "elapsed_s"),
        *("donors_holdout", "selection", "holdout", "recipe_digest", "account", "verdict", "answers", "expected"),
    ]
    for step in data["olmfast"]["steps"].values():
        keys = ["stage", "unit", "winner", "changed", "metrics", "dropped", "order", "truncated"]
        assert list(step) == [*keys, "gain", "tested", "spans"]
    assert set(data["olmfast"]["recipe"]) >= {"base", "tensors"}
    assert data["olmfast"]["ledger_bytes"] == (finished / "evaluations.jsonl").stat().st_size


def test_the_original_reads_the_report(finished):
    """Its reader wants a name and flat metrics, blocks by number, and tensors by the names they have in a file."""
    data = report(finished)
    held = {name for path in (finished.parent / "models").glob("donor0/*.safetensors") for name in load_file(path)}
    for part in (data["base_model"], data["boundary_layers"]):
        assert isinstance(part["name"], str)
        assert all(isinstance(value, float) for value in part["metrics"].values())
    assert all(name.isdecimal() and isinstance(e["best_model"], str) for name, e in data["layers"].items())
    assert data["tensors"].keys() <= held
    assert all(isinstance(entry["best_model"], str) for entry in data["tensors"].values())
    choices = Choices.read({key: data[key] for key in ("base_model", "boundary_layers", "layers", "tensors")})
    assert choices.layers == {int(i): e["best_model"] for i, e in data["layers"].items()}
    assert list(choices.tensors) == ["model.layers.0.self_attn.q_proj"]


def test_what_the_original_has_no_name_for_is_not_in_its_part_of_the_report():
    outcomes = {
        "base": Outcome("base", "base", "a", False, {"d": {"a": 1.0}}),
        "layers/0": Outcome("layers", "0", "linear 0.5 b", True, {"d": {"a": 1.0, "linear 0.5 b": 0.5}}),
        "layers/1+2": Outcome("layers", "1+2", "a + b", True, {"d": {"a + a": 1.0, "a + b": 0.5}}),
        "tensors/h.0.q/svd_es/0": Outcome("svd_es", "h.0.q", "svd_es/0/1", True, {}),
    }
    data = _as_the_original(outcomes, ["a", "b"])
    assert {block: entry["best_model"] for block, entry in data["layers"].items()} == {"1": "a", "2": "b"}
    assert data["tensors"] == {}


def test_the_log_has_a_line_with_its_time_for_all_that_a_verbose_terminal_says(finished):
    lines = (finished / "run.log").read_text().splitlines()
    told = [re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d[+-]\d\d:\d\d (.+)", line)[1] for line in lines]
    assert told[0].startswith("olmfast ")
    for outcome in Record.load(finished).steps.values():
        assert any(line.startswith(f"{outcome.stage} {outcome.unit}: {outcome.winner}") for line in told)
    assert any("tensors written" in line for line in told)
    assert told[-1].startswith("finished: ")


def test_the_log_of_a_run_that_was_stopped_says_why_and_the_next_session_goes_on_with_it(tmp_path):
    config = load_config(tiny_run(tmp_path, layer_swap=True))
    interrupted(config, 2)
    before = (tmp_path / "out.partial" / "run.log").read_text()
    assert "stopped on request" in before.splitlines()[-1]
    run(config, resume=True)
    after = (tmp_path / "out" / "run.log").read_text()
    assert after.startswith(before)
    assert f"continues: {tmp_path / 'out'}" in after


def test_no_share_of_cut_off_texts_is_told_of_what_was_not_evaluated(tmp_path):
    config = load_config(tiny_run(tmp_path, layer_swap=True, improve_all="all"))
    steps = run(config).record.steps
    unscored = [(o, label) for o in steps.values() for label, x in o.metrics.get("talk.json", {}).items() if x is None]
    assert unscored
    for outcome, label in unscored:
        assert label not in outcome.truncated.get("talk.json", {})


def test_the_report_is_what_the_log_says(finished):
    text = (finished / "merge_report.json").read_text()
    assert json.dumps(Record.load(finished).data, indent=1, ensure_ascii=False, allow_nan=False) == text


def test_the_report_is_written_when_the_run_begins_and_then_every_thirty_seconds_at_most(tmp_path):
    now = 100.0
    record = Record.create(tmp_path, {"config": {}}, clock=lambda: now)
    written = []
    for now in (101.0, 129.9, 130.0, 131.0, 159.0, 161.0):
        record.add(f"layers/{now}", OUTCOME, standing(2, 2), 1, now)
        written.append([*report(tmp_path)["olmfast"]["steps"]])
        assert f"layers/{now}" in Record.load(tmp_path).steps
    assert [len(steps) for steps in written] == [0, 0, 3, 3, 3, 6]


def test_an_interrupted_run_leaves_a_report_of_all_its_steps(tmp_path):
    config = tiny_run(tmp_path, layer_swap=True)
    interrupted(load_config(config), 2)
    assert list(report(tmp_path / "out.partial")["olmfast"]["steps"]) == ["base", "layers/0"]
    assert report(tmp_path / "out.partial") == Record.load(tmp_path / "out.partial").data


def test_a_run_that_goes_on_after_its_budget_says_that_it_is_running(tmp_path):
    config = tiny_run(tmp_path, layer_swap=True)
    assert run(load_config(config, {"budget": 5})).status == "stopped"
    with pytest.raises(Interrupted):
        run(load_config(config), resume=True, stop_requested=lambda: True)
    assert report(tmp_path / "out")["olmfast"]["status"] == "stopped"
    assert report(tmp_path / "out.partial")["olmfast"]["status"] == "running"


def test_whoever_reads_a_record_knows_every_kind_of_expression():
    """In a process that has imported nothing else: rebuilding and resuming read recipes of every kind."""
    code = """
import importlib, pkgutil
import olmfast.search.record, olmfast.weights
from olmfast.weights.sources import Expression
known = set(Expression.kinds)
for module in pkgutil.iter_modules(olmfast.weights.__path__, "olmfast.weights."):
    importlib.import_module(module.name)
assert known == set(Expression.kinds), set(Expression.kinds) - known
"""
    subprocess.run([sys.executable, "-c", code], check=True)
