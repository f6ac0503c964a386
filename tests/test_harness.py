"""lm-evaluation-harness: its tasks as questions, and a model evaluated through it; from files, without a network."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from olmfast import run
from olmfast.config.datasets import DatasetConfig
from olmfast.config.run import load_config
from olmfast.errors import InputError
from olmfast.evaluation.encoding import load_datasets
from olmfast.evaluation.harness import conversations
from olmfast.pruning.prune import prune
from olmfast.runs.scoreboard import evaluate_like
from olmfast.testing import tiny_model, tiny_tokenizer

pytest.importorskip("lm_eval", reason="needs the extra eval: pip install -e '.[eval]'")

SPLITS = {"train": (20, 24), "validation": (50, 12), "test": (0, 10)}  # first number asked about, and how many


def sums(first: int, n: int) -> list[dict[str, object]]:
    """Sums with the right answer among four."""
    return [
        {
            "question": f"{k}+{k + 1}=",
            "choices": [str(2 * k + 1 + d) for d in range(4)],
            "label": 0,
            "answer": 2 * k + 1,
        }
        for k in range(first, first + n)
    ]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """What the package datasets keeps of files goes where it is forgotten."""
    import datasets

    with pytest.MonkeyPatch.context() as patch:
        place = tmp_path_factory.mktemp("cache")
        patch.setattr(datasets.config, "HF_DATASETS_CACHE", place)
        patch.setenv("HF_DATASETS_CACHE", str(place))
        patch.setenv("HF_HUB_OFFLINE", "1")
        yield place


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder of tasks: multiple choice, of letters, generated, with worked examples, and some without all splits."""
    folder = tmp_path_factory.mktemp("harness") / "tasks"
    folder.mkdir()
    files = {}
    for split, (first, n) in SPLITS.items():
        files[split] = str(folder / f"{split}.jsonl")
        Path(files[split]).write_text("".join(json.dumps(row) + "\n" for row in sums(first, n)))
    base = {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": files},
        "test_split": "test",
        "doc_to_text": "Sum: {{question}}",
        "metadata": {"version": 1.0},
    }
    splits = {"training_split": "train", "validation_split": "validation"}
    choice = {"output_type": "multiple_choice", "doc_to_choice": "{{choices}}", "doc_to_target": "{{label}}"}
    generated = {
        "output_type": "generate_until",
        "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4, "do_sample": False},
        "metric_list": [{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
    }
    accuracy = {"metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]}
    shots = {"num_fewshot": 2, "fewshot_split": "train", "fewshot_config": {"sampler": "first_n"}}
    made = {
        "tiny_choice": base | splits | choice | accuracy,
        "tiny_sums": base | splits | generated,
        "tiny_shots": base | splits | generated | shots,
        "tiny_letters": base | splits | choice | accuracy | {"doc_to_choice": ["A", "B", "C", "D"]},
        "tiny_said": base | splits | accuracy | {"output_type": "loglikelihood", "doc_to_target": " {{answer}}"},
        "tiny_only_test": base | choice | accuracy,
        "tiny_untested": {key: value for key, value in base.items() if key != "test_split"}
        | splits
        | choice
        | accuracy,
    }
    for name, config in made.items():
        (folder / f"{name}.yaml").write_text(yaml.safe_dump({"task": name, **config}))
    (folder / "both.yaml").write_text(yaml.safe_dump({"group": "tiny_both", "task": ["tiny_choice", "tiny_sums"]}))
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab", 1):
        tiny_model(folder / name, "llama", seed, max_position_embeddings=256)
    return folder


def asked(tasks: Path, **keys: object) -> list[tuple[str, str]]:
    entry = DatasetConfig.model_validate({"lm_eval_path": str(tasks), **keys})
    found, _ = conversations(entry, tasks)
    return [(one.messages[0]["content"], one.response) for one in found]


def test_a_tasks_documents_are_questions_with_the_right_answer(tasks):
    assert asked(tasks, lm_eval="tiny_choice", samples=2) == [("Sum: 50+51=", " 101"), ("Sum: 51+52=", " 103")]
    assert asked(tasks, lm_eval="tiny_sums", split="train")[0] == ("Sum: 20+21=", " 41")
    assert asked(tasks, lm_eval="tiny_said")[0] == ("Sum: 50+51=", " 101")
    assert len(asked(tasks, lm_eval="tiny_sums", split="test")) == 10
    context, answer = asked(tasks, lm_eval="tiny_shots", split="train")[0]
    assert (context.count("Sum: "), answer) == (3, " 41")
    assert context.count("20+21=") == 1  # among its own worked examples it is not
    assert asked(tasks, lm_eval="tiny_untested") == asked(tasks, lm_eval="tiny_untested", split="train")
    entry = DatasetConfig.model_validate({"lm_eval": "tiny_letters", "mode": "choice", "lm_eval_path": str(tasks)})
    (dataset,) = load_datasets(tasks, {"letters": entry}, tiny_tokenizer(), 256).values()
    assert len(dataset.samples[0].options) == 4
    assert [sample.number for sample in dataset.samples] == list(range(12))


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"lm_eval": "tiny_chioce"}, "no task is called 'tiny_chioce'; did you mean 'tiny_choice'?"),
        ({"lm_eval": "tiny_both"}, "tiny_both is a group of 2 tasks; name one, such as tiny_choice"),
        ({"lm_eval": "tiny_only_test"}, "tiny_only_test: has no other split; it has no split to search by"),
        ({"lm_eval": "tiny_only_test", "split": "train"}, "has no train split; it has no split to search by"),
        (
            {"lm_eval": "tiny_untested", "split": "validation"},
            "its validation split is what it is scored by; use split: ",
        ),
        ({"lm_eval": "tiny_choice", "mode": "choice"}, "its options are not the letters A, B, ...; use mode exact"),
    ],
)
def test_what_a_task_does_not_have_is_said(tasks, keys, message):
    with pytest.raises(InputError) as caught:
        asked(tasks, **keys)
    assert message in str(caught.value)


