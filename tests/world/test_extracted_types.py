"""Adapters extracted of Transformers' types: at full rank PEFT's model, and ours, compute what the fine-tune does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from olmfast.config.mergekit import load_merge_config
from olmfast.errors import InputError
from olmfast.static.extract import extract_lora
from olmfast.static.write import merge
from olmfast.testing import tiny_config, tiny_of

IDS = torch.arange(5, 20)[None]


def pair(place: Path, kind: str, of: type[Any], **keys: Any) -> None:
    """`base` and `tune`, which differ in everything."""
    for seed, name in enumerate(("base", "tune")):
        tiny_of(place / name, of, tiny_config(kind, **keys), seed, tokenizer=False)


def logits(model: Any) -> torch.Tensor:
    more = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model.eval()(input_ids=IDS, **more).logits


@pytest.mark.parametrize(
    ("kind", "model", "keys"),
    [
        ("bert", "BertForMaskedLM", {"tie_word_embeddings": True}),  # weight and bias of the decoder are tied
        ("t5", "T5ForConditionalGeneration", {}),  # four parameters are one
        ("roberta", "RobertaForSequenceClassification", {}),  # no head that is tied
        ("opt", "OPTForCausalLM", {}),  # finds its positions itself
        ("rwkv", "RwkvForCausalLM", {}),  # modules with parameters of their own hold linear layers
        ("llava", "LlavaForConditionalGeneration", {}),  # the head lies deeper; modules saved within modules
    ],
)
def test_at_full_rank_the_adapter_is_the_fine_tune(kind, model, keys, tmp_path):
    from peft import PeftModel

    of = getattr(transformers, model)
    pair(tmp_path, kind, of, **keys)
    extract_lora(tmp_path / "base", tmp_path / "tune", tmp_path / "ad", 64)
    expected = logits(of.from_pretrained(tmp_path / "tune"))
    theirs = PeftModel.from_pretrained(of.from_pretrained(tmp_path / "base"), tmp_path / "ad")
    torch.testing.assert_close(logits(theirs), expected, rtol=1e-3, atol=1e-3)
    (tmp_path / "m.yml").write_text(json.dumps({"merge_method": "passthrough", "models": [{"model": "base+ad"}]}))
    merge(load_merge_config(tmp_path / "m.yml"), tmp_path / "out")
    ours, info = of.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    torch.testing.assert_close(logits(ours), expected, rtol=1e-3, atol=1e-3)


def test_nothing_is_in_an_adapter_twice(tmp_path):
    pair(tmp_path, "rwkv", transformers.RwkvForCausalLM)
    done = extract_lora(tmp_path / "base", tmp_path / "tune", tmp_path / "ad", 4)
    names = [
        name.removeprefix("base_model.model.") for name in load_file(tmp_path / "ad" / "adapter_model.safetensors")
    ]
    assert any(name.startswith("rwkv.blocks.0.attention") for name in done.saved)
    for saved in done.saved:
        assert not [name for name in (*names, *done.errors) if name.startswith(f"{saved}.") and "lora_" in name]
        assert not [other for other in done.saved if other.startswith(f"{saved}.")]


def test_a_model_that_could_only_be_saved_whole_is_refused(tmp_path):
    pair(tmp_path, "mamba", transformers.MambaForCausalLM)
    with pytest.raises(InputError, match="differs that is not part of what is saved whole, so there is nothing of a"):
        extract_lora(tmp_path / "base", tmp_path / "tune", tmp_path / "ad", 4)
    assert not list(tmp_path.glob("ad*"))
