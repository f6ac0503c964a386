"""Files that hold what nobody expects: each ends in one message that names it, and nothing is written."""

from __future__ import annotations

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from olmfast.config.loading import parse_yaml
from olmfast.errors import InputError, show, told
from olmfast.evaluation import blueprint, misfits, rendering
from olmfast.search.log import Outcome, Standing
from olmfast.search.record import Record
from olmfast.testing import FAMILIES, tiny_run
from olmfast.weights.architecture import Architecture

MERGE = {
    "merge_method": "linear",
    "models": [{"model": f"models/donor{i}", "parameters": {"weight": 1}} for i in (0, 1)],
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    """A folder with donors, a config that runs and a merge file."""
    folder = tmp_path_factory.mktemp("good")
    tiny_run(folder, 2, dataset={"sums.json": {"mode": "exact_match"}}, holdout={})
    (folder / "merge.yml").write_text(yaml.safe_dump(MERGE))
    return folder


@pytest.fixture
def place(good, tmp_path, monkeypatch) -> Path:
    """A fresh copy, which is the working directory."""
    monkeypatch.chdir(shutil.copytree(good, tmp_path / "run"))
    return tmp_path / "run"


@pytest.fixture
def refused(olmfast, place) -> Callable[..., str]:
    """The message that a command is refused with, once it is clear that nothing was written."""

    def call(*arguments: object) -> str:
        before = {path: path.lstat().st_mtime_ns for path in place.rglob("*")}
        code, out, err = olmfast(*arguments)
        assert (code, out) == (2, ""), err
        assert err.startswith("olmfast: ")
        assert err.count("olmfast: ") == 1
        assert max(map(len, err.splitlines())) < 900
        assert {path: path.lstat().st_mtime_ns for path in place.rglob("*")} == before
        return err.removeprefix("olmfast: ")

    return call


def edit(path: Path, **keys: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


COMMANDS = (["run", "cfg.yaml", "-q"], ["run", "cfg.yaml", "--dry-run", "-q"], ["check", "cfg.yaml"])


@pytest.mark.parametrize("command", [*COMMANDS, ["check", "merge.yml"]])
def test_all_that_does_not_fit_the_weights_in_config_json_is_told_at_once(refused, place, command):
    for name in ("donor0", "donor1"):
        edit(place / f"models/{name}/config.json", vocab_size=113, intermediate_size=50, num_hidden_layers=3)
    where = place / "models" / "donor0" / "config.json"
    told = {
        f"{where}: says 3 blocks, the weights hold 2 (named model.layers.N)",
        f"{where}: does not fit the weights: vocab_size is 113, but they hold ",
        f"{where}: does not fit the weights: intermediate_size is 50, but they hold ",
    }
    found = refused(*command).splitlines()
    if "merge.yml" not in command:
        assert len(found) == 3
        assert all(any(line.startswith(one) for line in found) for one in told)
    assert any("vocab_size" in line or "113" in line for line in found)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"num_attention_heads": "4"}, "num_attention_heads: expected a positive whole number, got '4'"),
        ({"hidden_size": 10**400}, "hidden_size: expected a positive whole number, got 1"),
        ({"max_position_embeddings": "many"}, "max_position_embeddings: expected a positive whole number, got 'many'"),
        ({"text_config": 3, "architectures": 0.5}, "text_config: expected an object, got 3"),
        ({"attention_bias": "\\"}, "Transformers cannot build this model: "),
        ({"hidden_act": ["silu"]}, "Transformers cannot build this model: "),
        ({"num_key_value_heads": 4}, "does not fit the weights: "),
        ({"model_type": {}}, "model_type {} is not supported"),
        ({"rms_norm_eps": float("inf")}, "rms_norm_eps: expected a finite number, 0 or more, got inf"),
        ({"final_logit_softcapping": "30"}, "final_logit_softcapping: expected a finite number, 0 or more, got '30'"),
    ],
)
def test_a_key_of_config_json_with_another_kind_of_value_is_named(refused, place, keys, message):
    for name in ("donor0", "donor1"):
        edit(place / f"models/{name}/config.json", **keys)
    assert message in refused("run", "cfg.yaml", "-q")
    assert message in refused("check", "cfg.yaml")


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        ({"num_key_value_heads": 1}, "num_key_value_heads is 1, but"),
        ({"num_key_value_heads": None}, "without num_key_value_heads Transformers takes it as 4, but"),
        (
            {"num_key_value_heads": None, "num_kv_heads": 2},
            "without num_key_value_heads Transformers takes it as 4 (of num_kv_heads it knows nothing), but",
        ),
    ],
)
def test_the_key_that_makes_shapes_differ_is_named_with_the_value_that_fits_even_where_it_is_missing(
    refused, place, keys, says
):
    for name in ("donor0", "donor1"):
        path = place / f"models/{name}/config.json"
        config = {**json.loads(path.read_text()), **keys}
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    held = "they hold model.layers.0.self_attn.k_proj.weight [16, 32], which it makes "
    for command in COMMANDS:
        (line,) = refused(*command).splitlines()
        assert f"config.json: does not fit the weights: {says} {held}" in line
        assert line.endswith(" (and 3 more); num_key_value_heads: 2 fits")


