"""LoRA adapters of experts that Transformers fuses (PEFT's target_parameters), held against PEFT."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from olmfast.config.mergekit import load_merge_config
from olmfast.errors import InputError
from olmfast.static.write import merge
from olmfast.testing import tiny_adapter, tiny_of
from olmfast.weights.adapters import AdaptedModel
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.digests import DigestCache
from olmfast.weights.hub import ADAPTER

SIZES: dict[str, Any] = {
    "vocab_size": 112, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "num_experts_per_tok": 2,
}
# Each expert's matrices in the file; the same, of a family that runs know; fused in the file, inputs first.
FAMILIES = {
    "Qwen3Moe": {"moe_intermediate_size": 24, "num_experts": 4},
    "Mixtral": {"num_local_experts": 4},
    "GptOss": {"num_local_experts": 4},
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
EXPERTS = "base_model.model.model.layers.0.mlp.experts"


def moe(folder: Path, family: str, **keys: Any) -> Path:
    import transformers

    config = getattr(transformers, f"{family}Config")(**SIZES | FAMILIES[family] | keys)
    return tiny_of(folder, getattr(transformers, f"{family}ForCausalLM"), config, 1)


def opened(base: Path) -> Checkpoint:
    return Checkpoint(base, "base", DigestCache(), any_family=True)


def adapted(base: Path, adapter: Path) -> AdaptedModel:
    return AdaptedModel(opened(base), adapter, "ad")


def by_peft(base: Path, adapter: Path, folder: Path) -> Any:
    """What merge_and_unload makes, in float64, and what is saved of it."""
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float64)
        PeftModel.from_pretrained(model, adapter, torch_device="cpu").merge_and_unload().save_pretrained(folder)
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "keys",
    [
        {"target_parameters": BOTH},
        {"target_parameters": ["down_proj"], "target_modules": ["q_proj"], "use_rslora": True},
        {"target_parameters": ["1.mlp.experts.gate_up_proj"], "target_modules": []},
        {"target_parameters": BOTH[::-1], "rank_pattern": {r".*\.gate_up_proj": 6}, "alpha_pattern": {"down_proj": 3}},
    ],
    ids=["both", "down and attention", "one layer", "patterns"],
)
def test_adapted_experts_are_merge_and_unload_within_one_rounding(family, keys, tmp_path):
    base = moe(tmp_path / "base", family)
    adapter = tiny_adapter(tmp_path / "ad", base, lora_alpha=7, spread=0.2, **keys)
    model, exact, before = adapted(base, adapter), by_peft(base, adapter, tmp_path / "full"), opened(base).tensors
    assert set(model.tensors) == set(exact)
    changed = 0
    for name, tensor in model.tensors.items():
        ours, truth = tensor.read(), exact[name]
        assert bool(((ours - truth).abs() <= 1e-6 * truth.abs() + 1e-6).all()), name
        changed += not torch.equal(ours, before[name].read())
    assert changed == sum(not torch.equal(exact[name], tensor.read().double()) for name, tensor in before.items()) > 0


def test_what_peft_makes_of_gate_up_and_down_by_default_is_understood(tmp_path):
    base = moe(tmp_path / "base", "Qwen3Moe")
    adapter = tiny_adapter(tmp_path / "ad", base, target_modules=["gate_proj", "up_proj", "down_proj"], spread=0.2)
    settings = json.loads((adapter / ADAPTER[0]).read_text())
    assert settings["target_parameters"], settings  # so that this tests something
    exact = by_peft(base, adapter, tmp_path / "full")
    for name, tensor in adapted(base, adapter).tensors.items():
        torch.testing.assert_close(tensor.read().double(), exact[name], rtol=1e-6, atol=1e-6)


def respelt(adapter: Path, change: Any) -> None:
    held = load_file(adapter / ADAPTER[1])
    save_file(change(held), adapter / ADAPTER[1])


def as_before_0_19(held: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """PEFT up to 0.18 took the first dimension of every expert for its inputs: A and B change places."""
    found = {}
    for name in [name.removesuffix(".lora_A.weight") for name in held if name.endswith(".lora_A.weight")]:
        a, b = held[f"{name}.lora_A.weight"], held[f"{name}.lora_B.weight"]
        a, b = a.view(4, -1, a.shape[1]), b.view(b.shape[0], -1, 4)
        found[f"{name}.lora_A.weight"] = b.permute(2, 1, 0).reshape(-1, b.shape[0]).contiguous()
        found[f"{name}.lora_B.weight"] = a.permute(2, 1, 0).reshape(a.shape[2], -1).contiguous()
    return found


def test_adapters_of_old_versions_of_peft_are_the_other_way_round(tmp_path):
    base = moe(tmp_path / "base", "Qwen3Moe")
    adapter = tiny_adapter(tmp_path / "ad", base, target_parameters=BOTH, spread=0.2)
    expected = {name: tensor.read() for name, tensor in adapted(base, adapter).tensors.items()}
    respelt(adapter, as_before_0_19)
    for name, tensor in adapted(base, adapter).tensors.items():
        torch.testing.assert_close(tensor.read(), expected[name], rtol=1e-6, atol=1e-6)


def test_a_square_expert_is_taken_as_the_others_of_its_model_are(tmp_path):
    base = moe(tmp_path / "base", "GptOss", intermediate_size=32)
    adapter = tiny_adapter(tmp_path / "ad", base, target_parameters=BOTH, spread=0.2)
    exact = by_peft(base, adapter, tmp_path / "full")
    for name, tensor in adapted(base, adapter).tensors.items():
        torch.testing.assert_close(tensor.read().double(), exact[name], rtol=1e-6, atol=1e-6)
    alone = tiny_adapter(tmp_path / "alone", base, target_parameters=BOTH[1:], spread=0.2)
    with pytest.raises(InputError, match="down_proj: experts are square, so that A and B could be meant either way"):
        adapted(base, alone)


def test_a_plain_matrix_may_be_adapted_as_a_parameter(tmp_path):
    base = moe(tmp_path / "base", "Qwen3Moe")
    keys = {"target_modules": "all-linear", "lora_alpha": 7, "spread": 0.2}
    adapters = [tiny_adapter(tmp_path / "all", base, **keys)]
    settings = json.loads((adapters[0] / ADAPTER[0]).read_text())
    assert "gate.weight" in " ".join(settings["target_parameters"])  # the router
    adapters.append(tiny_adapter(tmp_path / "some", base, target_parameters=["q_proj.weight", *BOTH], spread=0.2))
    for adapter in adapters:
        exact = by_peft(base, adapter, tmp_path / f"full-{adapter.name}")
        for name, tensor in adapted(base, adapter).tensors.items():
            torch.testing.assert_close(tensor.read().double(), exact[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_values_of_experts_do_not_depend_on_the_reader(family, tmp_path, monkeypatch):
    base = moe(tmp_path / "base", family)
    adapter = tiny_adapter(tmp_path / "ad", base, target_parameters=BOTH, spread=0.2)
    for module in ("adapted", "chunks"):
        monkeypatch.setattr(f"olmfast.weights.{module}.CHUNK", 100)  # less than an expert, no multiple of a row
    before = opened(base).tensors
    for name, tensor in adapted(base, adapter).tensors.items():
        if tensor is before[name] or "experts" not in name:
            continue
        whole = tensor.read().flatten()
        apart, reader = torch.empty_like(whole), tensor.open()
        for start in reversed(range(0, len(apart), 77)):
            reader.read_into(apart[start : start + 77], start)
        assert torch.equal(apart, whole), name


@pytest.mark.parametrize(
    ("tensors", "keys", "message"),
    [
        ({f"{EXPERTS}.lora_A.weight": torch.ones(16, 7)}, {}, r"down_proj: A and B have shapes \[16, 7\]"),
        ({f"{EXPERTS}.lora_A.weight": torch.ones(0)}, {}, r"down_proj: A and B have shapes \[0\]"),
        ({}, {"r": 3}, "gate_up_proj: has 16 and 16 ranks, expected 3 for each of 4 experts"),
        ({f"{EXPERTS}.lora_B.weight": None}, {}, "down_proj: expected lora_A and lora_B, got lora_A"),
        ({}, {"target_parameters": ["down_proj"]}, "has 2 updates for model.layers.0.mlp.experts.down_proj"),
        ({}, {"target_parameters": ["x"]}, "no tensor model.layers.0.mlp.experts.base_layer.weight in base"),
    ],
)
def test_what_does_not_fit_the_experts_is_refused_and_named(tensors, keys, message, tmp_path):
    base = moe(tmp_path / "base", "Qwen3Moe", num_hidden_layers=1)
    adapter = tiny_adapter(tmp_path / "ad", base, target_parameters=BOTH)
    respelt(adapter, lambda held: {name: one for name, one in (held | tensors).items() if one is not None})
    settings = json.loads((adapter / ADAPTER[0]).read_text())
    (adapter / ADAPTER[0]).write_text(json.dumps(settings | keys))
    with pytest.raises(InputError, match=message):
        adapted(base, adapter)


def test_adapted_experts_are_merged(tmp_path):
    base = moe(tmp_path / "base", "Qwen3Moe")
    fulls = []
    for seed in (1, 2):
        adapter = tiny_adapter(tmp_path / f"ad{seed}", base, seed, target_parameters=BOTH, spread=0.2)
        fulls.append(by_peft(base, adapter, tmp_path / f"full{seed}"))
    entries = [{"model": f"base+ad{seed}", "parameters": {"weight": 0.5}} for seed in (1, 2)]
    (tmp_path / "m.yml").write_text(json.dumps({"merge_method": "linear", "models": entries, "dtype": "float32"}))
    out = merge(load_merge_config(tmp_path / "m.yml"), tmp_path / "out").output_dir
    for name, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor.double(), (fulls[0][name] + fulls[1][name]) / 2, rtol=1e-5, atol=1e-6)
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] | info["unexpected_keys"]


def test_experts_saved_whole_are_refused_where_the_base_stores_each(tmp_path):
    base = moe(tmp_path / "base", "Qwen3Moe")
    adapter = tiny_adapter(tmp_path / "ad", base, target_modules=["q_proj"], modules_to_save=["experts"])
    with pytest.raises(InputError, match="in base, which stores each expert by itself; merge it with PEFT first"):
        adapted(base, adapter)


def test_an_adapter_of_a_config_with_an_infinite_number_is_understood(tmp_path):
    base = moe(tmp_path / "base", "Qwen3Moe")
    adapter = tiny_adapter(tmp_path / "ad", base, target_parameters=BOTH, spread=0.2)
    expected = {name: tensor.read() for name, tensor in adapted(base, adapter).tensors.items()}
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(config | {"time_step_limit": [0.0, {"__float__": "Infinity"}]}))
    assert all(torch.equal(tensor.read(), expected[name]) for name, tensor in adapted(base, adapter).tensors.items())
    (base / "config.json").write_text(json.dumps(config | {"model_type": "unheard"}))
    with pytest.raises(InputError, match="target_parameters: Transformers has no model type 'unheard'"):
        adapted(base, adapter)
