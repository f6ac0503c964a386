"""A read-only view of one Hugging Face folder: which tensors its shards hold and where; copies only when requested.

Opening reads headers only. Shards are checked as the safetensors format requires (bounds, overlaps, dtype x
shape = bytes), so that a damaged file is named before any weight is used. Bytes come from the shard engine
(csrc/): mapped, and copied under a guard, so that a file that shrinks or fails is an error, not a crash.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
import xxhash

from olmfast import _shards
from olmfast.errors import FileChanged, InputError, OlmfastError, cut, told
from olmfast.weights.architecture import Architecture, check_kinds, is_known
from olmfast.weights.chunks import Readable, chunked
from olmfast.weights.digests import DigestCache
from olmfast.weights.files import check_characters, check_not_pointer, read_text, real
from olmfast.weights.formats import instead
from olmfast.weights.wrappers import Module, own_names

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
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
ADAPTER_CONFIG = "adapter_config.json"  # what makes a folder that of an adapter, if it has no model's weights
CHUNK_BYTES = 4 << 20  # hashed, or checked, at a time: what a core's caches hold
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
TOKENIZER_FILES = (
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "normalizer.json",
    "tekken.json",
    "*.tiktoken",
    "*.model",
    "*.jinja",
    "chat_template.json",
    "additional_chat_templates/*.jinja",
)
GENERATION_CONFIG = "generation_config.json"


class Tensor(Readable, Protocol):
    """One tensor of a model, whether its bytes lie in a file or are made, as they are read, of what lies in files."""

    @property
    def name(self) -> str: ...

    @property
    def file(self) -> Path:
        """The file that errors name."""
        ...

    @property
    def n_bytes(self) -> int:
        """Bytes of its values."""
        ...

    @property
    def held_bytes(self) -> int:
        """Bytes that stay in memory while it is read a chunk at a time."""
        ...

    @property
    def in_file(self) -> TensorInfo | None:
        """Where its bytes lie, if they lie in a file as they are."""
        ...

    def places(self) -> Iterator[TensorInfo]:
        """Every tensor of a file that it is made of."""
        ...

    def open(self) -> Readable:
        """Its values, to be read a chunk at a time from the first to the last, as often as wanted."""
        ...

    def read(self) -> torch.Tensor:
        """A copy on the CPU, in its dtype and shape."""
        ...

    def known_digest(self, digests: DigestCache) -> str:
        """A digest: equal ones, equal bytes. `digests` keeps what was read for it."""
        ...


@dataclass(frozen=True)
class TensorInfo:
    """One tensor in a shard: `offset` and `n_bytes` are its place in the file, in bytes."""

    name: str
    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    n_bytes: int
    shard: _shards.Shard = field(repr=False, compare=False)

    def rows(self, begin: int, end: int) -> TensorInfo:
        """The part `tensor[begin:end]`; a scalar counts as one row."""
        shape = self.shape or (1,)
        row_bytes = self.n_bytes // shape[0]
        n_bytes = (end - begin) * row_bytes
        offset = self.offset + begin * row_bytes
        return replace(self, shape=(end - begin, *shape[1:]), offset=offset, n_bytes=n_bytes)

    def at(self, place: Sequence[int]) -> TensorInfo:
        """The part `tensor[place]`, of as many dimensions fewer as `place` has indices."""
        part = self
        for index in place:
            part = part.rows(index, index + 1)
            part = replace(part, shape=part.shape[1:])
        return part

    def read_into(self, out: torch.Tensor, start: int) -> None:
        """Fill `out`, (m,) on the CPU, with the values from flat index `start` on, converted to its dtype."""
        copy_tensors([self.values_into(out, start)])

    def read(self) -> torch.Tensor:
        """A copy on the CPU, in the stored dtype and shape. Raises FileChanged if the file cannot be read any more."""
        out = torch.empty(self.shape, dtype=self.dtype)
        copy_tensors([self.into(out)])
        return out

    @property
    def held_bytes(self) -> int:
        """See `Tensor`."""
        return 0

    @property
    def in_file(self) -> TensorInfo:
        """See `Tensor`."""
        return self

    def places(self) -> Iterator[TensorInfo]:
        """See `Tensor`."""
        yield self

    def open(self) -> TensorInfo:
        """See `Tensor`."""
        return self

    def known_digest(self, digests: DigestCache) -> str:
        """Its digest; computed once for a file that does not change."""
        file = (os.path.abspath(self.shard.path), self.shard.size, self.shard.modified_ns)
        known = digests.get(*file, self.name)
        if known is None:
            known = self.digest()
            digests.put(*file, self.name, known)
        return known

    def digest(self) -> str:
        """xxh3-128 of dtype, shape and bytes, through a small buffer."""
        state = xxhash.xxh3_128(f"{self.dtype} {self.shape}".encode())
        buffer = bytearray(min(self.n_bytes, CHUNK_BYTES))
        with reading():
            for begin in range(0, self.n_bytes, CHUNK_BYTES):
                part = memoryview(buffer)[: self.n_bytes - begin]
                self.shard.read_into(self.offset + begin, part)
                state.update(part)
        return state.hexdigest()

    def into(self, target: torch.Tensor) -> _shards.Transfer:
        """The tensor on its way into a CPU tensor (or view) of the same shape, converted to its dtype.

        `copy_tensors` does it. Raises OlmfastError if it does not fit.
        """
        self.check_fits(target)
        if target.device.type != "cpu":
            raise OlmfastError(f"{self.file}: {self.name}: is copied to main memory only, not to {target.device}")
        return self._values_into(target, self.shape, self.offset)

    def check_fits(self, target: torch.Tensor) -> None:
        """Raise OlmfastError unless a tensor, on whatever device, has this shape and a dtype to convert to."""
        if tuple(target.shape) != self.shape or target.dtype not in DTYPE_NAMES:
            raise OlmfastError(
                f"{self.file}: {self.name}: has shape {self.shape}, cannot be copied into {target.dtype} "
                f"{tuple(target.shape)}"
            )

    def values_into(self, out: torch.Tensor, start: int) -> _shards.Transfer:
        """The values from flat index `start` on, on their way into `out`, (m,) on the CPU."""
        return self._values_into(out, (len(out),), self.offset + start * self.dtype.itemsize)

    def _values_into(self, target: torch.Tensor, shape: tuple[int, ...], offset: int) -> _shards.Transfer:
        begin = int(target.storage_offset()) * target.element_size()
        return _shards.Transfer(
            self.shard,
            offset,
            DTYPE_NAMES[self.dtype],
            shape,
            target.data_ptr(),
            max(0, int(target.untyped_storage().nbytes()) - begin),
            DTYPE_NAMES[target.dtype],
            target.stride(),
        )


class Checkpoint:
    """One model folder. `tensors` maps canonical names to where their bytes lie, or how they are made.

    `made_of` are the names of the models (and adapters) that it is, `folders` where each of them lies; config.json and
    what else there is lies in `folder`, the tokenizer in `tokenizer_folder`.

    `notes` say what is odd about it and has been taken as Transformers takes it.
    `any_family`: model types that the table of families does not know are taken by their tensors' names.

    Raises InputError, naming the file, when the folder is not a usable safetensors checkpoint.
    """

    def __init__(
        self, folder: Path, name: str | None = None, digests: DigestCache | None = None, any_family: bool = False
    ) -> None:
        self.folder = self.tokenizer_folder = folder
        self.name = name or str(folder)
        self.made_of: tuple[str, ...] = (self.name,)
        self.folders: tuple[Path, ...] = (folder,)
        if (folder / ADAPTER_CONFIG).is_file() and not list(folder.glob("model*.safetensors")):
            raise InputError(_is_an_adapter(folder, self.name))
        self.config: dict[str, Any] = read_json(folder / "config.json")
        check_kinds(self.config, str(folder / "config.json"))
        if self.config.get("quantization_config"):
            raise InputError(f"{folder}: quantised weights cannot be merged; use the unquantised model")
        where = f"{folder / 'config.json'}"
        if not any_family:
            self.architecture = Architecture.from_config(self.config, where)
        self.notes: list[str] = []
        infos = {info.name: info for info in _open_shards(folder, self.notes.append)}
        # No type of the table has a part `module`; the code that a model brings may have one.
        module: Module = "anywhere" if is_known(self.config) else "never" if self.config.get("auto_map") else "front"
        own = own_names(infos, str(folder), module)
        if odd := [name for name in infos if own[name] != name]:
            self.notes.append(f"{folder}: {odd[0]} is read as {own[odd[0]]}, as what torch.compile or DDP wrapped")
        stored = {own[name]: info for name, info in infos.items()}
        if any_family:
            self.architecture = Architecture.from_names(self.config, where, stored)
        self.file_names = dict(sorted(self.architecture.canonical(stored).items()))
        self.tensors: dict[str, Tensor] = {canonical: stored[name] for canonical, name in self.file_names.items()}
        self.digests = digests or DigestCache()

    @property
    def paths(self) -> list[Path]:
        """Its folders and all files that may be read of it."""
        files = {place.file for tensor in self.tensors.values() for place in tensor.places()}
        return [*self.folders, *sorted(files.union(*(folder.iterdir() for folder in self.folders)))]

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
        return self.tensors[tensor].read()

    def digest(self, tensor: str) -> str:
        """Of a tensor in a file, xxh3-128 of dtype, shape and bytes; of any, equal digests are equal bytes."""
        return self.tensors[tensor].known_digest(self.digests)

    def fingerprint(self) -> str:
        """xxh3-128 of all tensors (names and digests) and of config.json."""
        state = xxhash.xxh3_128(json.dumps(self.config, sort_keys=True).encode())
        for name in self.tensors:
            state.update(f"{name} {self.digest(name)}".encode())
        return state.hexdigest()

    @cached_property
    def companions(self) -> dict[str, str]:
        """The files that a result takes over with the tokenizer: name -> xxh3-128 when first asked for.

        Raises InputError for one that is a link out of the folder, unless it leads into Hugging Face's cache: somebody
        else's model must not lead to this machine's files.
        """
        found = {path for pattern in TOKENIZER_FILES for path in self.tokenizer_folder.glob(pattern)}
        names = {path.relative_to(self.tokenizer_folder).as_posix(): path for path in sorted(found)}
        names |= {path.name: path for path in self.folder.glob(GENERATION_CONFIG)}
        return {name: digest_file(path) for name, path in names.items() if is_own_file(path)}

    def companion(self, name: str) -> Path:
        """Where one of them lies."""
        return (self.folder if name == GENERATION_CONFIG else self.tokenizer_folder) / name

    def check_finite(self, checked: set[Tensor] | None = None) -> None:
        """Raise InputError naming the first tensor that holds NaN or infinity; `checked` are those that do not."""
        checked = set() if checked is None else checked
        for info in self.tensors.values():
            if info in checked:
                continue
            if info.dtype.is_floating_point and not is_finite(info.open()):
                raise InputError(
                    f"{info.file}: {info.name}: holds NaN or infinity, so this donor is refused; "
                    "repair it or take it out of models"
                )
            checked.add(info)


def is_finite(source: Readable) -> bool:
    """Whether a tensor of floats holds no NaN and no infinity."""
    n, step = math.prod(source.shape), CHUNK_BYTES // source.dtype.itemsize
    buffer = torch.empty(min(n, step), dtype=source.dtype)
    for begin, end in chunked(n, step):
        part = buffer[: end - begin]
        source.read_into(part, begin)
        if not are_finite(part):
            return False
    return True


def are_finite(values: torch.Tensor) -> bool:
    """Whether values, contiguous on the CPU, are neither NaN nor infinite, as no integer is."""
    if not values.dtype.is_floating_point:
        return True
    return _shards.all_finite(values.data_ptr(), values.numel(), DTYPE_NAMES[values.dtype])


def prefetch(infos: Iterable[TensorInfo]) -> None:
    """Read these tensors from disk and map them, so that copying them costs no more than a copy.

    An error shows when they are copied.
    """
    infos = list(infos)
    for how in ("prefetch", "load"):
        for info in infos:
            with suppress(OSError):
                info.shard.advise(info.offset, info.n_bytes, how)


def copy_tensors(transfers: Sequence[_shards.Transfer]) -> None:
    """Copy tensors to where `TensorInfo.into` aimed them, on all cores at once.

    Raises FileChanged naming the file that cannot be read any more.
    """
    with reading():
        _shards.copy(transfers)


@contextmanager
def reading() -> Iterator[None]:
    """Turn the engine's error about a file that can no longer be read into the user's."""
    try:
        yield
    except OSError as error:
        raise FileChanged(f"{error.filename}: {error.strerror}") from error


def read_json(path: Path) -> dict[str, Any]:
    """One JSON object from a file. Raises InputError naming the file."""
    if not os.path.lexists(path):
        what = f"no {path.name} in this folder" if os.path.isdir(path.parent) else "no such folder"
        raise InputError(f"{path.parent}: {what}; expected a Hugging Face model folder")
    try:
        text = read_text(path)
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number without end
        raise InputError(f"{path}: not readable as JSON: {told(error)}") from error
    if not isinstance(data, dict):
        raise InputError(f"{path}: expected a JSON object, got {type(data).__name__}")
    check_characters(text, data, str(path))
    return data


def _is_an_adapter(folder: Path, name: str) -> str:
    """What to do about an adapter's folder where a model's is expected."""
    base = read_json(folder / ADAPTER_CONFIG).get("base_model_name_or_path") or "model"
    return f"{folder}: is an adapter, not a model; name the model it is for before it, as in '{base}+{name}'"


def is_own_file(path: Path) -> bool:
    """Whether a companion is a file. Raises InputError if it is one of elsewhere, or none at all, or LFS's pointer."""
    if path.is_symlink():
        place = real(path)
        in_cache = place.parent.name == "blobs" and place.parent.parent.name.startswith("models--")
        if not in_cache and real(path.parent) not in place.parents:
            raise InputError(f"{path}: is a link out of the model's folder, to {place}; put the file itself there")
        if not place.exists():
            raise InputError(f"{path}: is a link to {place}, which is not there; download it again")
    if path.is_file():
        check_not_pointer(path)
        return True
    return False


