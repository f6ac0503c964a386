"""LoRA adapters as models: what they are worth, held against PEFT, and where they may stand."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForCausalLM, AutoTokenizer

from olmfast import evaluate, load_config, run
from olmfast.config.mergekit import load_merge_config
from olmfast.errors import InputError
from olmfast.runs.rebuild import rebuild
from olmfast.static.adaptive import LinearMerge
from olmfast.static.write import merge
from olmfast.testing import (
    sums,
    tiny_adapter,
    tiny_config,
    tiny_model,
    tiny_of,
    tiny_run,
    tiny_tokenizer,
    write_answers,
    write_dataset,
)
from olmfast.weights.adapters import AdaptedModel
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.chunks import CHUNK
from olmfast.weights.digests import DigestCache
from olmfast.weights.hub import ADAPTER, resolve
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Sources

IDS = torch.arange(5, 25)[None]
LINEAR = ["q_proj", "v_proj", "up_proj", "down_proj"]
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"

# What PEFT can say of an adapter -> the family it is tried on, and the keys of its config.
OPTIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("llama", {"target_modules": LINEAR, "lora_alpha": 7}),
    "rslora": ("llama", {"target_modules": LINEAR, "lora_alpha": 7, "use_rslora": True}),
    "dora": ("llama", {"target_modules": LINEAR, "use_dora": True}),
    "patterns": (
        "llama",
        {
            "target_modules": r".*\.\d+\.(mlp|self_attn)\.(q|up|down)_proj",
            "rank_pattern": {"up_proj": 2, r"^model\.layers\.1\.self_attn\.q_proj": 6},
            "alpha_pattern": {"layers.0.mlp.down_proj": 3, "q_proj": 11},
        },
    ),
    "all linear, some layers": ("llama", {"target_modules": "all-linear", "exclude_modules": ["k_proj"]}),
    "one layer": ("llama", {"target_modules": ["q_proj"], "layers_to_transform": [1]}),
    "modules to save": ("llama", {"target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "embedding and head": ("llama", {"target_modules": ["embed_tokens", "lm_head"]}),
    "embedding, dora": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "use_dora": True}),
    "tokens": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [100, 3]}}),
    "bias of lora": ("qwen2", {"target_modules": ["q_proj"], "lora_bias": True}),
    "all biases": ("qwen2", {"target_modules": ["q_proj"], "bias": "all"}),
    "conv1d": ("gpt2", {"target_modules": ["c_attn", "c_proj", "c_fc"], "fan_in_fan_out": True}),
    "conv1d, dora": ("gpt2", {"target_modules": ["c_attn", "c_proj"], "use_dora": True, "bias": "lora_only"}),
    "embed_out": ("gpt_neox", {"target_modules": ["embed_out", "query_key_value"]}),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """Bases named `family` (float32), `family16` (bfloat16) and `tied`; three adapters of `llama`, `ad1` and so on, and
    what PEFT makes of them, `full1` and so on."""
    folder = tmp_path_factory.mktemp("bases")
    for family in {family for family, _ in OPTIONS.values()}:
        tiny_model(folder / family, family, 1)
        tiny_model(folder / f"{family}16", family, 1, dtype=torch.bfloat16)
    tiny_model(folder / "tied", "llama", 1, tie_word_embeddings=True)
    for seed in (1, 2, 3):
        adapter = tiny_adapter(folder / f"ad{seed}", folder / "llama", seed, spread=0.2, target_modules=LINEAR)
        peft_model(folder / "llama", adapter).merge_and_unload().save_pretrained(folder / f"full{seed}")
        tiny_tokenizer().save_pretrained(folder / f"full{seed}")
    return folder


def peft_model(base: Path, adapter: Path, dtype: torch.dtype | None = None) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype or "auto")
        return PeftModel.from_pretrained(model, adapter, torch_device="cpu").eval()


def peft_tensors(base: Path, adapter: Path, dtype: torch.dtype | None = None) -> Mapping[str, torch.Tensor]:
    """Parameter -> its value after PEFT's merge_and_unload, computed in `dtype`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft_model(base, adapter, dtype).merge_and_unload().state_dict()


def opened(folder: Path, *names: str, **keys: Any) -> Pool:
    return Pool.open(names, folder, folder, **keys)


def change(adapter: Path, **keys: Any) -> None:
    """Set keys of adapter_config.json."""
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **keys}))


def written(folder: Path, models: list[str], **keys: Any) -> Path:
    """What `olmfast merge` makes of models beside it."""
    entries = {"merge_method": "linear", "models": [{"model": name} for name in models]}
    (folder / "m.yml").write_text(yaml.safe_dump({**entries, "parameters": {"weight": 1.0}, **keys}))
    return merge(load_merge_config(folder / "m.yml"), folder / "out", overwrite=True).output_dir


