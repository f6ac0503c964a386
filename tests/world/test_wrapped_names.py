"""Checkpoints and adapters that were saved with a wrapper's names in theirs: torch.compile, DDP, FSDP."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from olmfast.config.mergekit import load_merge_config
from olmfast.errors import InputError
from olmfast.static.write import merge
from olmfast.testing import tiny_adapter, tiny_model
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.wrappers import own_names

PEFT = "base_model.model."
Respell = Callable[[str], str]
WRAPPED: dict[str, Respell] = {
    "compiled": lambda name: f"_orig_mod.{name}",
    "ddp": lambda name: f"module.{name}",
    "ddp of ddp of compiled": lambda name: f"module.module._orig_mod.{name}",
    "a layer compiled": lambda name: name.replace("model.layers.1.", "model.layers.1._orig_mod."),
    "a leaf compiled": lambda name: name.replace("q_proj.", "q_proj._orig_mod."),
    "decoder compiled": lambda name: name.replace("model.", "model._orig_mod.", 1),
    "decoder in ddp": lambda name: name.replace("model.", "model.module.", 1),
    "fsdp": lambda name: name.replace("layers.0.", "_fsdp_wrapped_module.layers.0._checkpoint_wrapped_module."),
}
ADAPTED: dict[str, Respell] = {
    **{name: respell for name, respell in WRAPPED.items() if name != "decoder in ddp"},
    "inside": lambda name: name.replace(PEFT, f"{PEFT}module._orig_mod."),
}


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """Two models, a and b, and an adapter of a."""
    folder = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab"):
        tiny_model(folder / name, "llama", seed)
    tiny_adapter(folder / "ad", folder / "a", 1, target_modules=["q_proj", "up_proj"], modules_to_save=["lm_head"])
    return folder


def respelt(models: Path, folder: Path, name: str, respell: Respell) -> Path:
    """A copy of a model or an adapter with other names in its file."""
    copy = shutil.copytree(models / name, folder / "wrapped")
    (file,) = copy.glob("*.safetensors")
    held = {respell(key): tensor for key, tensor in load_file(file).items()}
    assert set(held) != set(load_file(file))
    save_file(held, file, metadata={"format": "pt"})
    return copy


def merged(folder: Path, *names: Path | str, out: str = "out") -> Path:
    entries = {"merge_method": "linear", "models": [{"model": str(name)} for name in names]}
    (folder / "m.yml").write_text(json.dumps({**entries, "parameters": {"weight": 1.0}}))
    return merge(load_merge_config(folder / "m.yml"), folder / out).output_dir


def assert_same(one: Path, other: Path) -> None:
    found, expected = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("respell", WRAPPED.values(), ids=list(WRAPPED))
def test_a_wrapped_model_is_read_and_written_under_its_own_names(respell, models, tmp_path):
    wrapped = respelt(models, tmp_path, "b", respell)
    assert any("is read as" in note for note in Checkpoint(wrapped).notes)
    assert_same(merged(tmp_path, wrapped, out="alone"), models / "b")
    expected = merged(tmp_path, models / "a", models / "b", out="expected")
    assert_same(merged(tmp_path, models / "a", wrapped, out="second"), expected)
    reverse = merged(tmp_path, wrapped, models / "a", out="first")
    assert_same(reverse, merged(tmp_path, models / "b", models / "a", out="reverse"))


@pytest.mark.parametrize("respell", ADAPTED.values(), ids=list(ADAPTED))
def test_an_adapter_of_a_wrapped_model_is_the_same_adapter(respell, models, tmp_path):
    wrapped = respelt(models, tmp_path, "ad", respell)
    expected = merged(tmp_path, f"{models / 'a'}+{models / 'ad'}", out="expected")
    assert_same(merged(tmp_path, f"{models / 'a'}+{wrapped}"), expected)


def test_names_that_become_one_are_refused(models, tmp_path):
    copy = shutil.copytree(models / "b", tmp_path / "b")
    held = load_file(copy / "model.safetensors")
    held["_orig_mod.model.norm.weight"] = held["model.norm.weight"] + 1
    save_file(held, copy / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"_orig_mod\.model\.norm\.weight and model\.norm\.weight are one parameter"):
        merged(tmp_path, copy)
    assert not list(tmp_path.glob("out*"))


def test_a_part_that_may_be_the_models_own_stays():
    code_of_its_own = ["module.a.weight", "module.b.weight"]
    assert own_names(code_of_its_own, "x", "never") == {name: name for name in code_of_its_own}
    some = ["module.a.weight", "b.module.weight"]
    assert own_names(some, "x", "front") == {name: name for name in some}
    assert own_names(["module"], "x", "front") == {"module": "module"}
    assert own_names([], "x", "front") == {}


def test_a_models_own_code_may_call_a_part_module(models, tmp_path):
    copy = respelt(models, tmp_path, "b", WRAPPED["ddp"])
    config = json.loads((copy / "config.json").read_text())
    config |= {"model_type": "of_its_own", "auto_map": {"AutoModel": "modeling.M"}}
    (copy / "config.json").write_text(json.dumps(config))
    assert_same(merged(tmp_path, copy), copy)
