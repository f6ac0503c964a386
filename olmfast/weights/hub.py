"""Models and adapters by Hub id or path: where they are on this machine; missing Hub models are downloaded."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from olmfast.errors import InputError, cut, told
from olmfast.weights.checkpoint import ADAPTER_CONFIG, missing_files, read_header

DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
ADAPTER_WEIGHTS = "adapter_model.safetensors"
ADAPTER = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)  # the files of an adapter; an adapter's repository may hold others' too
OF_ADAPTERS = [
    *ADAPTER,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "*.jinja",
]


def parts_of(name: str, models_dir: Path, folder: Path) -> list[str]:
    """The model and the adapters that `model+adapter` names; a `+` in an existing folder's name is part of it."""
    pieces = name.split("+")
    found = []
    while pieces:
        n = next((n for n in range(len(pieces), 1, -1) if folders_of("+".join(pieces[:n]), models_dir, folder)), 1)
        found.append("+".join(pieces[:n]))
        pieces = pieces[n:]
    return found


def common_model(names: Sequence[str], models_dir: Path, folder: Path) -> str | None:
    """The model of which all of these names are adapters, or it; None if there is no such model."""
    parts = [parts_of(name, models_dir, folder) for name in names]
    models = {first for first, *_ in parts}
    return models.pop() if len(models) == 1 and max(map(len, parts)) > 1 else None


def folders_of(name: str, models_dir: Path, folder: Path) -> list[Path]:
    """The folders that a name may mean: where a hub id is stored, then paths."""
    places = (models_dir / name.replace("/", "_"), models_dir / name, folder / os.path.expanduser(name))
    return [place for place in dict.fromkeys(places) if os.path.isdir(place)]


def resolve(name: str, models_dir: Path, folder: Path, download: bool = True, of: Sequence[str] = ()) -> Path:
    """The folder of a model named by hub id or path; hub ids lie at `models_dir/<id with "/" as "_">`.

    Missing Hub models are downloaded and interrupted downloads continued; without `download` they are taken from
    Hugging Face's cache on this machine. `of` are the files of what is looked for, if that is no model.
    Raises InputError if the model cannot be found.
    """
    stored = models_dir / name.replace("/", "_")
    if os.path.isdir(stored) and not _unfinished(stored, of):
        return stored
    for candidate in folders_of(name, models_dir, folder):
        if candidate != stored:
            return candidate
    for candidate in (models_dir / name, folder / os.path.expanduser(name)):
        if os.path.isfile(candidate):
            raise InputError(f"{candidate}: is a file; name the folder that it lies in, with its config.json")
    if address := re.match(r"(?:https?://)?(?:www\.)?(?:huggingface|hf)\.co/([\w-][\w.-]*/[\w.-]+)", name):
        raise InputError(f"{cut(name)}: is an address; name the model {address[1]}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@.+)?", name):
        if os.path.isdir(stored):
            return stored  # unfinished, and no hub id: opening it names what is missing
        places = " and ".join(dict.fromkeys([str(models_dir), str(folder)]))
        raise InputError(f"{cut(name)}: no such {'adapter' if of else 'model'} folder; looked in {places}")
    return _download(name, stored, of) if download else _cached(name, stored)


def _cached(name: str, stored: Path) -> Path:
    """Where Hugging Face's cache has a model. Raises InputError if it does not; no network is used."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    there = stored.parent if (stored.parent / f"models--{repository.replace('/', '--')}").is_dir() else None
    try:
        how = {"revision": revision or None, "cache_dir": there}  # None: where the cache is by default
        return Path(snapshot_download(repository, **how, local_files_only=True))
    except Exception as error:  # the hub client raises many unrelated types
        raise InputError(
            f"{name}: neither at {stored} nor in Hugging Face's cache ({type(error).__name__}), and merging uses no "
            f"network; get it with: hf download {repository}{f' --revision {revision}' if revision else ''}"
        ) from error


def _marker(target: Path) -> Path:
    """A file next to a folder that is being downloaded; it stays there when the download is interrupted."""
    return target.with_name(f"{target.name}.incomplete")


def _unfinished(folder: Path, of: Sequence[str] = ()) -> list[str]:
    """Names of files that an interrupted download left out, cut off, or was busy with."""
    if list(folder.glob("*.bin")):
        return []
    marks = [_marker(folder), *folder.glob(".cache/huggingface/download/**/*.incomplete")]
    return [*_unusable(folder, of), *(mark.name for mark in marks if os.path.isfile(mark))]


def _unusable(folder: Path, of: Sequence[str] = ()) -> list[str]:
    """Names of files that are missing or cut off."""
    try:
        unusable = missing_files(folder, of)
    except InputError:
        return ["model.safetensors.index.json"]
    for path in sorted(folder.glob("model*.safetensors") if not of else folder.glob(ADAPTER_WEIGHTS)):
        try:
            read_header(path)
        except InputError:
            unusable.append(path.name)
    return unusable


def _download(name: str, target: Path, of: Sequence[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    repository, _, revision = name.partition("@")
    marker, hub_notes = _marker(target), target / ".cache" / "huggingface" / "download"
    try:
        # Asked first: without a network, the download itself would accept the files it already has.
        found = HfApi().model_info(repository, revision=revision or None)
        target.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        for file in _unusable(target, of):
            (hub_notes / f"{file}.metadata").unlink(missing_ok=True)  # else a truncated file would count as complete
        snapshot_download(
            repository,
            revision=found.sha,
            local_dir=target,
            allow_patterns=OF_ADAPTERS if of else DOWNLOADED,
            ignore_patterns=["original/*", "consolidated*", "*.bin.index.json"],
        )
    except Exception as error:  # the hub client and its transport raise many unrelated types
        reason = told(str(error).strip().split("\n")[0] or type(error).__name__)
        missing = f" (unfinished: {', '.join(_unfinished(target, of))})" if os.path.isdir(target) else ""
        raise InputError(
            f"{name}: not in {target.parent} and could not be downloaded{missing}: {reason}; "
            f"check the name and the network, or put the {'adapter' if of else 'model'} at {target}"
        ) from error
    for mark in (marker, *hub_notes.glob("**/*.incomplete")):
        mark.unlink(missing_ok=True)
    return target
