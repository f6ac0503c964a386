"""`olmfast prune`: layers merged into those below them, by alphas that a file gives or that are made here."""

from __future__ import annotations

import json
import math
import re
import shlex

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from olmfast.config.run import parse_config
from olmfast.evaluation.model import WorkingModel
from olmfast.pruning.alphas import alphas_of, weights_of
from olmfast.pruning.prune import prune
from olmfast.pruning.similarity import NEIGHBOURS, alphas_by, entropy, mutual_information, ranks, similarities
from olmfast.pruning.target import Target
from olmfast.report.write import report
from olmfast.testing import FAMILIES, tiny_model, tree, write_mmlu
from olmfast.weights.sources import Sources

CPU = torch.device("cpu")
N = 5  # layers
# What every family calls its projections: written down once more, so that no rule is trusted.
PROJECTION = re.compile(
    r"(q_proj|k_proj|v_proj|o_proj|out_proj|qkv_proj|query_key_value|c_attn|dense|c_proj|gate_proj|up_proj|down_proj"
    r"|gate_up_proj|c_fc|fc1|fc2|fc_in|fc_out|dense_h_to_4h|dense_4h_to_h|w1|w2|w3)\.weight$"
)
# Layers of different kinds cannot be merged: the last ones are of one.
KINDS = {"gemma2": {"layer_types": ["sliding_attention", *["full_attention"] * (N - 1)]}}


def model(folder, family="llama", n_layers=N, **keys):
    depth = "n_layer" if family in ("gpt2", "gptj") else "num_hidden_layers"
    return tiny_model(folder, family, 1, **{depth: n_layers, **KINDS.get(family, {}), **keys})


def weights(folder):
    return load_file(folder / "model.safetensors")


def alpha_file(path, alphas, last, **more):
    entries = [
        {"step": k - 18, "layer_to_merge_into": last - k - 1, "layer_to_remove": last - k, "ratio_i_alpha": a, **more}
        for k, a in enumerate(alphas)
    ]
    path.write_text(json.dumps(entries, indent=2))
    return path


def section(folder, **keys):
    given = {"models": ["m"], "models_dir": ".", "output_dir": "out", "device": "cpu", "prune": keys}
    return parse_config(given, "cfg", folder)


def numbered(name):
    """What comes before a layer's number, the number, and what follows."""
    found = re.match(r"(.*?\.(?:layers|h)\.)(\d+)(\..*)$", name)
    return (found[1], int(found[2]), found[3]) if found else None


def nested(a, before, after, first, alphas):
    """W_i <- alpha W_i + (1 - alpha) W_j, from the last layer down, in float64."""
    value = a[f"{before}{first + len(alphas)}{after}"].double()
    for k, alpha in enumerate(alphas):
        value = alpha * a[f"{before}{first + len(alphas) - 1 - k}{after}"].double() + (1 - alpha) * value
    return value


def convex(a, before, after, first, alphas):
    """The same as one sum."""
    total = 0.0
    for k in range(len(alphas) + 1):
        own = alphas[len(alphas) - 1 - k] if k < len(alphas) else 1.0
        above = [1 - alpha for alpha in alphas[len(alphas) - k :]] if k else []
        total = total + own * math.prod(above) * a[f"{before}{first + k}{after}"].double()
    return total


