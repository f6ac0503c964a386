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
    assert len(error.splitlines()) == len(wrong)


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
    # All that is estimated is done; padding, bringing activations up and the pass that is measured come on top.
    assert 1 < counter.get_total_flops() / estimated < 1.3


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
    assert ", which is too little" in olmfast("check", cfg)[1]
    assert ", which is too little" not in olmfast("check", edit(cfg, max_ram=None))[1]


def test_the_disk_that_is_free_is_told(cfg, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 0, 10**9))
    assert estimate(load_config(cfg)).to_json()["free_bytes"] == 10**9
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - 5, 5))
    with pytest.raises(InputError, match="the result needs"):
        estimate(load_config(cfg))
