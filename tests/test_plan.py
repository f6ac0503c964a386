"""What `olmfast check` and `--dry-run` say of a run before it begins, and what they may look at for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.utils.flop_counter import FlopCounterMode

from olmfast import load_config, run
from olmfast.errors import InputError
from olmfast.evaluation.memory import Memory
from olmfast.evaluation.metrics import standard_error
from olmfast.evaluation.model import WorkingModel
from olmfast.observer import Observer
from olmfast.runs.estimate import estimate
from olmfast.runs.inputs import Inputs
from olmfast.testing import sums, tiny_model, tiny_run, write_dataset
from olmfast.weights import checkpoint
from olmfast.weights.expressions import whole
from olmfast.weights.sources import Sources

STAGES = {"boundary_select": True, "layer_swap": True, "tensor_swap": True, "es_svd": True, "es_norm": True}
LOSS = {"mode": "bigram_loss"}


@pytest.fixture(scope="module")
def pool(tmp_path_factory) -> Path:
    """A folder with two donors of four blocks, and a config of all stages."""
    folder = tmp_path_factory.mktemp("pool")
    tiny_run(folder, 2, **STAGES, units=["*.q_proj", "*.mlp.*"], model={"num_hidden_layers": 4})
    return folder


@pytest.fixture
def cfg(pool, tmp_path) -> Path:
    """The config of a fresh copy."""
    return shutil.copytree(pool, tmp_path / "run") / "cfg.yaml"


def edit(cfg: Path, **keys: object) -> Path:
    """Change keys of a config; None takes one out."""
    data = {**yaml.safe_load(cfg.read_text()), **keys}
    cfg.write_text(yaml.safe_dump({key: value for key, value in data.items() if value is not None}, sort_keys=False))
    return cfg


def test_a_plan_reads_no_weight_and_a_run_refuses_what_is_wrong_with_them(cfg, olmfast, monkeypatch):
    shard = cfg.parent / "models" / "donor1" / "model.safetensors"
    tensors = load_file(shard)
    tensors["model.norm.weight"][0] = torch.nan
    save_file(tensors, shard, {"format": "pt"})

    def read(*_: object) -> None:
        raise AssertionError("a weight was read")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "copy_tensors", read)
        patch.setattr(checkpoint.TensorInfo, "digest", read)
        assert olmfast("check", cfg)[0] == 0
        assert olmfast("run", cfg, "--dry-run")[0] == 0
    code, _, error = olmfast("run", cfg, "-q")
    assert (code, "model.norm.weight: holds NaN or infinity" in error) == (2, True)


def test_everything_that_is_wrong_is_told_at_once(cfg, olmfast):
    edit(cfg, units=["*.qproj", "*.kproj"], output_dir="models", holdout={"gone.json": LOSS, "gone_too.json": LOSS})
    code, _, error = olmfast("check", cfg)
    assert code == 2
    wrong = ("gone.json: no such", "gone_too.json: no such", "units: '*.qproj' matches", "output_dir: ")
    assert all(part in error for part in wrong), error
    assert len(error.splitlines()) == len(wrong) + 1  # the output folder holds both donors


def test_a_missing_donor_hides_neither_another_nor_a_missing_dataset_nor_a_device(cfg, olmfast):
    edit(cfg, models=["donor0", "gone", "gone_too"], holdout={"gone.json": LOSS}, device="cuda:77")
    code, _, error = olmfast("check", cfg)
    assert code == 2
    wrong = ("device: 'cuda:77'", "gone: no such model", "gone_too: no such model", "gone.json: no such dataset")
    assert all(part in error for part in wrong), error


def test_a_plan_says_what_moves_what_stays_and_whose_tokenizer_it_is(cfg, olmfast):
    code, out, _ = olmfast("check", edit(cfg, skip_norm=True, layer_swap=None, boundary_select=None))
    assert code == 0
    for line in (
        "candidates of a unit: its current values; for each donor: swap",
        "3 tensors keep the base's values: embedding, final norm and head: the boundary is not searched",
        "8 tensors keep the base's values: skip_norm",
        "12 tensors keep the base's values: no pattern of units matches",
        "tokenizer: donor0's; vocabulary: 112 rows in every donor; "
        "tokens listed by the tokenizers: donor0 105, donor1 105",
    ):
        assert line in out
    found = json.loads(olmfast("check", cfg, "--json")[1])
    assert found["stages"]["tensors"] == {"units": 16, "tensors": 16, "candidates": 32}
    assert found["tensors"] == 39 == sum(found["tensors_that_stay"].values()) + 16
    assert found["vocabulary"] == {"rows": 112, "tokens": {"donor0": 105, "donor1": 105}}
    assert found["estimated_s"] == pytest.approx(found["flop"] / found["flop_per_s"])


def test_a_unit_costs_the_blocks_from_its_own_on(cfg):
    stages = estimate(load_config(cfg)).stages
    passes = {name: stage.model_passes(4) for name, stage in stages.items()}
    assert passes["base"] == 2  # both donors, through all blocks
    assert passes["boundary"] == 1  # the other donor; the current one has its scores
    assert passes["layers"] == 1 + 0.75 + 0.5 + 0.25
    assert passes["tensors"] == 4 * passes["layers"]  # four modules in each block
    assert passes["norm_es"] == pytest.approx(stages["norm_es"].n_scored * 2.5 / 4)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_operations_are_those_that_a_run_does(tmp_path, family):
    size = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "head_dim": 32}
    model = {"n_embd": 128, "n_layer": 4} if family == "gpt2" else size
    keys = {"layer_swap": True, "candidates": [{"linear": 0.5}], "holdout": {}, "dataset": {"sums.json": LOSS}}
    cfg = tiny_run(tmp_path, 3, family, **keys, model=model, dtype="float64")  # experts' products are counted there
    write_dataset(tmp_path / "sums.json", sums(48))
    config = load_config(cfg)
    estimated = estimate(config).flop
    with FlopCounterMode(display=False) as counter:
        run(config)
    # Padding, bringing activations up and the pass that is measured come on top of what is estimated; the last block's
    # MLP, which sees only the positions that predict an answer, does less.
    assert 0.9 < counter.get_total_flops() / estimated < 1.3


def test_time_is_in_proportion_to_questions_and_grows_with_whole_models(cfg):
    few, many, sequential = (
        estimate(load_config(cfg, keys)).flop for keys in ({"samples": 2}, {"samples": 6}, {"scorer": "sequential"})
    )
    assert 2.4 < many / few < 3.6
    assert sequential > many


def test_the_least_memory_is_the_model_one_candidate_and_what_enters_its_block(cfg, monkeypatch):
    config = load_config(cfg)
    inputs = Inputs.open(config, Observer())
    settings, datasets = inputs.settings, inputs.questions.datasets
    sources = Sources(inputs.pool, cfg.parent)
    model = WorkingModel(whole("donor0", inputs.pool.tensors), sources, settings.device, settings.dtype)
    live = sum(parameter.nbytes for parameter in model.module.parameters())
    block = sum(model.live(name).nbytes for name in inputs.pool.tensors if ".layers.0." in name)
    # What the process holds itself changes from call to call.
    monkeypatch.setattr(Memory, "used", Memory(settings.device).used)
    found = estimate(config)
    held = found.memory_bytes - live - block
    n_tokens = sum(
        len(s.prompt) + len(s.response) - 1 for n in ("sums.json", "more.json") for s in datasets[n].samples
    )
    n_tokens += sum(len(s.prompt) + 7 for s in datasets["talk.json"].samples)
    assert held - n_tokens * 32 * 4 > 0  # what the interpreter and the libraries take already
    alone = estimate(load_config(cfg, {"scorer": "sequential"}))
    assert found.memory_bytes - alone.memory_bytes == pytest.approx(block + n_tokens * 32 * 4, abs=1 << 22)


def test_a_limit_below_what_is_needed_is_said(cfg, olmfast, monkeypatch):
    monkeypatch.setattr(Memory, "used", 500_000_000)  # what the process holds itself changes from call to call
    tiny_model(cfg.parent / "models" / "donor0", hidden_size=512, intermediate_size=4096, num_hidden_layers=4)
    found = estimate(load_config(edit(cfg, models=["donor0"])))
    limit = found.memory_bytes - 4_000_000
    edit(cfg, max_ram=limit)
    assert "its blocks are streamed" in olmfast("check", cfg)[1]
    assert "its blocks are streamed" not in olmfast("check", edit(cfg, max_ram=None))[1]


def test_the_disk_that_is_free_is_told(cfg, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 10**9))
    assert estimate(load_config(cfg)).to_json()["free_bytes"] == 10**9
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))
    with pytest.raises(InputError, match="the result needs"):
        estimate(load_config(cfg))


def test_a_plan_counts_to_a_budget_of_evaluations(cfg, olmfast):
    whole = estimate(load_config(cfg))
    most, first = whole.n_candidates, whole.stages["base"].n_candidates + whole.stages["boundary"].n_candidates
    code, out, _ = olmfast("check", cfg, "--set", "budget=5")
    assert code == 0
    assert f"5 of at most {most} candidates fit the budget" in out
    assert "fit the budget" not in olmfast("check", cfg)[1]
    found = json.loads(olmfast("check", cfg, "--set", "budget=5", "--json")[1])
    assert (found["budget"], found["evaluations"], found["evaluations_at_most"]) == ({"evaluations": 5}, 5, most)
    fitting = {name: stage["within_budget"] for name, stage in found["stages"].items()}
    assert fitting == {"base": 2, "boundary": 2, "layers": 5 - first, "tensors": 0, "svd_es": 0, "norm_es": 0}
    assert found["flop"] < whole.flop
    roomy = json.loads(olmfast("check", cfg, "--set", f"budget={most + 1}", "--json")[1])
    assert (roomy["evaluations"], roomy["flop"]) == (most, whole.flop)


def test_modules_are_refined_in_turn_so_a_budget_cuts_after_some_of_them(cfg):
    config = load_config(cfg)
    stages = estimate(config).stages
    before = sum(stages[name].n_candidates for name in ("base", "boundary", "layers"))
    per_module = sum(stages[name].n_candidates for name in ("tensors", "svd_es", "norm_es")) / 16
    fitting = estimate(load_config(cfg, {"budget": before + 4 * int(per_module)})).within_budget
    assert min(fitting["tensors"], fitting["svd_es"], fitting["norm_es"]) > 0
    assert all(fitting[name] < stages[name].n_candidates for name in ("tensors", "svd_es", "norm_es"))


def test_a_plan_says_how_many_evaluations_a_budget_of_time_is_expected_to_pay_for(cfg, olmfast, monkeypatch):
    monkeypatch.setattr("olmfast.runs.estimate.product_rate", lambda *_: 1e6)
    whole = estimate(load_config(cfg))
    short = estimate(load_config(cfg, {"budget": {"seconds": whole.seconds / 2}}))
    assert 0 < short.n_evaluations < whole.n_candidates
    # What follows the search is not limited; the last evaluation that fits is a whole one.
    assert whole.seconds / 2 - 1 < short.seconds <= whole.seconds / 2 + whole.scoring_s
    assert estimate(load_config(cfg, {"budget": "1d"})).n_evaluations == whole.n_candidates
    out = olmfast("check", cfg, "--set", "budget=1m")[1]
    assert "about " in out
    assert "are expected to fit the budget of 0:01:00" in out


def test_scoring_that_is_no_search_is_part_of_the_estimate_and_listed(cfg, olmfast):
    out = olmfast("check", cfg)[1]
    besides = "held-out questions: donors (2), selection questions: result (4), held-out questions: result (2)"
    assert besides in out
    alone = estimate(load_config(edit(cfg, holdout=None)))
    assert [step.stage for step in alone.steps if not step.counts] == ["selection"]
    assert 0 < alone.scoring_s < alone.seconds


@pytest.mark.parametrize(("n", "error"), [(50, 0.0707), (200, 0.0354), (10, 0.158)])
def test_the_likely_standard_error_is_half_a_range_by_the_root_of_the_questions(n, error):
    assert standard_error(n) == pytest.approx(error, rel=0.01)


def test_a_plan_says_what_so_many_questions_can_tell(cfg, olmfast):
    out = olmfast(
        "check", edit(cfg, dataset={"sums.json": {"mode": "exact_match"}, "more.json": {"mode": "perplexity"}})
    )[1]
    assert "sums.json: exact_match, 6 samples; a skill's standard error is about 0.2; 24 would give 0.1" in out
    assert "more.json: perplexity, 6 samples\n" in out
    assert "assumed, not measured" in out
    found = json.loads(olmfast("check", cfg, "--json")[1])["datasets"]
    assert found["sums.json"]["standard_error"] == pytest.approx(0.204, abs=0.001)
    assert "standard_error" not in found["more.json"]


@pytest.mark.parametrize(
    ("chosen", "rates", "told"),
    [
        ("float32", {"float32": 1e9, "bfloat16": 6.1e9}, "bfloat16 products are 6.1 times faster than float32 here; "),
        ("bfloat16", {"float32": 3e9, "bfloat16": 1e9}, "float32 products are 3.0 times faster than bfloat16 here; "),
        ("float32", {"float32": 1e9, "bfloat16": 1.2e9}, None),
    ],
)
def test_a_plan_says_when_products_are_much_faster_in_another_dtype(cfg, olmfast, monkeypatch, chosen, rates, told):
    rate = "olmfast.runs.estimate.product_rate"
    monkeypatch.setattr(rate, lambda *measured: rates[str(measured[-1]).removeprefix("torch.")])
    out = olmfast("check", cfg, "--dtype", chosen)[1]
    said = [line for line in out.splitlines() if "times faster" in line]
    assert said == ([] if told is None else [line for line in said if line.startswith(told) and "try it" in line])
    assert bool(said) == bool(told)
    assert json.loads(olmfast("check", cfg, "--dtype", chosen, "--json")[1])["flop_per_s_by_dtype"] == rates


def test_check_takes_the_overrides_of_a_run(cfg, olmfast):
    changed = olmfast("check", cfg, "--set", "samples=3", "--set", "budget=4", "--dtype", "float64", "--device", "cpu")
    assert changed[0] == 0
    assert "sums.json: exact_match, 3 samples" in changed[1]
    assert "on cpu in float64" in changed[1]
    dry = olmfast("run", cfg, "--dry-run", "--set", "samples=3", "--set", "budget=4", "--dtype", "float64", "--json")
    same = olmfast("check", cfg, "--set", "samples=3", "--set", "budget=4", "--dtype", "float64", "--json")
    measured = {"flop_per_s", "flop_per_s_by_dtype", "estimated_s", "estimated_scoring_s", "memory_bytes", "free_bytes"}
    plans = [{k: v for k, v in json.loads(out).items() if k not in measured} for _, out, _ in (dry, same)]
    assert plans[0] == plans[1]
    for arguments in (("--set", "sampels=3"), ("--device", "cuda:77"), ("--seed", "-1")):
        assert olmfast("check", cfg, *arguments)[0] == 2
    merge = cfg.with_name("merge.yml")
    merge.write_text(
        f"merge_method: linear\nmodels: [{{model: {cfg.parent}/models/donor0, parameters: {{weight: 1}}}}]\n"
    )
    assert olmfast("check", merge)[0] == 0
    code, _, error = olmfast("check", merge, "--seed", "3")
    assert (code, "is a merge file, whose keys are not overridden here, got seed" in error) == (2, True)