def loaded(folder: Path) -> Any:
    """The model, which has every tensor that it needs and no other."""
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model


# ---- against PEFT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("option", OPTIONS)
def test_an_adapted_model_is_merge_and_unload_within_one_rounding(option, dtype, place, tmp_path):
    family, keys = OPTIONS[option]
    base = place / (family if dtype == torch.float32 else f"{family}16")
    # A bfloat16 base gets float32 values: PEFT rounds those of modules_to_save as it loads them.
    adapter = tiny_adapter(tmp_path / "adapter", base, **keys)
    (model,) = opened(place, f"{base.name}+{adapter}")
    exact, theirs = peft_tensors(base, adapter, torch.float64), peft_tensors(base, adapter)
    changed = 0
    for name, tensor in model.tensors.items():
        parameter = model.architecture.slot(name).parameter
        ours, truth, other = tensor.read(), exact[parameter], theirs[parameter]
        assert ours.dtype == other.dtype == dtype
        assert ours.shape == other.shape
        slack = 8 * torch.finfo(torch.float32).eps * truth.abs().max()
        one_rounding = torch.finfo(dtype).eps / 2 * truth.abs() + slack
        assert bool(((ours.double() - truth).abs() <= one_rounding).all()), name
        assert float((ours.double() - truth).abs().max()) <= float((other.double() - truth).abs().max() + slack)
        changed += model.digest(name) != opened(place, base.name)[base.name].digest(name)
    assert changed


def test_names_of_old_files_and_of_bare_models_are_understood(place, tmp_path):
    (expected,) = opened(place, "llama+ad1")
    for name, respell in {
        "adapter's name": lambda name: name.replace(".weight", ".default.weight"),
        "bare": lambda name: name.replace("base_model.model.model.", "base_model.model."),
        "wrapped": lambda name: name.replace("base_model.model.", "base_model.model.language."),
    }.items():
        folder = shutil.copytree(place / "ad1", tmp_path / name)
        held = {respell(key): value for key, value in load_file(place / "ad1" / ADAPTER[1]).items()}
        save_file(held, folder / ADAPTER[1])
        (model,) = opened(place, f"llama+{folder}")
        assert all(torch.equal(model.read(tensor), expected.read(tensor)) for tensor in expected.tensors), name


def test_an_adapter_of_two_towers_finds_the_tensors_whatever_their_file_calls_them(tmp_path):
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlavaForConditionalGeneration

    base = tiny_of(tmp_path / "base", LlavaForConditionalGeneration, tiny_config("llava"))
    names = load_file(base / "model.safetensors")
    keys = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(LlavaForConditionalGeneration.from_pretrained(base), keys).save_pretrained(tmp_path / "ad")
    held = load_file(tmp_path / "ad" / ADAPTER[1])
    assert not {f"{name.split('.lora_')[0].removeprefix('base_model.model.')}.weight" for name in held} & set(names)
    full = PeftModel.from_pretrained(LlavaForConditionalGeneration.from_pretrained(base), tmp_path / "ad")
    full.merge_and_unload().save_pretrained(tmp_path / "full")
    expected = load_file(tmp_path / "full" / "model.safetensors")
    (model,) = opened(tmp_path, "base+ad", alike=False)
    changed = [name for name in names if not torch.equal(model.read(name), names[name])]
    assert any("vision" in name for name in changed)
    assert any("language" in name for name in changed)
    for name in expected:
        torch.testing.assert_close(model.read(name), expected[name], rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("keys", "is_tied"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, False),
        ({"target_modules": ["q_proj", "lm_head"]}, False),
        ({"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, False),
        ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}, True),
        ({"target_modules": ["q_proj"], "trainable_token_indices": [3, 7]}, True),
        ({"target_modules": ["q_proj"]}, True),
    ],
)
def test_a_tied_model_becomes_what_the_adapter_computes(keys, is_tied, place, tmp_path):
    shutil.copytree(place / "tied", tmp_path / "tied")
    tiny_adapter(tmp_path / "ad", tmp_path / "tied", **keys)
    model = loaded(written(tmp_path, ["tied+ad"]))
    expected = peft_model(tmp_path / "tied", tmp_path / "ad")(IDS).logits
    torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-4, atol=1e-4)
    assert model.config.tie_word_embeddings is is_tied
    assert (HEAD in load_file(tmp_path / "out" / "model.safetensors")) is not is_tied