def test_where_either_of_two_keys_would_fit_both_are_named(refused, place):
    tiny_run(place / "shared", 2, "qwen2", dataset={"sums.json": {"mode": "exact_match"}}, holdout={})
    for name in ("donor0", "donor1"):  # whose heads are as wide as their number makes them
        edit(place / f"shared/models/{name}/config.json", num_attention_heads=8)
    found = refused("check", "shared/cfg.yaml")
    assert "num_attention_heads is 8, num_key_value_heads is 2, but they hold model.layers.0.self_attn.k_proj" in found
    assert "num_attention_heads: 4 or num_key_value_heads: 4 fits" in found


def a_moe(place: Path, **keys: Any) -> str:
    """A run of mixtures of sixteen experts, and the start of a line that says that their config.json does not fit.

    Its keys are spelled as in published files; None: left out.
    """
    model = {"num_experts": 16, "head_dim": 16, "tie_word_embeddings": False}
    tiny_run(place / "moe", 2, "qwen3_moe", model=model, dataset={"sums.json": {"mode": "exact_match"}}, holdout={})
    for name in ("donor0", "donor1"):
        path = place / f"moe/models/{name}/config.json"
        config = {**json.loads(path.read_text()), **model, **keys}
        config.pop("num_local_experts", None)
        path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return f"{place / 'moe/models/donor0/config.json'}: does not fit the weights: "


@pytest.mark.parametrize(
    ("stated", "says"),
    [
        (8, "num_experts is 8"),
        (32, "num_experts is 32"),
        (None, "without num_experts Transformers takes it as 128"),
    ],
)
def test_a_wrong_number_of_experts_is_named_as_the_file_names_it(refused, place, stated, says):
    start = a_moe(place, num_experts=stated)
    (line,) = refused("check", "moe/cfg.yaml").splitlines()
    assert line.startswith(f"{start}{says}, but they hold model.layers.0.mlp.gate.weight [16, 32], which it makes [")
    assert line.endswith(" more); num_experts: 16 fits")


def test_a_number_of_experts_under_a_name_that_transformers_also_knows_is_named_so(refused, place):
    start = a_moe(place, num_experts=None)
    for name in ("donor0", "donor1"):
        edit(place / f"moe/models/{name}/config.json", num_local_experts=8)
    (line,) = refused("check", "moe/cfg.yaml").splitlines()
    assert line.startswith(f"{start}num_local_experts is 8, but ")
    assert line.endswith("; num_local_experts: 16 fits")


def test_of_what_only_the_modules_look_for_it_is_not_said_that_nothing_is_known(refused, place):
    a_moe(place, num_experts=None)  # sixteen, as a head is wide
    assert "without num_experts Transformers takes it as 128, but" in refused("check", "moe/cfg.yaml")
    a_moe(place / "other", num_experts=None, mine=16)
    found = refused("check", "other/moe/cfg.yaml")
    assert "without num_experts Transformers takes it as 128 (of mine it knows nothing), but" in found


