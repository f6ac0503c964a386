"""Models that a data-flow file makes: by the command, of classifiers, other families and heads, evo checkpoints."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from hops import IDS, D, donors, drawn, factor, file_of, hop_by_hop, loaded, whole
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    pipeline,
)

import olmfast as package
from olmfast import dataflow
from olmfast.config.loading import parse_yaml
from olmfast.config.tagged import TaggedLoader
from olmfast.dataflow.execution import execute
from olmfast.errors import InputError
from olmfast.testing import FAMILIES, tiny_model, tiny_of, tiny_tokenizer, tree


def as_the_original_writes(data: dict[str, Any]) -> str:
    ordered = OrderedDict({**data, "model_paths": [tuple(entry) for entry in data["model_paths"]]})
    return yaml.dump(ordered, sort_keys=False)


def yaml_of(text: str) -> dict[str, Any]:
    return parse_yaml(text, "text", TaggedLoader)  # type: ignore[return-value]


def deep(names: Sequence[str], depth: int, used: Sequence[tuple[int, int]], **factors: float) -> dict[str, Any]:
    """Two models and two passes, of which the second is empty, as the original's files are."""
    mask = [[[False] * depth for _ in names] for _ in range(2)]
    scales = [[[1.0] * depth for _ in names] for _ in range(2)]
    for model, layer in used:
        mask[0][model][layer] = True
    for place, value in factors.items():
        scales[0][0][int(place[1:])] = value
    keys = {"model_paths": [[name, None] for name in names], "layer_mask": mask, "input_layer_model": 0}
    return {**keys, "output_layer_model": 0, "num_r": 2, "scaling_factors": scales}


def test_two_models_of_32_layers_by_the_command(olmfast, tmp_path, monkeypatch):
    for seed, name in enumerate(("SakanaAI/EvoLLM-JP-v1-7B", "augmxnt/shisa-gamma-7b-v1"), 1):
        tiny_model(tmp_path / name, "mistral", seed, num_hidden_layers=32, dtype=torch.bfloat16, use_cache=False)
    names = ["SakanaAI/EvoLLM-JP-v1-7B", "augmxnt/shisa-gamma-7b-v1"]
    text = as_the_original_writes(deep(names, 32, [(0, layer) for layer in range(31)], l10=0.1))
    (tmp_path / "flow.yml").write_text(text)
    monkeypatch.chdir(tmp_path)
    before = tree(tmp_path)
    for command in (["check", "flow.yml"], ["dataflow", "flow.yml", "out", "--dry-run"]):
        code, printed, _ = olmfast(*command)
        assert code == 0
        assert "32 hops: SakanaAI/EvoLLM-JP-v1-7B 0-31" in printed
    assert package.check(tmp_path / "flow.yml").n_bytes == package.check(yaml_of(text)).n_bytes > 0
    code, _, error = olmfast("check", "flow.yml", "--seed", "1")
    assert code == 2
    assert "flow.yml: is a data-flow file, whose keys are not overridden here, got seed" in error
    for command in ("merge", "run"):
        code, _, error = olmfast(command, "flow.yml", *(["out"] if command == "merge" else []))
        assert code == 2
        assert "use: olmfast dataflow flow.yml OUT" in error
    assert tree(tmp_path) == before
    assert olmfast("dataflow", "flow.yml", "out", "--json")[0] == 0
    config = json.loads(Path("out/config.json").read_text())
    assert (config["num_hidden_layers"], config["use_cache"], config["sliding_window"]) == (32, True, 16)
    got, first = (load_file(f"{name}/model.safetensors") for name in ("out", names[0]))
    changed = "model.layers.9.mlp.down_proj.weight"
    assert torch.equal(got.pop(changed), (first.pop(changed).float() * 0.1).bfloat16())
    assert all(torch.equal(tensor, first[name]) for name, tensor in got.items())
    assert Path("out/dataflow.yml").read_text() == text
    assert olmfast("dataflow", "flow.yml", "out")[0] == 2  # not without --overwrite
    assert olmfast("dataflow", "flow.yml", "out", "--overwrite", "--dtype", "float32")[0] == 0
    assert load_file("out/model.safetensors")[changed].dtype == torch.float32


ROPE = {"rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
        "original_max_position_embeddings": 16, "rope_theta": 500000.0}  # fmt: skip
LLAMA_32 = {"num_hidden_layers": 16, "head_dim": 64, "tie_word_embeddings": True, "rope_parameters": ROPE}


