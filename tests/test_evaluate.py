"""One number, wherever it is asked for: in a run, in its report, and of `olmfast evaluate`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from olmfast import load_config, run
from olmfast.config.datasets import read_dataset_option
from olmfast.errors import InputError
from olmfast.runs.scoreboard import Scoreboard, evaluate, evaluate_like
from olmfast.search.halves import Halves, set_aside
from olmfast.testing import tiny_model, tiny_run, write_choices

DATASETS = {
    "sums.json": {"mode": "exact_match", "think": False, "strict": True},
    "more.json": {"mode": "exact_match", "template": "raw", "samples": 4},
    "talk.json": {"mode": "diversity", "max_new_tokens": 8},
}
HOLDOUT = {"heldout.json": {"mode": "perplexity", "think": False}}


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of a run whose datasets ask in all ways."""
    folder = tmp_path_factory.mktemp("run")
    run(load_config(tiny_run(folder, 2, layer_swap=True, dataset=DATASETS, holdout=HOLDOUT)))
    return folder


def reported(folder: Path, part: str) -> dict[str, float]:
    return json.loads((folder / "out" / "merge_report.json").read_text())["olmfast"][part]["rows"]["merged"]


def digits(row: dict[str, float]) -> list[str]:
    """A row's scores as tables print them."""
    return [f"{score:.4f}" for score in row.values()]


def test_a_result_scores_in_evaluate_what_it_scored_in_its_run(finished, olmfast, monkeypatch):
    monkeypatch.chdir(finished)
    asked = [
        *("sums.json:exact_match,think=false,strict=true", "more.json:exact_match,template=raw,samples=4"),
        *("talk.json:diversity,max_new_tokens=8", "heldout.json:perplexity,think=false"),
    ]
    given = [part for entry in asked for part in ("--dataset", entry)]
    code, said, _ = olmfast("evaluate", "out", *given, "--json")
    assert code == 0
    board = json.loads(said)
    expected = digits(reported(finished, "selection")) + digits(reported(finished, "holdout"))
    assert digits(board["rows"]["out"]) == expected
    assert [len(scores) for scores in board["samples"]["out"].values()] == [6, 4, 3, 6]
    card = (finished / "out" / "README.md").read_text()
    assert all(score in card for score in expected)
    without = [entry.split(",")[0] for entry in asked]
    code, said, _ = olmfast("evaluate", "out", *[part for entry in without for part in ("--dataset", entry)], "--json")
    assert digits(json.loads(said)["rows"]["out"]) != expected  # these settings are what the number is of


def test_a_runs_config_says_how_any_model_is_scored(finished, olmfast, monkeypatch):
    monkeypatch.chdir(finished)
    models = ("--against", "models/donor0", "--against", "models/donor1")
    code, said, _ = olmfast("evaluate", "out", *models, "--config", "cfg.yaml", "--json")
    assert code == 0
    boards = json.loads(said)
    report = json.loads((finished / "out" / "merge_report.json").read_text())["olmfast"]
    for part in ("selection", "holdout"):
        for label, own in {"out": "merged", "models/donor1": "donor1", "plain average": "plain average"}.items():
            assert digits(boards[part]["rows"][label]) == digits(report[part]["rows"][own])
    code, said, _ = olmfast("evaluate", "out", "--config", "cfg.yaml")
    assert code == 0
    assert "Selection scores (lower is better)" in said
    assert "Held-out scores" in said


def test_a_joint_searchs_questions_that_are_set_aside_are_not_among_those_that_decided(tmp_path):
    path = tiny_run(tmp_path, 2, dataset={"own.json": {"mode": "choice"}}, holdout={}, validation=0.4, budget=8)
    write_choices(tmp_path / "own.json", tmp_path / "models" / "donor0")
    result = run(load_config(path))
    boards = evaluate_like(load_config(path), result.output_dir)
    assert list(boards) == ["selection"]
    assert boards["selection"].n_questions("own.json") == result.selection.n_questions("own.json") < 24
    assert digits(boards["selection"].rows[str(result.output_dir)]) == digits(result.selection.rows["merged"])


def test_a_model_of_another_kind_is_asked_with_its_own_tokenizer(finished, tmp_path):
    other = tiny_model(tmp_path / "other", "qwen2")
    said: list[str] = []
    boards = evaluate_like(load_config(finished / "cfg.yaml"), other, note=said.append)
    assert set(boards["selection"].rows) == {str(other)}
    assert said[0].startswith(f"{other} is asked with its own tokenizer: ")


