"""Configs of the original OLM, version by version: read as what they were there, and every choice recomputed."""

from __future__ import annotations

import json
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from olmfast import check, load_config, run
from olmfast.config.run import RunConfig, parse_config
from olmfast.errors import InputError
from olmfast.observer import Observer
from olmfast.testing import tiny_model, tiny_run

DATASETS = {"long.json": {"mode": "quality"}, "math.json": {"mode": "exact"}, "talk.json": {"mode": "bigram"}}
# Configs of the shapes that its versions had.
BASIC = {"direction": "backward", "models": ["a", "b"], "dataset": DATASETS}
NAMED = {**BASIC, "base_model_name": "a", "improve_all": None, "metric_dir": "./metrics/", "samples": 1000}
SWITCHED = {
    **NAMED, "direction": "forward", "base_model_name": "b", "base_select": "bigram", "boundary_select": None,
    "db_dir": None, "models_db": None, "skip_quality": False, "layer_swap": False, "tensor_swap": True,
}
NEWEST = {
    "models": ["a", "b"], "base_model_name": "c", "direction": "backward", "layer_swap": False, "tensor_swap": True,
    "es_svd": False, "es_norm": False, "skip_norm": True, "base_select": False, "boundary_select": False,
    "load_merge_report": False, "improve_all": "base", "max_models": 25, "metric_dir": "./metrics/",
    "dataset": {"math.json": {"mode": "exact_match", "think": False}, "long.json": {"mode": "diversity"}},
}


def parse(config: dict[str, Any], **keys: Any) -> RunConfig:
    return parse_config({**config, **keys}, "olm_config.yaml", Path("/data/me"))


@pytest.mark.parametrize(
    ("config", "walk", "base_select", "base", "selection", "units"),
    [
        (BASIC, ["block"], "quality", "a", "average_rank", ["*"]),
        (NAMED, ["block"], False, "a", "average_rank", ["*"]),
        ({**BASIC, "dataset": {"math.json": {"mode": "exact"}}}, ["block"], True, "a", "average_rank", ["*"]),
        ({**BASIC, "base_select": "bigram"}, ["block"], "bigram", "a", "average_rank", ["*"]),
        ({**BASIC, "selection": "ranks"}, ["block"], "quality", "a", "average_rank", ["*"]),
        (SWITCHED, ["tensor"], "bigram", "b", "average_rank", ["*", "boundary"]),
        (NEWEST, ["tensor"], False, "c", "copeland", ["*", "boundary"]),
        ({**NEWEST, "selection": "ranks"}, ["tensor"], False, "c", "copeland", ["*", "boundary"]),
        ({**NEWEST, "units": ["*"]}, ["tensor"], False, "c", "copeland", ["*"]),
        ({**NEWEST, "base_select": "b"}, ["tensor"], "b", "b", "copeland", ["*", "boundary"]),
    ],
)
def test_every_version_is_searched_as_it_was(config, walk, base_select, base, selection, units):
    found = parse(config)
    assert not found.is_joint
    assert (found.walk, found.base_select, found.base_name) == (walk, base_select, base)
    assert (found.selection, found.units) == (selection, units)


def test_a_config_of_first_versions_is_told_from_later_ones_and_says_so():
    said = "read as a config of the original's first versions"
    (note,) = (note for note in parse(BASIC).notes if note.startswith(said))
    assert "every block is searched; the base is chosen by quality; the lowest average rank wins" in note
    assert any(f"{said}, as it has db_dir" in note for note in parse(SWITCHED).notes)
    later = [NEWEST, {**BASIC, "layer_swap": False}, {**BASIC, "boundary_select": True}, {**BASIC, "scales": ["model"]}]
    for config in later:
        assert not any(note.startswith(said) for note in parse(config).notes)
        assert "block" not in parse(config).walk


