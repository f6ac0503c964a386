"""Static merges of real checkpoints: what is written, what is refused, and that nothing is lost."""

from __future__ import annotations

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from llamas import merged, tensors
from safetensors.torch import save_file

from olmfast.errors import InputError
from olmfast.kernels import slerp, ties_merge, weighted_sum
from olmfast.testing import FAMILIES, tiny_model
from olmfast.weights.chunks import Held, Operands, Scratch
from olmfast.weights.methods import METHODS


@pytest.fixture
def place(llamas, tmp_path) -> Path:
    """A folder of one test's own, with copies of the models."""
    for name in "ab":
        shutil.copytree(llamas / name, tmp_path / name)
    return tmp_path


def change(folder: Path, **changed: torch.Tensor | None) -> None:
    """Save tensors of a model anew; None removes one."""
    held = tensors(folder) | {name.replace("__", "."): tensor for name, tensor in changed.items()}
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    save_file({n: t for n, t in held.items() if t is not None}, folder / "model.safetensors", metadata={"format": "pt"})


def set_config(folder: Path, **keys: Any) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def test_the_result_loads_and_holds_what_the_formula_says(place):
    from transformers import AutoModelForCausalLM

    done = merged(place, parameters={"weight": 0.5})
    a, b, out = (tensors(place / name) for name in ("a", "b", "out"))
    assert done.account == f"{len(a)} tensors written: {len(a)} merged by linear"
    for name, tensor in out.items():
        assert torch.equal(tensor, ((a[name].float() + b[name].float()) / 2).bfloat16())
    model = AutoModelForCausalLM.from_pretrained(place / "out")
    assert torch.equal(model.lm_head.weight.bfloat16(), out["lm_head.weight"])


def test_the_folder_has_the_files_of_the_base_byte_for_byte_the_recipe_and_a_card(place):
    (place / "a" / "notes.txt").write_text("not copied")
    merged(place)
    names = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
    for name in names:
        assert (place / "out" / name).read_bytes() == (place / "a" / name).read_bytes()
    assert (place / "out" / "mergekit_config.yml").read_text() == (place / "m.yml").read_text()
    front = yaml.safe_load((place / "out" / "README.md").read_text().split("---")[1])
    assert front == {
        "base_model": ["a", "b"],
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "olmfast"],
    }
    assert {path.name for path in (place / "out").iterdir()} == {
        *names,
        "model.safetensors",
        "mergekit_config.yml",
        "README.md",
    }
    assert not (place / "out.partial").exists()


