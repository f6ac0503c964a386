"""Two small models of any type of Transformers, and merges of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file

from olmfast.config.mergekit import load_merge_config
from olmfast.static.write import Written, merge
from olmfast.testing import tiny_config, tiny_of


def pair(place: Path, kind: str, model: str, keys: dict[str, Any] | None = None) -> None:
    """Two models of a type, a and b."""
    config = tiny_config(kind, **(keys or {}))
    for seed, name in enumerate("ab"):
        tiny_of(place / name, getattr(transformers, model), config, seed)


def merged(place: Path, method: str = "linear", allow: tuple[str, ...] = (), **keys: Any) -> Written:
    if "slices" not in keys:
        keys.setdefault("models", [{"model": "a"}, {"model": "b"}])
    if method == "linear":
        keys.setdefault("parameters", {"weight": 0.5})
    (place / "m.yml").write_text(json.dumps({"merge_method": method, **keys}))
    return merge(load_merge_config(place / "m.yml"), place / "out", allow_mismatch=allow)


def merged_by(place: Path, text: str, **options: Any) -> Written:
    """What a merge file of this text makes."""
    (place / "m.yml").write_text(text)
    return merge(load_merge_config(place / "m.yml"), place / "out", **options)


def stacked(place: Path, *parts: tuple[str, int, int], **keys: Any) -> Written:
    slices = [{"sources": [{"model": model, "layer_range": [begin, end]}]} for model, begin, end in parts]
    return merged(place, "passthrough", slices=slices, **keys)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def save(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def edit(folder: Path, **keys: Any) -> None:
    """Keys of config.json; None removes one."""
    held = {**config_of(folder), **keys}
    (folder / "config.json").write_text(json.dumps({key: value for key, value in held.items() if value is not None}))


def loaded(folder: Path, model: str) -> Any:
    found, info = getattr(transformers, model).from_pretrained(folder, output_loading_info=True, dtype=torch.float64)
    assert not any(info.values()), info
    return found.eval()
