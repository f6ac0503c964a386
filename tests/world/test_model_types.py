"""Whatever the model type: a merge loads clean with the right kinds of layers, or is refused with nothing written.

Architectures are those of Transformers, small. What is loaded is compared with tensors computed here.
"""

from __future__ import annotations

import json
import os
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file

from olmfast.config.mergekit import load_merge_config
from olmfast.errors import InputError
from olmfast.static.write import merge
from olmfast.testing import tiny_config, tiny_of

# model type -> (class, keys of its config). Every way to say which layer is of which kind is among them.
TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", {}),
    "mistral": ("MistralForCausalLM", {}),
    "qwen2": ("Qwen2ForCausalLM", {"use_sliding_window": True, "max_window_layers": 2, "sliding_window": 8}),
    "qwen3": ("Qwen3ForCausalLM", {}),
    "gemma": ("GemmaForCausalLM", {}),
    "gemma2": ("Gemma2ForCausalLM", {"sliding_window": 8}),
    "gemma3_text": ("Gemma3ForCausalLM", {"sliding_window": 8, "sliding_window_pattern": 2}),
    "gpt2": ("GPT2LMHeadModel", {}),
    "gptj": ("GPTJForCausalLM", {}),
    "gpt_neox": ("GPTNeoXForCausalLM", {}),
    "gpt_neo": ("GPTNeoForCausalLM", {"attention_types": [[["global", "local"], 2]], "window_size": 8}),
    "bloom": ("BloomForCausalLM", {}),
    "opt": ("OPTForCausalLM", {}),
    "phi": ("PhiForCausalLM", {}),
    "phi3": ("Phi3ForCausalLM", {}),
    "falcon": ("FalconForCausalLM", {}),
    "mpt": ("MptForCausalLM", {}),
    "stablelm": ("StableLmForCausalLM", {}),
    "cohere2": ("Cohere2ForCausalLM", {"sliding_window": 8, "sliding_window_pattern": 2}),
    "granite": ("GraniteForCausalLM", {}),
    "olmo2": ("Olmo2ForCausalLM", {}),
    "starcoder2": ("Starcoder2ForCausalLM", {}),
    "smollm3": ("SmolLM3ForCausalLM", {"no_rope_layer_interval": 2}),
    "mixtral": ("MixtralForCausalLM", {}),
    "qwen2_moe": ("Qwen2MoeForCausalLM", {"mlp_only_layers": [1]}),
    "qwen3_moe": ("Qwen3MoeForCausalLM", {"decoder_sparse_step": 2}),
    "deepseek_v3": ("DeepseekV3ForCausalLM", {"first_k_dense_replace": 1}),
    "llama4_text": ("Llama4ForCausalLM", {"interleave_moe_layer_step": 2, "intermediate_size_mlp": 48}),
    "gpt_oss": ("GptOssForCausalLM", {"sliding_window": 8}),
    "jamba": ("JambaForCausalLM", {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False}),
    "mamba": ("MambaForCausalLM", {}),
    "rwkv": ("RwkvForCausalLM", {"attention_hidden_size": 32}),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", {"lru_width": 32}),
    "qwen3_next": ("Qwen3NextForCausalLM", {"full_attention_interval": 2}),
    "lfm2": ("Lfm2ForCausalLM", {"full_attn_idxs": [1, 3]}),
    "minimax": ("MiniMaxForCausalLM", {"block_size": 8}),
    "modernbert": ("ModernBertForMaskedLM", {}),
    "bert": ("BertForMaskedLM", {}),
    "roberta": ("RobertaForMaskedLM", {}),
    "distilbert": ("DistilBertForMaskedLM", {}),
    "electra": ("ElectraForMaskedLM", {}),
    "albert": ("AlbertForMaskedLM", {}),
    "deberta-v2": ("DebertaV2ForMaskedLM", {}),
    "t5": ("T5ForConditionalGeneration", {}),
    "bart": ("BartForConditionalGeneration", {}),
    "whisper": ("WhisperForConditionalGeneration", {}),
    "llava": ("LlavaForConditionalGeneration", {}),
    "mistral3": ("Mistral3ForConditionalGeneration", {}),
    "qwen2_audio": ("Qwen2AudioForConditionalGeneration", {}),
    "gemma3": ("Gemma3ForConditionalGeneration", {}),
    "mllama": ("MllamaForCausalLM", {"cross_attention_layers": [1, 3]}),
    "clip": ("CLIPModel", {}),
}
# Those whose config.json says of its layers what another's says too: tried with OLMFAST_ALL_TYPES=1.
LIKE_ANOTHER = {
    "gemma", "phi", "stablelm", "granite", "olmo2", "starcoder2", "qwen3", "opt", "falcon", "mpt", "roberta",
    "distilbert", "electra", "deberta-v2", "recurrent_gemma", "clip", "gptj",
}  # fmt: skip
TRIED = [kind for kind in TYPES if kind not in LIKE_ANOTHER or "OLMFAST_ALL_TYPES" in os.environ]
# Which of them no slices can be cut of, whatever they are.
WITHOUT_ONE_STACK = {"t5", "bart", "whisper", "albert"}
# Those whose layers are of several kinds, or differ by their place.
VARIED = {
    "qwen2",
    "gemma2",
    "gpt_neo",
    "cohere2",
    "smollm3",
    "qwen2_moe",
    "deepseek_v3",
    "llama4_text",
    "jamba",
    "rwkv",
}
VARIED |= {"recurrent_gemma", "lfm2", "minimax", "modernbert", "mllama", "gemma3"}
# What each way of cutting cannot be said of in config.json.
REFUSED = {"repeated": {"minimax"}, "dropped": {"minimax"}, "turned": {"deepseek_v3", "rwkv", "modernbert"}}
SLICES = {"repeated": [(0, 3), (1, 4)], "dropped": [(0, 1), (3, 4)], "turned": [(2, 4), (0, 2)]}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Any:
    """A function that makes two models of a type, once."""
    folder = tmp_path_factory.mktemp("types")

    def made(kind: str) -> Path:
        if not (folder / kind).exists():
            name, keys = TYPES[kind]
            config = tiny_config(kind, **({"text_config": keys} if kind == "mllama" else keys))
            for seed, model in enumerate("ab"):
                part = config.text_config if kind == "mllama" else config
                tiny_of(folder / kind / model, getattr(transformers, name), part, seed)
        return folder / kind

    return made


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def loaded(folder: Path, kind: str) -> Any:
    """The result as Transformers loads it, with no key missing or unexpected, and free of shapes that do not fit."""
    model, info = getattr(transformers, TYPES[kind][0]).from_pretrained(folder, output_loading_info=True)
    assert not any(info.values()), info
    return model.eval()