def test_a_missing_width_of_heads_is_named_and_no_key_that_mends_less(refused, place):
    start = a_moe(place, head_dim=None)
    (line,) = refused("check", "moe/cfg.yaml").splitlines()
    assert line == (
        f"{start}without head_dim Transformers takes it as 8, but they hold model.layers.0.self_attn.k_norm.weight "
        "[16], which it makes [8] (and 11 more); head_dim: 16 fits"
    )


def test_each_of_several_keys_that_are_wrong_is_named_once(refused, place):
    start = a_moe(place, head_dim=None, num_experts=8, vocab_size=100)
    lines = refused("check", "moe/cfg.yaml").splitlines()
    assert all(line.startswith(start) for line in lines)
    assert sorted(line.rsplit("; ")[-1] for line in lines) == [
        "head_dim: 16 fits",
        "num_experts: 16 fits",
        "vocab_size: 112 fits",
    ]


def test_a_key_that_mends_some_tensors_and_not_all_is_not_said_to_fit(refused, place):
    start = a_moe(place, vocab_size=100)
    for name in ("donor0", "donor1"):
        path = place / f"moe/models/{name}/model.safetensors"
        norm = "model.layers.1.self_attn.q_norm.weight"
        save_file({**load_file(path), norm: torch.ones(17)}, path)
    lines = refused("check", "moe/cfg.yaml").splitlines()
    assert lines[0].startswith(f"{start}vocab_size is 100, but they hold ")
    assert lines[0].endswith("; vocab_size: 112 mends these, but not all")
    assert lines[1] == f"{start}head_dim is 16, num_experts is 16, but they hold {norm} [17], which it makes [16]"


@pytest.mark.parametrize("keys", [{"num_experts": 64}, {"head_dim": None}, {"hidden_size": 64}])
def test_a_wrong_key_of_a_model_of_many_blocks_is_found_with_few_of_them(monkeypatch, keys):
    true: dict[str, Any] = {
        **FAMILIES["qwen3_moe"],
        "model_type": "qwen3_moe",
        "head_dim": 16,
        "num_experts": 128,
        "num_hidden_layers": 94,
    }
    where = Path("config.json")
    with torch.device("meta"):
        module = blueprint.build_module(true, where, False, torch.bfloat16)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in module.named_parameters():
        path, _, part = name.partition(".experts.")
        for expert in range(128 if part else 0):
            for each in ("gate_proj", "up_proj") if part == "gate_up_proj" else ("down_proj",):
                shape = (32, 24) if each == "down_proj" else (24, 32)
                shapes[f"{path}.experts.{expert}.{each}.weight"] = shape
        if not part:
            shapes[name] = tuple(parameter.shape)
    built: list[int] = []
    compared: list[int] = []

    def building(data, *arguments):
        built.append(data["num_hidden_layers"])
        return original(data, *arguments)

    def comparing(module, architecture, shapes):
        compared.append(len(shapes))
        return differing(module, architecture, shapes)

    original, differing = blueprint.build_module, misfits.differing
    monkeypatch.setattr(blueprint, "build_module", building)
    for file in (blueprint, misfits):
        monkeypatch.setattr(file, "differing", comparing)
    config = {key: value for key, value in {**true, **keys}.items() if value is not None}
    with pytest.raises(InputError, match=f"{next(iter(keys))}: {true[next(iter(keys))]} fits$"):
        blueprint.check_fit(config, Architecture.from_config(config, "it"), shapes, where, tied=False)
    assert built[0] == 94
    assert sum(built) < 94 + 50
    assert sum(compared) < 1.1 * len(shapes)


def test_fewer_experts_than_the_weights_hold_are_the_configs_fault(refused, place):
    tiny_run(place / "experts", 2, "mixtral", dataset={"sums.json": {"mode": "exact_match"}}, holdout={})
    for name in ("donor0", "donor1"):
        edit(place / f"experts/models/{name}/config.json", num_local_experts=1)
    found = refused("check", "experts/cfg.yaml")
    assert "num_local_experts is 1, but they hold model.layers.0.block_sparse_moe.gate.weight" in found