def test_an_adapter_with_tokens_of_its_own_brings_rows_and_tokenizer(place, tmp_path):
    from peft import LoraConfig, get_peft_model

    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<tool>", "<call>"]})
    base = AutoModelForCausalLM.from_pretrained(place / "llama")
    base.resize_token_embeddings(116, mean_resizing=False)
    keys = {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}
    get_peft_model(base, LoraConfig(r=2, init_lora_weights=False, **keys)).save_pretrained(tmp_path / "ad")
    tokenizer.save_pretrained(tmp_path / "ad")
    shutil.copytree(place / "llama", tmp_path / "llama")
    model = loaded(written(tmp_path, ["llama+ad"]))
    assert model.config.vocab_size == 116
    assert torch.equal(model.get_input_embeddings().weight, base.get_input_embeddings().weight)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").convert_tokens_to_ids("<call>") == len(tiny_tokenizer()) + 1


@pytest.mark.parametrize(("n_tokens", "is_taken"), [(7, True), (8, False)])
def test_an_adapters_tokenizer_is_taken_if_all_its_tokens_have_a_row(n_tokens, is_taken, place, tmp_path):
    adapter, tokenizer = shutil.copytree(place / "ad1", tmp_path / "ad"), tiny_tokenizer()
    tokenizer.add_tokens([f"<{i}>" for i in range(n_tokens)])
    tokenizer.save_pretrained(adapter)
    (model,) = opened(place, f"llama+{adapter}")
    assert model.tokenizer_folder == (adapter if is_taken else place / "llama")


# ---- computed in the chunk that needs it


class Largest(TorchDispatchMode):
    """The most values of any tensor that is made, but for one whose memory is `known`."""

    n_values = known = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and (storage := out.untyped_storage()).data_ptr() != self.known:
            self.n_values = max(self.n_values, storage.nbytes() // out.element_size())
        return out


@pytest.mark.parametrize("keys", [{}, {"use_dora": True}], ids=["lora", "dora"])
@pytest.mark.parametrize("turned", [False, True])
def test_a_large_tensor_is_read_in_chunks_whose_bytes_do_not_depend_on_the_reader(keys, turned, tmp_path):
    n_out, n_in, rank = 3000, 1000, 4
    draw = torch.Generator().manual_seed(0)
    base = tiny_model(tmp_path / "base", "gpt2" if turned else "llama", 1)
    name = "transformer.h.0.mlp.c_fc" if turned else "model.layers.0.mlp.up_proj"
    weight = torch.randn((n_in, n_out) if turned else (n_out, n_in), generator=draw)
    held = load_file(base / "model.safetensors") | {f"{name}.weight": weight}
    save_file(held, base / "model.safetensors", metadata={"format": "pt"})
    a, b = torch.randn(rank, n_in, generator=draw), torch.randn(n_out, rank, generator=draw)
    (tmp_path / "ad").mkdir()
    factors = {f"base_model.model.{name}.lora_A.weight": a, f"base_model.model.{name}.lora_B.weight": b}
    if keys:
        factors[f"base_model.model.{name}.lora_magnitude_vector"] = torch.rand(n_out, generator=draw)
    save_file(factors, tmp_path / "ad" / ADAPTER[1])
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2, **keys}
    (tmp_path / "ad" / ADAPTER[0]).write_text(json.dumps(settings))
    model = AdaptedModel(Checkpoint(base), tmp_path / "ad", "ad")
    tensor = model.tensors[f"{name}.weight"]
    whole = tensor.read()
    delta = (b.double() @ a.double()) / 2
    exact = weight.double() + (delta.T if turned else delta)
    if keys:
        magnitude = factors[f"base_model.model.{name}.lora_magnitude_vector"].double()
        features = 0 if turned else 1
        exact *= (magnitude / exact.norm(dim=features)).unsqueeze(features)
    torch.testing.assert_close(whole.double(), exact, rtol=1e-6, atol=1e-6)
    apart, step = torch.empty(whole.numel()), 300_007
    with Largest() as largest:
        largest.known = apart.untyped_storage().data_ptr()
        reader = tensor.open()
        for start in range(0, len(apart), step):
            reader.read_into(apart[start : start + step], start)
    assert torch.equal(apart, whole.flatten())
    assert largest.n_values <= CHUNK < whole.numel() / 4
    reader.read_into(apart[:step], 100)  # from the front again
    assert torch.equal(apart[:step], whole.flatten()[100 : step + 100])
    assert tensor.held_bytes < whole.nbytes + a.nbytes + b.nbytes


# ---- what is refused, by name


def spoilt(adapter: Path, **changed: torch.Tensor | None) -> None:
    held = load_file(adapter / ADAPTER[1]) | changed
    save_file({name: tensor for name, tensor in held.items() if tensor is not None}, adapter / ADAPTER[1])


