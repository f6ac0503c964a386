"""A read-only view of one Hugging Face folder: which tensors its shards hold and where, never a copy unasked.

Opening reads headers only. Shards are checked as the safetensors format demands (bounds, overlaps, dtype x
shape = bytes), so that a damaged file is named before any weight is used.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from olmfast.errors import InputError, OlmfastError
from olmfast.weights.architecture import Architecture

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
MAX_HEADER_BYTES = 100_000_000  # the safetensors library's own limit
CHUNK_BYTES = 16 << 20


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a shard: `offset` and `n_bytes` are its place in the file, in bytes."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    n_bytes: int


class Checkpoint:
    """One model folder. `tensors` maps canonical names to where their bytes lie.

    Raises InputError, naming the file, when the folder is not a usable safetensors checkpoint.
    """

    def __init__(self, folder: Path, name: str | None = None) -> None:
        self.folder = folder
        self.name = name or str(folder)
        self.config: dict[str, Any] = read_json(folder / "config.json")
        if self.config.get("quantization_config"):
            raise InputError(f"{folder}: quantised weights cannot be merged; use the unquantised model")
        self.architecture = Architecture.from_config(self.config, f"{folder / 'config.json'}")
        stored = {info.name: info for info in _open_shards(folder)}
        self.tensors: dict[str, TensorInfo] = {
            canonical: stored[name] for canonical, name in sorted(self.architecture.canonical(stored).items())
        }
        self.file_names = {canonical: info.name for canonical, info in self.tensors.items()}
        self._digests: dict[str, str] = {}

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(info.n_bytes for info in self.tensors.values())

    @property
    def is_tied(self) -> bool:
        """Whether head and embedding are one tensor: by the config, unless the bytes say otherwise."""
        family = self.architecture.family
        if family.head not in self.tensors:
            return True
        if not self.architecture.tied_in_config:
            return False
        return self.digest(family.head) == self.digest(family.embedding)

    def read(self, tensor: str) -> torch.Tensor:
        """A copy of one tensor on the CPU, in its stored dtype and shape."""
        info = self.tensors[tensor]
        out = torch.empty(info.shape, dtype=info.dtype)
        buffer = out.view(-1).view(torch.uint8).numpy().data if info.n_bytes else memoryview(b"")
        position = 0
        for chunk in self._chunks(info):
            buffer[position : position + len(chunk)] = chunk
            position += len(chunk)
        return out

    def digest(self, tensor: str) -> str:
        """xxh3-128 of dtype, shape and bytes; computed once."""
        if tensor not in self._digests:
            info = self.tensors[tensor]
            state = xxhash.xxh3_128(f"{info.dtype} {info.shape}".encode())
            for chunk in self._chunks(info):
                state.update(chunk)
            self._digests[tensor] = state.hexdigest()
        return self._digests[tensor]

    def fingerprint(self) -> str:
        """xxh3-128 of all tensors (names and digests) and of config.json."""
        state = xxhash.xxh3_128(json.dumps(self.config, sort_keys=True).encode())
        for name in self.tensors:
            state.update(f"{name} {self.digest(name)}".encode())
        return state.hexdigest()

    def check_finite(self) -> None:
        """Raise InputError naming the first tensor that holds NaN or infinity."""
        for name, info in self.tensors.items():
            if info.dtype.is_floating_point and not bool(torch.isfinite(self.read(name)).all()):
                raise InputError(
                    f"{info.file}: {info.name}: holds NaN or infinity, so this donor is refused; "
                    "repair it or take it out of models"
                )

    def _chunks(self, info: TensorInfo) -> Iterator[bytes]:
        try:
            with info.file.open("rb", buffering=0) as file:
                file.seek(info.offset)
                left = info.n_bytes
                while left:
                    chunk = file.read(min(left, CHUNK_BYTES))
                    if not chunk:
                        raise OlmfastError(f"{info.file}: {info.name}: the file ends early; it has changed")
                    left -= len(chunk)
                    yield chunk
        except OSError as error:
            raise OlmfastError(f"{info.file}: {info.name}: cannot be read: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file. Raises InputError naming the file."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        what = "no such folder" if not path.parent.is_dir() else f"no {path.name} in this folder"
        raise InputError(f"{path.parent}: {what}; expected a Hugging Face model folder") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number without end
        raise InputError(f"{path}: not readable as JSON: {error}") from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(data).__name__}")
    return data


def missing_files(folder: Path) -> list[str]:
    """Names of files that the folder's index (or its config) promises and that are not there."""
    if not (folder / "config.json").is_file():
        return ["config.json"]
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return [name for name in sorted(set(_weight_map(index).values())) if not (folder / name).is_file()]
    return [] if list(folder.glob("*.safetensors")) else ["model.safetensors"]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index}: expected 'weight_map' with tensor names and shard files")
    return weight_map


def _open_shards(folder: Path) -> Iterator[TensorInfo]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        weight_map = _weight_map(index)
        for name in missing_files(folder):
            raise InputError(f"{index}: names the shard {name}, which is not in the folder; download it again")
        held = {file: {i.name: i for i in read_header(folder / file)} for file in sorted(set(weight_map.values()))}
        for tensor, file in weight_map.items():
            if tensor not in held[file]:
                raise InputError(f"{index}: says that {tensor} is in {file}, which does not hold it")
            yield held[file][tensor]
        return
    single = folder / "model.safetensors"
    if single.is_file():
        yield from read_header(single)
    elif list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        raise InputError(
            f"{folder}: only pickled weights (.bin), which are not read because they can run code; convert them: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    else:
        raise InputError(f"{folder}: no model.safetensors and no model.safetensors.index.json in this folder")


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes. Raises InputError if it is damaged."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(8)
            if len(head) < 8:
                raise InputError(f"{path}: {size} bytes are too few for a safetensors file; download it again")
            (length,) = struct.unpack("<Q", head)
            if length > min(MAX_HEADER_BYTES, size - 8):
                raise InputError(f"{path}: header of {length} bytes in a file of {size}; the file is truncated")
            header = json.loads(file.read(length).decode("utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, RecursionError) as error:  # ValueError: not UTF-8, not JSON, or a number without end
        raise InputError(f"{path}: header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise InputError(f"{path}: header is not a JSON object")
    header.pop("__metadata__", None)
    infos = [_tensor_info(path, name, entry, 8 + length) for name, entry in header.items()]
    infos.sort(key=lambda info: (info.offset, info.n_bytes))
    position = 8 + length
    for info in infos:
        if info.offset != position:
            raise InputError(f"{path}: {info.name}: begins at byte {info.offset}, expected {position}")
        position += info.n_bytes
    if position != size:
        raise InputError(f"{path}: expected {position} bytes, got {size}; the file is truncated or has extra bytes")
    return infos


def _tensor_info(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype, shape = DTYPES[entry["dtype"]], tuple(entry["shape"])
        begin, end = entry["data_offsets"]
        whole = all(isinstance(x, int) and not isinstance(x, bool) and x >= 0 for x in (*shape, begin, end))
    except (KeyError, TypeError, ValueError):
        whole = False
    if not whole:
        raise InputError(f"{path}: {name}: damaged or unsupported header entry {entry!r}")
    if end - begin != math.prod(shape) * dtype.itemsize:
        raise InputError(f"{path}: {name}: {entry['dtype']} {list(shape)} does not fill {end - begin} bytes")
    return TensorInfo(name, path, dtype, shape, start + begin, end - begin)