def a_loop(path: Path) -> None:
    path.symlink_to(path.name)


@pytest.mark.parametrize("file", ["cfg.yaml", "sums.json", "models/donor0/config.json", "models/donor0/tokenizer.json"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, a_loop])
def test_what_is_no_regular_file_is_not_waited_for(refused, place, file, make):
    (place / file).unlink()
    make(place / file)
    assert file in refused("run", "cfg.yaml", "-q")


def test_a_merge_file_that_is_a_pipe_is_not_waited_for(refused, place):
    os.mkfifo(place / "pipe.yml")
    assert refused("merge", "pipe.yml", "out") == "pipe.yml: cannot be read: it is no regular file\n"


@pytest.mark.parametrize(
    "text",
    [
        "a: !!int x", "a: !!float x", "a: !!bool x", "a: !!timestamp x", "a: !!binary é", "a: !!python/object:os.x {}",
        "a: !x y", "a: 2001-13-40", "? [a]\n: b", "&x {a: *x}", '"\\ud800": 1', "[" * 5000,
    ],
)  # fmt: skip
def test_tags_and_scalars_that_are_none_are_the_files_fault(text):
    with pytest.raises(InputError, match=r"^x\.yml"):
        parse_yaml(text, "x.yml")


def test_aliases_that_stand_for_a_billion_values_are_refused_and_others_are_not():
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10)]
    with pytest.raises(InputError, match="its aliases stand for too many values"):
        parse_yaml("\n".join(lines), "x.yml")
    assert parse_yaml("a: &a [1, 2]\nb: *a", "x.yml") == {"a": [1, 2], "b": [1, 2]}


def test_quotes_are_bounded():
    nested: list[Any] = []
    for _ in range(40):
        nested = [nested] * 9
    for value in (nested, "a" * 9000, 10**5000, {"a": "b" * 9000}, ["x"] * 9000):
        assert len(show(value)) < 310
    assert show("it's") == repr("it's")
    assert told(ValueError("a\nb\x1b[2J" + "c" * 9000)).startswith("a b\\x1b[2Jccc")
    assert len(told("c" * 9000)) < 310


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ 1/0 }}", "the chat template fails: ZeroDivisionError"),
        ("{{ messages[9].content.x }}", "the chat template refuses it: list object has no element 9"),
        ("{% for", "the chat template refuses it: unexpected 'end of template'"),
        ("{{ messages + 1 }}", "the chat template fails: TypeError"),
        ("{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "the chat template fails: RecursionError"),
        ("{{ 'a' * 10**12 }}", "the chat template "),
        ("{{ messages[0].content * 5000000 }}", "the chat template makes more than 1 MB"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "takes more than 0.5 s"),
        ("{{ 9 ** (9 ** 9) }}", "takes more than 0.5 s"),
    ],
)
def test_a_chat_template_cannot_crash_hang_or_fill_the_memory(refused, place, monkeypatch, template, message):
    monkeypatch.setattr(rendering, "N_BYTES", 1 << 20)
    if "more than 0.5 s" in message:
        monkeypatch.setattr(rendering, "SECONDS", 0.5)
    (place / "models" / "donor0" / "chat_template.jinja").write_text(template)
    found = refused("run", "cfg.yaml", "-q")
    assert found.startswith(f"{place / 'sums.json'}: item 0: ")
    assert message in found


