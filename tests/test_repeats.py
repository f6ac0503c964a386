"""Ranges of one model's blocks run twice: swept coarse to fine, raced, tested once, told with intervals."""

from __future__ import annotations

import functools
import html
import shutil
import tempfile
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from olmfast import InputError, Result, load_config, run
from olmfast.dataflow.gains import Gain, own_spans
from olmfast.errors import Interrupted
from olmfast.report.paths import heat_map, summary, table
from olmfast.search.ranges import around, coarsest, grid, told
from olmfast.terminal.runs import print_result
from olmfast.testing import own_answers, tiny_model

N = 4


@functools.cache
def material(n_blocks: int, first: int, end: int) -> Path:
    """A model, and questions whose answers are those of the model with a range of its blocks run twice."""
    folder = Path(tempfile.mkdtemp(prefix="repeats-"))
    models = folder / "models"
    tiny_model(models / "one", seed=1, noise=0.4, num_hidden_layers=n_blocks)
    blocks = [*range(end), *range(first, n_blocks)]
    tiny_model(models / "long", seed=1, num_hidden_layers=len(blocks))
    own = load_file(models / "one" / "model.safetensors")
    long = {name: value for name, value in own.items() if ".layers." not in name}
    for place, block in enumerate(blocks):
        prefix = f"model.layers.{block}."
        long |= {name.replace(prefix, f"model.layers.{place}."): v for name, v in own.items() if prefix in name}
    long = {name: value.clone() for name, value in long.items()}
    save_file(long, models / "long" / "model.safetensors", {"format": "pt"})
    own_answers(folder / "asked.json", models / "long", 60, 1)
    own_answers(folder / "held.json", models / "long", 60, 2)
    return folder


def twice(folder: Path, n_blocks: int = N, first: int = 1, end: int = 3, **keys: Any) -> Path:
    """The config of a sweep of that model, on copies of those questions."""
    made = material(n_blocks, first, end)
    for name in ("asked.json", "held.json"):
        shutil.copy(made / name, folder)
    config = {
        "models_dir": str(made / "models"),
        "output_dir": "out",
        "models": ["one"],
        "dataset": {"asked.json": {"mode": "exact"}},
        "holdout": {"held.json": {"mode": "exact"}},
        "device": "cpu",
        "dataflow": {"repeat": True, "models": "one"},
        **keys,
    }
    path = folder / "cfg.yaml"
    path.write_text(yaml.safe_dump(config))
    return path


# Ranges


def test_a_grid_has_every_range_between_its_edges():
    assert grid(3, 1) == [(0, 1), (0, 2), (0, 3), (1, 2), (1, 3), (2, 3)]
    assert grid(5, 2) == [(0, 2), (0, 4), (0, 5), (2, 4), (2, 5), (4, 5)]
    assert (told((2, 5)), told((3, 4))) == ("2-4", "3")