@pytest.mark.parametrize(
    ("text", "file", "entry"),
    [
        ("a.json:exact", "a.json", {"mode": "exact"}),
        ("D:/x/a.json:exact,think=false", "D:/x/a.json", {"mode": "exact", "think": False}),
        ("a.json:quality,forbid=x:y,weight=2", "a.json", {"mode": "quality", "forbid": "x:y", "weight": 2}),
        ("a:exact,fields.prompt=q", "a", {"mode": "exact", "fields": {"prompt": "q"}}),
    ],
)
def test_a_dataset_option_says_all_that_an_entry_can(text, file, entry):
    assert read_dataset_option(text) == (file, entry)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--dataset", "a.json:exact,think"), "a.json:exact,think: expected KEY=VALUE after a comma, got 'think'"),
        (("--dataset", "a.json:exact,thinks=no"), "dataset.a.json.thinks: unknown key; did you mean 'think'?"),
        (("--dataset", "a.json:exact", "--dataset", "a.json:exact"), "--dataset a.json:exact: is given twice"),
        (("--limit", "3"), "--limit: is of --lm-eval alone"),
        (("--lm-eval", "x", "--samples", "3"), "--samples: --lm-eval has no use for it"),
        (("--lm-eval", "x", "--mmlu", "m"), "--lm-eval: --mmlu has no use for it"),
        ((), "evaluate: expected either --dataset FILE:MODE or --config CFG"),
        (("--dataset", "a.json:exact", "--config", "cfg.yaml"), "expected either --dataset FILE:MODE or --config CFG"),
    ],
)
def test_what_cannot_be_scored_is_named(finished, olmfast, monkeypatch, arguments, message):
    monkeypatch.chdir(finished)
    code, _, error = olmfast("evaluate", "out", *arguments)
    assert code == 2
    assert message in error


def test_one_file_is_scored_in_several_modes(finished, olmfast, monkeypatch):
    monkeypatch.chdir(finished)
    options = [f"--dataset=sums.json:{mode}" for mode in ("exact", "perplexity", "exact_match,strict=true")]
    code, shown, error = olmfast("evaluate", "out", *options, "--device", "cpu", "--json")
    assert code == 0, error
    names = ["sums.json:exact", "sums.json:perplexity", "sums.json:exact_match"]
    rows = json.loads(shown)["rows"]["out"]
    assert list(rows) == names
    for option, name in zip(options, names, strict=True):
        alone = json.loads(olmfast("evaluate", "out", option, "--device", "cpu", "--json")[1])["rows"]["out"]
        assert rows[name] == pytest.approx(alone["sums.json"], rel=1e-6)
    board = evaluate("out", {"sums.json": {"mode": ["exact", "perplexity"]}}, device="cpu")
    assert board.rows["out"] == pytest.approx({name: rows[name] for name in names[:2]}, rel=1e-6)


def test_the_modes_of_one_file_have_the_same_questions_set_aside_and_in_each_half(finished):
    data = load_config(finished / "cfg.yaml").model_dump(mode="json", include={"models", "models_dir", "dataset_dir"})
    twice, once = {"mode": ["exact", "perplexity"]}, {"mode": "exact"}
    config = load_config({**data, "dataset": {"sums.json": twice, "b.json": once}})
    assert list(config.dataset) == ["sums.json:exact", "sums.json:perplexity", "b.json"]
    sizes = dict.fromkeys(config.dataset, 20)
    kept, aside = set_aside(sizes, 0.2, config.seed, config.sources)
    first, second = Halves.of(sizes, config.seed, config.sources)
    for part in (kept, aside, first, second):
        assert part["sums.json:exact"] == part["sums.json:perplexity"]
    assert first["b.json"] != first["sums.json:exact"]
    alone = Halves.of({"sums.json": 20}, config.seed)  # as those of the file in one mode are
    assert first["sums.json:exact"] == alone.first["sums.json"]


def test_a_config_without_its_datasets_is_refused(finished, tmp_path):
    config = load_config(finished / "cfg.yaml", {"dataset_dir": str(tmp_path)})
    with pytest.raises(InputError, match=r"sums\.json: no such dataset file"):
        evaluate_like(config, finished / "out")


def test_skill_outside_its_range_has_a_word_of_explanation():
    def board(merged: float) -> Scoreboard:
        rows = {"a": {"d": 1.0}, "b": {"d": 2.0}, "merged": {"d": merged}}
        return Scoreboard(["a", "b"], rows)

    assert board(1.5).remark() == ""
    assert board(0.5).remark() == "skill retained above 1: better, on average, than the best donor of each dataset"
    assert board(2.5).remark() == "skill retained below 0: worse, on average, than the worst donor of each dataset"