@cache
def kept(folder: Path, kind: str) -> Any:
    return loaded(folder, kind)


def merged(place: Path, out: Path, **keys: Any) -> Path:
    out.parent.mkdir(parents=True, exist_ok=True)
    (out.parent / "m.yml").write_text(json.dumps(keys))
    for name in "ab":
        if not (out.parent / name).exists():
            (out.parent / name).symlink_to(place / name)
    merge(load_merge_config(out.parent / "m.yml"), out)
    return out


@pytest.mark.parametrize("kind", TRIED)
def test_a_blend_loads_clean_and_is_what_the_formula_says(kind, models, tmp_path):
    place = models(kind)
    both = [{"model": "a", "parameters": {"weight": 0.25}}, {"model": "b", "parameters": {"weight": 0.75}}]
    out = merged(place, tmp_path / "linear", merge_method="linear", models=both)
    a, b, result = weights(place / "a"), weights(place / "b"), weights(out)
    assert set(result) == set(a)
    for name, tensor in result.items():
        truth = a[name].double() * 0.25 + b[name].double() * 0.75
        assert torch.allclose(tensor.double(), truth, atol=1e-6, rtol=1e-6), name
    loaded(out, kind)
    loaded(merged(place, tmp_path / "copy", merge_method="passthrough", models=[{"model": "b"}]), kind)
    assert weights(tmp_path / "copy").keys() == b.keys()


@pytest.mark.parametrize(("kind", "cut"), [(k, c) for k in TRIED for c in SLICES if c == "repeated" or k in VARIED])
def test_slices_load_clean_with_each_layer_of_the_kind_it_was_or_are_refused(kind, cut, models, tmp_path):
    place = models(kind)
    sources = [("a", SLICES[cut][0]), ("b", SLICES[cut][1])]
    slices = [{"sources": [{"model": model, "layer_range": list(given)}]} for model, given in sources]
    if kind in REFUSED[cut] | WITHOUT_ONE_STACK:
        with pytest.raises(InputError, match=r"^slices: .*(cannot say this|cannot be told)"):
            merged(place, tmp_path / "out", merge_method="passthrough", slices=slices)
        assert not list(tmp_path.glob("out*"))
        return
    out = merged(place, tmp_path / "out", merge_method="passthrough", slices=slices)
    result = loaded(out, kind)
    donors = {name: kept(place / name, kind) for name in "ab"}
    order = [(model, index) for model, (begin, end) in sources for index in range(begin, end)]
    stack = blocks(result)
    assert len(stack) == len(order)
    for block, (model, index) in zip(stack, order, strict=True):
        same_block(block, blocks(donors[model])[index])
    around = [dict(model.named_parameters()) for model in (result, *donors.values())]
    inside = {
        id(tensor) for model in (result, *donors.values()) for block in blocks(model) for tensor in block.parameters()
    }
    for name, tensor in around[0].items():
        if id(tensor) not in inside:  # embeddings are the first slice's, the final norm and the head the last's
            assert any(torch.equal(tensor, other[name]) for other in around[1:]), name


def blocks(model: Any) -> Any:
    """The layers of the part that reads text: the list of as many modules as its config has layers."""
    n_layers = model.config.get_text_config(decoder=True).num_hidden_layers
    lists = {name: part for name, part in model.named_modules() if isinstance(part, torch.nn.ModuleList)}
    (found,) = (p for n, p in lists.items() if len(p) == n_layers and not re.search(r"vision|audio|experts", n))
    return found


def same_block(block: Any, other: Any) -> None:
    """Equal weights, and the same attributes but for the layer's number."""
    mine, theirs = dict(block.named_parameters()), dict(other.named_parameters())
    assert mine.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in mine.items())
    for part, its in zip(block.modules(), other.modules(), strict=True):
        assert type(part) is type(its)
        for key in ("is_sliding", "sliding_window", "attention_type", "use_rope", "layer_type", "is_causal", "scaling"):
            assert getattr(part, key, None) == getattr(its, key, None), key