Q = "base_model.model.model.layers.0.self_attn.q_proj"


# ---- from the Hub


def test_an_adapter_of_the_hub_is_downloaded_without_what_lies_beside_it(place, tmp_path, monkeypatch):
    asked = {}

    def snapshot_download(repository, revision, local_dir, allow_patterns, **_):
        asked.update(repository=repository, revision=revision, patterns=allow_patterns)
        shutil.copytree(place / "ad1", local_dir)

    class Found:
        sha = "0" * 40

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: Found)
    shutil.copytree(place / "llama", tmp_path / "org_base")
    (model,) = opened(tmp_path, "org/base+org/ad@v2")
    assert asked["repository"] == "org/ad"
    assert not {"*.json", "*.safetensors"} & set(asked["patterns"])  # a repository may hold every checkpoint
    assert model.folders == (tmp_path / "org_base", tmp_path / "org_ad@v2")
    asked.clear()
    assert resolve("org/ad@v2", tmp_path, tmp_path, of=ADAPTER) == tmp_path / "org_ad@v2"
    assert not asked


# ---- wherever a model stands


@pytest.mark.parametrize(
    ("base", "keys"),
    [
        ("llama", {"merge_method": "ties", "parameters": {"weight": 1.0, "density": 0.7}}),
        ("llama+ad3", {"merge_method": "model_stock", "parameters": {}}),
    ],
)
def test_adapters_merge_like_the_models_that_peft_makes_of_them(base, keys, place, tmp_path):
    for name in ("llama", "ad1", "ad2", "ad3", "full1", "full2", "full3"):
        shutil.copytree(place / name, tmp_path / name)
    plain = written(tmp_path, ["full1", "full2"], base_model=base.replace("llama+ad", "full"), **keys)
    expected = load_file(plain / "model.safetensors")
    out = written(tmp_path, ["llama+ad1", "llama+ad2"], base_model=base, **keys)
    found = load_file(out / "model.safetensors")
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-5)
    loaded(out)
    front = yaml.safe_load((out / "README.md").read_text().split("---")[1])
    assert front["base_model"] == list(dict.fromkeys([*base.split("+"), "llama", "ad1", "ad2"]))  # ids, for the hub


def test_an_adapted_base_is_written_in_layers_too(place, tmp_path):
    for name in ("llama", "ad1"):
        shutil.copytree(place / name, tmp_path / name)
    slices = [{"sources": [{"model": name, "layer_range": [0, 2]}]} for name in ("llama+ad1", "llama")]
    config = {"merge_method": "passthrough", "base_model": "llama+ad1", "slices": slices}
    (tmp_path / "m.yml").write_text(yaml.safe_dump(config))
    out = merge(tmp_path / "m.yml", tmp_path / "out").output_dir
    found = load_file(out / "model.safetensors")
    pool = opened(place, "llama+ad1", "llama")
    part = "mlp.up_proj.weight"
    assert torch.equal(found[f"model.layers.1.{part}"], pool["llama+ad1"].read(f"model.layers.1.{part}"))
    assert torch.equal(found[f"model.layers.3.{part}"], pool["llama"].read(f"model.layers.1.{part}"))
    assert loaded(out).config.num_hidden_layers == 4


def test_a_second_adapter_changes_the_first_ones_model(place):
    (model,) = opened(place, "llama+ad1+ad2")
    expected = peft_tensors(place / "full1", place / "ad2")
    for name in model.tensors:
        torch.testing.assert_close(model.read(name), expected[name], rtol=1e-6, atol=1e-6)


def test_linear_takes_adapters_and_names_its_folder_after_them(place, tmp_path, monkeypatch, olmfast):
    monkeypatch.chdir(tmp_path)
    line = ["linear", "--model_a", f"{place}/llama", "--model_b", f"{place}/llama+{place}/ad1", "--alpha", "0.25"]
    code, out, _ = olmfast("check", *line)
    assert code == 0, out
    assert olmfast(*line)[0] == 0
    found = load_file(tmp_path / "merged_models" / "llama_llama+ad1_alpha0.25" / "model.safetensors")
    a, b = opened(place, "llama", "llama+ad1")
    name = "model.layers.0.mlp.up_proj.weight"
    torch.testing.assert_close(found[name], 0.25 * a.read(name) + 0.75 * b.read(name))
    assert LinearMerge("x/llama+y/ad", "z", 0.5).folder_name == "llama+ad_z_alpha0.50"


