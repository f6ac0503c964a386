"""The report of a run: one page from the record alone, safe with hostile text, the same bytes from the same record."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from functools import partial
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import escape
from transformers import AutoModelForCausalLM

from olmfast import InputError, load_config, run
from olmfast.evaluation.open import Evaluation, Questions, Settings
from olmfast.evaluation.replies import LONGEST, replies
from olmfast.observer import Observer
from olmfast.report import write
from olmfast.report.history import History
from olmfast.report.origins import EVOLVED, Origins, shares_of
from olmfast.report.page import page
from olmfast.report.tables import MOST_STEPS
from olmfast.report.write import report, write_report
from olmfast.search.record import Record
from olmfast.testing import find_chromium, long_record, opened, skilled_run, tiny_run
from olmfast.weights.affine import Affine
from olmfast.weights.by_row import by_row
from olmfast.weights.expressions import Copy, Rows, Stored, merge, whole
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe

CHROMIUM = find_chromium()
A, B = Copy("a", "w"), Copy("b", "w")
HOSTILE = "</pre></details><script>alert(1)</script><img src=x onerror=alert(1)>\x00\x1b[31m\ud800 {{ 7 * 7 }}"


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The result of a joint search with held-out questions; the tests only read it."""
    config = skilled_run(tmp_path_factory.mktemp("run"), n=12, n_donors=2, held_out=10, mode="exact", budget=20)
    return run(config).output_dir


class Elements(HTMLParser):
    """The elements of a page: their names, their attributes, and the text of each kind."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.names: set[str] = set()
        self.attributes: set[tuple[str, str | None]] = set()
        self.headings: list[str] = []
        self._inside = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.add(tag)
        self.attributes |= set(attrs)
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside == "h2" and data.strip():
            self.headings.append(data.strip())


def test_a_run_ends_with_a_report_that_its_record_alone_makes_again(finished, tmp_path):
    for name in ("steps.jsonl", "evaluations.jsonl", "merge_report.json"):
        shutil.copy(finished / name, tmp_path)
    made = report(tmp_path)
    assert made == tmp_path / "report.html"
    assert made.read_bytes() == (finished / "report.html").read_bytes()
    assert not list(tmp_path.glob("*.tmp"))


def test_it_begins_with_the_verdict_and_has_every_section(finished):
    history, text = History.read(finished), (finished / "report.html").read_text()
    verdict = history.verdict
    assert verdict is not None
    assert text.index(str(escape(verdict.lines()[0]))) < text.index("<h2>")
    for one in verdict.comparisons:
        assert f"<tr><td>{one.rival}</td>" in text
        assert f"{one.low:+.3f} to {one.high:+.3f}" in text
    assert Elements(text).headings == [
        "How good, and how it got there",
        "What it is made of",
        "What it says",
        "How far the donors are apart",
        "Every step",
        "Settings, hashes, versions",
    ]
    for taken in history.steps:
        assert taken.outcome.where in text
    for part in (history.recipe.digest(), *history.header["datasets"].values(), *history.header["donors"].values()):
        assert part in text


def test_the_page_needs_no_network_and_no_script_and_is_small(finished):
    text = (finished / "report.html").read_text()
    found = Elements(text)
    assert not found.names & {"script", "link", "iframe", "object", "embed", "img", "image", "base", "form"}
    addresses = {value for name, value in found.attributes if name in ("href", "src", "xlink:href", "action", "data")}
    assert all(address.startswith("#") for address in addresses)
    assert not re.search(r"@import|url\((?!#)", text)
    assert not any(name.startswith("on") for name, _ in found.attributes)
    assert len(text.encode()) < 2_000_000
    assert "prefers-color-scheme: dark" in text


def renamed(value: Any, old: str, new: str) -> Any:
    """A record's values with another name in all places."""
    if isinstance(value, dict):
        return {renamed(key, old, new): renamed(own, old, new) for key, own in value.items()}
    if isinstance(value, list):
        return [renamed(own, old, new) for own in value]
    return value.replace(old, new) if isinstance(value, str) else value