@pytest.fixture(scope="module")
def task_and_language(tmp_path_factory) -> Path:
    """A sequence classifier and a language model of another vocabulary, as a file names them."""
    folder = tmp_path_factory.mktemp("classifier")
    labels = {"num_labels": 2, "id2label": {0: "neg", 1: "pos"}, "label2id": {"neg": 0, "pos": 1}}
    config = LlamaConfig(**{**FAMILIES["llama"], **LLAMA_32, **labels, "pad_token_id": 0})
    tiny_of(folder / "org/task", LlamaForSequenceClassification, config, 1)
    tiny_model(folder / "org/language", "llama", 2, **LLAMA_32 | {"vocab_size": 120})
    used = [(0, layer) for layer in range(15)] + [(1, 3)]
    (folder / "flow.yml").write_text(as_the_original_writes(deep(["org/task", "org/language"], 16, used)))
    return folder


@pytest.mark.usefixtures("float64_throughout")
def test_a_classifier_takes_layers_of_a_language_model(task_and_language, olmfast, tmp_path):
    flow = task_and_language / "flow.yml"
    with pytest.raises(InputError, match=r"org/task: is LlamaForSequenceClassification; use --classification"):
        execute(flow, tmp_path / "out")
    assert olmfast("check", flow)[0] == 2
    assert "17 hops: org/task 0-14, org/language 3, org/task 15" in olmfast("check", flow, "--classification")[1]
    assert not list(tmp_path.iterdir())
    model, tokenizer = execute(merge_config=flow, output_path=tmp_path / "out", classification=True)
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert (model.dtype, model.config.use_cache) == (torch.bfloat16, True)
    assert (len(model.model.layers), model.config.head_dim) == (17, 64)
    assert model.config.rope_parameters == ROPE
    assert model.config.id2label == {0: "neg", 1: "pos"}
    asked = pipeline("text-classification", model=str(tmp_path / "out"))
    assert {answer["label"] for answer in asked("1+2=", top_k=None)} == {"neg", "pos"}
    assert tokenizer("1+2=")["input_ids"]
    exact, _ = execute(flow, tmp_path / "exact", classification=True, dtype="float64")
    classifier = AutoModelForSequenceClassification.from_pretrained(
        task_and_language / "org/task", dtype=torch.float64, attn_implementation="eager"
    )
    language = AutoModelForCausalLM.from_pretrained(
        task_and_language / "org/language", dtype=torch.float64, attn_implementation="eager"
    )
    path = [(int(layer == 15), 3 if layer == 15 else layer, None, None) for layer in range(16)] + [(0, 15, None, None)]
    with torch.no_grad():
        torch.testing.assert_close(exact(IDS).logits, hop_by_hop([classifier, language], path), rtol=1e-9, atol=1e-9)


def test_embedding_head_and_labels_come_from_the_models_that_are_named(task_and_language, tmp_path):
    models = [str(task_and_language / "org" / name) for name in ("task", "language")]
    data = deep(models, 16, [(0, 0)])
    with pytest.raises(InputError, match="--classification needs a sequence classifier as output model"):
        execute({**data, "output_layer_model": 1}, tmp_path / "out", classification=True)
    with pytest.raises(InputError, match=r"has a head of shape \[120, 32\], and the embedding of .*task.* \[112, 32\]"):
        execute({**data, "output_layer_model": 1}, tmp_path / "out")
    # Embedding, config and tokenizer of the language model, head and labels of the classifier.
    model, _ = execute({**data, "input_layer_model": 1}, tmp_path / "out", classification=True, dtype="float32")
    assert model.config.vocab_size == 120
    assert model.config.id2label == {0: "neg", 1: "pos"}
    score = load_file(f"{models[0]}/model.safetensors")["score.weight"]
    assert torch.equal(model.score.weight, score)
    # And of a classifier's blocks and embedding a language model, by its own head.
    both = tiny_model(tmp_path / "c", "llama", 3, **LLAMA_32)
    mixed = deep([models[0], str(both)], 16, [(0, 0)])
    model, _ = execute({**mixed, "output_layer_model": 1}, dtype="float32")
    assert type(model).__name__ == "LlamaForCausalLM"
    assert not model.config.tie_word_embeddings
    assert torch.equal(model.lm_head.weight, load_file(both / "model.safetensors")["model.embed_tokens.weight"])