def test_old_keys_and_modes_have_the_meaning_of_their_successors():
    config = parse(
        BASIC,
        es_swap=True,
        es_generations=4,
        es_sigma=0.2,
        dataset={"a.json": {"mode": "exact_uncertain"}, "b.json": {"mode": "uncertain_bigram"}},
        improve_all="exact_uncertain",
    )
    assert (config.es_svd, config.es_svd_generations, config.es_svd_sigma) == (True, 4, 0.2)
    assert [entry.mode for entry in config.dataset.values()] == ["exact", "bigram"]
    assert config.improve_all == "exact"
    assert parse(NEWEST, improve_all="exact").improve_all == "exact_match"
    assert parse(NAMED, improve_all="bigram", dataset={"a.json": {"mode": "exact"}}).improve_all is None


def test_a_base_that_is_not_in_models_joins_them():
    assert parse(NEWEST).models == ["a", "b", "c"]
    told = [note for note in parse({**NEWEST, "base_model_name": "aa"}).notes if "joins" in note]
    assert told == ["base_model_name: aa is not in models and joins them; did you mean 'a'?"]


@pytest.mark.parametrize(
    "key", ["samples", "direction", "markov", "max_models", "layer_swap", "selection", "budget", "racing", "units"]
)
def test_a_blank_value_means_the_default(key):
    blank = parse({**BASIC, "layer_swap": True, "selection": "copeland", key: None})
    assert getattr(blank, key) == RunConfig.model_fields[key].get_default()
    assert not blank.is_joint


def test_blank_values_mean_the_default_in_datasets_and_lists_too():
    config = parse(BASIC, models=["a", None, "b"], dataset={"a.json": {"mode": "exact", "think": None, "weight": None}})
    assert config.models == ["a", "b"]
    assert (config.dataset["a.json"].think, config.dataset["a.json"].weight) == (True, 1)


def test_the_basic_config_has_places_for_everything():
    config = parse(BASIC)
    assert (config.models_dir, config.output_dir) == (Path("/data/me/models"), Path("/data/me/merged"))
    assert config.dataset_dir == Path("/data/me")


@pytest.mark.parametrize(
    ("direction", "markov", "windows"),
    [
        ("forward", 1, ["0", "0+1", "1+2"]),
        ("backward", 1, ["2", "1+2", "0+1"]),
        ("forward", 2, ["0", "0+1", "0+1+2"]),
        ("backward", {"window": 1, "slide": False}, ["1+2", "0"]),
    ],
)
def test_windows_slide_unless_told_not_to(direction, markov, windows):
    from olmfast.search.units import units_of
    from olmfast.weights.architecture import Architecture

    architecture = Architecture.from_config({"model_type": "llama", "num_hidden_layers": 3}, "config.json")
    tensors = [f"model.layers.{i}.mlp.up_proj.weight" for i in range(3)]
    config = parse(BASIC, markov=markov, direction=direction)
    assert [unit.name for unit in units_of("block", config, architecture, tensors)] == windows


def test_a_run_that_would_search_nothing_is_refused_with_what_to_do(tmp_path):
    off = {"layer_swap": False, "tensor_swap": False, "base_select": False}
    with pytest.raises(InputError, match=r"searches nothing: .* no stage is on; switch on some of base_select"):
        run(load_config(tiny_run(tmp_path, 2, **off)))
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    said: list[str] = []
    observer = Observer()
    observer.note = said.append  # type: ignore[method-assign]
    check(load_config(tmp_path / "cfg.yaml", {"models": ["donor0"], "layer_swap": True}), observer=observer)
    assert "models: donor0 is the only one: there is nothing to choose from" in said


# Runs


def original_run(folder: Path, config: dict[str, Any], **keys: Any) -> Path:
    """`olm_config.yaml` of one of the shapes, with three tiny donors in the models' places."""
    tiny_run(folder, 0, models=[], dataset={}, holdout={})
    (folder / "cfg.yaml").unlink()
    for seed, name in enumerate(("a", "b", "c")):
        tiny_model(folder / "models" / name, seed=seed)
    for name in ("math.json", "talk.json"):
        (folder / name).write_text((folder / ("sums.json" if name == "math.json" else "more.json")).read_text())
    asked = {"conversation": [{"from": "system", "value": "Write."}, {"from": "human", "value": "Tell a story."}]}
    asked["conversation"].append({"from": "gpt", "value": ""})
    (folder / "long.json").write_text(json.dumps([asked]))
    path = folder / "olm_config.yaml"
    path.write_text(yaml.safe_dump({**config, "max_new_tokens": 6, **keys}))
    return path