@given(st.integers(1, 90), st.integers(1, 100))
def test_the_first_grid_is_as_fine_as_it_may_be(n_blocks, at_most):
    step = coarsest(n_blocks, at_most)
    assert len(grid(n_blocks, step)) <= max(at_most, 3)
    assert step == 1 or len(grid(n_blocks, step // 2)) > max(at_most, 3)


@given(st.integers(1, 40), st.integers(1, 4), st.data())
def test_what_lies_around_a_range_is_near_it_and_a_range(n_blocks, step, data):
    i = data.draw(st.integers(0, n_blocks - 1))
    j = data.draw(st.integers(i + 1, n_blocks))
    found = around([(i, j)], step, n_blocks)
    assert (i, j) in found
    assert len(set(found)) == len(found)
    assert all(0 <= a < b <= n_blocks and abs(a - i) <= step and abs(b - j) <= step for a, b in found)


# Gains


def test_a_gain_is_a_share_of_the_error_with_a_paired_interval():
    spans = own_spans({"a": 0.5, "b": 3.0, "c": 0.0}, {"a": "exact", "b": "perplexity", "c": "choice"})
    assert spans == {"a": (0.0, 0.5), "b": (1.0, 3.0)}
    leads = [torch.tensor([0.1, 0.3, 0.2, 0.2]), torch.tensor([0.0, 0.2, 0.1, 0.1])]
    gain = Gain.of(leads)
    assert gain.mean == pytest.approx(0.15)
    assert gain.low < 0.15 < gain.high
    assert gain.high - 0.15 == pytest.approx(0.15 - gain.low)
    assert Gain.of(leads, 0.99).low < gain.low
    assert Gain.of([]).n == 0


def test_an_interval_holds_the_truth_nineteen_times_of_twenty():
    dice = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(400):
        gain = Gain.of([torch.randn(30, generator=dice) + 0.3, torch.randn(50, generator=dice) + 0.1])
        held += gain.low <= 0.2 <= gain.high
    assert 0.92 <= held / 400 <= 0.98


# Runs


@pytest.fixture(scope="module")
def found(tmp_path_factory) -> tuple[Path, Result]:
    """A sweep that finds what it looks for: where, and its result."""
    folder = tmp_path_factory.mktemp("found")
    return folder, run(twice(folder))


def test_the_range_that_helps_is_found_and_the_result_runs_it_twice_as_a_plain_model(found):
    folder, result = found
    report = result.record.values["repeats"]
    assert report["chosen"] == [1, 3]
    assert report["comparisons"] == len(report["ranges"]) == N * (N + 1) // 2
    best = report["best"][0]
    assert best["range"] == [1, 3]
    assert 0 < best["interval"][0] < best["gain"] <= 1
    assert best["interval of all"][0] <= best["interval"][0]
    assert report["questions"] == "60 held-out"
    made, wanted = (
        AutoModelForCausalLM.from_pretrained(path) for path in (folder / "out", material(N, 1, 3) / "models/long")
    )
    ids = torch.arange(5, 20)[None]
    torch.testing.assert_close(made(ids).logits, wanted(ids).logits)
    assert result.holdout.rows["merged"]["held.json"] < result.holdout.rows["one"]["held.json"]
    card = (folder / "out" / "README.md").read_text()
    assert "## Blocks run twice" in card
    assert f"{report['comparisons']} ranges" in card


def test_the_table_and_the_picture_say_what_was_found(found, capsys):
    folder, result = found
    report = result.record.values["repeats"]
    assert summary(report) in html.unescape((folder / "out" / "report.html").read_text())
    picture = ET.fromstring((folder / "out" / "repeats.svg").read_text())
    assert len(picture.findall(".//{http://www.w3.org/2000/svg}title")) == report["comparisons"]
    print_result(result, as_json=False)
    printed = capsys.readouterr().out
    assert "Blocks run twice, on 60 held-out questions" in printed
    assert "10 ranges compared with the model" in printed
    head, *rows = table(report)
    assert head[:4] == ["blocks run twice", "hops", "gain", "95 % interval"]
    assert rows[0][:2] == ["1-2", "6"]
    assert rows[-1][:2] == ["none", "4"]
    ET.fromstring(heat_map({**report, "model": "a<b & c"}))


def test_held_out_questions_choose_nothing(found, tmp_path):
    _, result = found
    config = twice(tmp_path)
    own_answers(tmp_path / "held.json", material(N, 1, 3) / "models/one", 20, 7)
    other = run(config).record
    assert other.steps == result.record.steps
    assert other.values["repeats"]["best"][0]["gain"] < 0


def test_where_nothing_helps_the_model_stays_as_it_is(tmp_path):
    config = twice(tmp_path)
    own_answers(tmp_path / "asked.json", material(N, 1, 3) / "models/one", 40, 1)
    result = run(config)
    assert result.record.values["repeats"]["chosen"] is None
    assert result.recipe.config_edits == {}
    assert "nothing is changed" in summary(result.record.values["repeats"])


def test_coarse_to_fine_tries_a_part_of_the_ranges_and_is_resumed_where_it_was_stopped(tmp_path):
    dataflow = {"repeat": True, "models": "one", "shown": 3, "grid": 6, "keep": 2}
    config = twice(tmp_path, 8, 2, 4, dataflow=dataflow)
    whole = run(load_config(config, {"output_dir": str(tmp_path / "whole")}))
    report = whole.record.values["repeats"]
    assert report["comparisons"] < 8 * 9 // 2
    assert len(report["best"]) == 3
    assert {key.split("/")[1] for key in whole.record.steps if key.startswith("repeat/")} >= {"4", "2", "1"}
    asked = iter(range(3))
    with pytest.raises(Interrupted):
        run(config, stop_requested=lambda: next(asked, None) is None, resume=True)
    resumed = run(config, resume=True)
    assert resumed.record.steps == whole.record.steps
    assert resumed.record.values["repeats"] == report
    for name in ("model.safetensors", "repeats.svg"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_larger_budget_goes_on_and_tells_of_all(tmp_path):
    config = twice(tmp_path, holdout={}, dataflow={"repeat": True, "grid": 3, "keep": 2, "racing": False})
    counted = [run(load_config(config, {"budget": n}), resume=True).record.values["repeats"] for n in (3, 60)]
    assert 0 < counted[0]["comparisons"] < counted[1]["comparisons"]
    assert all(one["questions"] == 30 for one in counted[1]["ranges"])


def test_ranges_race_and_those_left_behind_keep_what_is_known_of_them(tmp_path):
    racing = {"rungs": [6, 12], "confidence": 0.9}
    config = twice(tmp_path, dataflow={"repeat": True, "racing": racing})
    report = run(config).record.values["repeats"]
    asked = {one["questions"] for one in report["ranges"]}
    assert asked & {6, 12}
    assert all(one["whole"] == (one["questions"] == 30) for one in report["ranges"])
    assert report["chosen"] == [1, 3]


def test_the_plan_counts_the_ranges(tmp_path, olmfast):
    code, out, _ = olmfast("check", twice(tmp_path))
    assert code == 0
    assert "repeat" in out


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"models": ["one", "long"]}, "dataflow.models: is one, and models lists 2"),
        ({"layer_swap": True}, "layer_swap: dataflow is a search of its own"),
        ({"dataflow": {"repeat": True, "gird": 9}}, "did you mean 'grid'"),
        ({"evolve": {"merge_method": "ties"}}, "evolve, dataflow: each is a search of its own"),
    ],
)
def test_what_does_not_fit_is_named(keys, said, tmp_path):
    with pytest.raises(InputError, match=said):
        run(twice(tmp_path, **keys))
    assert not (tmp_path / "out.partial").exists()