@pytest.mark.usefixtures("float64_throughout")
@pytest.mark.parametrize("family", list(FAMILIES))
@pytest.mark.parametrize("everything", [False, True], ids=["projections", "all"])
def test_every_tensor_is_the_formulas_and_the_folder_computes_the_working_models_logits(tmp_path, family, everything):
    a = weights(model(tmp_path / "m", family))
    alphas, first = (0.3, 0.625, 0.9), N - 4
    alpha_file(tmp_path / "alphas.json", alphas, N - 1)
    config = section(tmp_path, alphas_file="alphas.json", merge="all" if everything else "projections")
    prune(config)
    out = weights(tmp_path / "out")
    n_merged = 0
    for name, tensor in out.items():
        place = numbered(name)
        buffer = place and re.match(r"\.(attn|attention)\.(bias|masked_bias)$", place[2])
        if not place or place[1] != first or buffer or not (everything or PROJECTION.search(name)):
            assert torch.equal(tensor, a[name]), name
            continue
        n_merged += 1
        before, _, after = place
        for formula in (nested, convex):
            exact = formula(a, before, after, first, alphas)
            assert bool(((tensor.double() - exact).abs() <= 4e-7 * exact.abs().max()).all()), name
    assert n_merged == sum(name.startswith(f"{p[0]}{first}.") and bool(everything or PROJECTION.search(name))
                           for name in a if (p := numbered(name)))  # fmt: skip
    assert {p[1] for name in out if (p := numbered(name))} == set(range(first + 1))

    target = Target.open(config, evaluated=True)
    live = WorkingModel(target.recipe(weights_of(alphas)), Sources(target.pool, tmp_path), CPU, torch.float64)
    made = AutoConfig.from_pretrained(tmp_path / "out", experts_implementation="eager")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", config=made, dtype=torch.float64)
    assert made.num_hidden_layers == first + 1
    ids = torch.randint(5, 100, (2, 24), generator=torch.Generator().manual_seed(0))
    tolerance = 1e-5 if family == "gptj" else 1e-9  # its table of positions is rounded to float32 by Transformers
    torch.testing.assert_close(live.module(ids).logits, loaded(ids).logits, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_merged_tensor_is_rounded_once(tmp_path, dtype):
    a = weights(model(tmp_path / "m", dtype=dtype))
    prune(section(tmp_path, method="uniform", num_layer=4))
    name = "model.layers.0.mlp.up_proj.weight"
    exact = sum(a[name.replace(".0.", f".{k}.")].double() for k in range(5)) / 5
    half = torch.finfo(dtype).eps / 2
    off = (weights(tmp_path / "out")[name].double() - exact).abs()
    assert bool((off <= exact.abs() * half * 1.001 + 1e-7).all())


@pytest.mark.parametrize("more", [{}, {"ratio_j": 0.25}], ids=["parthiv", "fusion"])
def test_an_alpha_file_of_the_original_runs_unchanged_and_round_trips(tmp_path, olmfast, monkeypatch, more):
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "m", n_layers=32)
    alpha_file(tmp_path / "given-alphas.json", [0.75] * 13, 31, **more)
    line = shlex.split("--model_path m --alphas_file ./given-alphas.json --num_layer 13 --output_dir ./base -g 4")
    code, out, error = olmfast("prune", *line)
    assert (code, error.count("--ngpu 4 is ignored")) == (0, 1)
    assert "174 tensors written: 167 copied from m, 7 merged by linear, 117 of blocks" in out
    assert json.loads((tmp_path / "base/config.json").read_text())["num_hidden_layers"] == 19
    assert (tmp_path / "base/tokenizer.json").read_bytes() == (tmp_path / "m/tokenizer.json").read_bytes()
    steps = json.loads((tmp_path / "base/alphas.json").read_text())
    assert steps[0] == {"step": 0, "layer_to_merge_into": 30, "layer_to_remove": 31, "ratio_i_alpha": 0.75}
    assert [one["step"] for one in steps] == list(range(13))
    again = shlex.split("--model_path m --alphas_file base/alphas.json --output_dir again")
    assert olmfast("prune", *again)[0] == 0
    for name in ("alphas.json", "model.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    assert olmfast("rebuild", "base", "rebuilt")[0] == 0
    assert (tmp_path / "rebuilt/model.safetensors").read_bytes() == (tmp_path / "base/model.safetensors").read_bytes()


def test_fewer_steps_take_the_first_entries(tmp_path):
    model(tmp_path / "m")
    alpha_file(tmp_path / "a.json", (0.1, 0.2, 0.3), N - 1)
    done = prune(section(tmp_path, alphas_file="a.json", num_layer=2))
    assert (done.n_layers, done.alphas, done.steps) == (3, (0.1, 0.2), ((3, 4), (2, 3)))


def bad(index, **change):
    def damage(entries):
        entries[index] |= change
        return entries

    return damage


@pytest.mark.parametrize(
    ("damage", "keys", "message"),
    [
        (lambda e: e[:2], {"num_layer": 3}, "holds 2 entries, and 3 steps need 3: entry 2 is missing"),
        (bad(1, layer_to_remove=2), {}, "entry 1: merges layer 2 into 2, expected 3 into 2"),
        (lambda e: e[::-1], {}, "entry 0: merges layer 2 into 1, expected 4 into 3"),
        (bad(2, ratio_i_alpha=math.nan), {}, "entry 2: ratio_i_alpha: expected a number from 0 to 1, got nan"),
        (bad(0, ratio_i_alpha=1.01), {}, "entry 0: ratio_i_alpha: expected a number from 0 to 1, got 1.01"),
        (bad(0, ratio_i_alpha=-0.1), {}, "entry 0: ratio_i_alpha: expected a number from 0 to 1, got -0.1"),
        (bad(0, ratio_i_alpha="0.5"), {}, "entry 0: ratio_i_alpha: expected a number from 0 to 1, got '0.5'"),
        (bad(0, ratio_i_alpha=True), {}, "entry 0: ratio_i_alpha: expected a number from 0 to 1, got True"),
        (bad(1, ratio_j=0.9), {}, "entry 1: ratio_i_alpha 0.5 and ratio_j 0.9 add up to 1.4 instead of 1"),
        (lambda e: [e[0], {"step": 1}, e[2]], {}, "entry 1: layer_to_merge_into is missing, got 'step'"),
        (lambda e: [e[0], 0.5], {}, "entry 1: expected an object with layer_to_merge_into"),
        (lambda _: [], {}, "expected a list of steps with layer_to_merge_into"),
        (lambda e: {"alphas": e}, {}, "expected a list of steps with layer_to_merge_into"),
    ],
)
def test_a_file_that_does_not_fit_is_refused_by_the_entry(tmp_path, damage, keys, message):
    model(tmp_path / "m")
    path = alpha_file(tmp_path / "a.json", (0.5, 0.5, 0.5), N - 1)
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    before = tree(tmp_path)
    with pytest.raises(Exception, match=re.escape(f"{path}: {message}")):
        prune(section(tmp_path, alphas_file="a.json", **keys))
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"alphas_file": "parthiv_alphas.json"}, "no such file; did you mean 'parthiv-alphas.json'?"),
        ({"method": "uniform", "num_layer": N}, "num_layer 5: the model has 5 layers, of which at most 4 can go"),
        ({"method": "uniform", "num_layer": 3, "start": 2}, "start 2: 4 layers from it on end at 5, and the"),
        ({"method": "uniform"}, "num_layer: say how many layers go"),
        ({"method": "uniform", "num_layer": 0}, "num_layer"),
        ({"method": "uniform", "num_layer": 2, "count": 2}, "count 2 and num_layer 2 differ"),
        ({"method": "file", "num_layer": 2}, "method file: alphas_file is missing"),
        ({"method": "drop", "num_layer": 2, "alphas_file": "parthiv-alphas.json"}, "method drop makes its own alphas"),
        ({"method": "drop", "num_layer": 2, "objective": "accuracy"}, "objective: method drop searches nothing"),
        ({"method": "unifrom", "num_layer": 2}, "did you mean 'uniform'?"),
        ({"method": "similarity", "num_layer": 2}, "similarity: data_dir, the folder of MMLU, is missing"),
        ({"method": "uniform", "num_layers": 2}, "num_layers: unknown key; did you mean 'num_layer'?"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named(tmp_path, keys, message):
    model(tmp_path / "m")
    alpha_file(tmp_path / "parthiv-alphas.json", (0.5, 0.5), N - 1)
    with pytest.raises(Exception, match=re.escape(message)):
        prune(section(tmp_path, **keys))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"dataset": {"a.json": {"mode": "exact"}}}, "dataset: method drop searches nothing; leave it out"),
        ({"budget": 3}, "budget: method drop searches nothing; leave it out"),
        ({"models": ["m", "n"]}, "models: method drop prunes one model, got 2; joint takes a pool"),
    ],
)
def test_keys_that_a_method_has_no_use_for_are_refused(tmp_path, keys, message):
    given = {"models": ["m"], "output_dir": "out", "prune": {"method": "drop", "num_layer": 1}, **keys}
    with pytest.raises(Exception, match=re.escape(message)):
        parse_config(given, "cfg", tmp_path)


