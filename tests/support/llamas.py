"""Merges of two Llamas, which the fixture `llamas` makes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import load_file

from olmfast.config.mergekit import load_merge_config
from olmfast.static.write import Written, merge

OPTIONS = ("overwrite", "allow_nonfinite", "shard_size", "seed", "max_ram")


def merged(place: Path, method: str = "linear", names: str = "ab", **keys: Any) -> Written:
    options = {key: keys.pop(key) for key in OPTIONS if key in keys}
    if "slices" not in keys:
        keys.setdefault("models", [{"model": name} for name in names])
    if method == "linear":
        keys.setdefault("parameters", {"weight": 0.5})
    path = place / "m.yml"
    path.write_text(yaml.safe_dump({"merge_method": method, **keys}))
    return merge(load_merge_config(path), place / "out", **options)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}