def test_kinds_of_layers_follow_them(tmp_path):
    keys = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2, "tie_word_embeddings": False}
    folders = donors("qwen2", **keys)
    path = [(0, 2, None, None), (0, 0, 0.5, None), (1, 2, None, None), (1, 1, -1.0, None)]
    execute({**file_of(path), "model_paths": folders}, tmp_path / "out", dtype="float64")
    full, window = "full_attention", "sliding_attention"
    assert loaded(tmp_path / "out").config.layer_types == [window, full, window, full]
    with torch.no_grad():
        got = loaded(tmp_path / "out")(IDS, use_cache=False).logits
    want = hop_by_hop([whole(folder) for folder in folders], path)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_models_of_another_rope_or_another_family_have_no_path_in_common(tmp_path):
    a = donors("llama", torch.float32)[0]
    far = tiny_model(tmp_path / "far", "llama", 2, num_hidden_layers=3, rope_parameters={"rope_theta": 5e5,
                     "rope_type": "default"})  # fmt: skip
    wide = tiny_model(tmp_path / "wide", "llama", 2, num_hidden_layers=3, intermediate_size=64)
    data = file_of([(0, 0, None, None), (1, 1, None, None)])
    out = tmp_path / "out"
    with pytest.raises(InputError, match=r"far: rope_parameters.rope_theta is 500000.0, .* --allow-mismatch"):
        execute({**data, "model_paths": [a, str(far)]}, out)
    execute({**data, "model_paths": [a, str(far)]}, save_only_config=True, allow_mismatch=["rope_theta"])
    narrow = tiny_model(tmp_path / "narrow", "llama", 2, num_hidden_layers=3, hidden_size=16)
    with pytest.raises(InputError, match=rf"layer 0: is not 16 wide, as the embedding of {narrow} is"):
        execute({**data, "model_paths": [a, str(narrow)], "input_layer_model": 1, "output_layer_model": 1}, out)
    inverse = tiny_model(tmp_path / "inverse", "gpt2", n_layer=3, scale_attn_by_inverse_layer_idx=True)
    with pytest.raises(InputError, match=r"layer 1 of the result has attn.scaling .* the model type alone, which cann"):
        execute({**file_of([(0, 0, None, None)], 1), "model_paths": [str(inverse)], "add_last_layer": True}, out)
    with pytest.raises(InputError, match=r"wide: layer 1: mlp.\w+.weight: has shape .* blocks of a path must be alike"):
        execute({**data, "model_paths": [a, str(wide)]}, out)
    with pytest.raises(InputError, match="models of different architectures have no path in common"):
        execute({**data, "model_paths": [a, donors("mistral")[0]]}, out)
    assert not out.exists()


def test_models_without_a_head_give_embedding_and_blocks_and_where_it_is_tied_a_head(tmp_path):
    whole_gpt2, other = (Path(folder) for folder in donors("gpt2", torch.float32))
    bare = tmp_path / "bare"
    AutoModel.from_pretrained(other).save_pretrained(bare)
    tiny_tokenizer().save_pretrained(bare)
    assert "wte.weight" in load_file(bare / "model.safetensors")  # names without the model's prefix
    data = {**file_of([(1, 0, 0.5, None), (0, 0, None, 1.0)]), "output_layer_model": 1}
    got, want = (
        execute({**data, "model_paths": [str(whole_gpt2), str(second)]}, dtype="float32")[0] for second in (bare, other)
    )
    assert torch.equal(got(IDS).logits, want(IDS).logits)
    assert got.config.architectures == ["GPT2LMHeadModel"]


def test_it_generates_with_a_cache_what_it_generates_without():
    model, _ = execute({**file_of([(1, 1, 1.5, None), (0, 0, 0.5, 0.1)] * 2), "model_paths": donors("llama")})
    assert (model.config.use_cache, model.dtype) == (True, torch.bfloat16)
    model = model.float()
    with_cache, without = (
        model.generate(IDS, max_new_tokens=8, do_sample=False, use_cache=use, eos_token_id=None, pad_token_id=0)
        for use in (True, False)
    )
    assert torch.equal(with_cache, without)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_r": 1}, "expected 1 entries, as num_r says, got 2"),
        ({"output_layer_model": 2}, "output_layer_model: expected 0 to 1"),
        ({"layer_mask": [[[True] * 2] * 2] * 2}, "scaling_factors[0][0]: expected a list of 2 entries"),
        ({"scaling_factors": [[[float("nan")] * 3] * 2] * 2}, "scaling_factors[0][0][0]: expected a finite number"),
        ({"scaling_factors": [[[[1.0] * 9] * 3] * 2] * 2}, "expected a number, 32 numbers, the width of the model"),
        ({"scaling_factors": [[[1e39] * 3] * 2] * 2}, "holds NaN or infinity|turns finite inputs into NaN or infinity"),
    ],
)
def test_what_does_not_fit_ends_with_2_and_writes_nothing(keys, message, olmfast, tmp_path):
    data = {**deep(donors("llama", torch.float32), 3, [(0, 0), (0, 1)]), **keys}
    (tmp_path / "flow.yml").write_text(yaml.safe_dump(data))
    before = tree(tmp_path)
    code, _, error = olmfast("dataflow", tmp_path / "flow.yml", tmp_path / "out")
    assert code == 2
    assert any(part in error for part in message.split("|"))
    assert tree(tmp_path) == before


