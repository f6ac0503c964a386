"""Vocabularies that once gave a wrong result without a word: every token keeps its row."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers
from pairs import config_of, edit, loaded, merged, pair, save, stacked, weights

from olmfast.errors import InputError
from olmfast.runs.check import check
from olmfast.testing import tiny_config, tiny_of

TOOL = "<tool>"


def add_token(folder: Path, token: str, index: int) -> None:
    data = json.loads((folder / "tokenizer.json").read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": index, "content": token, "special": True})
    (folder / "tokenizer.json").write_text(json.dumps(data))


def swap_tokens(folder: Path, one: str, other: str) -> None:
    """Let two tokens change their ids, in the tokenizer alone."""
    data = json.loads((folder / "tokenizer.json").read_text())
    ids = data["model"]["vocab"]
    ids[one], ids[other] = ids[other], ids[one]
    (folder / "tokenizer.json").write_text(json.dumps(data))


# 1. Heads and embeddings are found by what grows with the vocabulary.


@pytest.mark.parametrize(
    ("kind", "model", "rows"),
    [
        (
            "llava",
            "LlavaForConditionalGeneration",
            ["language_model.lm_head.weight", "language_model.model.embed_tokens"],
        ),
        ("bert", "BertForMaskedLM", ["cls.predictions.bias", "bert.embeddings.word_embeddings"]),
        ("distilbert", "DistilBertForMaskedLM", ["vocab_projector.bias", "distilbert.embeddings.word_embeddings"]),
        ("rwkv", "RwkvForCausalLM", ["head.weight", "rwkv.embeddings"]),
        ("t5", "T5ForConditionalGeneration", ["shared"]),
    ],
)
def test_every_tensor_with_a_row_per_token_follows_the_tokens(kind, model, rows, tmp_path):
    pair(tmp_path, kind, model, {"attention_hidden_size": 32} if kind == "rwkv" else None)
    swap_tokens(tmp_path / "b", "x", "y")
    add_token(tmp_path / "b", TOOL, 105)
    merged(tmp_path, base_model="a", tokenizer={"source": "union", "pad_to_multiple_of": 16})
    ids = json.loads((tmp_path / "a" / "tokenizer.json").read_text())["model"]["vocab"]
    a, b, out = (weights(tmp_path / name) for name in ("a", "b", "out"))
    for row in rows:
        (name,) = (name for name in a if name.startswith(row))
        x, y = ids["x"], ids["y"]
        assert torch.allclose(out[name][x], (a[name][x] + b[name][y]) / 2), name
        assert torch.allclose(out[name][y], (a[name][y] + b[name][x]) / 2), name
        assert torch.allclose(out[name][105], b[name][105]), name
        assert out[name].shape[0] == 112
    assert set(out) == set(a)
    loaded(tmp_path / "out", model)


def test_a_bias_that_grows_with_the_vocabulary_but_not_by_rows_is_refused(tmp_path):
    pair(tmp_path, "bart", "BartForConditionalGeneration")
    add_token(tmp_path / "b", TOOL, 112)
    with pytest.raises(InputError, match="final_logits_bias grows with the vocabulary, but has no row per token"):
        merged(tmp_path, base_model="a", tokenizer_source="union")
    merged(tmp_path, base_model="a", tokenizer_source="base")  # no row moves


def test_of_a_type_that_nobody_knows_a_second_tensor_of_as_many_rows_is_refused(tmp_path):
    pair(tmp_path, "llama", "LlamaForCausalLM")
    for name in "ab":
        edit(tmp_path / name, model_type="newcomer")
        save(tmp_path / name, {**weights(tmp_path / name), "other.table": torch.ones(112, 3)})
    add_token(tmp_path / "b", TOOL, 105)
    with pytest.raises(
        InputError, match=r"has no model type 'newcomer', and other\.table has 112 rows as the embedding"
    ):
        merged(tmp_path, base_model="a", tokenizer_source="union")


def test_the_id_of_an_image_token_follows_it(tmp_path):
    pair(tmp_path, "llava", "LlavaForConditionalGeneration")
    ids = json.loads((tmp_path / "a" / "tokenizer.json").read_text())["model"]["vocab"]
    edit(tmp_path / "a", image_token_id=ids["x"])
    edit(tmp_path / "b", image_token_id=ids["x"])
    swap_tokens(tmp_path / "b", "x", "y")
    merged(tmp_path, base_model="a", tokenizer_source="b")
    assert config_of(tmp_path / "out")["image_token_id"] == ids["y"]


# 2. Tokenizer and embedding agree.


def code_llama(place: Path) -> None:
    """Two models whose embedding ends before the tokenizer does: a by three tokens, b by none."""
    for seed, (name, rows) in enumerate((("a", 104), ("b", 110))):
        tiny_of(place / name, transformers.LlamaForCausalLM, tiny_config("llama", vocab_size=rows), seed)
        for index, token in enumerate(("<pre>", "<mid>", "<suf>"), 105):
            add_token(place / name, token, index)


@pytest.mark.parametrize("source", ["base", "union", "b"])
def test_ids_past_the_embedding_are_given_rows_and_to_no_other_token(source, tmp_path):
    code_llama(tmp_path)
    add_token(tmp_path / "b", TOOL, 108)
    tokens = {"<new>": {"source": {"kind": "model_token", "model": "b", "token": "x"}, "force": True}}
    merged(tmp_path, base_model="a", tokenizer={"source": source, "tokens": tokens})
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.get_vocab()
    out, b = weights(tmp_path / "out"), weights(tmp_path / "b")
    assert len(set(ids.values())) == len(ids)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert max(ids.values()) < out[name].shape[0] == config_of(tmp_path / "out")["vocab_size"]
        assert torch.allclose(out[name][ids["<pre>"]], b[name][105])
        assert torch.allclose(out[name][ids["<new>"]], b[name][ids["x"]])
    assert (TOOL in ids) == (source != "base")
    loaded(tmp_path / "out", "LlamaForCausalLM")


def test_a_token_that_no_embedding_has_a_row_for_gets_the_mean_and_is_told(tmp_path):
    for seed, name in enumerate("ab"):
        tiny_of(tmp_path / name, transformers.LlamaForCausalLM, tiny_config("llama", vocab_size=105), seed)
        add_token(tmp_path / name, "<pre>", 105)
    (tmp_path / "m.yml").write_text(
        json.dumps(
            {
                "merge_method": "linear",
                "models": [{"model": "a"}, {"model": "b"}],
                "parameters": {"weight": 0.5},
                "tokenizer_source": "base",
            }
        )
    )
    plan = check(tmp_path / "m.yml")
    assert (
        "a: 1 tokens of the tokenizer have no row in the embedding, which has 105, the first '<pre>'"
        in plan.warnings[0]
    )
    merged(tmp_path, tokenizer_source="base")
    a, b, out = (weights(tmp_path / name)["lm_head.weight"] for name in ("a", "b", "out"))
    assert torch.allclose(out[105], (a.mean(0) + b.mean(0)) / 2, atol=1e-6)


def test_a_tokenizer_that_gives_an_id_twice_is_refused(tmp_path):
    pair(tmp_path, "llama", "LlamaForCausalLM")
    add_token(tmp_path / "a", "<one>", 105)
    add_token(tmp_path / "a", "<two>", 105)
    with pytest.raises(InputError, match="the tokens '<one>' and '<two>' have the same id 105"):
        merged(tmp_path, base_model="a", tokenizer_source="union")


def test_tokens_of_a_model_of_another_slice_have_its_rows(tmp_path):
    pair(tmp_path, "llama", "LlamaForCausalLM")
    add_token(tmp_path / "b", TOOL, 105)
    stacked(tmp_path, ("a", 0, 2), ("b", 2, 4), base_model="a", tokenizer_source="union")
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(weights(tmp_path / "out")[name][105], weights(tmp_path / "b")[name][105])
