"""Models by Hub id or path: where they are on this machine; missing Hub models are downloaded."""

from __future__ import annotations

import os
import re
from pathlib import Path

from olmfast.errors import InputError
from olmfast.weights.checkpoint import missing_files, read_header

DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]


def resolve(name: str, models_dir: Path, folder: Path, download: bool = True) -> Path:
    """The folder of a model named by hub id or path; hub ids lie at `models_dir/<id with "/" as "_">`.

    Missing Hub models are downloaded and interrupted downloads continued; without `download` they are taken from
    Hugging Face's cache on this machine.
    Raises InputError if the model cannot be found.
    """
    stored = models_dir / name.replace("/", "_")
    if stored.is_dir() and not _unfinished(stored):
        return stored
    for candidate in (models_dir / name, folder / os.path.expanduser(name)):
        if candidate.is_dir() and candidate != stored:
            return candidate
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(@.+)?", name):
        if stored.is_dir():
            return stored  # unfinished, and no hub id: opening it names what is missing
        places = " and ".join(dict.fromkeys([str(models_dir), str(folder)]))
        raise InputError(f"{name}: no such model folder; looked in {places}")
    return _download(name, stored) if download else _cached(name, stored)


def _cached(name: str, stored: Path) -> Path:
    """Where Hugging Face's cache has a model. Raises InputError if it does not; no network is used."""
    from huggingface_hub import snapshot_download

    repository, _, revision = name.partition("@")
    try:
        return Path(snapshot_download(repository, revision=revision or None, local_files_only=True))
    except Exception as error:  # the hub client raises many unrelated types
        raise InputError(
            f"{name}: neither at {stored} nor in Hugging Face's cache ({type(error).__name__}), and merging uses no "
            f"network; get it with: hf download {repository}{f' --revision {revision}' if revision else ''}"
        ) from error


def _marker(target: Path) -> Path:
    """A file next to a folder that is being downloaded; it stays there when the download is interrupted."""
    return target.with_name(f"{target.name}.incomplete")


def _unfinished(folder: Path) -> list[str]:
    """Names of files that an interrupted download left out, cut off, or was busy with."""
    if list(folder.glob("*.bin")):
        return []
    marks = [_marker(folder), *folder.glob(".cache/huggingface/download/**/*.incomplete")]
    return [*_unusable(folder), *(mark.name for mark in marks if mark.is_file())]


def _unusable(folder: Path) -> list[str]:
    """Names of files that are missing or cut off."""
    try:
        unusable = missing_files(folder)
    except InputError:
        return ["model.safetensors.index.json"]
    for path in sorted(folder.glob("model*.safetensors")):
        try:
            read_header(path)
        except InputError:
            unusable.append(path.name)
    return unusable


def _download(name: str, target: Path) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    repository, _, revision = name.partition("@")
    marker, hub_notes = _marker(target), target / ".cache" / "huggingface" / "download"
    try:
        # Asked first: without a network, the download itself would accept the files it already has.
        found = HfApi().model_info(repository, revision=revision or None)
        target.parent.mkdir(parents=True, exist_ok=True)
        marker.touch()
        for file in _unusable(target):
            (hub_notes / f"{file}.metadata").unlink(missing_ok=True)  # else a truncated file would count as complete
        snapshot_download(
            repository,
            revision=found.sha,
            local_dir=target,
            allow_patterns=DOWNLOADED,
            ignore_patterns=["original/*", "consolidated*", "*.bin.index.json"],
        )
    except Exception as error:  # the hub client and its transport raise many unrelated types
        lines = str(error).strip().splitlines()
        reason = lines[0] if lines else type(error).__name__
        missing = f" (unfinished: {', '.join(_unfinished(target))})" if target.is_dir() else ""
        raise InputError(
            f"{name}: not in {target.parent} and could not be downloaded{missing}: {reason}; "
            f"check the name and the network, or put the model at {target}"
        ) from error
    for mark in (marker, *hub_notes.glob("**/*.incomplete")):
        mark.unlink(missing_ok=True)
    return target