def test_a_first_configs_blocks_are_searched_and_its_empty_answer_is_right_for_quality(tmp_path, olmfast, monkeypatch):
    original_run(tmp_path, BASIC)
    monkeypatch.chdir(tmp_path)
    code, said, _ = olmfast("run", "--dry-run")
    assert code == 0
    assert "read as a config of the original's first versions, as it has a direction and no switch of a stage" in said
    assert olmfast("run", "-q")[0] == 0
    report = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert list(report["layers"]) == ["1", "0"]
    by_quality = report["olmfast"]["steps"]["base"]["metrics"]["long.json"]
    assert by_quality[report["base_model"]["name"]] == min(by_quality.values())


def test_the_newest_configs_modules_are_searched_with_those_of_the_boundary(tmp_path):
    result = run(load_config(original_run(tmp_path, NEWEST)))
    units = [outcome.unit for outcome in result.record.choices()]
    assert (units[0], units[-1]) == ("lm_head", "model.embed_tokens")
    assert len(units) == 2 + 2 * 7
    assert result.recipe.base == "c"
    assert not any("norm" in unit for unit in units)


@pytest.mark.parametrize("wanted", ["bigram", "talk.json", "b"])
def test_base_and_boundary_are_chosen_by_a_metric_a_dataset_or_a_name(tmp_path, wanted):
    switches = {"layer_swap": False, "base_select": wanted, "boundary_select": wanted}
    result = run(load_config(original_run(tmp_path, BASIC, models=["a", "b", "c"], **switches)))
    base, boundary = result.record.steps["base"], result.record.steps["boundary"]
    if wanted == "b":
        assert (result.recipe.base, boundary.winner) == ("b", "b")
        return
    for outcome in (base, boundary):
        scores = outcome.metrics["talk.json"]
        assert scores[outcome.winner] == pytest.approx(min(scores.values()), rel=1e-5)
    assert list(boundary.metrics) == list(DATASETS)


def test_a_donor_stored_with_another_head_gives_its_blocks(tmp_path):
    path = original_run(tmp_path, BASIC, models=["a", "b", "c"], base_model_name="a")
    folder = tmp_path / "models" / "b"
    tensors = load_file(folder / "model.safetensors")
    del tensors["lm_head.weight"]
    tensors["score.weight"] = torch.zeros(2, 32)
    tensors["model.embed_tokens.weight"] = tensors["model.embed_tokens.weight"][:100].clone()  # a vocabulary of its own
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps({**config, "architectures": ["LlamaForSequenceClassification"], "vocab_size": 100})
    )
    said: list[str] = []

    observer = Observer()
    observer.note = said.append  # type: ignore[method-assign]
    result = run(load_config(path), observer=observer)
    (told,) = [line for line in said if line.startswith("b: ")]
    assert "stored as LlamaForSequenceClassification, so it gives its blocks alone" in told
    assert told.endswith("(score.weight)")
    for name, outcome in result.record.steps.items():
        assert ("b" in outcome.metrics["math.json"]) == (name != "base")
    assert "b" not in result.selection.rows
    written = load_file(result.output_dir / "model.safetensors")
    donors = {name: load_file(tmp_path / "models" / name / "model.safetensors") for name in ("a", "b", "c")}
    assert torch.equal(written["lm_head.weight"], donors["a"]["lm_head.weight"])
    for block in "01":
        winner = result.record.steps[f"layers/{block}"].winner
        name = f"model.layers.{block}.mlp.up_proj.weight"
        assert torch.equal(written[name], donors[winner][name])
    with pytest.raises(InputError, match="can give its blocks, but not be the base; name another base_model_name"):
        check(load_config(path, {"base_model_name": "b"}))


# Every choice of a whole search, recomputed from its ledger by other code