def test_what_models_and_datasets_say_is_text_and_never_markup(finished):
    history = History.read(finished)
    values = renamed(dict(history.values), "donor1", HOSTILE)
    values["validation"] = {"skill": {HOSTILE: 0.5, "start": None}, "result": HOSTILE}
    for one in values["answers"]["asked"]:
        one |= {"prompt": HOSTILE, "expected": HOSTILE, "dataset": HOSTILE}
        one["answers"] = [[label, HOSTILE, score] for label, _, score in one["answers"]]
    header = {**history.header, "donors": {HOSTILE: "x", "donor0": "y"}, "config": {HOSTILE: HOSTILE}}
    steps = [
        replace(taken, outcome=replace(taken.outcome, unit=HOSTILE, winner=HOSTILE, dropped={HOSTILE: HOSTILE}))
        for taken in history.steps
    ]
    recipe = Recipe(HOSTILE, {HOSTILE: Copy(HOSTILE, "w"), f"{HOSTILE}.0.mlp.w": Copy(HOSTILE, "w")})
    text = page(replace(history, header=header, values=values, steps=tuple(steps), recipe=recipe))
    plain = Elements((finished / "report.html").read_text())
    found = Elements(text)
    assert found.names <= plain.names
    assert {name for name, _ in found.attributes} <= {name for name, _ in plain.attributes}
    assert "&lt;script&gt;alert(1)" in text
    assert "{{ 7 * 7 }}" in text
    text.encode()  # no half of a character is left
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", text)


def test_the_same_record_makes_the_same_bytes_in_another_process_with_another_hash_seed(finished, tmp_path):
    code = f"from olmfast.report.write import report; report({str(finished)!r}, {str(tmp_path / 'page.html')!r})"
    style = tmp_path / "matplotlibrc"
    style.write_text("axes.grid: True\nfont.size: 20\nlines.linewidth: 9\n")
    env = {**os.environ, "PYTHONHASHSEED": "7", "MATPLOTLIBRC": str(style)}
    subprocess.run([sys.executable, "-c", code], check=True, env=env)
    assert (tmp_path / "page.html").read_bytes() == (finished / "report.html").read_bytes()


def test_the_final_scoring_keeps_what_donors_and_result_answer(finished):
    history = History.read(finished)
    kept = history.values["answers"]
    assert kept["questions"] == "held-out"
    assert len(kept["asked"]) == 5
    assert {one["dataset"] for one in kept["asked"]} == {"held0.json", "held1.json"}
    config = load_config(finished.parent / "cfg.yaml")
    folders = {name: finished.parent / "models" / name for name in ("donor0", "donor1")} | {"merged": finished}
    models = {label: AutoModelForCausalLM.from_pretrained(folder) for label, folder in folders.items()}
    pool = Pool.open(["donor0"], finished.parent / "models", finished.parent)
    asked = Questions.load(pool["donor0"], finished.parent, config.holdout)
    for one in kept["asked"]:
        labels = [label for label, _, _ in one["answers"]]
        assert labels == ["merged", "donor0", "donor1"]
        scores = [history.boards["held-out"].samples[label][one["dataset"]][one["number"]] for label in labels]
        assert [score for _, _, score in one["answers"]] == scores
        board = history.boards["held-out"]
        rows = [board.samples[label][one["dataset"]] for label in labels]
        gaps = [max(own) - min(own) for own in zip(*rows, strict=True)]
        assert gaps[one["number"]] >= max(gaps) / 2  # a question on which all are alike says nothing
        sample = asked.datasets[one["dataset"]].samples[one["number"]]
        decode = partial(asked.tokenizer.decode, skip_special_tokens=True)
        assert (one["prompt"], one["expected"]) == (decode(sample.prompt), decode(sample.response))
        for label, text, _ in one["answers"]:
            ids = list(sample.prompt)
            for _ in sample.response:
                ids.append(int(models[label](torch.tensor([ids])).logits[0, -1].argmax()))
            assert text == decode(ids[len(sample.prompt) :])
    assert config.answers == 5


def test_no_question_is_kept_where_none_is_wanted_and_the_section_is_left_out(tmp_path):
    result = run(load_config(tiny_run(tmp_path, 2, layer_swap=True), {"answers": 0}))
    assert result.record.values["answers"]["asked"] == []
    text = (result.output_dir / "report.html").read_text()
    assert "What it says" not in text
    assert "Every step" in text
    older = History.read(result.output_dir)
    values = {key: value for key, value in older.values.items() if key != "answers"}
    assert page(replace(older, values=values)) == text  # as an older version recorded it


def test_a_long_run_is_cut_and_the_page_says_what_and_where_the_rest_is(tmp_path):
    path = report(long_record(tmp_path, 10_000))
    text = path.read_text()
    assert path.stat().st_size < 5_000_000
    assert text.count("<details>") <= MOST_STEPS + 10
    assert "9,700 of 10,000 steps are left out below" in text
    assert "steps.jsonl" in text
    assert "<td>tensors</td><td>9,999</td><td>3,333</td>" in text
    left_out = [int(n.replace(",", "")) for n in re.findall(r'<div class="gap">([\d,]+) steps left out', text)]
    assert sum(left_out) == 9_700


