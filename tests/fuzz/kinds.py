"""What is spoilt, and the commands that meet it: one function per kind of input.

Each is given a random generator and a `Place` with good input, changes some of it, and returns the command line.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from harness import Case
from malformed import as_text, spoil, spoil_bytes, spoil_file, value
from safetensors.torch import load_file, save_file

from olmfast import load_config, run
from olmfast.testing import tiny_run, write_dataset

FAMILIES = ("llama", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "mixtral")
MERGES: dict[str, dict[str, Any]] = {
    "linear": {
        "merge_method": "linear",
        "models": [
            {"model": "models/donor0", "parameters": {"weight": 0.4}},
            {"model": "models/donor1", "parameters": {"weight": [0.2, 0.8]}},
        ],
        "parameters": {"normalize": True, "int8_mask": True},
        "dtype": "float32",
    },
    "ties": {
        "merge_method": "ties",
        "base_model": "models/donor0",
        "models": [
            {"model": "models/donor0"},
            {
                "model": "models/donor1",
                "parameters": {"density": 0.5, "weight": [{"filter": "mlp", "value": 0.3}, {"value": 1}]},
            },
        ],
        "tokenizer": {
            "source": "union",
            "tokens": {"<s>": {"source": "models/donor1", "force": True}, "new": {"source": {"kind": "zero"}}},
            "pad_to_multiple_of": 8,
        },
    },
    "slices": {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": "models/donor0", "layer_range": [0, 2]}]},
            {"sources": [{"model": "models/donor1", "layer_range": [1, 2], "parameters": {"scale": 0.5}}]},
        ],
        "chat_template": "chatml",
        "out_dtype": "bfloat16",
    },
}
STAGES = {"search": "stages", "layer_swap": True, "candidates": ["swap", {"linear": [0.25]}]}
EVERY_KEY = {
    **STAGES,
    "base_model_name": "donor0",
    "boundary_select": True,
    "scales": ["model", "block"],
    "racing": {"rungs": [2, 4], "confidence": 0.9},
    "improve_all": "all",
    "markov": 1,
    "max_models": 2,
    "units": ["*.q_proj"],
    "selection": "copeland",
    "significance": 0.1,
    "tie_tolerance": 0.01,
    "validation": 0.2,
    "seed": 1,
    "scorer": "batched",
    "dtype": "float32",
    "batch_tokens": 64,
    "max_ram": "8GB",
    "budget": "3",
    "shard_size": "1MB",
    "forbid": "[a-c]",
    "template": "chatml",
    "max_new_tokens": 4,
    "samples": 3,
    "es_svd_sigma": 0.1,
    "metric_dir": "m",
}


@dataclass(frozen=True)
class Place:
    """A folder with good input: donors in models/, datasets, configs; `keys` are those of the run's config."""

    folder: Path
    keys: dict[str, Any]

    @property
    def config(self) -> Path:
        """The run's config."""
        return self.folder / "cfg.yaml"

    def donors(self, rng: random.Random) -> list[Path]:
        """One of the donors, or both: what is wrong with all of them is no difference between them."""
        both = [self.folder / "models" / name for name in ("donor0", "donor1")]
        return rng.choice([both, both, both[:1], both[1:]])

    def merge_file(self, data: Any) -> Path:
        """A merge file that holds this."""
        path = self.folder / "merge.yml"
        path.write_text(yaml.safe_dump(data, sort_keys=False))
        return path


def make_place(folder: Path, family: str = "llama") -> Place:
    """Good input of a family."""
    longer = {"model": {"max_position_embeddings": 512}} if family == "llama" else {}  # MMLU's prompts are long
    config = tiny_run(folder, 2, family, **STAGES, **longer)
    for path in (folder / "models").glob("*/generation_config.json"):
        path.write_text(json.dumps({"eos_token_id": [4, 2]}))
    write_dataset(folder / "more.json", [("1+1=", "2"), ("2+2=", "4"), ("3+3=", "6")])
    items = [{"question": "Which?", "choices": ["a", "b"], "answer": 1}, {"messages": _messages(), "id": 3}]
    (folder / "choice.json").write_text(json.dumps(items[:1] * 3))
    (folder / "lines.jsonl").write_text("\n".join(json.dumps(one) for one in items[1:] * 3))
    for part in ("dev", "test"):
        (folder / "mmlu" / part).mkdir(parents=True)
        rows = '"What, now?",a,b,"c, d",e,A\nWho?,a,b,c,d,D\n'
        (folder / "mmlu" / part / f"art_{part}.csv").write_text(rows)
    (folder / "alphas.json").write_text(json.dumps({"0": 0.5, "1": 0.25}))
    keys = yaml.safe_load(config.read_text())
    # Few questions, and no template of the model's where that is not what is spoilt: each is rendered in a process.
    keys |= {"dataset": {"more.json": {"mode": "bigram_loss"}}, "holdout": {}, "template": "chatml"}
    config.write_text(yaml.safe_dump(keys))
    return Place(folder, keys)