def test_small_shards_get_an_index_that_names_each_tensor_once(place):
    merged(place, shard_size=20_000)
    index = json.loads((place / "out" / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(tensors(place / "a"))
    assert len(set(index["weight_map"].values())) == len(list((place / "out").glob("*.safetensors"))) > 1


def test_a_checkpoint_of_27_tensors_with_one_that_nobody_knows_comes_out_with_27(tmp_path):
    for seed, name in enumerate("ab"):
        tiny_model(tmp_path / name, "qwen2", seed)
        change(tmp_path / name, odd__thing=torch.full((3, 5), seed + 1.0))
    done = merged(tmp_path)
    out = tensors(tmp_path / "out")
    assert set(out) == set(tensors(tmp_path / "a"))
    assert len(out) == 27
    assert torch.equal(out["odd.thing"], torch.full((3, 5), 1.5))
    assert done.account == "27 tensors written: 27 merged by linear"


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare_linear", "sce"])
def test_a_tensor_without_values_stays_one(method, place):
    for name in "ab":
        change(place / name, empty__thing=torch.zeros(0, 4).bfloat16())
    merged(
        place,
        method,
        "ab",
        **({} if method == "linear" else {"base_model": "a", "parameters": {"weight": 0.5, "t": 0.5}}),
    )
    out = tensors(place / "out")
    assert out["empty.thing"].shape == (0, 4)
    assert set(out) == set(tensors(place / "a"))


def test_a_family_that_is_in_no_table_is_merged_by_its_keys(place):
    for name in "ab":
        set_config(place / name, model_type="newcomer", num_experts=2)
        change(place / name, model__layers__0__experts__1__gate=torch.randn(4, 4).bfloat16())
    merged(place, parameters={"weight": [0.0, 1.0], "normalize": False})
    out, a, b = (tensors(place / name) for name in ("out", "a", "b"))
    assert not out["model.layers.0.experts.1.gate"].any()  # the depth of a block is its first number
    name = "model.layers.2.mlp.up_proj.weight"
    assert torch.equal(out[name], (a[name].float() + b[name].float()).bfloat16())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_merged_and_loads(family, tmp_path):
    from transformers import AutoModelForCausalLM

    for seed, name in enumerate("ab"):
        tiny_model(tmp_path / name, family, seed)
    merged(tmp_path, "slerp", base_model="a", parameters={"t": 0.3})
    assert set(tensors(tmp_path / "out")) == set(tensors(tmp_path / "a"))
    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]


def test_a_tensor_that_one_model_lacks_is_named_with_everything_else_that_is_wrong(place):
    change(place / "b", model__layers__1__mlp__up_proj__weight=None, model__norm__weight=torch.ones(31).bfloat16())
    with pytest.raises(InputError) as caught:
        merged(place)
    assert "model.layers.1.mlp.up_proj.weight: in a, but not in b" in str(caught.value)
    assert "model.norm.weight: shapes differ: a [32], b [31]" in str(caught.value)
    assert not (place / "out.partial").exists()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("method", ["linear", "ties", "dare_linear", "sce", "arcee_fusion", "passthrough"])
def test_nan_and_infinity_are_named_with_their_file(method, bad, place):
    weight = tensors(place / "b")["model.layers.1.mlp.up_proj.weight"]
    weight[3, 4] = bad
    change(place / "b", model__layers__1__mlp__up_proj__weight=weight)
    keys = {"names": "b"} if METHODS[method].base == "required" or method == "passthrough" else {}
    if method != "passthrough":
        keys |= {"base_model": "a"} if method != "linear" else {}
        keys["parameters"] = {} if method in ("sce", "arcee_fusion") else {"weight": 0.5}
    if method == "sce":
        keys["names"] = "b"
    with pytest.raises(InputError, match=r"b/model\.safetensors: model\.layers\.1\.mlp\.up_proj\.weight: holds NaN or"):
        merged(place, method, **keys)
    assert not (place / "out").exists()
    merged(place, method, allow_nonfinite=True, **keys)
    assert not tensors(place / "out")["model.layers.1.mlp.up_proj.weight"].isfinite().all()


def test_a_result_that_overflows_is_an_error_although_its_inputs_are_finite(place):
    with pytest.raises(InputError, match="turns finite inputs into NaN or infinity"):
        merged(place, parameters={"weight": 1e6, "normalize": False}, dtype="float16")


def test_quantised_and_pickled_models_are_refused_with_advice(place):
    set_config(place / "b", quantization_config={"bits": 4})
    (place / "a" / "model.safetensors").rename(place / "a" / "pytorch_model.bin")
    with pytest.raises(InputError) as caught:
        merged(place)
    assert "quantised weights cannot be merged; use the unquantised model" in str(caught.value)
    assert "save_pretrained" in str(caught.value)


def test_models_of_different_depth_are_refused_before_anything_is_written(place):
    tiny_model(place / "c", "llama", 3, num_hidden_layers=2)
    with pytest.raises(InputError, match="different numbers of layers: a has 3, c has 2; use slices"):
        merged(place, names="ac")


def test_a_tied_head_stays_tied_and_is_written_once(tmp_path):
    for seed, name in enumerate("ab"):
        tiny_model(tmp_path / name, "llama", seed, tie_word_embeddings=True)
    change(tmp_path / "a", lm_head__weight=tensors(tmp_path / "a")["model.embed_tokens.weight"].clone())
    change(tmp_path / "b", lm_head__weight=tensors(tmp_path / "b")["model.embed_tokens.weight"].clone())
    done = merged(tmp_path)
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    assert done.account.endswith("1 tied to the embedding and not written twice")


def test_a_tied_model_offers_its_embedding_where_another_has_a_head(tmp_path):
    tiny_model(tmp_path / "a", "llama", 0, tie_word_embeddings=True)
    tiny_model(tmp_path / "b", "llama", 1)
    merged(tmp_path)
    a, b, out = (tensors(tmp_path / name) for name in ("a", "b", "out"))
    assert torch.equal(out["lm_head.weight"], (a["model.embed_tokens.weight"] + b["lm_head.weight"]) / 2)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is False


def test_slices_are_stacked_renumbered_and_the_config_follows(tmp_path):
    from transformers import AutoModelForCausalLM

    for seed, name in enumerate("ab"):
        tiny_model(tmp_path / name, "qwen2", seed, num_hidden_layers=4, max_window_layers=2, use_sliding_window=True)
    ranges = [("a", 0, 3), ("b", 1, 4)]
    slices = [{"sources": [{"model": m, "layer_range": [begin, end]}]} for m, begin, end in ranges]
    done = merged(tmp_path, "passthrough", slices=slices)
    a, b, out = (tensors(tmp_path / name) for name in ("a", "b", "out"))
    order = [(a, 0), (a, 1), (a, 2), (b, 1), (b, 2), (b, 3)]
    for new, (model, old) in enumerate(order):
        for part in ("mlp.up_proj.weight", "self_attn.q_proj.bias"):
            assert torch.equal(out[f"model.layers.{new}.{part}"], model[f"model.layers.{old}.{part}"])
    assert torch.equal(out["model.norm.weight"], b["model.norm.weight"])
    assert torch.equal(out["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    before = json.loads((tmp_path / "a" / "config.json").read_text())["layer_types"]
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == [*before[0:3], *before[1:4]]
    AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert "copied from a" in done.account
    assert "copied from b" in done.account


def test_a_layer_range_past_the_end_says_how_many_layers_there_are(place):
    slices = [{"sources": [{"model": "a", "layer_range": [0, 4]}]}]
    with pytest.raises(InputError, match=r"layer_range \[0, 4\] of a, which has 3 layers \(0 to 2\)"):
        merged(place, "passthrough", slices=slices)


def test_padded_rows_of_the_vocabulary_are_kept(place):
    for name in "ab":
        held = tensors(place / name)
        padded = {key: torch.cat([held[key], held[key][:4]]) for key in ("lm_head.weight", "model.embed_tokens.weight")}
        change(place / name, **{key.replace(".", "__"): tensor for key, tensor in padded.items()})
        set_config(place / name, vocab_size=116)
    merged(place, base_model="a", tokenizer_source="base")
    assert tensors(place / "out")["lm_head.weight"].shape[0] == 116
    assert json.loads((place / "out" / "config.json").read_text())["vocab_size"] == 116
    assert (place / "out" / "tokenizer.json").read_bytes() == (place / "a" / "tokenizer.json").read_bytes()


def test_a_union_appends_what_the_base_lacks_and_its_rows_come_from_the_model_that_has_it(place):
    from transformers import AutoTokenizer

    path = place / "b" / "tokenizer.json"
    data = json.loads(path.read_text())
    data["added_tokens"].append({**data["added_tokens"][0], "id": 105, "content": "<tool>", "special": True})
    path.write_text(json.dumps(data))
    merged(place, base_model="a", tokenizer={"source": "union", "pad_to_multiple_of": 64})
    tokenizer = AutoTokenizer.from_pretrained(place / "out")
    row = tokenizer.convert_tokens_to_ids("<tool>")
    assert tokenizer.encode("a<tool>b")[1] == row
    out = tensors(place / "out")["model.embed_tokens.weight"]
    assert out.shape[0] == 128
    assert torch.equal(out[row], tensors(place / "b")["model.embed_tokens.weight"][105])


def test_a_token_can_be_given_the_row_of_another_or_none(place):
    of_y = {"kind": "model_token", "model": "b", "token": "y"}
    tokens = {"x": {"source": of_y, "force": True}, "z": {"source": {"kind": "zero"}, "force": True}}
    merged(place, base_model="a", tokenizer={"source": "base", "tokens": tokens})
    ids = json.loads((place / "b" / "tokenizer.json").read_text())["model"]["vocab"]
    out, b = (tensors(place / name)["lm_head.weight"] for name in ("out", "b"))
    assert torch.equal(out[ids["x"]], b[ids["y"]])
    assert not out[ids["z"]].any()


@pytest.mark.parametrize(("wanted", "expected"), [("auto", "common"), ("b", "own"), ("{{ mine }}", "{{ mine }}")])
def test_the_chat_template_is_the_commonest_a_models_own_or_as_given(wanted, expected, place):
    (place / "a" / "chat_template.jinja").write_text("common")
    (place / "b" / "chat_template.jinja").write_text("own")
    merged(place, chat_template=wanted)
    assert (place / "out" / "chat_template.jinja").read_text() == expected


def test_a_word_that_is_no_chat_template_is_refused(place):
    with pytest.raises(InputError, match="did you mean 'chatml'"):
        merged(place, chat_template="chatlm")


def test_dare_draws_the_same_masks_again_and_others_from_another_seed(place):
    keys = {"names": "b", "base_model": "a", "parameters": {"weight": 1.0, "density": 0.5}}
    results = []
    for seed in (1, 1, 2):
        merged(place, "dare_linear", overwrite=True, seed=seed, **keys)
        results.append((place / "out" / "model.safetensors").read_bytes())
    assert results[0] == results[1] != results[2]


@pytest.mark.parametrize("name", METHODS)
def test_a_chunk_at_a_time_gives_what_the_whole_tensor_does(name):
    method, numbers = METHODS[name], torch.Generator().manual_seed(3)
    base = torch.randn(1400, 513, generator=numbers)
    others = [(base + 0.05 * torch.randn(base.shape, generator=numbers)).bfloat16() for _ in range(3)]
    terms = others[: method.n_terms[1] or 3]
    base = base.bfloat16() if method.base == "required" else None
    memory, settings = Scratch(), {"density": 0.4, "t": 0.3}
    for values in ([2 * term for term in terms], terms):  # what another tensor left in the memory does not matter
        operands = Operands([Held(term) for term in values], None if base is None else Held(base), memory=memory)
        piece = method.prepare(operands, method.settings(settings))
        edges = [*range(0, operands.n_values, 77_777), operands.n_values]
        odd = [piece(start, stop).bfloat16() for start, stop in pairwise(edges)]
    whole = method(terms, base, settings)
    assert torch.equal(torch.cat(odd).view(whole.shape), whole)


def test_methods_that_the_kernels_have_too_give_what_these_give():
    numbers = torch.Generator().manual_seed(4)
    base, *terms = (torch.randn(140, 513, generator=numbers).bfloat16() for _ in range(4))
    settings = {"weight": (0.2, 0.5, 0.4), "density": (0.3, 0.6, 0.5), "lambda": 0.8}
    flat = [term.flatten() for term in terms]
    pairs = [
        (METHODS["linear"](terms, None, settings), weighted_sum(flat, settings["weight"], normalize=True)),
        (METHODS["slerp"](terms[:2], None, {"t": 0.3}), slerp(*flat[:2], 0.3)),
        (
            METHODS["ties"](terms, base, settings),
            ties_merge(flat, settings["weight"], settings["density"], base=base.flatten(), scale=0.8),
        ),
    ]
    for ours, kernel in pairs:
        assert torch.equal(ours.flatten(), kernel)


@pytest.mark.parametrize("name", ["ties", "breadcrumbs"])
@pytest.mark.parametrize(("density", "same_as"), [(1e308, 1), (-1e308, 0), (1.5, 1)])
def test_a_density_beyond_0_and_1_keeps_all_or_nothing(name, density, same_as):
    values = torch.randn(64, generator=torch.Generator().manual_seed(3))
    operands = Operands([Held(values)], Held(torch.zeros(64)))
    method = METHODS[name]
    found = [method.prepare(operands, method.settings({"density": one}))(0, 64).clone() for one in (density, same_as)]
    assert torch.equal(*found)
