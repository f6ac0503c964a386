"""MMLU: its folder read whole, asked as the paper or as pruning by merging does, scored as one question is."""

from __future__ import annotations

import csv
import json
import math
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from olmfast.evaluation.mmlu import header, read_mmlu
from olmfast.runs.mmlu import Compared, evaluate_mmlu
from olmfast.testing import FAMILIES, tiny_model, write_mmlu

REAL = Path(os.environ.get("OLMFAST_MMLU", "absent"))  # where the real files are
SUBJECTS = {"abstract_algebra": 7, "virology": 5}
LONG = {"max_position_embeddings": 1024, "n_positions": 1024}


@pytest.fixture
def data(tmp_path):
    """Two subjects, one of whose questions has cells that look like no text."""
    write_mmlu(tmp_path / "data", SUBJECTS)
    with (tmp_path / "data/test/virology_test.csv").open("a", newline="") as file:
        csv.writer(file).writerow(["Which, in\ntwo lines?", "None", "TRUE", "", "3.10", "B"])
    return tmp_path / "data"


def model(folder, family="llama", **keys):
    positions = {"n_positions": 1024} if family in ("gpt2", "gptj") else {"max_position_embeddings": 1024}
    return str(tiny_model(folder, family, 3, **positions, **keys))


def alone(folder, data, subject, style, shots):
    """Accuracy and perplexity of a subject by an independent script, a question at a time, as the formulas say."""
    module = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    space, bare = ("  ", "") if style == "seed" else (" ", " ")

    def asked(row):
        cells = ["nan" if style == "seed" and cell in ("None", "") else cell for cell in row[:5]]
        listed = "".join(f"\n{letter}. {cell}" for letter, cell in zip("ABCD", cells[1:], strict=True))
        return f"{cells[0]}{listed}\nAnswer:"

    def rows(split):
        with (data / split / f"{subject}_{split}.csv").open(newline="") as file:
            return list(csv.reader(file))

    before = f"The following are multiple choice questions (with answers) about{space}{subject.replace('_', ' ')}.\n\n"
    before += "".join(f"{asked(row)} {row[5]}\n\n" for row in rows("dev")[:shots])
    right, losses = [], []
    for row in rows("test"):
        ids = tokenizer(before + asked(row))["input_ids"]
        if bare:  # one character is one token of the tests' tokenizer, a space too
            ids = [*ids, *tokenizer(" ")["input_ids"]]
        logits = module(torch.tensor([ids])).logits[0, -1]
        letters = [tokenizer(letter)["input_ids"][-1] for letter in "ABCD"]
        right.append("ABCD"[int(logits[letters].argmax())] == row[5])
        text = torch.tensor([tokenizer(asked(row))["input_ids"]])
        losses.append(module(text, labels=text).loss.item())
    return sum(right) / len(right), math.exp(sum(losses) / len(losses))


@pytest.mark.parametrize(("style", "shots"), [("seed", 5), ("spaced", 5), ("seed", 0)])
def test_scores_are_those_of_one_question_at_a_time(tmp_path, data, style, shots):
    name = model(tmp_path / "m")
    board = evaluate_mmlu(name, data, style=style, shots=shots, device="cpu")
    expected = {subject: alone(name, data, subject, style, shots) for subject in SUBJECTS}
    for subject, (accuracy, perplexity) in expected.items():
        assert board.subjects[subject].accuracy == pytest.approx(accuracy)
        assert board.subjects[subject].perplexity == pytest.approx(perplexity, rel=1e-4)
    results = board.results()
    assert results["average_accuracy"] == pytest.approx(sum(a for a, _ in expected.values()) / 2)
    assert results["average_perplexity"] == pytest.approx(sum(p for _, p in expected.values()) / 2, rel=1e-4)
    assert sorted(results) == [
        "average_accuracy", "average_perplexity", "per_subject_accuracy", "per_subject_perplexity",
    ]  # fmt: skip


@pytest.mark.parametrize("family", list(FAMILIES))
def test_the_beginning_that_prompts_share_is_run_once_and_changes_nothing(tmp_path, data, family, monkeypatch):
    name = model(tmp_path / "m", family)
    shared = evaluate_mmlu(name, data, device="cpu", dtype="float64", subjects=["virology"]).subjects["virology"]
    monkeypatch.setattr("olmfast.evaluation.letters._n_shared", lambda _: 0)
    plain = evaluate_mmlu(name, data, device="cpu", dtype="float64", subjects=["virology"]).subjects["virology"]
    assert shared.loss == pytest.approx(plain.loss, rel=1e-4)  # attention is computed in float32 by some
    assert shared.accuracy == plain.accuracy


def test_only_a_questions_own_tokens_are_run_for_it(tmp_path, data, monkeypatch):
    from olmfast.evaluation import letters

    widths = []
    run = letters._run
    monkeypatch.setattr(letters, "_run", lambda *given: widths.append(max(map(len, given[1]))) or run(*given))
    evaluate_mmlu(model(tmp_path / "m"), data, subjects=["virology"], device="cpu")
    assert widths[0] > 300  # the worked examples, once
    assert all(width < 80 for width in widths[1:])


def test_a_prompt_too_long_for_the_context_has_fewer_examples(tmp_path, data, olmfast):
    name = str(tiny_model(tmp_path / "m", max_position_embeddings=256))
    told = json.loads(olmfast("evaluate", name, "--mmlu", data, "--json", "--device", "cpu")[1])
    assert told["fewer_shots"] == told["questions"]
    assert "had fewer worked examples" in olmfast("evaluate", name, "--mmlu", data, "--device", "cpu")[1]
    short = str(tiny_model(tmp_path / "short", max_position_embeddings=32))
    code, _, error = olmfast("evaluate", short, "--mmlu", data, "--device", "cpu")
    assert (code, "longer than the model's context of 32 tokens" in error) == (2, True)