def _messages() -> list[dict[str, str]]:
    told = (("system", "Be brief."), ("user", "Say a."), ("assistant", "a"))
    return [{"role": role, "content": text} for role, text in told]


def _run(rng: random.Random, place: Place, named: Sequence[str]) -> Case:
    """One of the commands that read everything of a run and write nothing, seldom the run itself."""
    ways = [["run", "cfg.yaml", "--dry-run", "-q"], ["check", "cfg.yaml"], ["check", "cfg.yaml", "--json"]]
    if rng.random() > 0.02:
        return Case(rng.choice(ways), tuple(named))
    short = [
        "--set",
        "layer_swap=false",
        "--set",
        "base_select=true",
        "--set",
        "es_svd=false",
        "--set",
        "es_norm=false",
    ]
    arguments = ["run", "cfg.yaml", "-q", *short, "--set", "output_dir=out"]
    return Case(arguments, tuple(named), ("out",), lambda: _load(place.folder / "out"))


def _load(folder: Path) -> None:
    """Load a result as its users do."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    json.loads((folder / "config.json").read_text())
    AutoModelForCausalLM.from_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)


def run_config(rng: random.Random, place: Place) -> Case:
    """The run's YAML file."""
    data = {**place.keys, **EVERY_KEY} if rng.random() < 0.7 else dict(place.keys)
    if rng.random() < 0.2:
        data = {key: one for key, one in data.items() if key not in STAGES}
    place.config.write_text(json.dumps(data, indent=1) if rng.random() < 0.5 else yaml.safe_dump(data))
    spoil_file(rng, place.config, structured=rng.random() < 0.8, make=lambda it: as_text(rng, it)) if (
        place.config.read_bytes()[:1] == b"{"
    ) else spoil_file(rng, place.config, structured=False)
    return _run(rng, place, ("cfg.yaml", *_ANYWHERE))


_TENSORS = ("embed", "layers", "norm", "lm_head", "config.json", "Hugging Face's cache")
_ABSENT = "no such model folder"  # by the name that the file gives it
# A config leads anywhere: to a folder that is not there, a dataset that is another's, a device.
_ANYWHERE = (
    "device: ",
    "models",
    "donor",
    ".json",
    "output_dir",
    "out",
    "units: ",
    "max_ram",
    "max_vram",
    "dataset",
    "this config",
    "is where a disk is mounted",  # of output_dir: ../.., by the name of the folder that it leads to
    "File name too long",  # of which the beginning is quoted
    "is no folder of MMLU",  # of a dataset that is "", by the name of the folder
)


def merge_file(rng: random.Random, place: Place) -> Case:
    """A merge file."""
    path = place.merge_file(rng.choice(list(MERGES.values())))
    if rng.random() < 0.6:
        path.write_bytes(as_text(rng, spoil(rng, yaml.safe_load(path.read_text()))))
    else:
        spoil_file(rng, path, structured=False)
    return _merge(rng, place, ("merge.yml", "models", "donor", "tokenizer", "chat_template", *_TENSORS, _ABSENT))


def _merge(rng: random.Random, place: Place, named: Sequence[str], loads: Callable[[Path], None] | None = None) -> Case:
    if rng.random() < 0.3:
        return Case(["check", "merge.yml", *rng.choice(([], ["--json"]))], tuple(named))
    loads = loads or _load
    return Case(["merge", "merge.yml", "out"], tuple(named), ("out",), lambda: loads(place.folder / "out"))