def digest_file(path: Path) -> str:
    """xxh3-128 of a file's bytes. Raises FileChanged if it cannot be read any more."""
    state = xxhash.xxh3_128()
    for part in read_parts(path):
        state.update(part)
    return state.hexdigest()


def read_parts(path: Path) -> Iterator[bytes]:
    """A file's bytes, some at a time. Raises FileChanged if it cannot be read any more."""
    try:
        with path.open("rb") as file:
            while part := file.read(CHUNK_BYTES):
                yield part
    except OSError as error:
        raise FileChanged(f"{path}: cannot be read any more: {error.strerror}") from error


def missing_files(folder: Path, of: Sequence[str] = ()) -> list[str]:
    """Names of files that are missing: those of `of`, else those that the folder's index (or its config) lists."""
    if of:
        return [name for name in of if not os.path.isfile(folder / name)]
    if not (folder / "config.json").is_file():
        return ["config.json"]
    index = folder / INDEX
    if index.is_file() and not (folder / SINGLE).is_file():
        return [name for name in sorted(set(_weight_map(index).values())) if not os.path.isfile(folder / name)]
    return [] if list(folder.glob("*.safetensors")) else [SINGLE]


def _weight_map(index: Path) -> dict[str, str]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(f, str) for f in weight_map.values()):
        raise InputError(f"{index}: expected 'weight_map' with tensor names and shard files")
    for file in dict.fromkeys(weight_map.values()):
        if "\0" in file or Path(file).is_absolute() or ".." in Path(file).parts or not Path(file).parts:
            raise InputError(f"{index}: names the shard {file!r}, which is not in the folder")
    return weight_map