def test_cells_are_text_whatever_they_look_like(data):
    *_, last = read_mmlu(data, ["virology"])[0].questions
    assert last.text == "Which, in\ntwo lines?\nA. None\nB. TRUE\nC. \nD. 3.10\nAnswer:"
    *_, last = read_mmlu(data, ["virology"], style="seed")[0].questions
    assert last.text == "Which, in\ntwo lines?\nA. nan\nB. TRUE\nC. nan\nD. 3.10\nAnswer:"
    assert header("high_school_physics", "seed").endswith("about  high school physics.\n\n")
    assert header("high_school_physics").endswith("about high school physics.\n\n")


def test_a_table_says_how_it_was_asked_and_compares_with_other_results(tmp_path, data, olmfast):
    name = model(tmp_path / "m")
    out = olmfast("evaluate", name, "--mmlu", data, "--mmlu-as", "seed", "--json", "--device", "cpu")[1]
    (tmp_path / "base").mkdir()
    (tmp_path / "base/mmlu_results.json").write_text(out)
    told = json.loads(out)
    low, high = told["interval"]
    spread = sum(a * (1 - a) / (n - 1) for a, n in zip(told["per_subject_accuracy"].values(), (7, 6), strict=True))
    assert high - low == pytest.approx(2 * 1.96 * math.sqrt(spread) / 2)
    lesser = {**told, "per_subject_accuracy": {"virology": 0.0, "anatomy": 1.0}}
    (tmp_path / "other_results.json").write_text(json.dumps(lesser))
    files = (tmp_path / "base/mmlu_results.json", tmp_path / "other_results.json")
    shown = olmfast(
        "evaluate", name, "--mmlu", data, "--mmlu-as", "seed", "--device", "cpu", "--compare", *files
    )[1]  # fmt: skip
    assert "2 subjects, 13 questions, 5 worked examples, bare letters (A), the prompt of pruning by merging" in shown
    assert "compared with base: +0.0000 accuracy on 2 subjects" in shown
    gain = told["per_subject_accuracy"]["virology"]
    assert f"{gain:+.4f} accuracy on 1 subjects" in shown
    assert Compared.read(files[1]).gain(evaluate_mmlu(name, data, style="seed", device="cpu"))[0] == pytest.approx(gain)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--mmlu", "nowhere"), "nowhere: is no folder of MMLU"),
        (("--mmlu", "data", "--subjects", "virologie"), "no subject 'virologie'; did you mean 'virology'?"),
        (("--mmlu", "data", "--subjects", ","), "--subjects: expected names of subjects"),
        (("--mmlu", "data", "--shots", "6"), "holds 5 worked examples, and 6 shots are asked for"),
        (("--mmlu", "data", "--mmlu-as", "seeds"), "--mmlu-as seeds: expected spaced or seed"),
        (("--mmlu", "data", "--compare", "absent.json"), "absent.json: cannot be read"),
        (("--mmlu", "data", "--compare", "m/config.json"), "m/config.json: is no mmlu_results.json"),
        (("--mmlu", "odd"), "x_test.csv:1: expected question, A, B, C, D and the answer's letter, got ['q', 'a']"),
        (("--mmlu", "data", "--dataset", "a.json:exact"), "--dataset: --mmlu has no use for it"),
        (("--dataset", "a.json:exact", "--subjects", "virology"), "--subjects: is of --mmlu alone"),
        ((), "expected either --dataset FILE:MODE or --config CFG, or --mmlu DIR"),
        (("--dataset", "a.json:exact", "stray"), "stray: not expected here"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_named(tmp_path, data, olmfast, monkeypatch, arguments, message):  # noqa: ARG001
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "m")
    (tmp_path / "odd/test").mkdir(parents=True)
    (tmp_path / "odd/test/x_test.csv").write_text("q,a\n")
    (tmp_path / "odd/dev").mkdir()
    (tmp_path / "odd/dev/x_dev.csv").write_text("q,1,2,3,4,A\n" * 5)
    code, _, error = olmfast("evaluate", "m", *arguments)
    assert (code, message in error) == (2, True), error


def test_a_pruned_model_is_scored_and_the_results_are_its_own(tmp_path, data, olmfast, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "m", num_hidden_layers=4)
    line = ("--model_path", "m", "--method", "uniform", "-i", 2, "-d", data, "--mmlu-as", "seed", "--device", "cpu")
    code, out, _ = olmfast("prune", *line, "--output_dir", "out")
    assert (code, "mean accuracy of the subjects" in out) == (0, True)
    results = json.loads((tmp_path / "out/mmlu_results.json").read_text())
    again = evaluate_mmlu("out", data, style="seed", device="cpu").results()
    assert list(results) == list(again)
    assert results["per_subject_accuracy"] == again["per_subject_accuracy"]
    assert results["average_perplexity"] == pytest.approx(again["average_perplexity"], rel=1e-6)


@pytest.mark.skipif(not REAL.is_dir(), reason="the real files of MMLU are not there")
def test_the_real_files_are_read_whole():
    subjects = read_mmlu(REAL, n_shots=5)
    assert (len(subjects), sum(len(one.questions) for one in subjects)) == (57, 14_042)
    cells = [line for one in subjects for question in one.questions for line in question.text.splitlines()]
    assert sum(cell[3:] == "None" for cell in cells) == 10
