"""Bad input through the command line: exit code 2, one clear message, no traceback, and nothing written."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from olmfast.testing import tiny_model, write_dataset, write_mmlu

OLMFAST = [sys.executable, "-m", "olmfast.cli"]


def edit(cfg: Path, **keys: Any) -> Path:
    """Set keys of a config."""
    cfg.write_text(yaml.safe_dump({**yaml.safe_load(cfg.read_text()), **keys}, sort_keys=False))
    return cfg


def edit_json(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def edit_weights(donor: Path, change: Callable[[dict[str, torch.Tensor]], Any]) -> None:
    tensors = load_file(donor / "model.safetensors")
    change(tensors)
    save_file(tensors, donor / "model.safetensors", metadata={"format": "pt"})


def donor(cfg: Path, name: str = "donor1") -> Path:
    return cfg.parent / "models" / name


def test_a_missing_config_is_named(refused, tmp_path):
    assert refused(tmp_path / "absent.yaml") == f"{tmp_path / 'absent.yaml'}: cannot be read: No such file or directory"


def test_a_config_that_cannot_be_read_is_named(refused, tmp_path):
    assert refused(tmp_path) == f"{tmp_path}: cannot be read: Is a directory"
    path = tmp_path / "cfg.yaml"
    path.write_bytes(b"\xff\xfe\xfa")
    assert refused(path) == f"{path}: cannot be read: not UTF-8 text"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"layer_swp": True}, "layer_swp: unknown key; did you mean 'layer_swap'?"),
        ({"direction": "sideways"}, "direction: expected 'forward' or 'backward', got 'sideways'"),
        ({"dataset": {"sums.json": {"mode": "exakt"}}}, "'perplexity' or 'choice', got 'exakt'; did you mean 'exact'?"),
    ],
)
def test_an_unknown_key_mode_or_direction_is_named(refused, cfg, keys, message):
    text = refused(edit(cfg, **keys))
    assert text.startswith(f"{cfg}: ")
    assert text.endswith(message)


def test_the_real_command_refuses_without_a_traceback(cfg):
    edit(cfg, layer_swp=True)
    done = subprocess.run([*OLMFAST, "run", str(cfg)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == f"olmfast: {cfg}: layer_swp: unknown key; did you mean 'layer_swap'?\n"
    assert not (cfg.parent / "out.partial").exists()


def test_the_real_command_refuses_a_damaged_donor_without_a_traceback(cfg):
    (donor(cfg) / "config.json").unlink()
    done = subprocess.run([*OLMFAST, "run", str(cfg)], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert (
        done.stderr == f"olmfast: {donor(cfg)}: no config.json in this folder; expected a Hugging Face model folder\n"
    )
    assert not (cfg.parent / "out.partial").exists()


def test_a_missing_donor_is_named_with_the_places_looked_in(refused, cfg):
    shutil.rmtree(donor(cfg))
    message = f"donor1: no such model folder; looked in {cfg.parent / 'models'} and {cfg.parent}"
    assert refused(cfg) == message


def test_all_unusable_donors_are_named_at_once(refused, cfg):
    shutil.rmtree(donor(cfg, "donor0"))
    (donor(cfg) / "model.safetensors").unlink()
    first, second = refused(cfg).splitlines()
    assert first.startswith("donor0: no such model folder")
    assert second.startswith(f"{donor(cfg)}: no model.safetensors")


def test_a_folder_without_safetensors_is_named(refused, cfg):
    (donor(cfg) / "model.safetensors").unlink()
    assert refused(cfg) == (f"{donor(cfg)}: no model.safetensors and no model.safetensors.index.json in this folder")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model-00001-of-00002.safetensors", "shards need their index: download model.safetensors.index.json too"),
        ("m.Q4_K_M.gguf", "GGUF files are not read: take the model that they were made from"),
        ("consolidated.safetensors", "weights in their authors' own format: take those for Transformers"),
        ("model.fp16.safetensors", "rename it to model.safetensors if it is the whole model"),
        ("zero_to_fp32.py", "a DeepSpeed checkpoint; zero_to_fp32.py --safe_serialization makes a model of it"),
        ("__0_0.distcp", "a distributed checkpoint; save_pretrained of what trained it makes a model of it"),
        ("tf_model.h5", "weights of another framework; convert them with Transformers"),
        ("checkpoint-10/model.safetensors", "name that folder"),
    ],
)
def test_other_weights_in_a_folder_are_named(refused, cfg, name, message):
    (donor(cfg) / name).parent.mkdir(exist_ok=True)
    (donor(cfg) / "model.safetensors").rename(donor(cfg) / name)
    assert refused(cfg).endswith(f"in this folder, but {name}; {message}")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_what_a_clone_without_lfs_leaves_is_told(refused, cfg, file):
    (donor(cfg) / file).write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0a\nsize 123\n")
    assert f"{donor(cfg) / file}: is a Git LFS pointer, not the file itself; get it with git lfs pull" in refused(cfg)


@pytest.mark.parametrize("pickled", ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "consolidated.00.pth"])
def test_pickled_weights_are_not_read_and_the_message_says_how_to_convert_them(refused, cfg, pickled):
    (donor(cfg) / "model.safetensors").rename(donor(cfg) / pickled)
    message = refused(cfg)
    assert message.startswith(f"{donor(cfg)}: only pickled weights")
    assert "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)" in message


def test_a_pickle_under_the_name_of_safetensors_is_not_read(refused, cfg):
    torch.save({"weight": torch.ones(3)}, donor(cfg) / "model.safetensors")
    message = refused(cfg)
    assert message.startswith(f"{donor(cfg) / 'model.safetensors'}: states a header of ")
    assert message.endswith("this is no safetensors file")


def test_quantised_weights_are_refused(refused, cfg):
    edit_json(donor(cfg) / "config.json", quantization_config={"quant_method": "gptq", "bits": 4})
    assert refused(cfg) == f"{donor(cfg)}: quantised weights cannot be merged; use the unquantised model"


@pytest.mark.parametrize("n_bytes", [0, 7, 100, -1, -4000])
def test_a_truncated_file_of_weights_is_named(refused, cfg, n_bytes):
    path = donor(cfg) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:n_bytes])
    message = refused(cfg)
    assert message.startswith(f"{path}: ")
    assert message.endswith("download it again")


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"[]      ", "header is "),
        (b"{'a': 1}", "header is "),
        (b"1" * 5000, "header is "),
        (b"[" * 5000, "header is "),
        (b'{"x": 3}', "x: "),
        (b'{"x": {"dtype": "Q4", "shape": [], "data_offsets": [0, 4]}}', "x: "),
        (b'{"x": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}', "x: "),
        (b'{"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}', "x: "),
        (b'{"x": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}', "x: "),
        (b'{"x": {"dtype": "F32", "shape": [1, -1], "data_offsets": [0, -4]}}', "x: "),
    ],
)
def test_a_damaged_or_unknown_header_is_named(refused, cfg, header, message):
    path = donor(cfg) / "model.safetensors"
    path.write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    found = refused(cfg)
    assert found.startswith(f"{path}: ")
    assert message in found


@pytest.fixture
def sharded(cfg) -> Path:
    """The second donor, in two shards with an index."""
    folder = donor(cfg)
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in parts.items():
        save_file({name: tensors[name] for name in held}, folder / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in parts.items() for name in held}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()
    return folder


def test_an_index_that_names_a_missing_shard_is_named(refused, cfg, sharded):
    (sharded / "model-00002-of-00002.safetensors").unlink()
    index = sharded / "model.safetensors.index.json"
    assert refused(cfg) == (
        f"{index}: names the shard model-00002-of-00002.safetensors, which is not in the folder; download it again"
    )


def test_a_truncated_shard_is_named(refused, cfg, sharded):
    shard = sharded / "model-00001-of-00002.safetensors"
    shard.write_bytes(shard.read_bytes()[:-10])
    message = refused(cfg)
    assert message.startswith(f"{shard}: expected ")
    assert message.endswith("the file is truncated: download it again")


def test_an_index_that_names_the_wrong_shard_for_a_tensor_is_named(refused, cfg, sharded):
    index = sharded / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    edit_json(index, weight_map={**weight_map, "lm_head.weight": "model-00002-of-00002.safetensors"})
    assert refused(cfg) == (
        f"{index}: says that lm_head.weight is in model-00002-of-00002.safetensors, which does not hold it"
    )
    edit_json(index, weight_map={**weight_map, "x" * 2000: "model-00002-of-00002.safetensors"})
    assert f"says that {'x' * 300}... is in model-00002-of-00002.safetensors, which" in refused(cfg)


@pytest.mark.parametrize("weight_map", [None, {}, ["a"], {"lm_head.weight": 3}])
def test_an_index_without_a_map_is_named(refused, cfg, sharded, weight_map):
    index = sharded / "model.safetensors.index.json"
    edit_json(index, weight_map=weight_map)
    assert refused(cfg) == f"{index}: expected 'weight_map' with tensor names and shard files"


@pytest.mark.parametrize(
    ("text", "message"), [("{", "not readable as JSON"), ("[]", "expected a JSON object, got list")]
)
@pytest.mark.parametrize("file", ["config.json", "tokenizer.json"])
def test_a_damaged_file_beside_the_weights_is_named(refused, cfg, file, text, message):
    (donor(cfg) / file).write_text(text)
    assert refused(cfg).startswith(f"{donor(cfg) / file}: {message}")


@pytest.mark.parametrize("model_type", ["t5", None, ["llama"]])
def test_an_architecture_that_is_not_supported_is_named_with_those_that_are(refused, cfg, model_type):
    edit_json(donor(cfg) / "config.json", model_type=model_type)
    message = refused(cfg)
    assert message.startswith(
        f"{donor(cfg) / 'config.json'}: model_type {model_type!r} is not supported; supported are"
    )
    assert "gemma2, gpt2" in message
    assert message.endswith("merges that need no evaluation take any (olmfast merge)")


def test_all_differences_of_a_donor_are_listed_at_once(refused, cfg):
    shutil.rmtree(donor(cfg))
    sizes = {"num_hidden_layers": 3, "hidden_size": 40, "intermediate_size": 56, "vocab_size": 120}
    tiny_model(donor(cfg), "qwen2", **sizes)
    message = refused(cfg)
    assert message.startswith("donor1: cannot be merged with donor0: ")
    for difference in (
        "architecture 'qwen2' instead of 'llama'",
        "number of blocks 3 instead of 2",
        "hidden size 40 instead of 32",
        "vocabulary 120 instead of 112",
        "MLP width 56 instead of 48",
        "tensors too many, the first model.layers.0.self_attn.k_proj.bias",
        "tensors of another shape, the first",
    ):
        assert difference in message
    assert "\n" not in message


def test_every_donor_that_differs_is_listed(refused, cfg):
    tiny_model(cfg.parent / "models" / "wide", hidden_size=40)
    tiny_model(cfg.parent / "models" / "deep", num_hidden_layers=3)
    wide, deep = refused(edit(cfg, models=["donor0", "wide", "donor1", "deep"])).splitlines()
    assert wide.startswith("wide: cannot be merged with donor0: hidden size 40 instead of 32; ")
    assert deep.startswith("deep: cannot be merged with donor0: number of blocks 3 instead of 2; ")


def test_tokens_with_other_ids_are_a_difference_of_vocabulary(refused, cfg):
    path = donor(cfg) / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    path.write_text(json.dumps(data))
    assert refused(cfg) == (
        "donor1: cannot be merged with donor0: 2 tokens have another id in the tokenizer, the first 'a' "
        f"{vocabulary['a']} instead of {vocabulary['b']}"
    )


def test_a_config_that_says_more_blocks_than_there_are_is_named(refused, cfg):
    for name in ("donor0", "donor1"):
        edit_json(donor(cfg, name) / "config.json", num_hidden_layers=4)
    where = donor(cfg, "donor0") / "config.json"
    assert refused(cfg) == f"{where}: says 4 blocks, the weights hold 2 (named model.layers.N)"


def test_a_missing_tensor_is_named(refused, cfg):
    edit_weights(donor(cfg), lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"))
    assert refused(cfg) == (
        "donor1: cannot be merged with donor0: 1 tensors missing, the first model.layers.1.mlp.up_proj.weight"
    )


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_donor_with_nan_or_infinity_is_refused_by_name(refused, cfg, value, dtype):
    def spoil(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
        tensors["model.norm.weight"][-1] = value

    edit_weights(donor(cfg), spoil)
    assert refused(cfg) == (
        f"{donor(cfg) / 'model.safetensors'}: model.norm.weight: holds NaN or infinity, so this donor is refused; "
        "repair it or take it out of models"
    )


def test_donors_whose_scores_overflow_are_refused_and_leave_nothing_behind(olmfast, cfg):
    for name in ("donor0", "donor1"):
        edit_weights(donor(cfg, name), lambda tensors: tensors["model.norm.weight"].fill_(3e38))
    before = sorted(cfg.parent.rglob("*"))
    code, out, err = olmfast("run", cfg, "-q")
    assert (code, out) == (2, "")
    assert err == (
        "olmfast: donor0: scored NaN or infinity on sums.json, as it is: its config.json or weights are wrong, or the "
        "dtype is too narrow for them\n"
    )
    assert sorted(cfg.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, ": no such dataset file"),
        ("hello", ": neither JSON nor JSON Lines: "),
        ("", ": is empty"),
        ("[]", ": expected a list of conversations, got an empty list"),
        ('[{"conversation": [{"from": "human", "value": "2+2="}]}]', ": no item can be scored by mode "),
        ('[{"prompt": "2+2=", "response": ""}]', ": no item can be scored by mode "),
    ],
)
@pytest.mark.parametrize("file", ["sums.json", "heldout.json"])
def test_a_dataset_that_is_no_json_is_empty_or_has_no_response_is_named(refused, cfg, file, text, message):
    path = cfg.parent / file
    path.unlink() if text is None else path.write_text(text)
    assert refused(cfg).startswith(f"{path}{message}")


def test_a_dataset_of_which_nothing_fits_the_context_is_named(refused, cfg):
    write_dataset(cfg.parent / "sums.json", [("x" * 200, "y")])
    message = f"{cfg.parent / 'sums.json'}: every sample is longer than the model's context of 128 tokens"
    message += ", by its config.json"
    assert refused(cfg) == message


def test_worked_examples_that_fill_the_context_are_named(refused, cfg):
    write_mmlu(cfg.parent / "mmlu", {"art": 2})
    examples = cfg.parent / "mmlu" / "dev" / "art_dev.csv"
    examples.write_text(examples.read_text().replace("?", "?" * 200))
    test = "mmlu/test/art_test.csv"
    assert refused(edit(cfg, dataset={test: {"mode": "choice", "shots": 5}})) == (
        f"{cfg.parent / test}: every sample, opened by the worked examples of {examples}, is longer than the model's "
        "context of 128 tokens, by its config.json; fewer worked examples (shots, --ntrain) make them shorter"
    )


def test_a_dataset_of_a_name_that_no_file_can_have_is_the_configs_fault(refused, cfg):
    name = "x" * 300 + ".json"
    assert refused(edit(cfg, dataset={name: {"mode": "exact_match"}})).endswith(": File name too long")


def drop_tensor(folder: Path) -> None:
    for donor in ("donor0", "donor1"):
        path = folder / "models" / donor / "model.safetensors"
        tensors = load_file(path)
        del tensors["model.layers.1.mlp.up_proj.weight"]
        save_file(tensors, path, {"format": "pt"})


def invent_activation(folder: Path) -> None:
    for donor in ("donor0", "donor1"):
        path = folder / "models" / donor / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "wobble"}))


def invent_activation_of_one(folder: Path) -> None:
    path = folder / "models" / "donor1" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "wobble"}))


def forbid_memory(folder: Path) -> None:
    path = folder / "cfg.yaml"
    path.write_text(path.read_text() + "max_ram: 20MB\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (drop_tensor, "checkpoint and module do not match: nothing in the files fills"),
        (invent_activation, "Transformers cannot build this model: 'wobble'"),
        (invent_activation_of_one, "Transformers cannot build this model: 'wobble'"),
        (forbid_memory, "max_ram: 0.02 GB; the model and the libraries alone take"),
    ],
    ids=["no donor has a tensor", "unknown activation", "of one donor", "too little memory"],
)
def test_a_model_that_cannot_be_built_is_refused_before_a_folder_is_begun(refused, olmfast, cfg, spoil, message):
    spoil(cfg.parent)
    assert message in refused(cfg)
    assert message in refused(cfg, "--dry-run")
    code, _, err = olmfast("check", cfg)
    assert (code, message in err) == (2, True)


def test_a_folder_without_a_tokenizer_is_named(refused, cfg):
    for path in donor(cfg, "donor0").glob("tokenizer*"):
        path.unlink()
    message = refused(cfg)
    assert message.startswith(f"{donor(cfg, 'donor0')}: the tokenizer cannot be loaded: ")
    assert "\n" not in message


def test_a_device_that_is_not_there_is_named(refused, cfg):
    assert refused(cfg, "--device", "cuda:77").startswith("device: 'cuda:77' cannot be used here: ")
    assert refused(cfg, "--device", "gpu").startswith("device: 'gpu' cannot be used here: ")


def test_a_pattern_that_matches_nothing_is_named(refused, cfg):
    assert refused(edit(cfg, units=["*.q_proj", "*.qproj"])) == (
        "units: '*.qproj' matches no module inside the blocks, such as model.layers.0.input_layernorm"
    )