def test_layers_of_different_kinds_are_refused_naming_both(tmp_path):
    model(tmp_path / "m", "gemma2", layer_types=["sliding_attention", "full_attention"] * 2 + ["sliding_attention"])
    with pytest.raises(Exception, match=r"layer 4 of m has .*sliding_attention.*full_attention.* of layer 3 of m"):
        prune(section(tmp_path, method="uniform", num_layer=1))


def test_dropping_layers_asks_nothing_of_their_kinds_and_cuts_the_list_of_them(tmp_path):
    kinds = ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]
    a = weights(model(tmp_path / "m", "gemma2", layer_types=kinds))
    prune(section(tmp_path, method="drop", num_layer=2, start=1))
    out = weights(tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["num_hidden_layers"], config["layer_types"]) == (3, [kinds[0], kinds[1], kinds[4]])
    for place, layer in enumerate((0, 1, 4)):
        for name in out:
            if f"layers.{place}." in name:
                assert torch.equal(out[name], a[name.replace(f"layers.{place}.", f"layers.{layer}.")]), name


def test_any_run_of_layers_can_be_merged(tmp_path, olmfast, monkeypatch):
    monkeypatch.chdir(tmp_path)
    a = weights(model(tmp_path / "m", "qwen2"))
    line = shlex.split("--model_path m --method uniform --start 1 --count 3 --output_dir out")
    assert olmfast("prune", *line)[0] == 0
    out = weights(tmp_path / "out")
    q, bias = "model.layers.{}.self_attn.q_proj.weight", "model.layers.{}.self_attn.q_proj.bias"
    mean = sum(a[q.format(k)] for k in (1, 2, 3)) / 3
    torch.testing.assert_close(out[q.format(1)], mean)
    assert torch.equal(out[bias.format(1)], a[bias.format(1)])  # biases are not merged
    assert torch.equal(out[q.format(2)], a[q.format(4)])
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 3
    steps = json.loads((tmp_path / "out/alphas.json").read_text())
    assert [(s["layer_to_merge_into"], s["layer_to_remove"]) for s in steps] == [(2, 3), (1, 2)]
    line = shlex.split("--model_path m --alphas_file out/alphas.json --start 1 --output_dir two")
    assert olmfast("prune", *line)[0] == 0
    assert (tmp_path / "two/model.safetensors").read_bytes() == (tmp_path / "out/model.safetensors").read_bytes()


