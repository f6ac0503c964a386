"""Digests of tensors, kept so that a resumed run need not read its donors again to know what they hold."""

from __future__ import annotations

import json
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
import xxhash

DIGESTS = "digests.jsonl"
Digests = tuple[tuple[str, int, int, str, str], ...]  # file, size, time of change, tensor, digest


class DigestCache:
    """Digest by file, size, time of change and tensor; in memory, and in a file once `keep_in` names one."""

    def __init__(self) -> None:
        self._known: dict[tuple[str, int, int, str], str] = {}
        self._file: Path | None = None

    def get(self, path: str, size: int, modified_ns: int, tensor: str) -> str | None:
        """The digest of a tensor of an unchanged file, if it was ever computed."""
        return self._known.get((path, size, modified_ns, tensor))

    def put(self, path: str, size: int, modified_ns: int, tensor: str, digest: str) -> None:
        """Remember a digest."""
        key = (path, size, modified_ns, tensor)
        self._known[key] = digest
        if self._file is not None:
            with suppress(OSError), self._file.open("a", encoding="utf-8") as file:  # what is lost is computed again
                file.write(json.dumps([*key, digest]) + "\n")

    @property
    def known(self) -> Digests:
        """All that are known, for another process that sees the same files."""
        return tuple((*key, digest) for key, digest in self._known.items())

    def learn(self, digests: Digests) -> None:
        """Take over what another process knows."""
        self._known.update({(file, size, modified, tensor): own for file, size, modified, tensor, own in digests})

    def load(self, files: Iterable[Path]) -> None:
        """Learn what `keep_in` wrote in an earlier run; a missing or damaged file or line is skipped."""
        for path in files:
            if not path.is_file():  # a pipe would be waited for
                continue
            try:
                lines = path.read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError):
                continue
            for line in lines:
                try:
                    file, size, modified_ns, tensor, digest = json.loads(line)
                    key = (str(file), int(size), int(modified_ns), str(tensor))
                except (ValueError, TypeError, RecursionError):
                    continue  # the line that was being written when the process was killed
                if isinstance(digest, str):
                    self._known.setdefault(key, digest)

    def keep_in(self, file: Path) -> None:
        """Write what is known to `file`, and from now on every new digest."""
        lines = (json.dumps([*key, digest]) + "\n" for key, digest in self._known.items())
        file.write_text("".join(lines), encoding="utf-8")
        self._file = file


def digest_tensor(tensor: torch.Tensor) -> str:
    """xxh3-128 of a tensor's dtype, shape and bytes, as `Checkpoint.digest` computes it from a file."""
    values = tensor.detach().cpu().contiguous()
    state = xxhash.xxh3_128(f"{values.dtype} {tuple(values.shape)}".encode())
    if values.numel():
        state.update(values.view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()
