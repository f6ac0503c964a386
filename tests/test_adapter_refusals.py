"""What is no LoRA adapter, or one of another model, is refused by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from olmfast.errors import InputError
from olmfast.testing import tiny_adapter, tiny_model
from olmfast.weights.hub import ADAPTER
from olmfast.weights.pool import Pool

LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """The models `llama`, `qwen2` and `gpt_neox`, and `ad1`, an adapter of `llama`."""
    folder = tmp_path_factory.mktemp("bases")
    for family in ("llama", "qwen2", "gpt_neox"):
        tiny_model(folder / family, family, 1)
    tiny_adapter(folder / "ad1", folder / "llama", 1, spread=0.2, target_modules=LINEAR)
    return folder


def opened(folder: Path, *names: str, **keys: Any) -> Pool:
    return Pool.open(names, folder, folder, **keys)


def change(adapter: Path, **keys: Any) -> None:
    """Set keys of adapter_config.json."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


# ---- what is refused, by name


def spoilt(adapter: Path, **changed: torch.Tensor | None) -> None:
    held = load_file(adapter / ADAPTER[1]) | changed
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, adapter / ADAPTER[1])


Q = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    ("keys", "tensors", "message"),
    [
        ({"peft_type": "IA3"}, {}, "peft_type 'IA3' is not supported, only LORA"),
        ({"peft_type": "ADALORA"}, {}, "peft_type 'ADALORA'"),
        ({"peft_type": None}, {}, "has no peft_type, so that it is no adapter that PEFT has saved"),
        ({"peft_type": None, "lora_parameters": {"rank": 8}}, {}, "mlx_lm.fuse makes a model of an adapter of MLX"),
        ({"target_parameters": "experts.gate_up_proj"}, {}, "target_parameters: expected a list of names, got 'exp"),
        ({"layer_replication": [[0, 2]]}, {}, "layer_replication: not supported"),
        ({"use_qalora": True}, {}, "use_qalora: not supported"),
        ({"alora_invocation_tokens": [1]}, {}, "alora_invocation_tokens: not supported"),
        ({"a_key_of_next_year": {"x": 1}}, {}, "a_key_of_next_year: not supported"),
        ({"init_lora_weights": "pissa_niter_4"}, {}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "loftq"}, {}, "trained against a base that it has changed"),
        ({"r": 8}, {}, "layers.0.mlp.down_proj: has rank 4 and 4, adapter_config.json says 8"),
        ({"r": None}, {}, "r: expected a whole number from 1, got None"),
        ({"r": 0}, {}, "r: expected a whole number from 1, got 0"),
        ({"r": True}, {}, "r: expected a whole number from 1, got True"),
        ({"rank_pattern": {"q_proj": 0}}, {}, "rank_pattern: 'q_proj': expected a whole number from 1, got 0"),
        ({"rank_pattern": {"q_proj": "4"}}, {}, "rank_pattern: 'q_proj': expected a whole number from 1, got '4'"),
        ({"lora_alpha": float("nan")}, {}, "lora_alpha: expected a number, got nan"),
        ({"lora_alpha": 10**400}, {}, "lora_alpha: expected a number, got 1000"),
        ({"alpha_pattern": {"q_proj": None}}, {}, "alpha_pattern: 'q_proj': expected a number, got None"),
        ({"rank_pattern": [1]}, {}, "rank_pattern: expected a mapping, got [1]"),
        ({"alpha_pattern": {"(": 3}}, {}, "alpha_pattern: '('"),
        ({"use_dora": True}, {}, "no magnitude, with use_dora True"),
        ({"base_model_name_or_path": "org/other"}, {f"{Q}.lora_B.weight": torch.ones(3, 4)}, "base is org/other"),
        ({}, {f"{Q}.lora_B.weight": None}, "layers.0.self_attn.q_proj: lora_B is missing"),
        ({}, {f"{Q}.lora_A.weight": torch.empty(0)}, "only matrices are supported"),
        ({}, {f"{Q}.lora_A.weight": torch.ones(4, 2, 3, 3)}, "only matrices are supported"),
        ({}, {f"{Q}.lora_diag": torch.ones(4)}, "lora_diag: not supported"),
        ({}, {f"{Q}.lora_A.other.weight": torch.ones(4, 32)}, "more than one adapter"),
        ({}, {"base_model.model.vision.lora_A.weight": torch.ones(4, 8)}, "no tensor vision.weight in llama"),
        ({}, {"base_model.model.model.norm.weight": torch.ones(5)}, "has shape [5], llama has [32]"),
        ({"trainable_token_indices": [112]}, {}, ""),
    ],
)
def test_what_is_not_supported_is_refused_and_named(keys, tensors, message, place, tmp_path):
    adapter = shutil.copytree(place / "ad1", tmp_path / "ad")
    change(adapter, **keys)
    spoilt(adapter, **tensors)
    if not message:
        rows = "base_model.model.model.embed_tokens.token_adapter.trainable_tokens_delta"
        spoilt(adapter, **{rows: torch.ones(1, 32)})
        message = "trainable_token_indices: expected numbers of model.embed_tokens's 112 rows, got [112]"
    with pytest.raises(InputError) as caught:
        opened(place, f"llama+{adapter}")
    assert message in str(caught.value)
    assert str(adapter) in str(caught.value)


def test_folders_that_are_no_adapter_or_no_model_are_told_apart(place, tmp_path):
    def message(*names: str) -> str:
        with pytest.raises(InputError) as caught:
            opened(place, *names)
        return str(caught.value)

    change(shutil.copytree(place / "ad1", tmp_path / "lone"), base_model_name_or_path="org/base")
    wanted = f"is an adapter, not a model; name the model it is for before it, as in 'org/base+{tmp_path}/lone'"
    assert wanted in message(f"{tmp_path}/lone")
    shutil.copy(place / "llama" / "config.json", tmp_path / "lone")  # as some trainers save it
    assert wanted in message(f"{tmp_path}/lone")
    assert "is a model, not a LoRA adapter" in message("llama+qwen2")
    assert "nowhere: no such adapter folder" in message("llama+nowhere")
    assert "nowhere: no such model folder" in message("nowhere+ad1")
    (tmp_path / "empty").mkdir()
    assert "no adapter_config.json in this folder" in message(f"llama+{tmp_path}/empty")
    (tmp_path / "lone" / ADAPTER[1]).rename(tmp_path / "lone" / "adapter_model.bin")
    assert "only pickled weights" in message(f"llama+{tmp_path}/lone")
    assert "no tensor model.layers.0.mlp.down_proj.weight in gpt_neox" in message("gpt_neox+ad1")