LINEAR = ["linear", "--model_a", "models/donor0", "--model_b", "models/donor1", "--alpha", "0.5"]
COMMANDS: list[list[str]] = [
    ["run", "cfg.yaml", "--dry-run", "-q"],
    ["check", "cfg.yaml", "--device", "cpu", "--dtype", "float32", "--seed", "1", "--set", "budget=3", "--json"],
    ["check", "merge.yml", "--out", "out"],
    ["merge", "merge.yml", "out", "--device", "cpu", "--shard-size", "1MB", "--max-ram", "8GB", "--seed", "1"],
    ["merge", "merge.yml", "out", "--dry-run", "--json"],
    [*LINEAR, "--output_dir", "out", "--layers", "0", "1", "--qkv_only", "--device", "cpu"],
    [*LINEAR, "--output_dir", "out", "--layer_alphas", "alphas.json", "--method", "dare", "--density", "0.5"],
    [*LINEAR, "--output_dir", "out", "--no_special_fixes", "--seed", "3", "--json", "--overwrite"],
    ["check", *LINEAR, "--sensitivity", "more.json:exact_match", "--top", "1"],
    ["evaluate", "models/donor0", "--dataset", "more.json:exact_match", "--samples", "1", "--device", "cpu", "--json"],
    ["evaluate", "models/donor0", "--dataset", "more.json:perplexity", "--against", "models/donor1", "--samples", "2"],
    ["schema"],
    ["doctor", "--json"],
]
WORDS = ["cfg.yaml", "merge.yml", "models/donor0", "more.json", "nowhere", "-1", "0", "2", "--", "-", "", "--help"]


def command_line(rng: random.Random, place: Place) -> Case:
    """The words of a command line."""
    place.merge_file(MERGES["linear"])
    words = list(rng.choice(COMMANDS))
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(1, len(words)) if len(words) > 1 else 0
        how, word = rng.randrange(6), _word(rng)
        if how == 0:
            del words[at]
        elif how == 1:
            words.insert(at, words[rng.randrange(len(words))])
        elif how == 2:
            words.insert(at, word)
        elif how == 3:
            words[at] = words[at][: rng.randrange(len(words[at]) + 1)] + word[:3]
        else:
            words[at] = word
        words = words or ["run"]
    # Nothing can be named that is not there, and what an option means is in what it refuses.
    words = [word.replace("\0", "") for word in words]
    if words[0] == "run" and "--dry-run" not in words:
        words.append("--dry-run")
    # An output may be any word, in folders that it makes; what was there before is none.
    tops = {word.split("/")[0] for word in words}
    new = [top for top in sorted(tops) if top and not os.path.lexists(place.folder / top)]
    return Case(words, ("",), ("out", "merged_models", *new))


def _word(rng: random.Random) -> str:
    if rng.random() < 0.4:
        return rng.choice(WORDS)
    held = value(rng)
    return held if isinstance(held, str) else json.dumps(held)[:500]


DATASETS = {
    "more.json": ("exact_match", "bigram_loss", "diversity", "quality", "perplexity"),
    "choice.json": ("choice",),
    "lines.jsonl": ("exact", "perplexity"),
    "mmlu/test/art_test.csv": ("choice",),
}


def dataset(rng: random.Random, place: Place) -> Case:
    """A dataset: conversations, lines, choices, MMLU's tables."""
    name = rng.choice(list(DATASETS))
    path = place.folder / name
    if name.endswith(".csv") and rng.random() < 0.4:
        path = place.folder / "mmlu" / "dev" / "art_dev.csv"
    if name.endswith(".jsonl") and rng.random() < 0.6:
        lines = path.read_text().split("\n")
        at = rng.randrange(len(lines))
        lines[at] = as_text(rng, spoil(rng, json.loads(lines[at]))).decode("utf-8", "surrogatepass")
        path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    else:
        spoil_file(rng, path, structured=name.endswith(".json"))
    mode = rng.choice(DATASETS[name])
    if rng.random() < 0.15:
        arguments = ["evaluate", "models/donor0", "--dataset", f"{name}:{mode}", "--max-new-tokens", "4"]
        return Case([*arguments, "--samples", "2", "--device", "cpu"], (path.name,))
    entry = {"mode": mode, "max_new_tokens": 4, "samples": rng.choice((1, 2, 200)), "think": rng.random() < 0.8}
    entry |= {"template": rng.choice(("auto", "raw", "chatml"))}
    place.config.write_text(yaml.safe_dump({**place.keys, "dataset": {name: entry}}))
    return _run(rng, place, (path.name,))


TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json", "chat_template.jinja")
TEMPLATES = [
    "{{ messages[9].content }}", "{{ 1/0 }}", "{{ raise_exception('no') }}", "{% for", "{{ messages | nofilter }}",
    "{{ ''.__class__ }}", "{{ [1] | sum(start='') }}", "{{ 'a' * 10**9 }}", "{{ 'a' * 10**12 }}", "{{ 9 ** (9 ** 9) }}",
    "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "{{ messages + 1 }}",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "{% include 'x' %}", "{{ None.x.y }}", "", "{{ '\ud800' }}",
    "{{ messages | tojson }}", "{{ messages[0]['content'] }}", "{{ lipsum(n=10**6) }}", "{{ 5 | round(method=1) }}",
]  # fmt: skip


def tokenizer(rng: random.Random, place: Place) -> Case:
    """The files that make up a tokenizer, chat template and generation config included."""
    name = rng.choice(TOKENIZER_FILES)
    for donor in place.donors(rng):
        again = random.Random(rng.random())
        if name == "chat_template.jinja" and again.random() < 0.7:
            slow = again.random() < 0.02
            text = again.choice([one for one in TEMPLATES if slow or "99999" not in one])
            (donor / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        elif name == "tokenizer.json" and again.random() < 0.5:
            data = json.loads((donor / name).read_bytes())
            held = data["model"]["vocab"]  # most places of the file: left out, so that the others get a turn
            data["model"]["vocab"] = {"a": 0, "b": 1}
            data = spoil(again, data)
            if isinstance(data, dict) and isinstance(data.get("model"), dict) and again.random() < 0.8:
                data["model"]["vocab"] = held
            (donor / name).write_bytes(as_text(again, data))
        else:
            spoil_file(again, donor / name, structured=name.endswith(".json"))
    named = (name, "tokenizer", "donor0", "donor1", "chat template")
    place.config.write_text(yaml.safe_dump({**place.keys, "template": "auto"}))
    how = rng.random()
    if how < 0.5:
        return _run(rng, place, (*named, *place.keys["dataset"], *place.keys["holdout"]))
    if how < 0.75:
        template = rng.choice(({"chat_template": "auto"}, {"chat_template": "models/donor1"}, {}))
        place.merge_file({**MERGES["ties"], **template})
        return Case(["merge", "merge.yml", "out"], named, ("out",), lambda: _whole(place.folder / "out"))
    out = ("out",)
    return Case([*LINEAR, "--output_dir", "out"], named, out, lambda: _whole(place.folder / "out"))


def _whole(folder: Path) -> None:
    """Load the weights of a result whose other files may be as bad as those that it was given."""
    load_file(folder / "model.safetensors")
    for path in folder.glob("*.json"):
        json.loads(path.read_text())


def model_config(rng: random.Random, place: Place) -> Case:
    """config.json: what it says of sizes, of parts, of numbers; what passes the check is scored."""
    seed = rng.random()
    for donor in place.donors(rng):
        spoil_file(random.Random(seed), donor / "config.json")
    named = ("config.json", "donor0", "donor1")
    how = rng.random()
    if how < 0.12:
        arguments = ["evaluate", "models/donor0", "--dataset", "more.json:exact_match", "--samples", "1"]
        return Case([*arguments, "--device", "cpu"], named)
    if how < 0.3:
        place.merge_file(MERGES["linear"])
        return _merge(rng, place, named, _whole)
    return _run(rng, place, (*named, "max_ram", "longer than the model's context"))


def weights(rng: random.Random, place: Place) -> Case:
    """The headers of safetensors files, and their index."""
    for donor in place.donors(rng):
        path = donor / "model.safetensors"
        if rng.random() < 0.4:
            _shard(donor)
            spoil_file(rng, donor / "model.safetensors.index.json")
            continue
        content = path.read_bytes()
        (length,) = struct.unpack("<Q", content[:8])
        header, data = content[8 : 8 + length], content[8 + length :]
        how = rng.random()
        if how < 0.05:
            spoil_file(rng, path, structured=False)
            continue
        if how < 0.5:
            header = as_text(rng, spoil(rng, json.loads(header)))
        elif how < 0.8:
            header = spoil_bytes(rng, header)
        length = len(header) if rng.random() < 0.8 else rng.choice((0, 1, length + 1, 2**31, 2**63, 2**64 - 1))
        data = data if rng.random() < 0.8 else spoil_bytes(rng, data)
        path.write_bytes(struct.pack("<Q", length) + header + data)
    named = ("model.safetensors", "donor0", "donor1", "tensors", "model.")
    if rng.random() < 0.6:
        return _run(rng, place, named)
    place.merge_file(MERGES["linear"])
    return _merge(rng, place, named)


def _shard(donor: Path) -> None:
    """The donor's weights in two files with an index."""
    tensors = load_file(donor / "model.safetensors")
    names = sorted(tensors)
    files = {f"model-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, held in files.items():
        save_file({name: tensors[name] for name in held}, donor / file, metadata={"format": "pt"})
    weight_map = {name: file for file, held in files.items() for name in held}
    (donor / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (donor / "model.safetensors").unlink()


def report(rng: random.Random, place: Place) -> Case:
    """What a run that is resumed finds: the log of its steps, or the report of the original tool."""
    keys = {key: one for key, one in place.keys.items() if key != "holdout"}
    place.config.write_text(yaml.safe_dump(keys))
    out = place.folder / "out"
    if rng.random() < 0.4:
        out.mkdir()
        data = {
            "base_model": {"name": "donor1", "metrics": {"sums.json": 0.5}},
            "boundary_layers": {"name": "donor0", "metrics": {}},
            "layers": {"1": {"metrics": {}, "best_model": "donor1"}},
            "tensors": {"model.layers.0.mlp.up_proj": {"metrics": {}, "best_model": "donor0"}},
        }
        (out / "merge_report.json").write_text(json.dumps(data))
        spoil_file(rng, out / "merge_report.json")
        named = ("merge_report.json", "cannot be resumed", "nothing to resume")
    else:
        partial = shutil.copytree(place.folder / "unfinished", place.folder / "out.partial")
        log = partial / "steps.jsonl"
        if rng.random() < 0.6:
            lines = log.read_text().split("\n")[:-1]
            at = rng.randrange(len(lines))
            lines[at] = as_text(rng, spoil(rng, json.loads(lines[at]))).decode("utf-8", "surrogatepass")
            log.write_bytes("\n".join([*lines, ""]).replace("\n ", " ").encode("utf-8", "surrogatepass"))
        else:
            spoil_file(rng, rng.choice((log, partial / "evaluations.jsonl")), structured=False)
        named = ("steps.jsonl", "cannot be resumed", "evaluations.jsonl", "nothing to resume", "unfinished run")
    written = ("out", "out.partial", "out.original")
    return Case(["run", "cfg.yaml", "-q", "--resume"], named, written, lambda: _load(out))


def good_cases(place: Place) -> list[list[str]]:
    """Command lines that everything that is not spoilt is accepted by; they load what loads only once, too."""
    place.merge_file(MERGES["linear"])
    return [*COMMANDS, ["run", "cfg.yaml", "-q", "--set", "output_dir=tried"]]


def make_unfinished(place: Place) -> None:
    """A run that was stopped after some steps, in unfinished/."""
    keys = {key: one for key, one in place.keys.items() if key != "holdout"}
    place.config.write_text(yaml.safe_dump(keys))
    config = load_config(place.config)
    stops = iter([False, False, True])
    try:
        run(config, stop_requested=lambda: next(stops, True))
    except Exception as error:
        assert "resume" in str(error)  # noqa: PT017
    (place.folder / "out.partial").rename(place.folder / "unfinished")


Kind = Callable[[random.Random, Place], Case]
KINDS: dict[str, Kind] = {
    "run config": run_config,
    "merge file": merge_file,
    "command line": command_line,
    "dataset": dataset,
    "tokenizer": tokenizer,
    "config.json": model_config,
    "weights": weights,
    "report": report,
}
