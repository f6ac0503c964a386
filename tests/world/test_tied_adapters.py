"""Adapters of what a model ties, in Transformers' types: the result computes what PEFT's model does, or is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from olmfast.config.mergekit import load_merge_config
from olmfast.errors import InputError
from olmfast.static.write import merge
from olmfast.testing import tiny_config, tiny_of

IDS = torch.arange(5, 20)[None]
WHISPER, T5, BART = (f"{name}ForConditionalGeneration" for name in ("Whisper", "T5", "Bart"))


def adapted(place: Path, kind: str, model: str, keys: dict[str, Any]) -> tuple[Any, type[Any]]:
    """`base` and `ad`, an adapter of it that changes all it can; PEFT's model of the two, and its class."""
    from peft import LoraConfig, PeftModel, get_peft_model

    of = getattr(transformers, model)
    base = tiny_of(place / "base", of, tiny_config(kind, tie_word_embeddings=True), tokenizer=False)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        trained = get_peft_model(of.from_pretrained(base), LoraConfig(r=2, init_lora_weights=False, **keys))
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
    trained.save_pretrained(place / "ad")
    return PeftModel.from_pretrained(of.from_pretrained(base), place / "ad").eval(), of


def logits(kind: str, model: Any) -> torch.Tensor:
    with torch.no_grad():
        if kind == "whisper":
            shape = (1, model.config.num_mel_bins, 2 * model.config.max_source_positions)
            heard = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            return model(input_features=heard, decoder_input_ids=IDS).logits
        return model(input_ids=IDS, **({"decoder_input_ids": IDS} if kind in ("t5", "bart") else {})).logits


def merged(place: Path, method: str = "linear", **keys: Any) -> Path:
    keys = {"models": [{"model": "base+ad"}], "parameters": {"weight": 1.0}, **keys}
    (place / "m.yml").write_text(json.dumps({"merge_method": method, **keys}))
    return merge(load_merge_config(place / "m.yml"), place / "out").output_dir


def loaded(of: type[Any], folder: Path) -> Any:
    model, info = of.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@pytest.mark.parametrize(
    ("kind", "model", "keys"),
    [
        ("whisper", WHISPER, {"target_modules": ["proj_out", "q_proj"]}),
        ("whisper", WHISPER, {"target_modules": ["decoder.embed_tokens"]}),
        ("whisper", WHISPER, {"target_modules": ["q_proj"], "modules_to_save": ["proj_out"]}),
        ("bart", BART, {"target_modules": ["lm_head"]}),
        ("bart", BART, {"target_modules": ["encoder.embed_tokens"]}),
        ("bart", BART, {"target_modules": ["shared"]}),  # which Transformers' forward does not call
        ("bert", "BertForMaskedLM", {"target_modules": ["decoder"]}),
        ("bert", "BertForMaskedLM", {"target_modules": ["word_embeddings", "query"]}),
        ("opt", "OPTForCausalLM", {"target_modules": ["lm_head"]}),
        ("opt", "OPTForCausalLM", {"target_modules": ["embed_tokens"]}),
    ],
    ids=str,
)
def test_what_an_adapter_parts_is_parted_in_the_result(kind, model, keys, tmp_path):
    peft, of = adapted(tmp_path, kind, model, keys)
    out = loaded(of, merged(tmp_path))
    assert out.config.tie_word_embeddings is False
    torch.testing.assert_close(logits(kind, out), logits(kind, peft), rtol=1e-4, atol=1e-4)


def test_a_parted_head_merges_with_the_model_that_ties_it(tmp_path):
    peft, of = adapted(tmp_path, "whisper", WHISPER, {"target_modules": ["proj_out", "q_proj"]})
    keys = {"base_model": "base", "parameters": {"weight": 1.0}}
    out = loaded(of, merged(tmp_path, "task_arithmetic", **keys))
    torch.testing.assert_close(logits("whisper", out), logits("whisper", peft), rtol=1e-4, atol=1e-4)


def test_what_the_adapter_ties_stays_tied(tmp_path):
    keys = {"target_modules": ["proj_out", "decoder.embed_tokens"], "ensure_weight_tying": True}
    peft, of = adapted(tmp_path, "whisper", WHISPER, keys)
    out = loaded(of, merged(tmp_path))
    assert out.config.tie_word_embeddings is True
    torch.testing.assert_close(logits("whisper", out), logits("whisper", peft), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("module", ["lm_head", "shared", "embed_tokens"])
def test_what_no_config_can_part_is_refused(module, tmp_path):
    adapted(tmp_path, "t5", T5, {"target_modules": [module]})
    with pytest.raises(InputError, match=r"changes \S+, which is one with \S+ in every model of this type; merge it"):
        merged(tmp_path)
    assert not list(tmp_path.glob("out*"))


def test_a_head_that_is_stored_with_values_of_its_own_is_not_tied(tmp_path):
    adapted(tmp_path, "whisper", WHISPER, {"target_modules": ["q_proj"], "modules_to_save": ["decoder.embed_tokens"]})
    held = load_file(tmp_path / "base" / "model.safetensors")
    own = held["model.decoder.embed_tokens.weight"] + 1
    save_file({**held, "proj_out.weight": own}, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    out = load_file(merged(tmp_path) / "model.safetensors")
    assert torch.equal(out["proj_out.weight"], own)
    assert not torch.equal(out["model.decoder.embed_tokens.weight"], held["model.decoder.embed_tokens.weight"])