def test_a_section_of_a_runs_config_does_the_same(tmp_path, olmfast, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model(tmp_path / "m")
    text = "models: [m]\nmodels_dir: .\noutput_dir: out\nprune: {method: drop, num_layer: 2}\n"
    (tmp_path / "cfg.yaml").write_text(text)
    before = tree(tmp_path)
    for command in (("run", "cfg.yaml", "--dry-run"), ("check", "cfg.yaml")):
        code, out, _ = olmfast(*command)
        assert (code, "num_hidden_layers becomes 3" in out) == (0, True)
    dry = shlex.split("check prune --model_path m --method drop -i 2 --json")
    assert json.loads(olmfast(*dry)[1])["config"]["num_hidden_layers"] == 3
    assert tree(tmp_path) == before
    assert olmfast("run", "cfg.yaml")[0] == 0
    told = json.loads(olmfast("prune", "--model_path", "m", "--method", "drop", "-i", 2, "--json")[1])
    assert told["steps"] == [[3, 4, 1.0], [2, 3, 1.0]]
    assert told["output_dir"] == str(tmp_path / "pruned_models/m_drop_2")
    assert (tmp_path / "pruned_models/m_drop_2/model.safetensors").read_bytes() == (
        tmp_path / "out/model.safetensors"
    ).read_bytes()
    code, _, error = olmfast("run", "cfg.yaml")
    assert (code, "exists; use --overwrite" in error) == (2, True)


@pytest.mark.parametrize("alphas", [(0.5,), (0.1, 0.9, 0.3), (1.0, 1.0), (0.0, 1.0, 0.25), (0.0, 0.0)])
def test_alphas_and_weights_are_each_others_inverse(alphas):
    found = weights_of(alphas)
    assert math.isclose(sum(found), 1, abs_tol=1e-12)
    assert np.allclose(weights_of(alphas_of(found)), found)


# Similarity


def test_equally_similar_layers_have_the_alpha_of_the_original():
    assert alphas_by(np.full((3, 3), 0.7), [(1, 2), (0, 1)]) == pytest.approx([0.6224593312] * 2)


def test_row_means_include_the_diagonal():
    found = np.array([[4.0, 0.0], [0.0, 2.0]])
    assert alphas_by(found, [(0, 1)])[0] == pytest.approx(1 / (1 + math.exp(-2 / 3)))


def test_estimates_are_near_the_truth():
    random = np.random.default_rng(0)
    x = random.standard_normal((2000, 2))
    y = 0.8 * x + 0.6 * random.standard_normal((2000, 2))
    assert mutual_information(x, y, NEIGHBOURS) == pytest.approx(-math.log(1 - 0.8**2), abs=0.08)  # nats, of two pairs
    assert mutual_information(x, random.standard_normal((2000, 2))) == pytest.approx(0, abs=0.05)
    assert entropy(x, 50) == pytest.approx(math.log(2 * math.pi * math.e), abs=0.1)
    assert ranks(np.array([[3.0], [1.0], [3.0]])).ravel().tolist() == pytest.approx([2.5 / 3, 1 / 3, 2.5 / 3])


def test_layers_that_say_the_same_are_more_similar():
    states = torch.randn(3, 60, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    states[1] = states[0] + 0.01 * states[1]
    found = similarities(states)
    assert np.array_equal(found, found.T)
    assert found[0, 1] > 3 * found[0, 2] >= 0


def test_similarity_asks_one_question_of_each_subject_and_says_where_that_is_too_little(tmp_path):
    model(tmp_path / "m", max_position_embeddings=256)
    names = [f"subject_{index:02}" for index in range(51)]
    write_mmlu(tmp_path / "data", dict.fromkeys(names, 2))
    done = prune(section(tmp_path, num_layer=2, data_dir="data"))
    assert all(0.55 < alpha < 0.7 for alpha in done.alphas)
    told = json.loads((tmp_path / "out/merge_report.json").read_text())["olmfast"]["pruned"]
    assert (told["method"], len(told["similarity"])) == ("similarity", N)
    assert f"became layer {told['first']}" in (tmp_path / "out/report.html").read_text()
    (tmp_path / "out/report.html").rename(tmp_path / "first.html")
    assert report(tmp_path / "out").read_bytes() == (tmp_path / "first.html").read_bytes()
    with pytest.raises(Exception, match="similarity: 50 questions, and it needs more than 50"):
        prune(section(tmp_path, num_layer=2, data_dir="data", num_tasks=50), overwrite=True)
    few = section(tmp_path, num_layer=2, data_dir="data", num_tasks=26, num_samples=2)
    assert prune(few, overwrite=True).n_layers == 3