@pytest.mark.parametrize(
    ("file", "change", "command"),
    [
        ("tokenizer.json", {"added_tokens": [{"id": 3}]}, "run"),
        ("tokenizer.json", {"model": {"type": "BPE", "vocab": {"a": "b"}, "merges": []}}, "merge"),
        ("tokenizer.json", {"normalizer": {"type": "Nothing"}}, "run"),
        ("tokenizer_config.json", {"chat_template": 3}, "merge"),
        ("tokenizer_config.json", {"added_tokens_decoder": []}, "merge"),
        ("generation_config.json", {"eos_token_id": "</s>"}, "run"),
    ],
)
def test_a_tokenizers_file_of_another_shape_is_named(refused, place, file, change, command):
    for name in ("donor0", "donor1"):
        path = place / "models" / name / file
        path.write_text(path.read_text() if path.exists() else "{}")
        edit(path, **change)
        (place / "models" / name / "chat_template.jinja").unlink(missing_ok=True)
    merge = {**MERGE, "tokenizer": {"source": "union", "tokens": {"new": {}}}, "chat_template": "auto"}
    (place / "merge.yml").write_text(yaml.safe_dump(merge))
    arguments = ["cfg.yaml", "-q"] if command == "run" else ["merge.yml", "out"]
    assert "donor0" in refused(command, *arguments)


def test_tokens_that_the_embedding_has_no_row_of_are_told(refused, place):
    for name in ("donor0", "donor1"):
        path = place / "models" / name / "tokenizer.json"
        data = json.loads(path.read_text())
        data["model"]["vocab"]["+"] = 5000
        path.write_text(json.dumps(data))
    assert "the tokenizer gives the id 5000 to a token of sums.json, and the embedding has 112 rows" in refused(
        "run", "cfg.yaml", "-q"
    )


def test_names_and_numbers_that_nothing_can_have_are_refused(refused, place):
    long = "a" * 300
    assert "a name in it is longer than 255 bytes" in refused("run", "cfg.yaml", "-q", "--set", f"output_dir={long}")
    assert long[:200] in refused("run", "cfg.yaml", "-q", "--set", f"models=[{long}]")
    assert "max_ram" in refused("run", "cfg.yaml", "-q", "--set", f"max_ram={'9' * 400}")
    merge = {**MERGE, "parameters": {"weight": int("9" * 400)}}
    (place / "merge.yml").write_text(json.dumps(merge))
    assert refused("merge", "merge.yml", "out").startswith("merge.yml: parameters.weight: expected a number")
    linear = ["linear", "--model_a", "models/donor0", "--model_b", "models/donor1", "--alpha", "0.5", "--layers"]
    for digits in ("\u00b2", "\u0663", "9" * 5000):
        assert "not expected here; layers are given as --layers 1 2 20" in refused(*linear, digits)


def test_any_change_of_a_log_is_noticed(tmp_path):
    record = Record.create(tmp_path, {"config": {}})
    record.add("base", Outcome("base", "model", "donor0", False, {}), Standing(scores={"a": 1}), 2, 0.5)
    record.update(status="stopped")
    path, generator = tmp_path / "steps.jsonl", random.Random(0)
    content = path.read_bytes()
    last = content.rindex(b"\n", 0, -1) + 1
    for _ in range(300):
        at = generator.randrange(last)
        changed = bytearray(content)
        changed[at] = generator.choice([byte for byte in range(32, 127) if byte != changed[at]])
        path.write_bytes(bytes(changed))
        with pytest.raises(InputError, match=r"steps\.jsonl: "):
            Record.load(tmp_path)
    for lines in (content.splitlines(True)[::2], content.splitlines(True)[:1] + content.splitlines(True)[:0:-1]):
        path.write_bytes(b"".join(lines))
        with pytest.raises(InputError, match="is damaged: it, or a line before it, was changed since it was written"):
            Record.load(tmp_path)


@pytest.mark.parametrize(
    "report",
    [
        {"layers": {"x": {"best_model": "donor1"}}},
        {"layers": {"9" * 400: {"best_model": "donor1"}}},
        {"layers": {"0": "donor1"}},
        {"base_model": {"name": 3}},
        {"tensors": {"model.layers.0.mlp.up_proj": {"best_model": ["donor1"]}}},
        {"tensors": [1]},
        "donor1",
    ],
)
def test_a_report_of_the_original_tool_of_another_shape_is_refused(refused, place, report):
    (place / "out").mkdir()
    (place / "out" / "merge_report.json").write_text(json.dumps(report))
    assert "merge_report.json: is not a merge report" in refused("run", "cfg.yaml", "-q", "--resume")
