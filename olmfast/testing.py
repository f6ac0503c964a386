"""Tiny real models, tokenizers and datasets, for the tests of olmfast and of tools that import it."""

from __future__ import annotations

import json
import os
import string
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

_COMMON = {
    "vocab_size": 112,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
_GPT2 = {"vocab_size": 112, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 128}

# model_type -> config keys of a model of a few thousand parameters.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": _COMMON,
    "mistral": {**_COMMON, "sliding_window": 16},
    "qwen2": {**_COMMON, "tie_word_embeddings": True},
    "qwen3": {**_COMMON, "head_dim": 8},
    "gemma": {**_COMMON, "head_dim": 8},
    "gemma2": {**_COMMON, "head_dim": 8, "sliding_window": 16},
    "phi3": {**_COMMON, "pad_token_id": 0},
    "granite": {**_COMMON, "logits_scaling": 8.0, "embedding_multiplier": 12.0, "residual_multiplier": 0.22},
    "cohere": {**_COMMON, "pad_token_id": 0, "logit_scale": 0.0625, "use_qk_norm": True},
    "phi": _COMMON,
    "gpt2": _GPT2,
    "gptj": {**_GPT2, "rotary_dim": 4},
    "gpt_neox": {**_COMMON, "num_key_value_heads": 4},
    "mixtral": {**_COMMON, "num_local_experts": 2},
    "olmoe": {**_COMMON, "num_experts": 4, "num_experts_per_tok": 2, "pad_token_id": 0},
    "qwen3_moe": {**_COMMON, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
}
# Sizes under all the names that config classes have for them; `tiny_config` takes those that a class knows.
_TINY = {
    112: "vocab_size",
    64: "max_position_embeddings n_positions",
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_ff hidden_dim",
    32: "hidden_size d_model n_embd dim embed_dim word_embed_proj_dim max_source_positions max_target_positions",
    16: "moe_intermediate_size shared_expert_intermediate_size q_lora_rank kv_lora_rank image_size projection_dim "
    "embedding_size mamba_d_head",
    8: "head_dim d_kv qk_rope_head_dim qk_nope_head_dim v_head_dim num_mel_bins patch_size state_size mamba_d_state "
    "linear_key_head_dim linear_value_head_dim",
    4: "num_hidden_layers n_layer n_layers num_layers num_decoder_layers encoder_layers decoder_layers "
    "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_experts "
    "n_routed_experts num_local_experts rotary_dim mamba_n_heads eos_token_id",
    2: "num_key_value_heads num_experts_per_tok depth linear_num_value_heads linear_num_key_heads",
    1: "n_group topk_group bos_token_id",
    0: "pad_token_id",
}
SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHATML) -> Any:
    """A fast tokenizer with one token per printable character and ChatML's special tokens."""
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *string.printable])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="<|im_end|>"
    )
    fast.chat_template = chat_template
    return fast


def tiny_model(
    folder: Path,
    family: str = "llama",
    seed: int = 0,
    *,
    dtype: torch.dtype = torch.float32,
    noise: float = 0.1,
    shard_size: str = "5GB",
    **config: Any,
) -> Path:
    """Save a random model with its tokenizer and return its folder.

    All seeds share one ancestor, and differ from it by `noise` relative to each tensor's spread, as fine-tunes
    do. Weights are wide enough that candidates score differently.
    """
    import transformers
    from transformers import AutoConfig, AutoModelForCausalLM

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    keys = {"bos_token_id": 1, "eos_token_id": 4, "initializer_range": 0.3, **FAMILIES[family], **config}
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **keys))
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                spread = parameter.std() if parameter.numel() > 1 and parameter.std() > 0 else 1.0
                parameter.add_(torch.randn_like(parameter) * noise * spread)
    model.to(dtype).save_pretrained(folder, max_shard_size=shard_size)
    tiny_tokenizer().save_pretrained(folder)
    transformers.logging.set_verbosity(level)
    return folder