def test_tasks_of_the_harness_are_told(finished):
    history = History.read(finished)
    row = {"gsm8k": {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.125, "n": 12}}
    told = {"limit": 12, "results": {"merged": row, "donor0": row}}
    text = page(replace(history, values={**history.values, "final_eval": told}))
    cells = ["gsm8k", "exact_match (strict)", "12"]
    assert "".join(re.findall(r">([^<]+)</td>", text[text.index("<h2>Tasks</h2>") :])[:3]) == "".join(cells)


def test_a_record_without_seals_is_read_as_its_report_has_it(finished, tmp_path):
    for name in ("steps.jsonl", "merge_report.json"):
        shutil.copy(finished / name, tmp_path)
    log = tmp_path / "steps.jsonl"
    log.write_text(re.sub(r', "seal": "\w+"}', "}", log.read_text()))
    text, now = report(tmp_path).read_text(), (finished / "report.html").read_text()
    verdict = History.read(finished).verdict
    assert str(escape(verdict.lines()[0])) in text
    assert "Score against evaluations" in now
    assert "Score against evaluations" not in text  # it does not say when


def test_a_run_in_progress_has_a_report_and_it_says_that_nothing_has_been_scored(finished, tmp_path):
    lines = (finished / "steps.jsonl").read_bytes().splitlines(keepends=True)
    (tmp_path / "steps.jsonl").write_bytes(b"".join(lines[:4]) + lines[4][:20])  # a line is just being written
    text = report(tmp_path).read_text()
    assert "No result has been scored yet." in text
    assert "running" in text


def test_what_cannot_be_reported_is_said(tmp_path, olmfast):
    with pytest.raises(InputError, match="is not a directory"):
        report(tmp_path / "absent")
    with pytest.raises(InputError, match=r"holds no steps\.jsonl and no merge_report\.json"):
        report(tmp_path)
    (tmp_path / "merge_report.json").write_text('{"base_model": {}}')
    with pytest.raises(InputError, match="was not written by olmfast"):
        report(tmp_path)
    (tmp_path / "merge_report.json").write_text('{"olmfast": {"steps": {}}}')
    code, out, err = olmfast("report", tmp_path)
    assert (code, out) == (2, "")
    assert "is damaged" in err
    assert not (tmp_path / "report.html").exists()


def test_a_page_that_cannot_be_made_does_not_lose_the_result(finished, tmp_path, monkeypatch):
    shutil.copy(finished / "steps.jsonl", tmp_path)
    notes: list[str] = []

    class Noting(Observer):
        def note(self, text: str) -> None:
            notes.append(text)

    monkeypatch.setattr(write, "page", lambda _: 1 / 0)
    write_report(Record.load(tmp_path), Noting())
    assert notes == [
        "report.html could not be made (ZeroDivisionError: division by zero); the result is complete without it"
    ]
    assert not (tmp_path / "report.html").exists()


def test_the_command_says_where_the_report_is(finished, tmp_path, olmfast):
    code, out, _ = olmfast("report", finished, "--out", tmp_path / "page.html")
    assert (code, out) == (0, f"{tmp_path / 'page.html'}\n")
    assert (tmp_path / "page.html").read_bytes() == (finished / "report.html").read_bytes()


# As a browser shows it


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install one, or name it in OLMFAST_CHROMIUM")
@pytest.mark.parametrize("width", [400, 1280])
def test_nothing_is_cut_wide_or_narrow_not_even_long_names(finished, tmp_path, width):
    history = History.read(finished)
    long = "/data/models/" + "a-name-without-an-end" * 6
    values = renamed(dict(history.values), "donor1", long)
    values = renamed(values, "held1.json", f"{long}.json")
    values["answers"]["asked"][0]["answers"][0][1] = "0123456789" * 300
    header = renamed({**history.header}, "donor1", long)
    steps = [replace(taken, outcome=replace(taken.outcome, unit=long, winner=long)) for taken in history.steps]
    recipe = Recipe.from_json(renamed(history.recipe.to_json(), "donor1", long))
    worst = replace(history, header=header, values=values, steps=tuple(steps), recipe=recipe)
    (tmp_path / "worst.html").write_text(page(worst))
    for path in (finished / "report.html", tmp_path / "worst.html"):
        found = opened(CHROMIUM, path, width)
        assert found["cut"] == []
        assert found["width"] == width
        assert found["height"] > 1000


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install one, or name it in OLMFAST_CHROMIUM")
def test_what_is_cut_is_found(finished, tmp_path):
    text = (finished / "report.html").read_text()
    wide = text.replace("<main>", '<main><p style="width: 900px">wide</p>')
    held = text.replace(
        "<main>", '<main><p style="width: 40px; overflow-wrap: normal; overflow: hidden">unbreakable</p>'
    )
    for name, planted, told in (
        ("wide", wide, "beside the page: P.: wide"),
        ("held", held, "wider than its place: P."),
    ):
        (tmp_path / name).with_suffix(".html").write_text(planted)
        assert any(cut.startswith(told) for cut in opened(CHROMIUM, tmp_path / f"{name}.html", 400)["cut"])


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: install one, or name it in OLMFAST_CHROMIUM")
def test_the_pictures_of_the_docs_are_of_a_report(finished, tmp_path):
    script = Path(__file__).parent.parent / "examples" / "demo" / "pictures.py"
    subprocess.run([sys.executable, script, finished / "report.html", tmp_path / "own"], check=True)
    taken = {path.name: path.read_bytes()[:8] for path in tmp_path.iterdir()}
    names = {f"own{width}-{scheme}.png" for width in ("", "-narrow") for scheme in ("light", "dark")}
    assert taken == dict.fromkeys(names, b"\x89PNG\r\n\x1a\n")


