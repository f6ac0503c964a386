"""Every supported family: swap a block and a module, evaluate, write, and load the result with Transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from olmfast.config.datasets import DatasetConfig
from olmfast.evaluation.blueprint import draw_up
from olmfast.evaluation.encoding import load_datasets
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.sequential import SequentialScorer
from olmfast.output.writer import content_of, write_folder
from olmfast.testing import FAMILIES, sums, tiny_model, tiny_tokenizer, write_dataset
from olmfast.weights.expressions import Copy, whole
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Sources

CPU = torch.device("cpu")
CASES = [
    *((family, torch.float32, {}) for family in FAMILIES),
    ("llama", torch.bfloat16, {}),
    ("llama", torch.float16, {"tie_word_embeddings": True}),
    ("qwen2", torch.bfloat16, {"tie_word_embeddings": False}),
    ("gpt2", torch.bfloat16, {}),
]


def open_pool(folder: Path, names: list[str]) -> Pool:
    return Pool.open(names, folder, folder)


def from_transformers(folder: Path) -> Any:
    # Transformers' grouped product of experts knows no float64.
    config = AutoConfig.from_pretrained(folder, experts_implementation="eager")
    return AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float64)


def assert_same(module: Any, other: Any, ids: torch.Tensor) -> None:
    """Parameters bit by bit, logits in float64: a product may add up in another order elsewhere in memory."""
    own, others = dict(module.named_parameters()), dict(other.named_parameters())
    assert own.keys() == others.keys()
    assert all(torch.equal(parameter, others[name]) for name, parameter in own.items())
    # GPT-J's table of positions: loading a checkpoint, Transformers rounds it to float32.
    tolerance = 1e-5 if module.config.model_type == "gptj" else 1e-9
    torch.testing.assert_close(module(ids).logits, other(ids).logits, rtol=tolerance, atol=tolerance)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize(("family", "dtype", "config"), CASES, ids=lambda value: str(value))
def test_written_model_computes_the_working_models_logits(family, dtype, config, tmp_path):
    for seed, name in enumerate(("first", "second")):
        tiny_model(tmp_path / name, family, seed, dtype=dtype, **config)
    pool = open_pool(tmp_path, ["first", "second"])
    sources = Sources(pool, tmp_path)
    model = WorkingModel(whole("first", pool.tensors), sources, CPU, torch.float64)
    architecture = pool.architecture
    tensors = draw_up(model.recipe, pool, torch.float32).tensors
    ids = torch.randint(5, 100, (2, 24), generator=torch.Generator().manual_seed(0))
    before = model.module(ids).logits

    block = architecture.window_unit(tensors, [1])
    module = architecture.module_units(tensors)[0]
    assert len(block.tensors) > len(module.tensors) >= 1
    values = {name: Copy("second", name) for name in (*block.tensors, *module.tensors)}
    scorer = SequentialScorer(model, datasets(tmp_path), tiny_tokenizer(), [4], 4096)
    scores = scorer.score(block, [Candidate("now"), Candidate("swapped", values)])
    assert scores.mean("sums.json")[0] != scores.mean("sums.json")[1]
    assert torch.equal(model.module(ids).logits, before)  # a trial leaves nothing behind

    model.set_recipe(model.recipe.with_values(values))
    logits = model.module(ids).logits
    assert not torch.equal(logits, before)
    out = tmp_path / "merged"
    out.mkdir()
    write_folder(content_of(model.recipe, sources, pool["first"]), sources, out, 5_000_000_000)
    assert_same(model.module, from_transformers(out), ids)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", list(FAMILIES))
def test_working_model_of_a_whole_donor_equals_from_pretrained(family, tmp_path):
    folder = tiny_model(tmp_path / "donor", family, 3)
    pool = open_pool(tmp_path, ["donor"])
    model = WorkingModel(whole("donor", pool.tensors), Sources(pool, tmp_path), CPU, torch.float64)
    ids = torch.randint(5, 100, (2, 40), generator=torch.Generator().manual_seed(0))
    assert_same(model.module, from_transformers(folder), ids)


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize(("family", "key"), [("qwen3_moe", "moe_intermediate_size"), ("olmoe", "intermediate_size")])
def test_a_config_may_leave_out_what_its_class_has(family, key, tmp_path):
    own = getattr(AutoConfig.for_model(family), key)
    folder = tiny_model(tmp_path / "one", family, **{key: own}, num_experts=2, num_experts_per_tok=1)
    config = json.loads((folder / "config.json").read_text())
    assert config.pop(key) == own
    (folder / "config.json").write_text(json.dumps(config))
    pool = open_pool(tmp_path, ["one"])
    model = WorkingModel(whole("one", pool.tensors), Sources(pool, tmp_path), CPU, torch.float64)
    assert_same(model.module, from_transformers(folder), torch.arange(5, 20)[None])


@pytest.mark.parametrize("family", list(FAMILIES))
def test_units_cover_every_tensor_once(family, tmp_path):
    tiny_model(tmp_path / "donor", family, 0)
    pool = open_pool(tmp_path, ["donor"])
    architecture = pool.architecture
    blocks = [architecture.window_unit(pool.tensors, [index]) for index in range(architecture.n_blocks)]
    parts = [architecture.boundary_unit(pool.tensors), *blocks]
    named = sorted(name for part in parts for name in part.tensors)
    assert named == sorted(architecture.model_unit(pool.tensors).tensors) == sorted(pool.tensors)
    modules = architecture.module_units(pool.tensors)
    assert sorted(n for m in modules for n in m.tensors) == sorted(n for b in blocks for n in b.tensors)
    norms = set(modules) - set(architecture.module_units(pool.tensors, skip_norm=True))
    assert norms
    assert all("norm" in unit.name or "ln_" in unit.name for unit in norms)


def test_untouched_merge_is_the_base_byte_for_byte(tmp_path):
    tiny_model(tmp_path / "base", "llama", 0, dtype=torch.bfloat16, shard_size="20KB")
    pool = open_pool(tmp_path, ["base"])
    out = tmp_path / "out"
    out.mkdir()
    sources = Sources(pool, tmp_path)
    write_folder(content_of(whole("base", pool.tensors), sources, pool["base"]), sources, out, 20_000)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == pool["base"].n_bytes
    for name, info in pool["base"].tensors.items():
        written = load_file(out / index["weight_map"][name])[name]
        assert torch.equal(written.view(torch.int16), pool["base"].read(name).view(torch.int16)), info
    for file in ("config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (out / file).read_bytes() == (tmp_path / "base" / file).read_bytes()


def datasets(folder: Path):
    write_dataset(folder / "sums.json", sums(4))
    entries = {"sums.json": DatasetConfig(mode="perplexity")}
    return load_datasets(folder, entries, tiny_tokenizer(), 128)