def tiny_config(model_type: str, **keys: Any) -> Any:
    """A config of any of Transformers' types, of four layers (or what `keys` say) and a hundred tokens."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    return _shrunk(CONFIG_MAPPING[model_type], keys)


def _shrunk(kind: Any, keys: Mapping[str, Any]) -> Any:
    default = kind()
    small = {}
    for key, value in ((key, size) for size, keys_of_size in _TINY.items() for key in keys_of_size.split()):
        known = (
            hasattr(default, key)
            and key not in kind.attribute_map
            and not isinstance(getattr(kind, key, None), property)
        )
        if known and (getattr(default, key) is not None or key.endswith("_token_id")):
            small[key] = value
    for key in kind.sub_configs or ():
        part = getattr(default, key, None)
        if part is not None:
            small[key] = _shrunk(type(part), keys.get(key, {})).to_dict()
    return kind(**{**small, **{key: value for key, value in keys.items() if key not in (kind.sub_configs or ())}})


def tiny_of(
    folder: Path, model: type[Any], config: Any, seed: int = 0, noise: float = 0.1, tokenizer: bool = True
) -> Path:
    """Save a random model of a class of Transformers and return its folder; all seeds share one ancestor."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    with torch.random.fork_rng():
        torch.manual_seed(1234)
        module = model(config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for tensor in (*module.parameters(), *module.buffers()):
                if tensor.is_floating_point():
                    tensor.add_(torch.randn_like(tensor) * noise)
    module.save_pretrained(folder)
    if tokenizer:
        tiny_tokenizer().save_pretrained(folder)
    return folder


def tiny_adapter(
    folder: Path, base: Path, seed: int = 0, *, dtype: torch.dtype = torch.float32, spread: float = 0.05, **config: Any
) -> Path:
    """Save a random LoRA adapter of the model in `base` with PEFT, which has to be installed; returns its folder.

    `config` are keys of PEFT's LoraConfig. Everything that could be trained differs by `spread` from where it began.
    """
    import warnings

    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with warnings.catch_warnings(), torch.random.fork_rng():
        warnings.simplefilter("ignore")  # remarks on tied and saved embeddings, which are chosen on purpose
        torch.manual_seed(seed)
        model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), LoraConfig(**{"r": 4, **config}))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * spread)
        model.to(dtype).save_pretrained(folder)
    return folder


