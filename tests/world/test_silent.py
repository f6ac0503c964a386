"""Merges that once gave a wrong result without a word: each is now right, or refused by name.

Architectures are those of Transformers, small; results are compared with tensors and logits computed here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import transformers
from pairs import config_of, edit, loaded, merged, pair, save, stacked, weights

from olmfast.errors import InputError
from olmfast.runs.check import check
from olmfast.testing import tiny_config, tiny_of


def swap_tokens(folder: Path, one: str, other: str) -> None:
    """Let two tokens change their ids, in the tokenizer alone."""
    data = json.loads((folder / "tokenizer.json").read_text())
    ids = data["model"]["vocab"]
    ids[one], ids[other] = ids[other], ids[one]
    (folder / "tokenizer.json").write_text(json.dumps(data))


# 1. Layers stay of the kind they were, or the key that cannot follow is named.


def test_gemma_2_from_the_hub_gives_the_logits_of_the_layers_that_were_stacked(tmp_path):
    keys = {"sliding_window": 4}
    pair(tmp_path, "gemma2", "Gemma2ForCausalLM", keys)
    for name in "ab":
        edit(tmp_path / name, layer_types=None)  # as on the hub: every other layer slides, said nowhere
    stacked(tmp_path, ("a", 0, 3), ("b", 1, 4))
    kinds = [["sliding_attention", "full_attention"][index % 2] for index in (0, 1, 2, 1, 2, 3)]
    assert config_of(tmp_path / "out")["layer_types"] == kinds
    config = tiny_config("gemma2", **keys, num_hidden_layers=6, layer_types=kinds)
    truth = transformers.Gemma2ForCausalLM(config).double().eval()
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    state = {n: t for n, t in a.items() if ".layers." not in n} | {"model.norm.weight": b["model.norm.weight"]}
    for place, (model, index) in enumerate([(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]):
        prefix = f"model.layers.{index}."
        state |= {n.replace(prefix, f"model.layers.{place}."): t for n, t in model.items() if n.startswith(prefix)}
    truth.load_state_dict(state, strict=False)
    truth.tie_weights()
    ids = torch.arange(5, 25)[None]
    logits = truth(ids).logits
    assert torch.allclose(loaded(tmp_path / "out", "Gemma2ForCausalLM")(ids).logits, logits, atol=1e-6)
    for block in truth.model.layers:  # the kinds matter here
        block.self_attn.sliding_window = None
    truth.config.layer_types = ["full_attention"] * 6
    assert not torch.allclose(truth(ids).logits, logits, atol=1e-2)


@pytest.mark.parametrize(
    ("kind", "model", "keys", "expected"),
    [
        ("llama4_text", "Llama4ForCausalLM", {"moe_layers": [1, 3]}, {"moe_layers": [1, 3, 4, 6]}),
        ("qwen3_moe", "Qwen3MoeForCausalLM", {"mlp_only_layers": [0]}, {"mlp_only_layers": [0]}),
        ("lfm2", "Lfm2ForCausalLM", {"full_attn_idxs": [2]}, {"full_attn_idxs": [2, 5]}),
        ("deepseek_v3", "DeepseekV3ForCausalLM", {"first_k_dense_replace": 1}, {"first_k_dense_replace": 1}),
        (
            "recurrent_gemma",
            "RecurrentGemmaForCausalLM",
            {"lru_width": 32, "block_types": ["recurrent", "attention"]},
            {"block_types": [*["recurrent", "attention"] * 2, *["attention", "recurrent", "attention"]]},
        ),
    ],
)
def test_lists_of_layers_numbers_counts_and_patterns_follow(kind, model, keys, expected, tmp_path):
    pair(tmp_path, kind, model, keys)
    stacked(tmp_path, ("a", 0, 4), ("b", 1, 4))
    held = config_of(tmp_path / "out")
    assert {key: held[key] for key in expected} == expected
    loaded(tmp_path / "out", model)


@pytest.mark.parametrize(
    ("kind", "model", "keys", "parts", "named"),
    [
        (
            "jamba",
            "JambaForCausalLM",
            {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
            [("a", 0, 3), ("b", 2, 4)],
            "attn_layer_offset, attn_layer_period",
        ),
        (
            "deepseek_v3",
            "DeepseekV3ForCausalLM",
            {"first_k_dense_replace": 1},
            [("a", 0, 2), ("b", 0, 2)],
            "first_k_dense",
        ),
        (
            "qwen3_moe",
            "Qwen3MoeForCausalLM",
            {"decoder_sparse_step": 2},
            [("a", 0, 1), ("b", 2, 4)],
            "decoder_sparse_step",
        ),
    ],
)
def test_what_cannot_follow_is_named_and_nothing_is_written(kind, model, keys, parts, named, tmp_path):
    pair(tmp_path, kind, model, keys)
    with pytest.raises(InputError, match=named):
        stacked(tmp_path, *parts)
    assert not list(tmp_path.glob("out*"))


def test_layers_of_two_kinds_are_not_merged_with_each_other(tmp_path):
    pair(tmp_path, "gemma2", "Gemma2ForCausalLM", {"sliding_window": 4})
    sources = [{"model": "a", "layer_range": [0, 2]}, {"model": "b", "layer_range": [1, 3]}]
    with pytest.raises(InputError, match=r"layer 1 of b has .* of layer 0 of a"):
        merged(tmp_path, slices=[{"sources": sources}])


def test_slices_of_an_unknown_type_with_a_key_of_layers_are_refused(tmp_path):
    pair(tmp_path, "llama", "LlamaForCausalLM")
    for name in "ab":
        edit(tmp_path / name, model_type="newcomer", block_configs=[{}] * 4)
    with pytest.raises(InputError, match=r"block_configs in config\.json may speak of layers"):
        stacked(tmp_path, ("a", 0, 4), ("b", 1, 4))
    for name in "ab":
        edit(tmp_path / name, block_configs=None)
    stacked(tmp_path, ("a", 0, 4), ("b", 1, 4))
    assert config_of(tmp_path / "out")["num_hidden_layers"] == 7


# 2. The stack is the text model's.


def test_the_audio_tower_is_left_alone_and_a_layer_count_that_is_a_default_is_stated(tmp_path):
    pair(tmp_path, "qwen2_audio", "Qwen2AudioForConditionalGeneration")
    for name in "ab":
        edit(tmp_path / name, text_config={**config_of(tmp_path / name)["text_config"], "layer_types": None})
    stacked(tmp_path, ("a", 0, 4), ("b", 2, 4))
    held = config_of(tmp_path / "out")
    assert held["text_config"]["num_hidden_layers"] == 6
    assert held["audio_config"] == config_of(tmp_path / "a")["audio_config"]
    a, b, out = (weights(tmp_path / name) for name in ("a", "b", "out"))
    tower = [name for name in a if "audio_tower" in name or "projector" in name]
    assert tower
    assert all(torch.equal(out[name], a[name]) for name in tower)
    last = next(name for name in a if re.search(r"language_model\..*layers\.3\.mlp\.up_proj\.weight", name))
    assert torch.equal(out[last.replace("layers.3", "layers.5")], b[last])
    loaded(tmp_path / "out", "Qwen2AudioForConditionalGeneration")


@pytest.mark.parametrize(
    ("kind", "model"),
    [
        ("t5", "T5ForConditionalGeneration"),
        ("whisper", "WhisperForConditionalGeneration"),
        ("bart", "BartForConditionalGeneration"),
    ],
)
def test_two_stacks_are_refused_with_what_to_write_instead(kind, model, tmp_path):
    pair(tmp_path, kind, model)
    with pytest.raises(InputError, match=r"has an encoder and a decoder \(.*encoder.*decoder.*\).*use models"):
        stacked(tmp_path, ("a", 0, 2), ("b", 2, 4))


# 3. What is before, after and beside the stack.


@pytest.mark.parametrize(
    ("kind", "model", "before", "after", "aside"),
    [
        ("bloom", "BloomForCausalLM", "transformer.word_embeddings_layernorm.weight", "transformer.ln_f.weight", None),
        ("mamba", "MambaForCausalLM", "backbone.embeddings.weight", "backbone.norm_f.weight", None),
        (
            "opt",
            "OPTForCausalLM",
            "model.decoder.embed_positions.weight",
            "model.decoder.final_layer_norm.weight",
            None,
        ),
        ("bert", "BertForSequenceClassification", "bert.embeddings.LayerNorm.weight", "classifier.weight", None),
        (
            "clip",
            "CLIPModel",
            "text_model.embeddings.position_embedding.weight",
            "text_model.final_layer_norm.weight",
            "vision_model.pre_layrnorm.weight",
        ),
        (
            "gemma3",
            "Gemma3ForConditionalGeneration",
            "embed_tokens.weight",
            "model.norm.weight",
            "vision_tower.post_layernorm.weight",
        ),
    ],
)
def test_what_runs_before_the_layers_is_the_first_slices_what_runs_after_the_lasts(
    kind, model, before, after, aside, tmp_path
):
    pair(tmp_path, kind, model)
    stacked(tmp_path, ("b", 0, 4), ("a", 2, 4), base_model="a")
    a, b, out = (weights(tmp_path / name) for name in ("a", "b", "out"))
    for part, owner in ((before, b), (after, a), (aside, a)):
        for name in [name for name in a if part and name.endswith(part)]:
            assert torch.equal(out[name], owner[name]), name
            break
        else:
            assert part is None, part
    loaded(tmp_path / "out", model)


# 4. Configs that give the same weights another meaning.


@pytest.mark.parametrize(
    ("kind", "model", "key", "value"),
    [
        ("gpt2", "GPT2LMHeadModel", "n_head", 2),
        ("llama", "LlamaForCausalLM", "hidden_act", "gelu"),
        ("llama", "LlamaForCausalLM", "rope_parameters", {"rope_type": "default", "rope_theta": 5e5}),
        ("granite", "GraniteForCausalLM", "embedding_multiplier", 2.0),
        ("gemma2", "Gemma2ForCausalLM", "query_pre_attn_scalar", 64),
        ("mixtral", "MixtralForCausalLM", "num_experts_per_tok", 1),
    ],
)
def test_configs_under_which_a_blend_means_nothing_are_refused_unless_allowed(kind, model, key, value, tmp_path):
    pair(tmp_path, kind, model)
    edit(tmp_path / "b", **{key: value})
    with pytest.raises(
        InputError, match=rf"b: .*{'rope_theta' if 'rope' in key else key}.* is .*, a has .*--allow-mismatch"
    ):
        merged(tmp_path)
    assert not list(tmp_path.glob("out*"))
    merged(tmp_path, allow=(key,))
    assert config_of(tmp_path / "out").get(key) == config_of(tmp_path / "a").get(key)


@pytest.mark.parametrize(("key", "value"), [("rms_norm_eps", 1e-3), ("max_position_embeddings", 2048)])
def test_a_smaller_difference_is_told(key, value, tmp_path):
    pair(tmp_path, "llama", "LlamaForCausalLM")
    edit(tmp_path / "b", **{key: value, "transformers_version": "4.0.0", "attention_dropout": 0.5})
    (tmp_path / "m.yml").write_text(
        json.dumps(
            {"merge_method": "linear", "models": [{"model": "a"}, {"model": "b"}], "parameters": {"weight": 0.5}}
        )
    )
    (told,) = check(tmp_path / "m.yml").warnings
    assert told.startswith(f"b: {key} is {value}, a has ")


def test_a_key_that_states_the_default_is_no_difference(tmp_path):
    pair(tmp_path, "llama", "LlamaForCausalLM")
    edit(tmp_path / "b", rope_parameters=None, rope_theta=10000.0, hidden_act=None)
    merged(tmp_path)


def test_permuted_tokens_without_a_tokenizer_source_and_reordered_labels_are_refused(tmp_path):
    pair(tmp_path, "bert", "BertForSequenceClassification")
    swap_tokens(tmp_path / "b", "x", "y")
    edit(tmp_path / "a", id2label={"0": "good", "1": "bad"}, label2id={"good": 0, "bad": 1})
    edit(tmp_path / "b", id2label={"0": "bad", "1": "good"}, label2id={"bad": 0, "good": 1})
    with pytest.raises(InputError) as caught:
        merged(tmp_path)
    assert "b: 2 tokens have another id in the tokenizer, the first 'x'" in str(caught.value)
    assert "use tokenizer_source: base or union, or --allow-mismatch tokenizer" in str(caught.value)
    assert "b: id2label is {'0': 'bad', '1': 'good'}, a has {'0': 'good', '1': 'bad'}" in str(caught.value)
    merged(tmp_path, allow=("tokenizer", "id2label"))


def test_an_allowed_key_that_there_is_not_is_refused(tmp_path):
    pair(tmp_path, "llama", "LlamaForCausalLM")
    with pytest.raises(InputError, match=r"--allow-mismatch hiden_act: no such key .* did you mean 'hidden_act'"):
        merged(tmp_path, allow=("hiden_act",))


# The safety net.


def test_a_result_that_transformers_would_not_load_is_refused_before_it_is_written(tmp_path):
    pair(tmp_path, "llama", "LlamaForCausalLM")
    for name in "ab":
        held = weights(tmp_path / name)
        del held["model.norm.weight"]
        save(tmp_path / name, held)
    with pytest.raises(
        InputError, match=r"1 parameters that nothing fills, the first model\.norm\.weight; nothing has been"
    ):
        stacked(tmp_path, ("a", 0, 4), ("b", 1, 4))
    assert not list(tmp_path.glob("out*"))


def test_a_child_process_says_what_this_one_would(tmp_path, monkeypatch):
    import sys

    from olmfast.weights.skeletons import Skeletons

    tiny_of(tmp_path / "a", transformers.LlamaForCausalLM, tiny_config("llama"))
    config, shapes = config_of(tmp_path / "a"), {n: list(t.shape) for n, t in weights(tmp_path / "a").items()}
    asked = ["load", "stack", "vocabulary"]
    with Skeletons() as here:
        ours = here.examine(config, shapes, *asked)
    monkeypatch.delitem(sys.modules, "transformers")
    with Skeletons() as child:
        theirs = child.examine(config, shapes, *asked)
        assert child._process is not None
    assert child._process is None
    assert ours == theirs
    assert ours.stack == "model.layers"
