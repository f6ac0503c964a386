"""`olmfast linear`: the command lines of the adaptive linear merge, unchanged, and what is added to them."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from olmfast.testing import FAMILIES, sums, tiny_model, write_dataset

LAYERS = 28  # as many as the examples' models have


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A working directory with models of the examples' names."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def linear(olmfast):
    """Runs `olmfast linear` with the options of a line."""
    return lambda line: olmfast("linear", *shlex.split(line))


def make(folder, *names, n_layers=2, family="llama", **keys):
    key = "n_layer" if family.startswith("gpt") and family != "gpt_neox" else "num_hidden_layers"
    for seed, name in enumerate(names, 1):
        tiny_model(folder / name, family, seed, **{key: n_layers}, **keys)


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


BASIC = "--model_a m/base_model --model_b m/other_model --alpha 0.7"
EXAMPLES = {
    BASIC: "merged_models/base_model_other_model_alpha0.70",
    f"{BASIC} --layers 1 2 20 25 27": "merged_models/base_model_other_model_alpha0.70_layers1-2-20-25-27",
    f"{BASIC} --layers 1 2 20 25 27 --qkv_only":
        "merged_models/base_model_other_model_alpha0.70_layers1-2-20-25-27_qkv",
    f"{BASIC} --layers 1 2 20 --output_dir ./my_custom_output": "my_custom_output",
    "--model_a m/Qwen2.5-Math-7B --model_b m/DeepSeek-R1-7B --alpha 0.8 --layers 5 10 15 20 25":
        "merged_models/Qwen2.5-Math-7B_DeepSeek-R1-7B_alpha0.80_layers5-10-15-20-25",
    "--model_a m/Qwen2.5-Math-7B --model_b m/Qwen2.5-Instruct-7B --alpha 0.6":
        "merged_models/Qwen2.5-Math-7B_Qwen2.5-Instruct-7B_alpha0.60",
    "--model_a m/Qwen2.5-Math-7B --model_b m/DeepSeek-R1-7B --alpha 0.7 --layers 10 15 20 25 --qkv_only":
        "merged_models/Qwen2.5-Math-7B_DeepSeek-R1-7B_alpha0.70_layers10-15-20-25_qkv",
    f"{BASIC} --layers 0 1 2 3 4 --output_dir experiments/early_layers_merge": "experiments/early_layers_merge",
    f"{BASIC} --layers 20 21 22 23 24 25 26 27 --output_dir experiments/late_layers_merge":
        "experiments/late_layers_merge",
    f"{BASIC} --layers 10 11 12 13 14 15 --qkv_only --output_dir experiments/middle_layers_qkv_merge":
        "experiments/middle_layers_qkv_merge",
    f"{BASIC} --layers 3 4 5 6 7 8 9 10 11 12 13 25":
        "merged_models/base_model_other_model_alpha0.70_layerscount12_range3-25",
}  # fmt: skip


def test_every_example_of_the_original_makes_the_folder_it_names(here, linear):
    names = ("base_model", "other_model", "Qwen2.5-Math-7B", "DeepSeek-R1-7B", "Qwen2.5-Instruct-7B")
    make(here / "m", *names, n_layers=LAYERS, family="qwen2")
    for line, folder in EXAMPLES.items():
        code, _, error = linear(line)
        assert (code, error) == (0, ""), line
        assert (here / folder / "config.json").is_file(), line
        assert weights(here / folder), line


def test_selected_layers_are_blended_in_float32_and_the_rest_is_a_byte_for_byte(here, linear):
    make(here, "a", "b", n_layers=3, dtype=torch.bfloat16)
    linear("--model_a a --model_b b --alpha 0.7 --layers 0 2 --output_dir out")
    a, b, out = (weights(here / name) for name in ("a", "b", "out"))
    assert out.keys() == a.keys()
    for name, tensor in out.items():
        if ".layers.0." in name or ".layers.2." in name:
            exact = 0.7 * a[name].double() + 0.3 * b[name].double()
            off = (tensor.double() - exact).abs()
            assert bool((off <= exact.abs() * 2**-8 + 1e-7).all()), name  # rounded once
        else:
            assert torch.equal(tensor, a[name]), name


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "mixtral"])
def test_qkv_only_moves_query_key_and_value_of_every_family_and_nothing_else(here, linear, family):
    make(here, "a", "b", family=family)
    assert linear("--model_a a --model_b b --alpha 0.5 --layers 1 --qkv_only --output_dir out")[0] == 0
    a, b, out = (weights(here / name) for name in ("a", "b", "out"))
    moved = {name for name in a if not torch.equal(a[name], out[name])}
    expected = ("q_proj", "k_proj", "v_proj", "qkv_proj", "c_attn", "query_key_value")
    assert moved
    inside = [name for name in a if ".1." in name and name.rsplit(".", 2)[-2] in expected]
    assert moved == {name for name in inside if not torch.equal(a[name], b[name])}


def test_a_full_merge_keeps_the_special_tokens_rows_of_a_unless_told_otherwise(here, linear):
    make(here, "a", "b")
    linear("--model_a a --model_b b --alpha 0.25 --output_dir fixed")
    linear("--model_a a --model_b b --alpha 0.25 --output_dir plain --no_special_fixes")
    a, b, fixed, plain = (weights(here / name) for name in ("a", "b", "fixed", "plain"))
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        blended = 0.25 * a[name] + 0.75 * b[name]
        assert torch.equal(fixed[name][:5], a[name][:5])  # the five special tokens of the tokenizer
        torch.testing.assert_close(fixed[name][5:], blended[5:])
        torch.testing.assert_close(plain[name], blended)


def test_a_tied_model_a_says_that_the_others_head_is_not_used(here, linear):
    tiny_model(here / "tied", "llama", 1, tie_word_embeddings=True)
    make(here, "b")
    code, said, error = linear("--model_a tied --model_b b --alpha 0.5 --output_dir out")
    assert code == 0, error
    assert "b: its own lm_head.weight is not used, as tied is tied; as model A it would be" in said + error
    assert "lm_head.weight" not in weights(here / "out")


def test_the_end_tokens_of_both_models_end_a_generation(here, linear):
    make(here, "a", "b")
    (here / "a/generation_config.json").write_text(json.dumps({"eos_token_id": 4, "temperature": 0.5}))
    (here / "b/generation_config.json").write_text(json.dumps({"eos_token_id": [2, 4]}))
    linear("--model_a a --model_b b --alpha 0.5 --output_dir out")
    linear("--model_a a --model_b b --alpha 0.5 --output_dir plain --no_special_fixes")
    assert json.loads((here / "out/generation_config.json").read_text()) == {"eos_token_id": [4, 2], "temperature": 0.5}
    assert json.loads((here / "plain/generation_config.json").read_text())["eos_token_id"] == 4


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("--alpha 1.5", "--alpha must be in range [0, 1], got 1.5"),
        ("--alpha 0.5 --layers -1 2", "Layer indices must be non-negative. Got: [-1]"),
        ("--alpha 0.5 --layers 0 -3", "Layer indices must be non-negative. Got: [-3]"),
        ("--alpha 0.5 --layers 1 30", "Layer indices out of range. Model has 2 layers (0-1), but got indices: [30]"),
        ("--alpha 0.5 --qkv_only", "--qkv_only requires --layers"),
        ("--alpha 0.5 --layers 1 --qvk_only", "--qvk_only: not expected here"),
        ("--alpha 0.5 3", "3: not expected here"),
        ("--alpha 0.5 --method slurp", "--method slurp: expected one of linear, slerp, ties, dare"),
        ("--alpha 0.5 --top 1", "--sensitivity and --top"),
    ],
)
def test_errors_read_as_the_original_words_them_and_write_nothing(here, linear, line, message):
    make(here, "a", "b")
    code, _, error = linear(f"--model_a a --model_b b {line}")
    assert code == 2
    assert message in error
    assert not (here / "merged_models").exists()


def test_models_with_other_keys_are_refused_in_the_originals_words(here, linear):
    make(here, "a", family="llama")
    make(here, "b", family="qwen2")
    code, _, error = linear("--model_a a --model_b b --alpha 0.5")
    assert code == 2
    assert "State dictionaries have mismatched keys. only in b: model.layers.0.self_attn.k_proj.bias" in error


def test_a_file_gives_layers_their_own_alphas(here, linear):
    make(here, "a", "b")
    (here / "alphas.json").write_text("[0.25, 0.75]")
    linear("--model_a a --model_b b --alpha 0.5 --layer_alphas alphas.json --output_dir out")
    a, b, out = (weights(here / name) for name in ("a", "b", "out"))
    for layer, alpha in ((0, 0.25), (1, 0.75)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        torch.testing.assert_close(out[name], alpha * a[name] + (1 - alpha) * b[name])
    torch.testing.assert_close(out["model.norm.weight"], 0.5 * (a["model.norm.weight"] + b["model.norm.weight"]))
    (here / "alphas.json").write_text('{"1": 1.5}')
    code, _, error = linear("--model_a a --model_b b --alpha 0.5 --layer_alphas alphas.json --output_dir no")
    assert code == 2
    assert "alphas.json: layer 1: alpha must be in range [0, 1], got 1.5" in error


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "alphas.yml: cannot be read: No such file or directory"),
        ("0: [1", "alphas.yml:1:6: not valid YAML: "),
        ("0: 0.5\n0: 0.6", "alphas.yml:2:1: not valid YAML: key 0 is given twice"),
        ("", "alphas.yml: expected a list of alphas, or a mapping of layers to alphas, got None"),
        ("[]", "alphas.yml: expected a list of alphas"),
        ("first: 0.5", "alphas.yml: expected a layer index, got 'first'"),
        ("[0.5, .nan]", "alphas.yml: layer 1: alpha must be in range [0, 1], got nan"),
        ("[0.5, 0.5, 0.5]", "Model has 2 layers (0-1), but got indices: [2]"),
    ],
)
def test_alphas_that_cannot_be_meant_are_refused_and_named(here, linear, text, message):
    make(here, "a", "b")
    if text is not None:
        (here / "alphas.yml").write_text(text)
    code, _, error = linear("--model_a a --model_b b --alpha 0.5 --layer_alphas alphas.yml")
    assert code == 2
    assert message in error
    assert not (here / "merged_models").exists()


@pytest.mark.parametrize("method", ["slerp", "ties", "dare"])
def test_other_methods_name_their_folder_and_lie_at_a_where_alpha_is_one(here, linear, method):
    make(here, "a", "b")
    for alpha in (1, 0.5):
        assert linear(f"--model_a a --model_b b --method {method} --alpha {alpha}")[0] == 0
    a, same, mixed = (
        weights(here / name)
        for name in ("a", f"merged_models/a_b_alpha1.00_{method}", f"merged_models/a_b_alpha0.50_{method}")
    )
    for name, tensor in a.items():
        torch.testing.assert_close(same[name], tensor, msg=name)
    assert not torch.equal(mixed["model.layers.0.mlp.up_proj.weight"], a["model.layers.0.mlp.up_proj.weight"])


@pytest.mark.parametrize("dataset", ["sums.json:perplexity", "sums.json:perplexity,samples=3,template=raw"])
def test_sensitivity_merges_the_layers_that_score_best_when_merged_alone(here, linear, olmfast, dataset):
    make(here, "a", "b", n_layers=3)
    write_dataset(here / "sums.json", sums(8))
    wanted = f"--sensitivity {dataset} --top 1 --output_dir out"
    code, said, error = linear(f"--model_a a --model_b b --alpha 0.5 {wanted}")
    assert (code, error) == (0, "")
    rows = [text.split() for text in said.splitlines() if text.split()[0] in "012"]
    best = int(rows[0][0])
    assert [float(row[1]) for row in rows] == sorted(float(row[1]) for row in rows)
    a, out = weights(here / "a"), weights(here / "out")
    moved = {name.split(".")[2] for name in a if not torch.equal(a[name], out[name])}
    assert moved == {str(best)}
    # The folder, scored by another command, has the score that the ranking said.
    code, said, _ = olmfast("evaluate", "out", "--dataset", dataset, "--json", "--device", "cpu")
    assert code == 0
    assert float(rows[0][1]) == pytest.approx(json.loads(said)["rows"]["out"]["sums.json"], rel=1e-3)


def test_check_linear_says_what_the_dry_run_says_without_reading_a_weight(here, linear, olmfast):
    make(here, "a", "b", n_layers=3)
    for name in "ab":  # headers stay, values are gone
        file = here / name / "model.safetensors"
        held = file.read_bytes()
        n = 8 + int.from_bytes(held[:8], "little")
        file.write_bytes(held[:n] + b"\xff" * (len(held) - n))
    before = sorted(here.rglob("*"))
    line = "--model_a a --model_b b --alpha 0.5 --layers 0 2 --qkv_only --json"
    code, said, error = olmfast("check", "linear", *shlex.split(line))
    plan = json.loads(said)
    assert (code, error) == (0, "")
    assert plan["tensors"] == {"copied from a": 24, "merged by linear": 6}
    assert plan["output_dir"] == "merged_models/a_b_alpha0.50_layers0-2_qkv"
    assert {"memory_bytes", "estimated_s", "free_bytes", "result_bytes"} <= set(plan)
    dry = json.loads(linear(f"{line} --dry-run")[1])
    assert {key for key in plan if plan[key] != dry[key]} <= {"copy_bytes_per_s", "estimated_s", "free_bytes"}
    assert sorted(here.rglob("*")) == before


def test_check_linear_names_everything_that_does_not_fit_at_once(here, olmfast):
    make(here, "a", n_layers=3)
    make(here, "b", hidden_size=64)
    code, _, error = olmfast("check", "linear", *shlex.split("--model_a a --model_b b --alpha 0.5 --layers 1 7"))
    assert code == 2
    assert "Model has 3 layers (0-2), but got indices: [7]" in error
    assert "State dictionaries have mismatched keys. only in a: model.layers.2." in error
    assert "shapes differ: lm_head.weight: [112, 32] in a, [112, 64] in b" in error
    assert "shapes differ: model.norm.weight: [32] in a, [64] in b" in error
    line = "--model_a a --model_b b --alpha nan --layers -1 --density 0 --method slurp"
    code, _, error = olmfast("check", "linear", *shlex.split(line))
    assert code == 2
    for part in ("got nan", "non-negative. Got: [-1]", "--density must be", "did you mean 'slerp'?"):
        assert part in error


def test_check_linear_with_sensitivity_ranks_nothing_and_checks_the_dataset(here, olmfast):
    make(here, "a", "b", n_layers=3)
    write_dataset(here / "sums.json", sums(8))
    line = "--model_a a --model_b b --alpha 0.5 --sensitivity {} --top {}"
    code, said, _ = olmfast("check", "linear", *shlex.split(line.format("sums.json:perplexity", 1)))
    assert code == 0
    assert "21 copied from a, 9 merged by linear" in said
    assert "The ranking decides which 1 of the layers 0, 1, 2 are merged" in said
    code, _, error = olmfast("check", "linear", *shlex.split(line.format("smus.json:perplexitee", 4)))
    assert code == 2
    for part in ("smus.json: no such file", "did you mean 'perplexity'?", "--top 4: expected at most 3"):
        assert part in error
    code, _, error = olmfast("check", "linear", *shlex.split(line.format("sums.json:perplexity,sampels=2", 1)))
    assert code == 2
    assert "did you mean 'samples'?" in error


def test_a_merge_file_called_linear_is_checked_by_its_path(here, olmfast):
    make(here, "a", "b")
    (here / "linear").write_text("merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.5}")
    code, said, _ = olmfast("check", "./linear", "--json")
    assert code == 0
    assert json.loads(said)["method"] == "slerp"


def test_tokens_with_other_ids_in_b_are_told(here, linear):
    make(here, "a", "b")
    path = here / "b" / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    one, two = list(vocabulary)[10:12]
    vocabulary[one], vocabulary[two] = vocabulary[two], vocabulary[one]
    path.write_text(json.dumps(data))
    code, said, _ = linear("--model_a a --model_b b --alpha 0.5 --dry-run")
    assert code == 0
    assert "b: 2 tokens have another id in the tokenizer, the first " in said


@pytest.mark.parametrize("more", ["", "--sensitivity sums.json:perplexity --top 1"])
def test_hub_ids_are_taken_from_the_local_cache_and_never_from_the_network(here, linear, monkeypatch, more):
    cache = here / "cache"
    snapshot = cache / "models--org--far" / "snapshots" / "0123456789abcdef0123456789abcdef01234567"
    make(here, "a")
    make(snapshot.parent, snapshot.name)
    write_dataset(here / "sums.json", sums(4))
    (cache / "models--org--far" / "refs").mkdir()
    (cache / "models--org--far" / "refs" / "main").write_text(snapshot.name)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("used the network"))
    assert linear(f"--model_a a --model_b org/far --alpha 0.5 {more} --output_dir out")[::2] == (0, "")
    code, _, error = linear(f"--model_a a --model_b org/nowhere --alpha 0.5 {more} --output_dir out2")
    assert code == 2
    assert "merging uses no network; get it with: hf download org/nowhere" in error
    assert not (here / "out2").exists()


def test_an_output_that_is_there_is_refused_before_layers_are_ranked(here, linear, monkeypatch):
    make(here, "a", "b")
    write_dataset(here / "sums.json", sums(4))
    monkeypatch.setattr("olmfast.static.sensitivity.rank_layers", lambda *_: pytest.fail("ranked"))
    (here / "out").mkdir()
    (here / "out" / "notes.txt").write_text("mine")
    wanted = "--sensitivity sums.json:perplexity --top 1 --output_dir out"
    code, _, error = linear(f"--model_a a --model_b b --alpha 0.5 {wanted}")
    assert code == 2
    assert "out: exists; use --overwrite to replace it" in error


def test_nan_is_refused_unless_it_is_allowed_as_the_error_advises(here, linear):
    make(here, "a", "b")
    held = weights(here / "b")
    held["model.norm.weight"][0] = float("nan")
    save_file(held, here / "b" / "model.safetensors", {"format": "pt"})
    line = "--model_a a --model_b b --alpha 0.5 --output_dir out"
    code, _, error = linear(line)
    assert code == 2
    assert "model.norm.weight: holds NaN or infinity; repair it, or use --allow-nonfinite" in error
    assert not (here / "out").exists()
    assert linear(f"{line} --allow-nonfinite")[::2] == (0, "")
    assert weights(here / "out")["model.norm.weight"].isnan().sum() == 1


def test_layers_are_ranked_on_the_device_that_is_named(here, linear, monkeypatch):
    make(here, "a", "b")
    write_dataset(here / "sums.json", sums(4))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)  # what `auto` would take
    wanted = "--sensitivity sums.json:perplexity --top 1 --output_dir out"
    assert linear(f"--model_a a --model_b b --alpha 0.5 {wanted} --device cpu")[::2] == (0, "")
    code, said, error = linear(f"--model_a a --model_b b --alpha 0.5 {wanted} --device cuda:99 --overwrite")
    assert (code, said) == (2, "")  # nothing has been ranked
    assert error.startswith("olmfast: --device: 'cuda:99' cannot be used here: ")


def test_ranking_layers_asks_for_space_where_the_result_goes(here, linear, monkeypatch):
    make(here, "a", "b")
    write_dataset(here / "sums.json", sums(4))
    (here / "roomy").mkdir()
    (here / "roomy/full").mkdir()

    def usage(path):
        free = 10**9 if Path(path).name == "roomy" else 0
        return SimpleNamespace(total=10**9, used=10**9 - free, free=free)

    monkeypatch.setattr("shutil.disk_usage", usage)
    wanted = "--model_a a --model_b b --alpha 0.5 --sensitivity sums.json:perplexity --top 1"
    assert linear(f"{wanted} --output_dir roomy/out")[::2] == (0, "")
    for place in ("--output_dir roomy/full/out", ""):
        code, said, error = linear(f"{wanted} {place}")
        assert (code, said) == (2, "")
        assert " free" in error
