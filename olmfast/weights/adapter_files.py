"""What a folder that PEFT has saved holds: the keys of adapter_config.json that count, and the tensors by module."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from sys import float_info
from typing import Any

from olmfast.errors import InputError, show
from olmfast.weights.checkpoint import ADAPTER_CONFIG, TensorInfo, read_header, read_json
from olmfast.weights.wrappers import own_names

PREFIX = "base_model.model."  # of every name in an adapter's file

# Keys of adapter_config.json that say how it was trained or where it was put in; what it holds tells that here.
WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",  # trained biases lie in the file
    "corda_config",
    "ephemeral_gpu_offload",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_bias",  # so do these
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
READ = {
    "alpha_pattern",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "target_parameters",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}
# Ways to begin that leave the base as it is; others train against a base that they have changed.
HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<leaf>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")


@dataclass
class AdapterWeights:
    """What an adapter's file holds, by module (`model.layers.0.mlp.up_proj`) or parameter (`lm_head.weight`)."""

    low_rank: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    rows: dict[str, TensorInfo] = field(default_factory=dict)
    whole: dict[str, TensorInfo] = field(default_factory=dict)

    def parameters(self) -> list[str]:
        """Every parameter that it changes."""
        changed = [f"{module}.weight" for module in (*self.low_rank, *self.rows)]
        changed += [f"{module}.bias" for module, parts in self.low_rank.items() if "lora_B.bias" in parts]
        return list(dict.fromkeys([*changed, *self.whole]))


def read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises InputError, naming them, for kinds of adapters and options that are not supported."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file() and (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: is a model, not a LoRA adapter; behind a '+' stands a folder with {ADAPTER_CONFIG}"
        )
    if not path.is_file():
        raise InputError(f"{folder}: no {ADAPTER_CONFIG} in this folder; expected a LoRA adapter that PEFT has saved")
    settings = read_json(path)
    kind = settings.get("peft_type")
    if kind is None:
        advice = "; mlx_lm.fuse makes a model of an adapter of MLX" if "lora_parameters" in settings else ""
        raise InputError(f"{path}: has no peft_type, so that it is no adapter that PEFT has saved{advice}")
    if kind != "LORA":
        raise InputError(f"{path}: peft_type {kind!r} is not supported, only LORA; merge it with PEFT first")
    faults = [
        f"{path}: {key}: not supported, got {value!r}; merge it with PEFT first"
        for key, value in settings.items()
        if value and key not in WITHOUT_EFFECT | READ
    ]
    start = settings.get("init_lora_weights")
    if start not in HARMLESS_STARTS:
        faults.append(
            f"{path}: init_lora_weights {start!r}: was trained against a base that it has changed; save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    targets = settings.get("target_parameters")
    if targets is not None and not (isinstance(targets, list) and all(isinstance(one, str) for one in targets)):
        faults.append(f"{path}: target_parameters: expected a list of names, got {show(targets)}")
    faults += [f"{path}: {fault}" for fault in _number_faults(settings)]
    if faults:
        raise InputError("\n".join(faults))
    return settings


def _number_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the ranks, which are divided by, and the alphas, which need only be finite."""
    for key, patterns, is_rank in (("r", "rank_pattern", True), ("lora_alpha", "alpha_pattern", False)):
        given = settings.get(patterns) or {}
        if not isinstance(given, dict):
            yield f"{patterns}: expected a mapping, got {given!r}"
            given = {}
        values = {key: settings.get(key), **{f"{patterns}: {name!r}": one for name, one in given.items()}}
        for where, value in values.items():
            kinds = (int,) if is_rank else (int, float)
            if type(value) not in kinds or not abs(value) <= float_info.max or (is_rank and value < 1):
                wanted = "a whole number from 1" if is_rank else "a number"
                yield f"{where}: expected {wanted}, got {show(value)}"


def read_weights(path: Path) -> AdapterWeights:
    """What the adapter's file holds. Raises InputError for a file that is missing, or names of no LoRA."""
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        advice = "only pickled weights, which can run code" if pickled else "download it again"
        advice += "; if its repository has only a .bin file, load it with PEFT and save_pretrained it"
        raise InputError(f"{path.parent}: no {path.name} in this folder; {advice}")
    held, faults, infos = AdapterWeights(), list[str](), read_header(path)
    own = own_names([info.name for info in infos], str(path), "front")
    for info in infos:
        name = own[info.name].removeprefix(PREFIX)
        if ".original_module." in name:
            continue  # the base's, which old versions of PEFT saved as well
        if found := _PART.fullmatch(name):
            part = found["part"] + (".bias" if found["leaf"] == "bias" else "")
            parts = held.low_rank.setdefault(found["module"], {})
            if part in parts:
                faults.append(f"{path}: {info.name}: {part} of this module is there twice: more than one adapter")
            parts[part] = info
        elif found := _TOKENS.fullmatch(name):
            held.rows[found["module"]] = info
        elif re.search(r"\.lora_\w+", name):
            faults.append(f"{path}: {info.name}: not supported; merge the adapter with PEFT first")
        else:
            held.whole[re.sub(r"\.base_layer\.|\.modules_to_save\.(default\.)?", ".", name)] = info
    if not faults and not held.parameters():
        faults.append(f"{path}: holds no tensors")
    if faults:
        raise InputError("\n".join(faults))
    return held
