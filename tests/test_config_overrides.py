"""Overrides of a config by the command line, and a config against its documentation."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from configs import ORIGINAL, parse, plain
from hypothesis import given, settings
from hypothesis import strategies as st

from olmfast import cli
from olmfast.config.datasets import MODES, DatasetConfig
from olmfast.config.run import FREE_TO_CHANGE, PLACES, RunConfig, load_config, parse_config
from olmfast.config.searches import Dataflow, Evolve
from olmfast.errors import InputError


def write(folder: Path, text: str) -> Path:
    path = folder / "cfg.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_overrides_win_over_the_file_and_reach_names_with_dots(tmp_path):
    path = write(tmp_path, ORIGINAL)
    wanted = ["samples=9", "dataset.gsm8k.v2.json.mode=exact", "dataset.gpqa.json.weight=2e0", "models=[a, b]"]
    config = load_config(path, cli._overrides([*wanted, "base_model_name=a", "output_dir=elsewhere"]))
    assert config.samples == 9
    assert config.dataset["gsm8k.v2.json"].mode == "exact"
    assert not config.dataset["gsm8k.v2.json"].think
    assert config.dataset["gpqa.json"].weight == 2
    assert config.models == ["a", "b"]
    assert config.output_dir == tmp_path / "elsewhere"


@pytest.mark.parametrize(
    ("given", "dotted", "found"),
    [
        ({}, {"evolve.merge_method": "ties", "evolve.layer_granularity": 2}, ("evolve", "layer_granularity", 2)),
        ({}, {"dataflow.repeat": True, "dataflow.models": "one"}, ("dataflow", "repeat", True)),
        (
            {"dataflow": {"repeat": True}},
            {"dataflow.racing.confidence": 0.9},
            ("dataflow", "racing", "confidence", 0.9),
        ),
        ({}, {"budget.evaluations": 5}, ("budget", "evaluations", 5)),
        ({"budget": "2h"}, {"budget.evaluations": 5}, ("budget", "seconds", None)),
        ({"racing": True}, {"racing.confidence": 0.9}, ("racing", "confidence", 0.9)),
        ({"racing": None}, {"racing.rungs": [5, 9]}, ("racing", "rungs", [5, 9])),
        ({"markov": 1}, {"markov.slide": False}, ("markov", "window", 1)),
        ({}, {"prune.method": "cma", "prune.num_layer": 1}, ("prune", "method", "cma")),
        ({}, {"holdout.more.v2.json.mode": "exact"}, ("holdout", "more.v2.json", "mode", "exact")),
        (
            {},
            {"holdout.a.json.mode": "exact", "holdout.a.json.fields.prompt": "q"},
            ("holdout", "a.json", "fields", {"prompt": "q"}),
        ),
        ({}, {"holdout.a.json": {"mode": "exact"}}, ("holdout", "a.json", "mode", "exact")),
        (
            {"evolve": {"merge_method": "ties"}},
            {"validation.v.json.mode": "exact"},
            ("validation", "v.json", "mode", "exact"),
        ),
        ({}, {"dataset.sums.json.fields.prompt": "q"}, ("dataset", "sums.json", "fields", {"prompt": "q"})),
    ],
)
def test_an_override_makes_the_sections_that_are_missing(tmp_path, given, dotted, found):
    *path, wanted = found
    data = plain(**given, **({"models": ["a"]} if "dataflow" in found or "prune" in found else {}))
    config: Any = load_config(write(tmp_path, yaml.safe_dump(data)), dotted)
    for key in path:
        config = config[key] if isinstance(config, dict) else getattr(config, key)
    assert config == wanted


@pytest.mark.parametrize(
    ("dotted", "message"),
    [
        ({"evolv.sigma": 1}, "evolv.sigma: unknown key"),
        ({"evolve.merge_method": "ties", "evolve.sigm": 1}, "evolve.sigm: unknown key; did you mean 'sigma'?"),
        ({"seed.x": 1}, "seed.x: unknown key"),
        ({"dataset.more.json.md": "exact"}, "dataset.more.json.md"),
    ],
)
def test_an_override_of_a_key_that_does_not_exist_is_named(tmp_path, dotted, message):
    with pytest.raises(InputError) as caught:
        load_config(write(tmp_path, yaml.safe_dump(plain())), dotted)
    assert message in str(caught.value)


def test_an_override_can_set_a_value_that_holds_an_equals_sign():
    assert cli._overrides(["forbid=a=b"]) == {"forbid": "a=b"}


@pytest.mark.parametrize("entry", ["samples", "=3", "a=[", "a=2001-13-99"])
def test_an_override_that_is_no_key_and_value_is_refused(entry):
    with pytest.raises(InputError, match=re.escape(f"--set {entry}: ")):
        cli._overrides([entry])


@pytest.mark.parametrize(
    ("dotted", "message"),
    [
        ("smaples", "smaples: unknown key; did you mean 'samples'?"),
        ("dataset.gpqa.json.wieght", "dataset.gpqa.json.wieght: unknown key; did you mean 'weight'?"),
        ("dataset.absent.json.mode", "dataset.absent.json.mode: expected"),
        ("holdout.absent.json.mode", "holdout.absent.json.mode: expected"),
    ],
)
def test_an_override_of_a_key_that_is_not_there_is_refused(tmp_path, dotted, message):
    with pytest.raises(InputError, match=re.escape(message)):
        load_config(write(tmp_path, ORIGINAL), {dotted: 1})


def test_an_override_copes_with_keys_that_are_no_text(tmp_path):
    with pytest.raises(InputError, match=r"\[1\]: Keys should be strings"):
        load_config(write(tmp_path, ORIGINAL + "1: {a: b}\n"), {"samples": 3})


SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
VALUES = st.recursive(
    SCALARS | st.sampled_from(["exact", "2h", "1e-5", "forward", "alpha"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6) | st.integers(), inner, max_size=3),
    max_leaves=6,
)
KEYS = st.sampled_from(sorted(RunConfig.model_fields)) | st.text(max_size=8)
DATASETS = st.dictionaries(
    st.text(max_size=6),
    st.dictionaries(st.sampled_from(sorted(DatasetConfig.model_fields)), VALUES, max_size=4) | VALUES,
    max_size=2,
)


@settings(max_examples=150)
@given(st.dictionaries(KEYS, VALUES | DATASETS, max_size=4))
def test_any_mapping_gives_a_config_or_an_explanation(keys):
    try:
        outcome = parse(**keys)
    except InputError as error:
        outcome = str(error)
    assert isinstance(outcome, RunConfig) or outcome.startswith("cfg.yaml: ")


@settings(max_examples=100)
@given(st.text(max_size=60) | st.text("{}[]:,&*!|>'\"%@`#?-<= \n0123456789abx_.eE", max_size=60))
def test_any_text_gives_a_config_or_an_explanation(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "any.yaml"
    path.write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(InputError, match=re.escape(str(path))):
        load_config(path)


def documented(heading: str) -> dict[str, str]:
    """Key -> default, from the tables between this heading of docs/config.md and the next of its kind."""
    text = (Path(__file__).parents[1] / "docs" / "config.md").read_text(encoding="utf-8")
    parts = re.split(r"^#{2,3} (.+)\n", text, flags=re.MULTILINE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    return dict(re.findall(r"^\| `(\w+)` \|([^|]*)\|", sections[heading], flags=re.MULTILINE))


RUN_SECTIONS = (
    "What is merged",
    "What it is judged by",
    "What is searched",
    "How candidates are compared",
    "How it runs",
)


def test_the_documentation_lists_every_key_and_no_other():
    listed = [key for heading in RUN_SECTIONS for key in documented(heading)]
    assert sorted(listed) == sorted(RunConfig.model_fields)
    assert sorted(documented("Dataset keys")) == sorted(DatasetConfig.model_fields)
    assert sorted(documented("The numbers of one merge")) == sorted(Evolve.model_fields)
    assert sorted(documented("Paths and blocks run twice")) == sorted(Dataflow.model_fields)
    for mode in MODES:
        assert f"| `{mode}` |" in (Path(__file__).parents[1] / "docs" / "config.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("fields", [RunConfig.model_fields, DatasetConfig.model_fields])
def test_the_documented_defaults_are_the_real_ones(fields):
    headings = RUN_SECTIONS if fields is RunConfig.model_fields else ("Dataset keys",)
    listed = {key: value.strip() for heading in headings for key, value in documented(heading).items()}
    for key, field in fields.items():
        if isinstance(field.default, (bool, int, float)):
            shown = yaml.safe_load(listed[key].strip("`"))
            size = {"5GB": 5_000_000_000}.get(shown, shown)
            assert size == field.default, key
        elif field.is_required() and key not in PLACES:
            assert listed[key] == "required", key


def test_the_documentation_says_what_is_free_to_change_on_resume():
    text = (Path(__file__).parents[1] / "docs" / "config.md").read_text(encoding="utf-8")
    sentence = re.search(r"Free to change are (.*)", text, re.DOTALL)[1]
    assert set(re.findall(r"`(\w+)`", sentence)) == FREE_TO_CHANGE


def test_the_example_of_the_documentation_loads():
    text = (Path(__file__).parents[1] / "docs" / "config.md").read_text(encoding="utf-8")
    example = re.search(r"```yaml\n(.*?)```", text, re.DOTALL)[1]
    assert parse_config(yaml.safe_load(example), "docs", Path()).is_joint