def _open_shards(folder: Path, note: Callable[[str], None]) -> Iterator[TensorInfo]:
    """The tensors that Transformers would read, from the files that it would read them from."""
    index, single = folder / INDEX, folder / SINGLE
    if single.is_file():
        if index.is_file():
            note(f"{folder}: has both {SINGLE} and {INDEX}; the single file is taken, as by Transformers")
        yield from read_header(single)
    elif index.is_file():
        yield from _indexed(index, note)
    elif list(folder.glob("*.bin")) or list(folder.glob("*.pth")):
        raise InputError(
            f"{folder}: only pickled weights (.bin), which are not read because they can run code; convert them: "
            "AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
        )
    else:
        raise InputError(f"{folder}: no {SINGLE} and no {INDEX} in this folder{instead(folder)}")


def _indexed(index: Path, note: Callable[[str], None]) -> Iterator[TensorInfo]:
    folder, weight_map = index.parent, _weight_map(index)
    for name in missing_files(folder):
        raise InputError(f"{index}: names the shard {name}, which is not in the folder; download it again")
    held = {file: {i.name: i for i in read_header(folder / file)} for file in sorted(set(weight_map.values()))}
    for tensor, file in weight_map.items():
        if tensor not in held[file]:
            raise InputError(f"{index}: says that {cut(tensor)} is in {cut(file)}, which does not hold it")
        yield held[file][tensor]
    for file, infos in held.items():
        twice = next((name for name in infos if weight_map.get(name, file) != file), None)
        if twice is not None:
            raise InputError(
                f"{index}: says that {twice} is in {weight_map[twice]}, but {file} holds it too; which of them is the "
                "model's? Take the other out, or save the model again"
            )
        unlisted = [name for name in infos if name not in weight_map]
        weight_map |= dict.fromkeys(unlisted, file)
        yield from (infos[name] for name in unlisted)
        if unlisted:
            more = f" and {len(unlisted) - 1} more" if len(unlisted) > 1 else ""
            note(f"{folder / file}: holds {unlisted[0]}{more}, not in the index; taken, as by Transformers")


def read_header(path: Path) -> list[TensorInfo]:
    """The tensors of one safetensors file, in the order of their bytes. Raises InputError if it is damaged."""
    try:
        shard = _shards.Shard(path)
    except _shards.FormatError as error:
        check_not_pointer(path)
        raise InputError(str(error)) from error
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    return [_tensor_info(path, shard, *entry) for entry in shard.tensors]


def _tensor_info(
    path: Path, shard: _shards.Shard, name: str, dtype: str, shape: tuple[int, ...], offset: int, n_bytes: int
) -> TensorInfo:
    if dtype not in DTYPES:
        raise InputError(f"{path}: {name}: dtype {dtype} is not supported; supported are {', '.join(DTYPES)}")
    return TensorInfo(name, path, DTYPES[dtype], shape, offset, n_bytes, shard)
