"""What a user writes in a config: what loads, what is refused, and how the refusal reads."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from configs import ORIGINAL, parse, plain

from olmfast.config.datasets import MODES
from olmfast.config.loading import parse_mapping
from olmfast.config.resources import Budget
from olmfast.config.run import load_config, parse_config
from olmfast.errors import InputError


def refusal(**keys: Any) -> str:
    """The message a config with these keys is refused with."""
    with pytest.raises(InputError) as caught:
        parse(**keys)
    return str(caught.value)


def write(folder: Path, text: str) -> Path:
    path = folder / "cfg.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_a_config_of_the_original_tool_loads_as_it_is(tmp_path):
    config = load_config(write(tmp_path, ORIGINAL))
    assert config.base_name == "Qwen/Qwen2.5-Coder-7B-Instruct"
    assert config.selection == "copeland"
    assert (config.es_svd_sigma, config.es_norm_sigma) == (0.1, 1e-5)
    assert config.samples == 50
    assert all(
        getattr(config, switch)
        for switch in ("base_select", "boundary_select", "layer_swap", "tensor_swap", "skip_norm", "es_svd", "es_norm")
    )
    assert not config.dataset["gsm8k.v2.json"].think
    assert config.dataset["gpqa.json"].think


def test_what_the_original_leaves_out_has_the_originals_defaults():
    config = parse()
    assert (config.direction, config.samples, config.selection) == ("forward", 200, "copeland")
    assert config.markov.window == 0
    assert (config.es_svd_generations, config.es_svd_sigma) == (1, 0.1)
    assert (config.es_norm_generations, config.es_norm_sigma) == (3, 0.005)
    assert (config.improve_all, config.max_models, config.base_name) == (None, None, "alpha")
    switches = ("base_select", "boundary_select", "layer_swap", "tensor_swap", "skip_norm", "es_svd", "es_norm")
    assert not any(getattr(config, switch) for switch in (*switches, "load_merge_report"))


def test_paths_are_taken_from_the_folder_of_the_config(tmp_path, monkeypatch):
    monkeypatch.chdir("/")
    config = load_config(write(tmp_path, ORIGINAL))
    assert config.models_dir == tmp_path / "models"
    assert config.output_dir == tmp_path / "out" / "merged"
    assert config.dataset_dir == tmp_path / "data" / "sharegpt"
    assert config.config_dir == tmp_path


def test_absolute_paths_and_the_home_folder_stay_what_they_are(monkeypatch):
    monkeypatch.setenv("HOME", "/data/someone")
    config = parse(models_dir="/mnt/models", output_dir="~/merged")
    assert config.models_dir == Path("/mnt/models")
    assert config.output_dir == Path("/data/someone/merged")
    assert config.dataset_dir == Path("/data/me")


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"sample": 5}, "cfg.yaml: sample: unknown key; did you mean 'samples'?"),
        (
            {"dataset": {"sums.json": {"mode": "exact", "wieght": 2}}},
            "cfg.yaml: dataset.sums.json.wieght: unknown key; did you mean 'weight'?",
        ),
        (
            {"holdout": {"more.json": {"mode": "exact", "thinks": False}}},
            "cfg.yaml: holdout.more.json.thinks: unknown key; did you mean 'think'?",
        ),
        ({"qqqq": 1}, "cfg.yaml: qqqq: unknown key"),
        ({"genome": {"models": ["a"]}}, "cfg.yaml: genome: unknown key here; what it holds belongs below evolve"),
        (
            {"tasks": [{"name": "hellaswag"}]},
            "cfg.yaml: tasks: unknown key here; tasks of lm-evaluation-harness belong below dataset, as "
            "NAME: {lm_eval: TASK}",
        ),
        ({"budget": {"evaluation": 3}}, "cfg.yaml: budget.evaluation: unknown key; did you mean 'evaluations'?"),
    ],
)
def test_an_unknown_key_is_an_error_with_a_suggestion(keys, message):
    assert refusal(**keys) == message


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"direction": "forwards"}, "direction: expected 'forward' or 'backward', got 'forwards'; did you mean"),
        ({"dataset": {"a": {"mode": "exact_mach"}}}, "got 'exact_mach'; did you mean 'exact_match'?"),
        ({"dataset": {"a": {}}}, "dataset.a.mode: required key is missing"),
        ({"dataset": {"a": None}}, "dataset.a: expected a valid dictionary of keys, got nothing"),
        ({"dataset": {"a": "exact"}}, "dataset.a: expected how it is scored, such as {mode: exact_match}, got 'exact'"),
        ({"dataset": ["a"]}, "dataset: expected a mapping of keys to values, got ['a']"),
        ({"dataset": {"a": {"mode": "exact", "fields": {"prompt": 3}}}}, "prompt: expected a valid string, or a"),
        ({"validation": 1}, "validation: expected less than or equal to 0.5, or a mapping of keys to values, got 1"),
        ({"validation": {"a": {"mode": "x"}}}, "validation.a.mode: expected 'exact_match', 'bigram_loss'"),
        ({"workers": "many"}, "workers: expected a valid integer, or 'auto', got 'many'"),
        ({"dataset": {}}, "dataset: "),
        ({"dataset": {"a": {"mode": "exact", "weight": -1}}}, "dataset.a.weight: expected greater than or equal to 0"),
        ({"dataset": {"a": {"mode": "exact", "forbid": "("}}}, "dataset 'a': forbid: not a regular expression"),
        ({"samples": 0}, "samples: expected greater than or equal to 1, got 0"),
        ({"samples": 2.5}, "samples: expected a valid integer"),
        ({"models": []}, "models: "),
        ({"models": "alpha"}, "models: expected a valid list, got 'alpha'"),
        ({"models": ["alpha", "alpha"]}, "models: 'alpha' is listed twice"),
        ({"models_dir": 3}, "models_dir: expected a path, got 3"),
        ({"models_dir": "~nobody-of-that-name/x"}, "models_dir: '~nobody-of-that-name/x' is not a usable path"),
        ({"base_select": "betta"}, "base_select: expected true, false, a mode in use, a dataset or a model, got"),
        ({"boundary_select": "betta"}, "a mode in use, a dataset or a model, got 'betta'; did you mean 'beta'?"),
        ({"racing": True, "selection": "borda"}, "racing: who has the lowest average rank depends on all"),
        ({"improve_all": "perplexity"}, "improve_all: expected 'all', 'base', a mode in use or a dataset, got"),
        ({"improve_all": True}, "improve_all: expected a valid string, got True"),
        ({"es_svd_sigma": 0}, "es_svd_sigma: expected greater than 0, got 0"),
        ({"es_norm_sigma": float("inf")}, "es_norm_sigma: expected a finite number, got inf"),
        ({"es_accept": "all"}, "es_accept: expected 'selection' or 'any', got 'all'"),
        ({"selection": "best"}, "selection: expected 'copeland', 'mean' or 'average_rank', got 'best'"),
        ({"significance": 5}, "significance: expected less than 1, got 5"),
        ({"tie_tolerance": float("nan")}, "tie_tolerance: expected a finite number, got nan"),
        ({"markov": -1}, "markov: expected a number of blocks from 0 on, or {window: 1, slide: false}, got -1"),
        ({"markov": {"windows": 1}}, "markov.windows: unknown key; did you mean 'window'?"),
        ({"candidates": "swap"}, "candidates: expected a list such as [swap, {linear: [0.25, 0.5]}], got 'swap'"),
        ({"candidates": []}, "candidates: expected a list such as"),
        ({"candidates": ["swop"]}, "candidates: expected one of swap, linear, slerp, ties, task_arithmetic, got"),
        ({"candidates": ["swop"]}, "did you mean 'swap'?"),
        ({"candidates": [{"linear": 0.5, "slerp": 0.5}]}, "candidates: expected one of swap, linear, "),
        ({"candidates": [{"linear": [0.5, 1]}]}, "linear: expected shares of the donor between 0 and 1, got"),
        ({"candidates": [{"slerp": []}]}, "candidates: slerp: expected t between 0 and 1, got []"),
        ({"candidates": [{"ties": [0]}]}, "candidates: ties: expected densities above 0, at most 1, got [0]"),
        ({"candidates": [{"ties": True}]}, "candidates: ties: expected densities above 0, at most 1, got True"),
        ({"candidates": [{"linear": "half"}]}, "linear: expected shares of the donor between 0 and 1, got"),
        ({"candidates": [{"linear": 10**5000}]}, "got a number of thousands of digits"),
        ({"candidates": [{"swap": 0.5}]}, "candidates: swap takes a donor's values unchanged and has no numbers"),
        ({"candidates": ["slerp", {"slerp": 0.2}]}, "candidates: 'slerp' is listed twice; give its numbers as one"),
        ({"candidates": [{"linear": [0.5, 0.5]}]}, "candidates: linear: a number is given twice in [0.5, 0.5]"),
        ({"scales": ["blok"]}, "scales[0]: expected 'model', 'depth', 'kind', 'boundary', 'block' or 'tensor', got"),
        ({"scales": ["blok"]}, "did you mean 'block'?"),
        ({"scales": ["model", "model"]}, "scales: 'model' is listed twice"),
        ({"layer_swap": "perhaps"}, "layer_swap: expected a valid boolean"),
        ({"dtype": "int8"}, "dtype: expected 'auto', 'float32', 'bfloat16', 'float16' or 'float64', got 'int8'"),
        ({"shard_size": "big"}, "shard_size: expected a size in bytes such as '5GB', got 'big'"),
        ({"shard_size": 0}, "shard_size: expected a size in bytes such as '5GB', got 0"),
        ({"racing": {"rung": [25]}}, "racing.rung: unknown key; did you mean 'rungs'?"),
        ({"racing": {"rungs": [75, 25]}}, "racing: rungs: expected growing numbers of samples, got [75, 25]"),
        ({"direction": 16**5000}, "direction: expected 'forward' or 'backward', got a number of thousands of digits"),
        ({"seed": 16**5000}, "seed: expected less than 9223372036854775808, got a number of thousands of digits"),
    ],
)
def test_a_wrong_value_is_named_with_what_was_wanted(keys, message):
    assert refusal(**keys).startswith("cfg.yaml: ")
    assert message in refusal(**keys)


def test_paths_are_shown_without_detours(tmp_path):
    inner = tmp_path / "configs" / "demo"
    config = parse_config(plain(models_dir="./m/../models", output_dir="../../out"), "cfg.yaml", inner)
    assert (str(config.models_dir), str(config.output_dir)) == (f"{inner}/models", f"{tmp_path}/out")


def test_candidates_may_be_named_alone_or_with_one_or_several_numbers():
    config = parse(candidates=["swap", {"linear": [0.25, 0.75]}, "slerp", {"ties": 0.2}, {"task_arithmetic": ["1e-1"]}])
    assert [(kind.method, kind.values) for kind in config.candidates] == [
        ("swap", ()),
        ("linear", (0.25, 0.75)),
        ("slerp", (0.5,)),
        ("ties", (0.2,)),
        ("task_arithmetic", (0.1,)),
    ]
    assert [kind.method for kind in parse().candidates] == ["swap"]


@pytest.mark.parametrize(
    ("keys", "walk"),
    [
        ({}, []),
        ({"tensor_swap": True, "boundary_select": True, "layer_swap": True}, ["boundary", "block", "tensor"]),
        ({"scales": ["model", "depth"], "layer_swap": True}, ["model", "depth", "block"]),
        ({"scales": ["block", "model"], "layer_swap": True, "boundary_select": True}, ["block", "model", "boundary"]),
        ({"scales": ["tensor", "kind"]}, ["tensor", "kind"]),
    ],
)
def test_scales_are_walked_as_listed_and_then_what_switches_ask_for(keys, walk):
    assert parse(**keys).walk == walk


def test_every_fault_is_listed_at_once():
    message = refusal(direction="up", markov=-1, smaples=3, dataset={"a": {"mode": "exact", "samples": 0}})
    lines = message.splitlines()
    assert len(lines) == 4
    assert all(line.startswith("cfg.yaml: ") for line in lines)


def test_missing_keys_are_named():
    with pytest.raises(InputError) as caught:
        parse_config({}, "cfg.yaml", Path())
    named = re.findall(r"cfg.yaml: (\w+): required key is missing", str(caught.value))
    assert sorted(named) == ["dataset", "models"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("samples: 1\nmodels: [a]\nsamples: 2\n", ":3:1: not valid YAML: key 'samples' is given twice"),
        ("dataset:\n  a: {mode: exact, mode: choice}\n", ":2:20: not valid YAML: key 'mode' is given twice"),
        ("a: &x {b: 1}\nc: {b: 2, <<: *x, b: 3}\n", ":2:19: not valid YAML: key 'b' is given twice"),
        ("c: {<<: [{b: 1}, a]}\n", ":1:18: not valid YAML: expected a mapping to merge, or a list of them, got 'a'"),
        ("models: [a\n", ":2:1: not valid YAML: "),
        ("? [a]\n: 1\n", ":1:3: not valid YAML: ['a'] cannot be a key"),
        ("&x {a: *x}\n", "not valid YAML: found unconstructable recursive node"),
        ("seed: 2001-13-99\n", ": not valid YAML: month must be in 1..12"),
        ("a: " + "[" * 5000 + "]" * 5000, ": not valid YAML: "),
        ("a: !!python/object/apply:os.getcwd []\n", "could not determine a constructor"),
        ("", ": expected a mapping of keys to values, got nothing"),
        ("- a\n", ": expected a mapping of keys to values, got list"),
        ("\x00", ": not valid YAML: "),
    ],
)
def test_text_that_is_no_config_is_refused_with_its_place(tmp_path, text, message):
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_config(path)
    assert str(caught.value).startswith(str(path))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("{<<: *x, a: 3}", {"a": 3, "b": 1}),
        ("{a: 3, <<: *x}", {"a": 3, "b": 1}),
        ("{<<: [*x, *y]}", {"a": 1, "b": 1, "c": 2}),
        ("{<<: [*y, *x], c: 3}", {"a": 2, "b": 1, "c": 3}),
        ("{<<: {<<: *x, a: 4}, c: 3}", {"a": 4, "b": 1, "c": 3}),
        ("{<<: *z}", {"a": 5, "b": 1}),
    ],
)
def test_own_keys_go_before_merged_ones_and_of_these_the_earlier(text, read):
    known = "x: &x {a: 1, b: 1}\ny: &y {a: 2, c: 2}\nz: &z {<<: *x, a: 5}\n"
    assert parse_mapping(f"{known}merged: {text}\n", "m.yml")["merged"] == read


@pytest.mark.parametrize(
    ("budget", "seconds", "evaluations"),
    [
        ("2h", 7200.0, None),
        ("30m", 1800.0, None),
        ("1.5 m", 90.0, None),
        ("45s", 45.0, None),
        ("1d", 86400.0, None),
        (500, None, 500),
        ("500", None, 500),
        (None, None, None),
    ],
)
def test_a_budget_is_a_time_or_a_number_of_evaluations(budget, seconds, evaluations):
    expected = None if budget is None else Budget(seconds=seconds, evaluations=evaluations)
    assert parse(budget=budget).budget == expected


@pytest.mark.parametrize("budget", ["2 weeks", "h", "0s", 0, -3, "0", True, 1.5, [1], "٣"])
def test_a_budget_that_cannot_be_meant_is_refused(budget):
    assert refusal(budget=budget).startswith("cfg.yaml: budget: expected a time such as '2h' or '30m', or a number")


@pytest.mark.parametrize(("size", "n_bytes"), [("5GB", 5 * 10**9), ("2GiB", 2 << 30), ("1.5 MB", 1_500_000), (7, 7)])
def test_sizes_are_in_bytes_or_in_units_of_a_thousand_or_of_1024(size, n_bytes):
    assert parse(shard_size=size).shard_size == n_bytes


def test_dataset_keys_at_the_top_level_are_the_default_of_every_dataset():
    datasets = {"a.json": {"mode": "diversity"}, "b.json": {"mode": "exact", "samples": 7, "template": "raw"}}
    holdout = {"c.json": {"mode": "quality"}}
    defaults = {"samples": 3, "forbid": None, "template": "chatml", "max_new_tokens": 9}
    config = parse(dataset=datasets, holdout=holdout, **defaults)
    for entry in (config.dataset["a.json"], config.holdout["c.json"]):
        assert (entry.samples, entry.forbid, entry.template, entry.max_new_tokens) == (3, None, "chatml", 9)
    own = config.dataset["b.json"]
    assert (own.samples, own.forbid, own.template, own.max_new_tokens) == (7, None, "raw", 9)


def test_a_wrong_default_is_told_once_and_where_it_stands():
    datasets = {"a.json": {"mode": "exact"}, "b.json": {"mode": "exact"}}
    assert refusal(dataset=datasets, samples=-1) == "cfg.yaml: samples: expected greater than or equal to 1, got -1"


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_loads(mode):
    assert parse(dataset={"a.json": {"mode": mode}}).dataset["a.json"].mode == mode


@pytest.mark.parametrize("guard", ["all", "base", "exact", "sums.json"])
def test_the_guard_is_all_base_a_mode_in_use_or_a_dataset(guard):
    assert parse(improve_all=guard).improve_all == guard


@pytest.mark.parametrize("off", [None, False])
def test_the_guard_can_be_switched_off(off):
    assert parse(improve_all=off).improve_all is None


def test_a_dataset_that_decides_is_not_held_out():
    message = refusal(holdout={"sums.json": {"mode": "choice"}})
    assert message == "cfg.yaml: holdout: 'sums.json' is used for selection too, so it is not held out"