def test_config_alone_a_path_in_memory_and_the_originals_name(tmp_path, capsys):
    data = {"model_paths": [[name, "main"] for name in donors("llama", torch.float32)], **file_of([(0, 1, None, None)])}
    model, tokenizer = dataflow.dfs_excute_from_config(data, output_path=tmp_path / "out", save_only_config=True)
    assert model is None
    assert tokenizer("1")["input_ids"]
    assert not list((tmp_path / "out").glob("*.safetensors"))
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 1
    model, _ = dataflow.execute(data, device="cpu", debug=True, add_last_layer=True, last_layer_scale=0.5)
    assert "2 hops" in capsys.readouterr().out
    down = load_file(f"{data['model_paths'][0][0]}/model.safetensors")["model.layers.1.mlp.down_proj.weight"]
    assert torch.equal(model.model.layers[0].mlp.down_proj.weight, (0.5 * down).bfloat16())


def evo(folder: Path, family: str, layers: Sequence[int], **factors: torch.Tensor) -> Path:
    """A checkpoint that stores its blocks once and walks them with its own code."""
    source = Path(donors(family)[0])
    tensors = load_file(source / "model.safetensors")
    tensors |= {"model.input_layers": torch.tensor(layers, dtype=torch.int32)}
    tensors |= {f"model.input_{name}": tensor for name, tensor in factors.items()}
    shutil.copytree(source, folder)
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    name = f"Evo{family.capitalize()}AffineForCausalLM" if "bias" in factors else f"Evo{family.capitalize()}ForCausalLM"
    code = {"AutoModelForCausalLM": f"modeling_evo.{name}"}
    own = {"model_type": f"evo{family}", "architectures": [name], "num_hops": len(layers), "auto_map": code}
    (folder / "config.json").write_text(json.dumps({**config, **own, "use_cache": False}))
    (folder / "modeling_evo.py").write_text("raise SystemExit('run')\n")
    return folder


@pytest.mark.usefixtures("float64_throughout")
def test_an_evo_checkpoint_becomes_a_plain_one(olmfast, tmp_path):
    layers = [0, 1, 1, 2, 0, 2]
    cases = {
        "mistral": {"scales": drawn(1, 6)},
        "llama": {"scales": torch.stack([factor("matrix", i) for i in range(6)]), "bias": drawn(2, 6, D)},
    }
    for family, factors in cases.items():
        folder = evo(tmp_path / family, family, layers, **factors)
        out = tmp_path / f"{family}-plain"
        assert olmfast("dataflow", "--unfold", folder, out, "--dtype", "float64")[0] == 0
        assert not list(out.glob("*.py"))
        config = json.loads((out / "config.json").read_text())
        assert (config["model_type"], config["num_hidden_layers"], config["use_cache"]) == (family, 6, True)
        assert not {"auto_map", "num_hops"} & set(config)
        scales, bias = factors["scales"], factors.get("bias")
        path = [(0, layer, scales[i], None if bias is None else bias[i]) for i, layer in enumerate(layers)]
        with torch.no_grad():
            got = loaded(out)(IDS).logits
        torch.testing.assert_close(got, hop_by_hop([whole(donors(family)[0])], path), rtol=1e-9, atol=1e-9)
    code, _, error = olmfast("dataflow", "--unfold", donors("llama")[0], tmp_path / "none")
    assert code == 2
    assert "has no tensors input_layers and input_scales" in error
    bad = evo(tmp_path / "bad", "mistral", [0, 3], scales=torch.ones(2))
    code, _, error = olmfast("dataflow", "--unfold", bad, tmp_path / "none")
    assert code == 2
    assert "expected a list of blocks from 0 to 2, got [0, 3]" in error
    odd = evo(tmp_path / "named", "mistral", [2, 0], scales=torch.ones(2))
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "model_type": "dfs", "num_hidden_layers": 2}))
    assert olmfast("dataflow", "--unfold", odd, tmp_path / "named-plain")[0] == 0
    assert json.loads((tmp_path / "named-plain" / "config.json").read_text())["model_type"] == "mistral"
    (odd / "config.json").write_text(json.dumps({**config, "model_type": "dfs", "architectures": ["Dfs"]}))
    code, _, error = olmfast("dataflow", "--unfold", odd, tmp_path / "none")
    assert code == 2
    assert "model_type 'dfs' is none of cohere, gemma," in error
    bad = evo(tmp_path / "odd", "mistral", [0, 1], scales=torch.ones(2, 7))
    code, _, error = olmfast("dataflow", "--unfold", bad, tmp_path / "none")
    assert code == 2
    assert (
        "expected a number, 32 numbers, the width of the model, or 32 lists of 32, got 7 in model.input_scales" in error
    )
    assert not (tmp_path / "none").exists()