# What a result is made of


@pytest.mark.parametrize(
    ("expression", "shares"),
    [
        (A, {"a": 1}),
        (merge("linear", [A, B], weight=(0.25, 0.75)), {"a": 0.25, "b": 0.75}),
        (merge("linear", [A, B], weight=(1.0, 3.0)), {"a": 0.25, "b": 0.75}),
        (merge("linear", [A, B], weight=(1.5, -0.5), normalize=False), {"a": 1.5, "b": -0.5}),
        (merge("task_arithmetic", [B], A, weight=(0.3,)), {"b": 0.3, "a": 0.7}),
        (merge("slerp", [A, B], t=0.2), {"a": 0.8, "b": 0.2}),
        (by_row(A, (B,), A, torch.tensor([[0.0, 1.0]]), 0), {"a": 0.5, "b": 0.5}),
        (Rows(((A, 0, 3), (B, 0, 1), (None, 0, 4))), {"a": 3 / 8, "b": 1 / 8}),
        (Affine(B, 0.5), {"b": 0.5}),
        (Stored("refined/x.safetensors", "w", "0"), {EVOLVED: 1}),
    ],
)
def test_the_shares_of_an_expression_are_the_factors_it_sums_by(expression, shares):
    assert shares_of(expression) == pytest.approx(shares)


def test_the_map_says_what_each_part_is_of_and_how_far_it_moved():
    tensors = {
        "model.embed_tokens.weight": A,
        "model.layers.0.self_attn.q_proj.weight": B,
        "model.layers.0.self_attn.k_norm.weight": A,
        "model.layers.0.mlp.up_proj.weight": A,
        "model.layers.0.input_layernorm.weight": A,
        "model.layers.1.mlp.up_proj.weight": Copy("b", "model.layers.7.mlp.up_proj.weight"),
    }
    found = Origins.of(Recipe("a", tensors), None)
    assert found.parts == ["attention", "MLP", "norms"]
    attention = found.blocks[0]["attention"]
    assert (attention.shares, attention.moved) == ({"b": 0.5, "a": 0.5}, 0.5)
    assert found.blocks[0]["MLP"].moved == 0
    assert found.blocks[1]["MLP"].taken_from == (7,)
    assert set(found.outside) == {"model.embed_tokens"}
    start = Recipe("a", {**tensors, "model.layers.0.mlp.up_proj.weight": B})
    assert Origins.of(Recipe("a", tensors), start).blocks[0]["MLP"].moved == 1


def test_a_choice_is_answered_by_a_letter_and_a_text_is_not_longer_than_people_read(finished):
    folder = finished.parent
    entries = load_config(folder / "cfg.yaml").dataset
    modes = {"diversity": {"max_new_tokens": 500}, "choice": {}}
    pool = Pool.open(["donor0"], folder / "models", folder)
    evaluation = Evaluation(whole("donor0", pool.tensors), pool, Settings.of("cpu", "float32"))
    (folder / "pick.json").write_text('[{"question": "1+1?", "choices": ["2", "3"], "answer": 0}]')
    for mode, keys in modes.items():
        name = "pick.json" if mode == "choice" else "skill0.json"
        entry = entries["skill0.json"].model_copy(update={"mode": mode, **keys})
        asked = Questions.load(pool["donor0"], folder, {name: entry})
        dataset = asked.datasets[name]
        (said,) = replies(evaluation.model, dataset, [0], asked.tokenizer, asked.stop_tokens)
        if mode == "choice":
            assert re.fullmatch(r"[AB] \(\d+% of the letters\)", said)
        else:
            assert 0 < len(asked.tokenizer(said)["input_ids"]) <= LONGEST