def write_dataset(path: Path, pairs: Sequence[tuple[str, str]]) -> Path:
    """Write questions and answers as a dataset of conversations."""
    items = [{"conversation": [{"from": "human", "value": q}, {"from": "gpt", "value": a}]} for q, a in pairs]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def sums(n: int, seed: int = 0) -> list[tuple[str, str]]:
    """Questions of one skill: additions of small numbers."""
    rows = torch.randint(0, 100, (n, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    return [(f"{a}+{b}=", str(a + b)) for a, b in rows]


def write_answers(path: Path, model: Path, n: int = 24) -> Path:
    """Write up to n questions whose right answers are two characters that `model` itself says, in float32."""
    from transformers import AutoModelForCausalLM

    from olmfast.config.datasets import DatasetConfig
    from olmfast.evaluation.encoding import load_datasets

    entries = {path.name: DatasetConfig(mode="exact_match", samples=10 * n)}
    module, tokenizer = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32), tiny_tokenizer()
    asked = sums(10 * n)
    write_dataset(path, asked)
    samples = load_datasets(path.parent, entries, tokenizer, 128)[path.name].samples
    found = []
    for (question, _), sample in zip(asked, samples, strict=True):
        ids = list(sample.prompt)
        for _ in range(2):
            ids.append(int(module(torch.tensor([ids])).logits[0, -1].argmax()))
        text = tokenizer.decode(ids[-2:])
        if len(text) == 2 and text.strip() == text:  # no special token, and nothing that a template would strip
            found.append((question, text))
    return write_dataset(path, found[:n])


def write_choices(path: Path, model: Path, n: int = 24) -> Path:
    """Write multiple-choice questions whose right answers are what `model` itself picks, in float32."""
    from transformers import AutoModelForCausalLM

    from olmfast.config.datasets import DatasetConfig
    from olmfast.evaluation.encoding import load_datasets

    items = [{"question": f"No. {i}", "choices": ["w", "x", "y", "z"], "answer": 0} for i in range(n)]
    path.write_text(json.dumps(items), encoding="utf-8")
    entries = {path.name: DatasetConfig(mode="choice")}
    # A model stored in bfloat16 would be run in it: rounded so coarsely that near ties are the processor's to decide.
    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    samples = load_datasets(path.parent, entries, tiny_tokenizer(), 128)[path.name].samples
    for item, sample in zip(items, samples, strict=True):
        logits = module(torch.tensor([sample.prompt])).logits[0, -1, list(sample.options)]
        item["answer"] = int(logits.argmax())
    path.write_text(json.dumps(items), encoding="utf-8")
    return path


def write_mmlu(folder: Path, subjects: Mapping[str, int], seed: int = 0) -> Path:
    """Write a folder in MMLU's form: subject -> number of questions, beside five worked examples of each."""
    import csv

    letters = torch.Generator().manual_seed(seed)
    for subject, n in subjects.items():
        for split, count in (("dev", 5), ("test", n)):
            path = folder / split / f"{subject}_{split}.csv"
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("w", newline="", encoding="utf-8") as file:
                for index in range(count):
                    a, b, right = torch.randint(1, 50, (3,), generator=letters).tolist()
                    options = [str(a + b + k) for k in range(4)]
                    csv.writer(file).writerow([f"{subject[-2:]} {index}: {a}+{b}?", *options, "ABCD"[right % 4]])
    return folder


def tiny_run(folder: Path, n_donors: int = 3, family: str = "llama", **keys: Any) -> Path:
    """A folder with donors, datasets and `cfg.yaml`, ready for `olmfast run`; returns the config's path.

    `keys` override those of the config; `model` holds keys for `tiny_model`.
    """
    import yaml

    model: Mapping[str, Any] = keys.pop("model", {})
    names = [f"donor{index}" for index in range(n_donors)]
    for seed, name in enumerate(names, 1):
        tiny_model(folder / "models" / name, family, seed, **model)
    write_dataset(folder / "sums.json", sums(6, 1))
    write_dataset(folder / "more.json", sums(6, 2))
    write_dataset(folder / "talk.json", [(f"Say {word}", word) for word in ("one", "two", "three")])
    write_dataset(folder / "heldout.json", sums(6, 3))
    config = {
        "models_dir": "models",
        "output_dir": "out",
        "models": names,
        "dataset": {
            "sums.json": {"mode": "exact_match"},
            "more.json": {"mode": "bigram_loss"},
            "talk.json": {"mode": "diversity", "max_new_tokens": 8},
        },
        "holdout": {"heldout.json": {"mode": "perplexity"}},
        "device": "cpu",
        **keys,
    }
    path = folder / "cfg.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path


SLERP: Mapping[str, Any] = {
    "merge_method": "slerp",
    "parameters": {"t": 0.5},
    "base_model": "a",
    "models": [{"model": "a"}, {"model": "b"}],
}


def tiny_pair(folder: Path) -> Path:
    """A folder with two models in bfloat16, `a` and `b`, a merge of them, `m.yml` (SLERP), a dataset `sums.json`, and
    `cfg.yaml`, a run that swaps their blocks; returns it."""
    import yaml

    for seed, name in enumerate("ab"):
        tiny_model(folder / name, "llama", seed, dtype=torch.bfloat16)
    (folder / "m.yml").write_text(yaml.safe_dump(dict(SLERP)), encoding="utf-8")
    write_dataset(folder / "sums.json", [("1+1=", "2"), ("1+2=", "3"), ("2+2=", "4")])
    config = {
        "models_dir": ".",
        "output_dir": "out",
        "models": ["a", "b"],
        "device": "cpu",
        "search": "stages",
        "scales": [],
        "candidates": ["swap"],
        "layer_swap": True,
        "dataset": {"sums.json": {"mode": "perplexity"}},
    }
    (folder / "cfg.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return folder


def own_answers(path: Path, model: Path, n: int, seed: int) -> Path:
    """Write n questions whose expected answers are what a model writes itself: it is the best donor there is."""
    from transformers import AutoModelForCausalLM

    from olmfast.config.datasets import DatasetConfig
    from olmfast.evaluation.encoding import load_datasets

    module = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    questions = [question for question, _ in sums(n, seed)]
    write_dataset(path, [(question, "12") for question in questions])
    entries = {path.name: DatasetConfig(mode="exact", samples=n)}
    samples = load_datasets(path.parent, entries, tiny_tokenizer(), 128)[path.name].samples
    ends = torch.tensor([len(sample.prompt) for sample in samples])
    ids = torch.zeros(n, int(ends.max()) + 3, dtype=torch.long)
    for row, sample in enumerate(samples):
        ids[row, : len(sample.prompt)] = torch.tensor(sample.prompt)
    every = torch.arange(n)
    with torch.no_grad():
        for step in range(3):  # what is behind a row's end has no effect on what is before it
            logits = module(ids).logits[every, ends + step - 1]
            logits[:, :5] = -torch.inf  # special tokens and what is no text
            ids[every, ends + step] = logits.argmax(dim=1)
    told = [tiny_tokenizer().decode(row[end : end + 3]).strip() for row, end in zip(ids, ends, strict=True)]
    return write_dataset(path, list(zip(questions, (text or "x" for text in told), strict=True)))


def skilled_run(
    folder: Path,
    n: int = 12,
    n_donors: int = 3,
    held_out: int = 0,
    noise: float = 0.2,
    mode: str = "exact_match",
    n_blocks: int = 2,
    **keys: Any,
) -> Path:
    """A pool in which each donor is best at a dataset of its own, and a config without a word of how to search."""
    import yaml

    config = tiny_run(folder, n_donors, model={"noise": noise, "num_hidden_layers": n_blocks})
    data = yaml.safe_load(config.read_text())
    data["dataset"], data["holdout"] = {}, {}
    for i, name in enumerate(data["models"]):
        own_answers(folder / f"skill{i}.json", folder / "models" / name, n, seed=i)
        data["dataset"][f"skill{i}.json"] = {"mode": mode}
        if held_out:
            own_answers(folder / f"held{i}.json", folder / "models" / name, held_out, seed=100 + i)
            data["holdout"][f"held{i}.json"] = {"mode": mode}
    config.write_text(yaml.safe_dump({**data, "samples": 1000, **keys}))
    return config


def long_record(folder: Path, n_steps: int, n_blocks: int = 24, n_candidates: int = 8) -> Path:
    """Write the record of a search by modules that took n steps, every third of which changed something."""
    from olmfast.search.log import STEPS, Change, Entry, Outcome, RunEntry, StepEntry, ValuesEntry, json_line, sealed
    from olmfast.weights.expressions import Copy, whole
    from olmfast.weights.recipe import Recipe

    donors, datasets = [f"donor{i}" for i in range(n_candidates)], [f"skill{i}.json" for i in range(4)]
    modules = ("self_attn.q_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj", "input_layernorm")
    tensors = [f"model.layers.{block}.{module}.weight" for block in range(n_blocks) for module in modules]
    noise = torch.rand(n_steps + 1, len(datasets), n_candidates, generator=torch.Generator().manual_seed(0)).tolist()

    def outcome(step: int) -> Outcome:
        metrics = {name: dict(zip(donors, own, strict=True)) for name, own in zip(datasets, noise[step], strict=True)}
        unit, changed = tensors[step % len(tensors)].removesuffix(".weight"), step % 3 == 0
        if not step:
            return Outcome("base", "model", donors[0], True, metrics)
        return Outcome("tensors", unit, donors[step % n_candidates], changed, metrics, gain=0.001 if changed else 0.0)

    def change(step: int) -> Change:
        if not step:
            return Change(whole(donors[0], tensors))
        name = tensors[step % len(tensors)]
        part = {name: Copy(donors[step % n_candidates], name)}
        return Change(None, Recipe(donors[0], part) if step % 3 == 0 else None)

    entries: list[Entry] = [RunEntry({"version": 1, "config": {"models": donors}, "donors": dict.fromkeys(donors, "")})]
    for step in range(n_steps):
        key = f"tensors/{step}" if step else "base"
        entries.append(StepEntry(key, outcome(step), (step + 1) * n_candidates, float(step), 0, change(step)))
    entries.append(ValuesEntry({"status": "finished"}))
    lines, seal = [], ""
    for entry in entries:
        line, seal = sealed(json_line(entry.to_json()), seal)
        lines.append(line)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / STEPS).write_bytes(b"".join(lines))
    return folder


def tree(folder: Path) -> dict[str, tuple[int, bytes]]:
    """All that is under a folder, links not followed: path -> mode, and the bytes of a file or the target of a link."""

    def held(path: Path) -> bytes:
        if path.is_symlink():
            return os.fsencode(os.readlink(path))
        return path.read_bytes() if path.is_file() else b""

    return {str(path.relative_to(folder)): (path.lstat().st_mode, held(path)) for path in sorted(folder.rglob("*"))}


# Pages as a browser shows them

_MEASURE = """<pre id="measured"></pre><script>
document.querySelectorAll("details").forEach(one => one.open = true);
const width = document.documentElement.clientWidth, cut = [];
const scrolls = e => e && (["auto", "scroll"].includes(getComputedStyle(e).overflowX) || scrolls(e.parentElement));
const told = e => e.tagName + "." + (e.getAttribute("class") || "") + ": " + e.textContent.trim().slice(0, 60);
document.querySelectorAll("main *").forEach(e => {
  const box = e.getBoundingClientRect(), frame = e.closest("svg");
  if (box.width === 0 || scrolls(e.parentElement)) return;
  if (box.left < -1 || box.right > width + 1) cut.push("beside the page: " + told(e));
  if (frame && e.tagName === "text") {
    const room = frame.getBoundingClientRect();
    const inside = box.left > room.left - 2 && box.right < room.right + 2;
    if (!inside || box.top < room.top - 2 || box.bottom > room.bottom + 2)
      cut.push("beside its picture: " + told(e));
  }
  if (["TH", "TD", "SUMMARY", "H1", "H2", "P"].includes(e.tagName) && e.scrollWidth > e.clientWidth + 1)
    cut.push("wider than its place: " + told(e));
});
if (document.documentElement.scrollWidth > width) cut.push("the page scrolls sideways");
const found = {cut, width, height: document.documentElement.scrollHeight};
document.getElementById("measured").textContent = JSON.stringify(found);
</script>"""


def find_chromium() -> str | None:
    """A Chromium: the environment variable OLMFAST_CHROMIUM, or what is installed; None where there is none."""
    import shutil

    names = ("chromium", "chromium-browser", "chromium-headless-shell", "google-chrome")
    return os.environ.get("OLMFAST_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


def opened(chromium: str, page: Path, width: int) -> dict[str, Any]:
    """A page opened so many pixels wide, everything unfolded: what of it is `cut`, its `width` and its `height`."""
    import html
    import re
    import tempfile

    text = re.sub(r'<meta http-equiv="Content-Security-Policy"[^>]*>', "", page.read_text(encoding="utf-8"))
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "page.html"
        copy.write_text(text.replace("</body>", f"{_MEASURE}</body>"), encoding="utf-8")
        shown = _chromium(chromium, folder, "--dump-dom", f"--window-size={width},1000", copy.as_uri())
    measured = re.search(r'<pre id="measured">(.*?)</pre>', shown, re.DOTALL)
    assert measured is not None, shown[-2000:]
    return dict(json.loads(html.unescape(measured[1])))


def photograph(chromium: str, page: Path, out: Path, width: int, height: int, dark: bool) -> None:
    """A PNG of the top of a page, in few colours: small enough to keep."""
    import tempfile

    from PIL import Image

    scheme = f"--blink-settings=preferredColorScheme={0 if dark else 1}"
    with tempfile.TemporaryDirectory() as folder:
        size = f"--window-size={width},{height}"
        _chromium(chromium, folder, scheme, size, f"--screenshot={folder}/page.png", page.absolute().as_uri())
        Image.open(f"{folder}/page.png").convert("RGB").quantize(96).save(out, optimize=True)


def _chromium(chromium: str, folder: str, *options: str) -> str:
    import subprocess

    quiet = ("--headless", "--disable-gpu", "--hide-scrollbars", "--no-sandbox", f"--user-data-dir={folder}/profile")
    done = subprocess.run([chromium, *quiet, *options], capture_output=True, text=True, timeout=120, check=True)
    return done.stdout