def _tied(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-6 * max(abs(a), abs(b))


def _ranks(scores: dict[str, float]) -> dict[str, int]:
    return {i: 1 + sum(y < x and not _tied(x, y) for y in scores.values()) for i, x in scores.items()}


def _recomputed(metrics: dict[str, dict[str, float]], selection: str) -> str:
    ranks = {name: _ranks(scores) for name, scores in metrics.items()}
    labels = list(next(iter(metrics.values())))
    sums = {i: sum(rank[i] for rank in ranks.values()) for i in labels}
    if selection == "average_rank":
        return min(labels, key=lambda i: (sums[i], labels.index(i)))
    wins = dict.fromkeys(labels, 0)
    for i, j in product(labels, labels):
        wins[i] += sum(rank[i] < rank[j] for rank in ranks.values()) > sum(rank[j] < rank[i] for rank in ranks.values())
    return min(labels, key=lambda i: (-wins[i], sums[i], labels.index(i)))


@pytest.mark.parametrize(("direction", "selection"), [("forward", "copeland"), ("backward", "average_rank")])
def test_every_choice_of_a_whole_search_follows_from_its_ledger(tmp_path, direction, selection):
    stages = {"base_select": True, "boundary_select": True, "layer_swap": True, "tensor_swap": True, "es_svd": True}
    keys = {"direction": direction, "selection": selection, "markov": 1, "es_norm": True, "es_norm_generations": 1}
    units = ["*.0.self_attn.q_proj", "boundary"]
    model = {"num_hidden_layers": 3}
    modes = {"sums.json": "exact_match", "more.json": "bigram_loss", "heldout.json": "exact"}
    data = {name: {"mode": mode} for name, mode in modes.items()}
    path = tiny_run(tmp_path, 2, **stages, **keys, units=units, model=model, dataset=data, holdout={})
    result = run(load_config(path))
    ledger: dict[str, dict[str, dict[str, float]]] = {}
    for line in (result.output_dir / "evaluations.jsonl").read_text().splitlines():
        entry = json.loads(line)
        scores = ledger.setdefault(entry["step"], {}).setdefault(entry["dataset"], {})
        scores[entry["candidate"]] = sum(entry["samples"]) / len(entry["samples"])
    steps = result.record.steps
    assert set(ledger) == set(steps)
    assert {"layers/0+1", "layers/1+2", "boundary", "tensors/lm_head"} <= set(steps)
    checked = [steps[key].winner == _recomputed(metrics, selection) for key, metrics in ledger.items()]
    assert all(checked)
    assert len(checked) == 1 + 1 + 3 + 4 * 3 - 2  # norms have no matrix
    assert any(outcome.changed for outcome in steps.values())


def test_the_command_line_is_the_originals(tmp_path, olmfast, monkeypatch):
    original_run(tmp_path, NAMED)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "earlier").mkdir()
    report = tmp_path / "earlier" / "merge_report.json"
    report.write_text(json.dumps({"base_model": {"name": "b"}, "layers": {"1": {"best_model": "a"}}}))
    assert olmfast("run", "--config", "olm_config.yaml", "--load", report, "-q")[0] == 0
    found = json.loads((tmp_path / "merged" / "merge_report.json").read_text())
    assert found["base_model"]["name"] == "b"
    assert found["layers"]["1"] == {"metrics": {}, "best_model": "a"}  # taken over, not searched again
    assert set(found["layers"]["0"]["metrics"]) == set(DATASETS)
    (tmp_path / "olm_config.yaml").unlink()
    code, _, error = olmfast("run")
    assert code == 2
    assert error == (
        "olmfast: olm_config.yaml: no such file in this folder; name the run's config: olmfast run CONFIG\n"
    )
    code, _, error = olmfast("run", "a.yaml", "--config", "b.yaml")
    assert (code, error) == (2, "olmfast: --config b.yaml: the file is given already, as a.yaml; give one of them\n")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[]", "is not a merge report"),
        ("{}", "is not a merge report"),
        ('{"layers": {"one": {"best_model": "a"}}}', "is not a merge report of the original's shape"),
        ('{"olmfast": {"steps": {}}}', "is a report of olmfast's own; --resume continues it in its folder"),
    ],
)
def test_a_report_to_begin_from_is_one_of_the_originals(tmp_path, content, message):
    path = original_run(tmp_path, NAMED)
    report = tmp_path / "other.json"
    report.write_text(content)
    with pytest.raises(InputError, match=message):
        run(load_config(path), report=report)
    assert not (tmp_path / "merged.partial").exists()