def test_what_an_adapter_leaves_alone_is_the_bases_and_what_it_changes_is_told_by_its_digest(place, tmp_path):
    adapter = shutil.copytree(place / "ad1", tmp_path / "ad1")
    names = ["llama", "llama+ad1", "llama+ad2", f"llama+{adapter}"]
    base, one, two, again = opened(place, *names)
    kept, changed = EMBEDDING, "model.layers.0.mlp.up_proj.weight"
    assert base.tensors[kept] is one.tensors[kept] is two.tensors[kept]
    assert one.tensors[changed].in_file is None
    assert len({model.digest(changed) for model in (base, one, two)}) == 3
    assert one.fingerprint() == again.fingerprint()
    change(adapter, lora_alpha=9)
    assert opened(place, names[3])[names[3]].fingerprint() != one.fingerprint()


def test_nan_in_an_adapter_is_found_and_its_file_named(place, tmp_path):
    adapter = shutil.copytree(place / "ad1", tmp_path / "ad")
    spoilt(adapter, **{f"{Q}.lora_A.weight": torch.full((4, 32), torch.nan)})
    pool = opened(place, "llama", f"llama+{adapter}")
    with pytest.raises(InputError, match=f"{adapter}.*q_proj.*NaN"):
        pool.check_finite()
    shutil.copytree(place / "llama", tmp_path / "llama")
    with pytest.raises(InputError, match=r"adapter_model.safetensors: base_model.*lora_A.weight: holds NaN"):
        written(tmp_path, ["llama", "llama+ad"])
    assert not (tmp_path / "out").exists()


def test_an_adapter_scores_as_the_model_that_peft_makes_of_it(place, tmp_path):
    data = {write_dataset(tmp_path / "sums.json", sums(6)): {"mode": "bigram_loss"}}
    names = [f"{place}/{name}" for name in ("llama", "full1")]
    board = evaluate(f"{place}/llama+{place}/ad1", data, names, device="cpu")
    base, full, adapted = (next(iter(board.rows[name].values())) for name in (*names, f"{place}/llama+{place}/ad1"))
    assert adapted == pytest.approx(full, rel=1e-5)
    assert adapted != pytest.approx(base, rel=1e-2)


STAGES = {"layer_swap": True, "es_norm": True, "units": ["*.1.*q_proj"]}


@pytest.mark.parametrize("keys", [{"budget": 12}, STAGES], ids=["joint", "stages"])
def test_a_run_over_three_adapters_of_one_base(keys, place, tmp_path):
    for i in (1, 2):
        write_answers(tmp_path / f"skill{i}.json", place / f"full{i}", 12)
    data = {f"skill{i}.json": {"mode": "exact_match"} for i in (1, 2)}
    donors = [f"llama+ad{i}" for i in (1, 2, 3)]
    config = tiny_run(tmp_path, 0, models=donors, dataset=data, validation=0, **keys)
    for name in ("llama", "ad1", "ad2", "ad3"):
        shutil.copytree(place / name, tmp_path / "models" / name)
    result = run(load_config(config))
    one, two, _ = (result.selection.rows[donor] for donor in donors)
    assert one["skill1.json"] < two["skill1.json"]
    assert two["skill2.json"] < one["skill2.json"]
    assert result.selection.rows["plain average"] not in (one, two)  # of computed tensors
    assert loaded(result.output_dir).config.vocab_size == 112
    held = load_file(result.output_dir / "model.safetensors")
    sources = Sources(opened(tmp_path / "models", *donors, "llama"), result.output_dir)
    assert all(torch.equal(held[name], sources.value(value)) for name, value in result.recipe.tensors.items())
    on_disk = sorted(path.name for path in (tmp_path / "models").rglob("*.safetensors"))
    assert on_disk == ["adapter_model.safetensors"] * 3 + ["model.safetensors"]  # no copy of any donor
    rebuilt = rebuild(result.output_dir / "merge_report.json", tmp_path / "rebuilt").output_dir / "model.safetensors"
    assert rebuilt.read_bytes() == (result.output_dir / "model.safetensors").read_bytes()
    if "budget" in keys:
        assert result.record.values["anchor"]["model"] == "llama"  # which no key names
        change(tmp_path / "models" / "ad2", lora_alpha=99)
        with pytest.raises(InputError, match=r"changed since it was begun: donor llama\+ad2"):
            run(load_config(config, {"budget": 13}), resume=True)


def test_the_digest_cache_keeps_what_was_read_of_an_adapter(place):
    digests = DigestCache()
    Pool.open(["llama+ad1"], place, place, digests=digests)["llama+ad1"].fingerprint()
    assert any(path.endswith(ADAPTER[1]) for path, *_ in digests._known)
