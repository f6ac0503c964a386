"""The files beside weights, config.json and tokenizer that make a model folder whole: processor, code, parts of
sentence-transformers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from olmfast.weights.checkpoint import Checkpoint, is_own_file, read_json
from olmfast.weights.files import read_text

# What prepares images, sound and video, and what sentence-transformers reads.
PROCESSOR = (
    "*processor_config.json",
    "*feature_extractor_config.json",
    "modules.json",
    "config_sentence_transformers.json",
    "sentence_*_config.json",
)
CODE = "*.py"
CONFIGURATIONS = ("config.json", "tokenizer_config.json", "preprocessor_config.json", "processor_config.json")
_PLAIN = (".json", ".safetensors", ".txt", ".model")


def files_beside(base: Checkpoint, code: bool = True) -> dict[str, Path]:
    """Name in the result -> the base's file that is copied there, beside weights, config and the tokenizer's files.

    `code`: with the Python files that `auto_map` in a configuration names. They are copied, never run. Raises
    InputError for a link that leads out of the model.
    """
    patterns = (*PROCESSOR, CODE) if code and auto_maps(base) else PROCESSOR
    found = {path.name: path for pattern in patterns for path in base.folder.glob(pattern)}
    found |= dict(_parts_of_sentence_transformers(base.folder))
    return {name: path for name, path in sorted(found.items()) if is_own_file(path)}


def auto_maps(model: Checkpoint) -> list[str]:
    """The files of a model whose `auto_map` names code of its own."""
    return [
        name
        for name in CONFIGURATIONS
        if (model.folder / name).is_file() and "auto_map" in read_json(model.folder / name)
    ]


def texts_without_code(base: Checkpoint, tokenizer: Checkpoint, texts: Mapping[str, str]) -> dict[str, str]:
    """File name -> text of the files that would name code that is left out; `texts` are those changed already."""
    places = {name: base.folder / name for name in files_beside(base, code=False)}
    places |= {name: tokenizer.companion(name) for name in tokenizer.companions}
    changed = {}
    for name, path in places.items():
        if name in CONFIGURATIONS and "auto_map" in (texts.get(name) or read_text(path)):
            held: dict[str, Any] = json.loads(texts[name]) if name in texts else read_json(path)
            held.pop("auto_map", None)
            changed[name] = json.dumps(held, ensure_ascii=False, indent=2) + "\n"
    return changed


def _parts_of_sentence_transformers(folder: Path) -> Iterator[tuple[str, Path]]:
    """The files in the folders that modules.json lists (1_Pooling, 2_Dense), but for pickles."""
    try:
        modules = json.loads((folder / "modules.json").read_text(encoding="utf-8"))
        paths = [PurePosixPath(str(module["path"])) for module in modules if module["path"]]
    except (OSError, ValueError, TypeError, KeyError):
        return
    for path in paths:
        if not path.is_absolute() and ".." not in path.parts:
            for file in (folder / path).glob("*"):
                if file.is_file() and file.suffix in _PLAIN:
                    yield (path / file.name).as_posix(), file
