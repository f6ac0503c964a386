"""A run's donors where a worker is: at the same paths, or sent by the driver once and kept by their digests."""

from __future__ import annotations

import os
import shutil
import socket
import uuid
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import xxhash

from olmfast.errors import InputError, OlmfastError
from olmfast.weights.adapters import AdaptedModel
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.digests import DigestCache, Digests
from olmfast.weights.pool import Pool

SENT_AT_ONCE = 64 << 20  # bytes of a file
SENT = (".safetensors", ".json", ".model", ".txt", ".jinja")


@dataclass(frozen=True)
class Described:
    """A donor as the driver has it: the names of the model and the adapters that it is, their folders, the
    fingerprint of it all."""

    parts: tuple[str, ...]
    folders: tuple[Path, ...]
    fingerprint: str

    @property
    def name(self) -> str:
        """The donor's name."""
        return "+".join(self.parts)

    @classmethod
    def of(cls, donor: Checkpoint) -> Described:
        """Describe a donor, whose tensors are read for it unless their digests are known.

        It is opened anew: a Pool has its donors leave out, or offer, a head.
        """
        return cls(donor.made_of, donor.folders, _open(donor.made_of, donor.folders, donor.digests, {}).fingerprint())

    def files(self) -> Iterator[tuple[int, Path]]:
        """What a worker is sent of it: the part that a file belongs to, and the file."""
        for part, folder in enumerate(self.folders):
            for path in sorted(folder.iterdir()):
                if path.is_file() and path.suffix in SENT:
                    yield part, path


class Shelf:
    """The donors that a worker has."""

    def __init__(self, donors: Sequence[Described], digests: Digests) -> None:
        self.donors = donors
        self.digests = DigestCache()
        self.digests.learn(digests)
        self._own = uuid.uuid4().hex
        self._found: dict[str, Checkpoint] = {}
        self._opened: dict[Path, Checkpoint] = {}

    def missing(self) -> Iterator[str]:
        """The donors that are neither where the driver has them nor kept from an earlier run."""
        self._opened.clear()
        for donor in self.donors:
            kept = tuple(_kept(donor) / str(part) for part in range(len(donor.parts)))
            if not any(self._has(donor, folders) for folders in (donor.folders, kept)):
                yield donor.name

    def _has(self, donor: Described, folders: Sequence[Path]) -> bool:
        try:
            found = _open(donor.parts, folders, self.digests, self._opened)
        except (InputError, OSError):  # not there, or another
            return False
        if found.fingerprint() == donor.fingerprint:
            self._found[donor.name] = found
        return donor.name in self._found

    def receive(self, name: str, part: int, file: str, data: bytes) -> None:
        """More bytes of a file of a donor's; empty: it is complete, and with an empty name so is the donor."""
        donor = next(donor for donor in self.donors if donor.name == name)
        unfinished = _kept(donor).with_name(f"{donor.fingerprint}.{self._own}")
        if file:
            path = unfinished / str(part) / Path(file).name
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab") as opened:
                opened.write(data)
            return
        kept = _kept(donor)
        if kept.exists() and not self._has(donor, [kept / str(at) for at in range(len(donor.parts))]):
            shutil.rmtree(kept, ignore_errors=True)  # damaged
        try:
            unfinished.rename(kept)
        except OSError:  # another worker of this machine was faster
            shutil.rmtree(unfinished, ignore_errors=True)

    def pool(self) -> Pool:
        """All of them. Raises OlmfastError where one is not what the driver has, which has been sent."""
        for name in self.missing():
            raise OlmfastError(f"{name}: what arrived on {socket.gethostname()} is not what was sent")
        return Pool([self._found[donor.name] for donor in self.donors])


def _open(
    parts: Sequence[str], folders: Sequence[Path], digests: DigestCache, opened: dict[Path, Checkpoint]
) -> Checkpoint:
    """A model, and the adapters on it, by the folders of each; `opened` keeps the models."""
    first, *adapters = folders
    if first not in opened:
        opened[first] = Checkpoint(first, parts[0], digests)
    model = opened[first]
    for folder, name in zip(adapters, parts[1:], strict=True):
        model = AdaptedModel(model, folder, name)
    return model


def _kept(donor: Described) -> Path:
    """Where a donor that was sent is kept for later runs."""
    root = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    of_parts = xxhash.xxh3_64("+".join(donor.parts).encode()).hexdigest()
    return Path(root) / "olmfast" / "donors" / f"{donor.fingerprint}-{of_parts}"
