"""The schema that editors are given says what the config says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from olmfast.config.candidates import BLENDS
from olmfast.config.datasets import DatasetConfig
from olmfast.config.originals import IGNORED, RENAMED
from olmfast.config.run import PLACES, RunConfig, load_config, parse_config
from olmfast.config.schema import BLEND_BOUNDS, run_schema
from olmfast.errors import InputError

ROOT = Path(__file__).parent.parent
LEAST = {"models_dir": "m", "output_dir": "o", "models": ["a", "b"], "dataset": {"d.json": {"mode": "exact"}}}
SCHEMA = jsonschema.Draft202012Validator(run_schema())


def loads(config: dict[str, Any]) -> bool:
    try:
        parse_config(config, "cfg", Path("/data"))
    except InputError:
        return False
    return True


def test_the_command_prints_the_schema_and_it_is_one(olmfast):
    code, said, error = olmfast("schema")
    assert (code, error) == (0, "")
    assert json.loads(said) == run_schema()
    jsonschema.Draft202012Validator.check_schema(run_schema())


def test_it_has_every_key_and_every_default():
    schema = run_schema()
    assert set(schema["properties"]) == {*RunConfig.model_fields, *IGNORED, *RENAMED}
    assert set(schema["$defs"]["DatasetConfig"]["properties"]) == set(DatasetConfig.model_fields)
    assert not schema["required"]
    defaults = {key: entry["default"] for key, entry in schema["properties"].items() if "default" in entry}
    loaded = parse_config(LEAST, "cfg", Path("/data"))
    assert parse_config({**defaults, **LEAST}, "cfg", Path("/data")) == loaded
    assert SCHEMA.is_valid({**defaults, **LEAST})
    assert len(defaults) == len(RunConfig.model_fields) - len(["models", "dataset"]) - len(PLACES)  # which depend


@pytest.mark.parametrize("path", sorted((ROOT / "examples/demo").glob("*.yaml")), ids=lambda path: path.stem)
def test_the_configs_of_the_demo_load_and_are_valid(path):
    assert SCHEMA.is_valid(yaml.safe_load(path.read_text()))
    load_config(path)


@pytest.mark.parametrize(
    "text",
    [
        (ROOT / "README.md").read_text().split("```yaml\n# merge.yaml")[1].split("```")[0],
        (ROOT / "examples/demo/olm_config.yaml").read_text(),
    ],
    ids=["README", "demo"],
)
def test_the_configs_of_the_documents_are_valid(text):
    assert SCHEMA.is_valid(yaml.safe_load(text))


def test_a_config_says_what_to_merge_and_what_to_ask():
    prunes = {"models": ["a"], "output_dir": "o", "prune": {"alphas_file": "fusion_alphas.json", "num_layer": 13}}
    genome = {"evolve": {"merge_method": "ties", "models": ["a", "b"]}, "dataset": LEAST["dataset"], "output_dir": "o"}
    for config in (prunes, genome):
        assert (SCHEMA.is_valid(config), loads(config)) == (True, True)
    for key in ("models", "dataset"):
        config = {name: value for name, value in LEAST.items() if name != key}
        assert (SCHEMA.is_valid(config), loads(config)) == (False, False)


VALID = [
    {"holdout": {"lm_eval": "arc_easy"}, "dataset": {"lm_eval": "arc_easy", "split": "validation"}},
    {"evolve": {"merge_method": "ties", "base_model": "org/base", "models": ["a", "b"]}},
    *({"budget": value} for value in (None, 30, "30", "90s", "1.5 h", {"seconds": 9}, {"evaluations": "12"})),
    *({"racing": value} for value in (True, False, None, {}, {"rungs": [5, 10]}, {"confidence": "0.9"})),
    *({key: value} for key in ("shard_size", "max_ram", "max_vram") for value in (10**9, "5GB", "500 mib", "1e9"[:1])),
    *({"candidates": [value]} for value in ("swap", "slerp", {"linear": 0.5}, {"ties": [1, "1e-1"]})),
    *({"selection": value} for value in ("mean", "copeland", "ranks", "average_rank", "borda")),
    *({"markov": value} for value in (0, 2, "3", {"window": 1}, {"window": 1, "slide": False})),
    *({"boundary_select": value} for value in (True, "no", "exact", "d.json", "b")),
    *({key: None} for key in ("samples", "direction", "markov", "layer_swap", "selection", "models_dir", "holdout")),
    {"dataset": {"d.json": {"mode": "exact_uncertain", "think": None}}, "db_dir": None, "es_swap": False},
    *({"improve_all": value} for value in (None, False, "all", "d.json")),
    *({"layer_swap": value} for value in (True, "yes", "OFF")),
    *({"es_svd_sigma": value} for value in (0.1, 1, "1e-5")),
    {"max_ram": None, "samples": "50", "dataset_dir": "data", "forbid": None, "units": [], "scales": ["block"]},
    {"holdout": {"h.json": {"mode": "choice", "weight": "2", "think": "no", "strict": True}}},
]
INVALID = [
    *({"budget": value} for value in (0, True, "soon", 1.5, [], {"second": 9}, {"evaluations": 0})),
    *({"racing": value} for value in (1, "fast", {"rungs": []}, {"rungs": [1]}, {"confidence": 0.5}, {"rung": [5]})),
    *({key: value} for key in ("shard_size", "max_ram", "max_vram") for value in (0, "big", "5PB", [], True)),
    *({"candidates": value} for value in ("swap", [], ["swop"], [{"swap": 1}], [{"linear": 1}], [{"ties": [0]}])),
    *({"candidates": [value]} for value in ({"linear": []}, {"slerp": "half"}, {"linear": [0.5, 0.5]}, {})),
    *({"selection": value} for value in ("bordar", 3)),
    *({"markov": value} for value in (-1, 1.5, {"windows": 1}, [1])),
    *({"improve_all": value} for value in (True, 3)),
    *({"layer_swap": value} for value in ("perhaps", 7)),
    *({"es_svd_sigma": value} for value in (0, "much")),
    *({key: value} for key, value in {"sampels": 5, "samples": 0, "models": [], "dataset": {}, "seed": -1}.items()),
    *({"dataset": {"d.json": entry}} for entry in ({}, {"mode": "exakt"}, {"mode": "exact", "wieght": 1}, "exact")),
]


@pytest.mark.parametrize("keys", VALID, ids=repr)
def test_every_spelling_that_the_config_takes_is_valid(keys):
    assert loads({**LEAST, **keys})
    assert SCHEMA.is_valid({**LEAST, **keys})


@pytest.mark.parametrize("keys", INVALID, ids=repr)
def test_what_the_config_refuses_is_invalid(keys):
    assert not loads({**LEAST, **keys})
    assert not SCHEMA.is_valid({**LEAST, **keys})


@pytest.mark.parametrize("missing", ["models", "dataset"])
def test_a_required_key_is_missed(missing):
    config = {key: value for key, value in LEAST.items() if key != missing}
    assert not loads(config)
    assert not SCHEMA.is_valid(config)


@pytest.mark.parametrize("name", BLENDS)
def test_the_numbers_of_a_blend_are_those_that_it_allows(name):
    bounds = jsonschema.Draft202012Validator(BLEND_BOUNDS[name])
    for value in (-1.5, -1, 0, 1e-9, 0.5, 1 - 1e-9, 1, 1.5, 20):
        assert bounds.is_valid(value) == BLENDS[name].is_allowed(value), value