def texts(value: object) -> object:
    """Values as texts, as the harness logs them."""
    return [texts(part) for part in value] if isinstance(value, list) else str(value)


def test_figures_are_those_of_the_harness_own_command(tasks, models, tmp_path, olmfast, monkeypatch):
    monkeypatch.chdir(models)
    names = "tiny_choice,tiny_sums,tiny_shots"
    line = ("evaluate", "b", "--lm-eval", names, "--lm-eval-path", tasks, "--device", "cpu", "--dtype", "float32")
    code, shown, error = olmfast(*line, "--against", "a", "--json")
    assert code == 0, error
    told = json.loads(shown)
    arguments = ["--model", "hf", "--model_args", "pretrained=b,dtype=float32", "--tasks", names, "--device", "cpu"]
    arguments += ["--include_path", tasks, "--batch_size", 8, "--output_path", tmp_path / "theirs", "--log_samples"]
    command = [sys.executable, "-m", "lm_eval", "run", *map(str, arguments)]
    done = subprocess.run(command, cwd=models, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = (tmp_path / "theirs").rglob("results_*.json")
    theirs = json.loads(path.read_text())["results"]
    for task in names.split(","):
        own = {key: value for key, value in told["results"]["b"][task].items() if "," in key}
        assert own == {key: value for key, value in theirs[task].items() if "," in key}
        assert told["results"]["b"][task]["n"] == len(told["samples"]["b"][task]) == 10
        (logged,) = (tmp_path / "theirs").rglob(f"samples_{task}_*.jsonl")
        lines = sorted((json.loads(row) for row in logged.read_text().splitlines()), key=lambda row: row["doc_id"])
        ours = [texts(row["filtered_resps"]) for row in told["samples"]["b"][task]]
        assert ours == [texts(row["filtered_resps"]) for row in lines]
    assert "a" in told["results"]
    shown = olmfast(*line, "--limit", 4)[1]
    assert "at most 4 documents of each" in shown
    assert "± " in shown


def test_a_search_by_a_tasks_validation_ends_with_scores_of_its_test(tasks, models, tmp_path, olmfast):
    config = {
        "models": ["a", "b"],
        "models_dir": str(models),
        "output_dir": "out",
        "dataset": {"sums": {"lm_eval": "tiny_sums", "split": "validation", "mode": ["exact", "exact_match"]}},
        "holdout": {"lm_eval": "tiny_choice"},
        "lm_eval_path": str(tasks),
        "final_eval": {"tasks": ["tiny_choice", "tiny_sums"]},
        "budget": 4,
        "device": "cpu",
        "dtype": "float32",
    }
    (tmp_path / "cfg.yaml").write_text(yaml.safe_dump(config))
    result = run(load_config(tmp_path / "cfg.yaml"))
    assert result.selection.datasets == ["sums:exact", "sums:exact_match"]
    assert result.holdout.datasets == ["tiny_choice test"]
    assert {result.holdout.n_questions(name) for name in result.holdout.datasets} == {10}
    assert set(result.holdout.rows) >= {"a", "b", "merged"}
    assert list(result.final_eval.rows) == ["a", "b", "merged"]
    code, shown, error = olmfast(
        "evaluate", tmp_path / "out", "--lm-eval", "tiny_choice", "--lm-eval-path", tasks, "--json"
    )
    assert code == 0, error
    own = json.loads(shown)["results"][str(tmp_path / "out")]["tiny_choice"]
    assert own["acc,none"] == result.final_eval.rows["merged"]["tiny_choice"]["acc,none"]
    boards = evaluate_like(load_config(tmp_path / "cfg.yaml"), tmp_path / "out")
    (score,) = boards["holdout"].rows[str(tmp_path / "out")].values()
    assert score == pytest.approx(result.holdout.rows["merged"]["tiny_choice test"], rel=1e-5)


def test_a_pruning_search_goes_by_a_task_too(tasks, models, tmp_path):
    config = {
        "models": ["a"],
        "models_dir": str(models),
        "output_dir": str(tmp_path / "out"),
        "dataset": {"said": {"lm_eval": "tiny_said", "lm_eval_path": str(tasks)}},
        "holdout": {"choice": {"lm_eval": "tiny_letters", "mode": "likelihood", "lm_eval_path": str(tasks)}},
        "budget": 3,
        "device": "cpu",
        "prune": {"method": "cma", "num_layer": 1},
    }
    done = prune(config)
    assert {done.holdout.n_questions(name) for name in done.holdout.datasets} == {10}
    assert {done.closing.kept.n_questions(name) for name in done.closing.kept.datasets} == {10}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"final_eval": "tiny_chioce"}, "lm_eval: no task is called 'tiny_chioce'"),
        ({"final_eval": {"tasks": ["tiny_sums"], "limit": 1.5}}, "limit 1.5: expected a number of documents"),
        ({"dataset": {"lm_eval": "tiny_sums", "split": "test"}}, "split: test is what a task is scored by"),
        ({"dataset": {"lm_eval": "tiny_only_test"}}, "tiny_only_test: has no other split"),
    ],
)
def test_what_a_run_cannot_ask_is_named_before_it_begins(tasks, models, tmp_path, change, message):
    config = {
        "models": ["a", "b"],
        "models_dir": str(models),
        "output_dir": str(tmp_path / "out"),
        "dataset": {"lm_eval": "tiny_sums"},
        "lm_eval_path": str(tasks),
        "device": "cpu",
    }
    with pytest.raises(InputError) as caught:
        run(load_config({**config, **change}))
    assert message in str(caught.value)
    assert not (tmp_path / "out").exists()
