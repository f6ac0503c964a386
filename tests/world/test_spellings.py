"""One model, two spellings: what is the same parameter is merged as one, and the result is spelled as the base."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from olmfast.config.mergekit import load_merge_config
from olmfast.errors import InputError
from olmfast.static.linear import linear
from olmfast.static.write import Written, merge
from olmfast.testing import tiny_config, tiny_of


def merged(place: Path, **keys: Any) -> Written:
    models = [{"model": "a"}, {"model": "b"}]
    held = {"merge_method": "linear", "models": models, "parameters": {"weight": 0.5}, "base_model": "a", **keys}
    (place / "m.yml").write_text(json.dumps(held))
    return merge(load_merge_config(place / "m.yml"), place / "out")


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def respell(folder: Path, spell: Callable[[str], str | None]) -> None:
    held = {new: tensor for name, tensor in weights(folder).items() if (new := spell(name))}
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})


def pair(place: Path, kind: str, model: str, **keys: Any) -> dict[str, torch.Tensor]:
    """Two models of a type, and what their mean is."""
    for seed, name in enumerate("ab"):
        tiny_of(place / name, getattr(transformers, model), tiny_config(kind, **keys), seed)
    a, b = weights(place / "a"), weights(place / "b")
    return {name: (a[name] + b[name]) / 2 for name in a}


def as_in_module(name: str) -> str:
    """What the files of LLaVA call `language_model.model.` and so on."""
    name = re.sub(r"^language_model\.model\.", "model.language_model.", name).removeprefix("language_model.")
    return re.sub(r"^(vision_tower|multi_modal_projector)\.", r"model.\1.", name)


SPELLINGS: dict[str, tuple[str, str, Callable[[str], str]]] = {
    "llava as its module is called": ("llava", "LlavaForConditionalGeneration", lambda name: as_in_module(name)),
    "bert without bert.": ("bert", "BertForMaskedLM", lambda name: name.removeprefix("bert.")),
    "bloom without transformer.": ("bloom", "BloomForCausalLM", lambda name: name.removeprefix("transformer.")),
    "gamma and beta": (
        "bert",
        "BertForMaskedLM",
        lambda name: name.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"),
    ),
}


@pytest.mark.parametrize("which", SPELLINGS)
@pytest.mark.parametrize("odd", ["a", "b"])
def test_models_that_differ_in_spelling_are_merged_and_spelled_as_the_base(which, odd, tmp_path):
    kind, model, spell = SPELLINGS[which]
    mean = pair(tmp_path, kind, model)
    assert set(map(spell, mean)) != set(mean)
    respell(tmp_path / odd, spell)
    merged(tmp_path)
    out = weights(tmp_path / "out")
    assert set(out) == set(weights(tmp_path / "a"))
    for name, tensor in mean.items():
        assert torch.allclose(out[spell(name) if odd == "a" else name], tensor), name
    _, info = getattr(transformers, model).from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info


@pytest.mark.parametrize("odd", ["a", "b"])
def test_a_buffer_that_the_model_computes_may_be_in_one_alone(odd, tmp_path):
    mean = pair(tmp_path, "bert", "BertForMaskedLM")
    buffer = {"bert.embeddings.position_ids": torch.arange(64)[None]}
    save_file({**weights(tmp_path / odd), **buffer}, tmp_path / odd / "model.safetensors", metadata={"format": "pt"})
    merged(tmp_path)
    assert set(weights(tmp_path / "out")) == set(weights(tmp_path / "a"))
    assert all(torch.allclose(weights(tmp_path / "out")[name], tensor) for name, tensor in mean.items())


@pytest.mark.parametrize("odd", ["a", "b"])
@pytest.mark.parametrize(
    ("kind", "model", "copies"),
    [
        ("t5", "T5ForConditionalGeneration", ["encoder.embed_tokens.weight", "decoder.embed_tokens.weight"]),
        ("whisper", "WhisperForConditionalGeneration", ["proj_out.weight"]),
        ("gpt2", "GPT2LMHeadModel", ["lm_head.weight"]),
    ],
)
def test_a_shared_embedding_that_one_model_stores_twice_is_written_once(kind, model, copies, odd, tmp_path):
    mean = pair(tmp_path, kind, model, tie_word_embeddings=True)
    held = weights(tmp_path / odd)
    shared = next(name for name in held if re.search(r"shared|decoder\.embed_tokens|wte", name))
    held |= {name: held[shared].clone() for name in copies}
    save_file(held, tmp_path / odd / "model.safetensors", metadata={"format": "pt"})
    merged(tmp_path)
    out = weights(tmp_path / "out")
    assert set(out) == set(mean)
    assert all(torch.allclose(out[name], tensor) for name, tensor in mean.items())


@pytest.mark.parametrize("odd", ["a", "b"])
def test_a_head_of_its_own_in_one_model_alone_gives_the_result_one(odd, tmp_path):
    pair(tmp_path, "starcoder2", "Starcoder2ForCausalLM", tie_word_embeddings=True)
    head = torch.randn(112, 32, generator=torch.Generator().manual_seed(0))
    save_file(
        {**weights(tmp_path / odd), "lm_head.weight": head}, tmp_path / odd / "model.safetensors", {"format": "pt"}
    )
    config = tmp_path / odd / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "tie_word_embeddings": False}))
    merged(tmp_path)
    other = weights(tmp_path / ("b" if odd == "a" else "a"))["model.embed_tokens.weight"]
    assert torch.allclose(weights(tmp_path / "out")["lm_head.weight"], (head + other) / 2)
    model, info = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(info.values()), info
    assert not torch.equal(model.lm_head.weight, model.model.embed_tokens.weight)


def test_the_linear_merge_knows_spellings_too(tmp_path, monkeypatch):
    mean = pair(tmp_path, "bert", "BertForMaskedLM")
    respell(tmp_path / "b", lambda name: name.removeprefix("bert."))
    monkeypatch.chdir(tmp_path)
    linear("a", "b", 0.5, "out", no_special_fixes=True)
    out = weights(tmp_path / "out")
    assert all(torch.allclose(out[name], tensor) for name, tensor in mean.items())


def test_another_tensor_is_still_refused_by_name(tmp_path):
    pair(tmp_path, "bert", "BertForMaskedLM")
    respell(tmp_path / "b", lambda name: None if name == "cls.predictions.bias" else name)
    with pytest.raises(InputError, match=r"cls\.predictions\.bias: in a, but not in b"):
        merged(tmp_path)
