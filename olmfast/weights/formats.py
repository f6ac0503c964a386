"""What a folder without weights that can be read holds instead, and what to do about it."""

from __future__ import annotations

import re
from pathlib import Path

# What files look like -> what is said of the first of them.
_OTHERS = (
    (r".*-\d+-of-\d+\.safetensors", "shards need their index: download model.safetensors.index.json too"),
    (r"consolidated.*\.safetensors", "weights in their authors' own format: take those for Transformers"),
    (r".*\.safetensors", "rename it to model.safetensors if it is the whole model"),
    (r".*\.gguf", "GGUF files are not read: take the model that they were made from"),
    (r"zero_to_fp32\.py", "a DeepSpeed checkpoint; zero_to_fp32.py --safe_serialization makes a model of it"),
    (r".*\.distcp", "a distributed checkpoint; save_pretrained of what trained it makes a model of it"),
    (r".*\.(msgpack|h5|onnx|ckpt|keras)", "weights of another framework; convert them with Transformers"),
)


def instead(folder: Path) -> str:
    """A clause that names what is there; empty if it is nothing known."""
    names = sorted(path.name for path in folder.iterdir())
    for pattern, advice in _OTHERS:
        if found := [name for name in names if re.fullmatch(pattern, name)]:
            return f", but {found[0]}; {advice}"
    below = sorted(folder.glob("*/model.safetensors"))
    return f", but {below[0].relative_to(folder)}; name that folder" if below else ""
