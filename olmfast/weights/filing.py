"""Computed values in files without a name: kept outside of memory, and gone with the last who reads them.

What a process holds so costs it no memory but what is mapped at the moment, and a kill leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch

from olmfast import _shards
from olmfast.errors import OlmfastError
from olmfast.weights.checkpoint import DTYPE_NAMES, DTYPES, TensorInfo
from olmfast.weights.chunks import CHUNK, Scratch
from olmfast.weights.sources import Expression, Sources

ALIGNMENT = 64  # of tensors in a file, in bytes


class _Nameless(_shards.Shard):
    """A shard that keeps its file open: it has no name to be found by again."""

    def __init__(self, file: Any) -> None:
        super().__init__(f"/proc/self/fd/{file.fileno()}")
        self._file = file


class Wanted(NamedTuple):
    """A tensor to be kept: what it is worth, the dtype that it would be saved in, and its shape."""

    expression: Expression
    dtype: torch.dtype
    shape: tuple[int, ...]


def filed(wanted: Mapping[str, Wanted], sources: Sources) -> dict[str, TensorInfo]:
    """Compute tensors, a chunk at a time, into a file of their own; returns where each lies.

    The file takes space beside the tensors that a run has stored, where there is such a folder, else in the system's
    folder for temporary files, until the last of them is let go. Raises OlmfastError naming the folder where there is
    no room for it.
    """
    folder = sources.folder if sources.folder.name else Path(tempfile.gettempdir())
    memory = Scratch()
    header, n_bytes = {}, 0
    for name, one in wanted.items():
        end = n_bytes + prod(one.shape) * one.dtype.itemsize
        header[name] = {"dtype": DTYPE_NAMES[one.dtype], "shape": one.shape, "data_offsets": [n_bytes, end]}
        n_bytes = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    try:
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it lives as long as its tensors)
        file.write(len(text).to_bytes(8, "little") + text)
        for one in wanted.values():
            _write(file, one, sources, memory)
        file.flush()
    except OSError as error:
        raise OlmfastError(
            f"{folder}: {os.strerror(error.errno or 0)}; {n_bytes / 1e9:.2f} GB of computed weights are kept there "
            "while blocks are streamed"
        ) from error
    shard = _Nameless(file)
    return {
        name: TensorInfo(name, folder, DTYPES[dtype], shape, offset, n_bytes, shard)
        for name, dtype, shape, offset, n_bytes in shard.tensors
    }


def _write(file: Any, wanted: Wanted, sources: Sources, memory: Scratch) -> None:
    readable, n_values = wanted.expression.open(sources, memory), prod(wanted.shape)
    if tuple(readable.shape) != wanted.shape:
        raise ValueError(f"a tensor of shape {list(readable.shape)} where {list(wanted.shape)} is expected")
    for start in range(0, n_values, CHUNK):
        chunk = memory.take("filed", min(CHUNK, n_values - start), wanted.dtype)
        readable.read_into(chunk, start)
        file.write(chunk.view(torch.uint8).numpy().data)
