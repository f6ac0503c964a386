"""Recipe -> Hugging Face folder, streamed one tensor at a time, in the layout Transformers writes."""

from __future__ import annotations

import json
import os
import struct
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any, BinaryIO

import torch

from olmfast import _shards
from olmfast.errors import FileChanged, InputError, OlmfastError
from olmfast.output.beside import files_beside
from olmfast.weights.checkpoint import (
    DTYPE_NAMES,
    Checkpoint,
    TensorInfo,
    are_finite,
    digest_file,
    is_finite,
    read_header,
    read_json,
    read_parts,
    reading,
)
from olmfast.weights.chunks import CHUNK, Readable, Scratch, chunk_size
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression, Sources

WEIGHTS = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
PAGE_BYTES = 4096


@dataclass(frozen=True)
class OutputTensor:
    """One tensor of the result: its name in the file, dtype, shape and where its values come from."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    expression: Expression

    @property
    def n_values(self) -> int:
        """Values it holds."""
        return prod(self.shape)

    @property
    def n_bytes(self) -> int:
        """Bytes in the file."""
        return self.n_values * self.dtype.itemsize


@dataclass(frozen=True)
class Content:
    """What a result folder is to hold, decided before anything is written.

    `config` are the keys of its config.json, which is `base`'s own file where they are the same. `texts` are files
    written instead of copies of `tokenizer`'s. `left_out` says why the result does not have a tensor; `code` whether
    Python files that the models bring are copied (they are never run).
    """

    tensors: Sequence[OutputTensor]
    base: Checkpoint
    config: Mapping[str, Any]
    tokenizer: Checkpoint
    texts: Mapping[str, str] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    code: bool = True
    copies_config: bool = field(init=False)

    def __post_init__(self) -> None:
        # Read now: what is written has to be what was planned.
        _ = self.tokenizer.companions
        object.__setattr__(self, "copies_config", self.config == read_json(self.base.folder / "config.json"))

    @property
    def n_bytes(self) -> int:
        """Bytes of the weights."""
        return sum(tensor.n_bytes for tensor in self.tensors)

    def origins(self) -> Counter[str]:
        """How many tensors come from where."""
        return Counter(tensor.expression.origin for tensor in self.tensors)

    def account(self) -> str:
        """One line that says of every tensor where it comes from."""
        if not self.tensors:
            return "config and tokenizer written, and no weights"
        parts = [f"{n} {what}" for what, n in self.origins().items()]
        parts += [f"{n} {why}" for why, n in Counter(self.left_out.values()).items()]
        return f"{len(self.tensors)} tensors written: {', '.join(parts)}"


# Why a tensor of the base is not in the result.
TIED = "tied to the embedding and not written twice"
COMPUTED = "computed by the model and not written"
DROPPED = "of blocks that the result has not"


def content_of(recipe: Recipe, sources: Sources, tokenizer: Checkpoint) -> Content:
    """The folder that a recipe describes, with the tokenizer's files of one model."""
    base = sources.pool[recipe.base]
    family = base.architecture.family
    tied = _is_tied(recipe, sources)
    tensors, left_out = [], {}
    for name, expression in recipe.tensors.items():
        if tied and name == family.head and family.embedding in recipe.tensors:
            continue
        info = base.tensors.get(name)
        held = expression.open(sources) if info is None else info
        tensors.append(OutputTensor(base.file_names.get(name, name), held.dtype, tuple(held.shape), expression))
    written = {tensor.name for tensor in tensors}
    for name, stored in base.file_names.items():
        if stored not in written:
            computed = base.architecture.is_ignored(name)
            left_out[stored] = COMPUTED if computed else TIED if name == family.head else DROPPED
    config = recipe.config(base.config)
    if not tied and base.architecture.tied_in_config:
        config["tie_word_embeddings"] = False
    return Content(in_order(tensors), base, config, tokenizer, left_out=left_out)


def _is_tied(recipe: Recipe, sources: Sources) -> bool:
    """Whether the result's head is its embedding: the base ties them and their values are the same."""
    base = sources.pool[recipe.base]
    family = base.architecture.family
    if family.head not in recipe.tensors:
        return True
    if not base.architecture.tied_in_config:
        return False
    head, embedding = recipe.tensors[family.head], recipe.tensors[family.embedding]
    return head.identity(sources) == embedding.identity(sources)


def write_folder(
    content: Content,
    sources: Sources,
    folder: Path,
    shard_size: int,
    finite: bool = False,
    written: Callable[[OutputTensor], None] = lambda _: None,
) -> None:
    """Write weights, index, config and tokenizer files into the existing `folder`; all on the disk when this returns.

    Of a content without tensors no file of weights is made.
    What an interrupted earlier write left is replaced. `finite`: raise InputError naming the tensor when a value to
    be written is NaN or infinite. `written` is called with each tensor that is done.
    """
    if content.tensors:
        write_weights(content.tensors, sources, folder, shard_size, finite, written)
    _write_beside(content, folder)


def write_outline(content: Content, folder: Path) -> None:
    """Make `folder` what a result's folder will be but for the values: the weights file has a header and no bytes.

    A file system that knows holes gives it no space.
    """
    folder.mkdir(parents=True)
    positions = [0, *accumulate(tensor.n_bytes for tensor in content.tensors)]
    text = _header(list(content.tensors), positions)
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + positions[-1])
    _write_beside(content, folder)


def _write_beside(content: Content, folder: Path) -> None:
    """config.json and the other files beside the weights, on the disk when this returns."""
    if content.copies_config:
        copy_file(content.base.folder / "config.json", folder / "config.json")
        _check_copied(content.base.folder / "config.json", _holds(folder / "config.json", content.config))
    else:
        write_json(folder / "config.json", content.config)
    for name, digest in content.tokenizer.companions.items():
        if name not in content.texts:
            (folder / name).parent.mkdir(exist_ok=True)
            copy_file(content.tokenizer.companion(name), folder / name)
            _check_copied(content.tokenizer.companion(name), digest_file(folder / name) == digest)
    for name, path in files_beside(content.base, content.code).items():
        if name not in content.texts and name not in content.tokenizer.companions:
            (folder / name).parent.mkdir(exist_ok=True)
            copy_file(path, folder / name)
            _shards.sync_folder((folder / name).parent)
    for name, text in content.texts.items():
        write_text(folder / name, text)
    _shards.sync_folder(folder)


def faults_of(content: Content, folder: Path, shard_size: int) -> list[str]:
    """The files of a result that are missing from its folder, or not whole; weights by their headers and sizes."""
    shards = _split(content.tensors, shard_size)
    names = ["config.json", *(["model.safetensors.index.json"] if len(shards) > 1 else [])]
    names += content.tokenizer.companions
    names += [name for name, path in files_beside(content.base, content.code).items() if path.stat().st_size]
    faults = [name for name in names if not (folder / name).is_file() or not (folder / name).stat().st_size]
    for name, tensors in shards.items():
        try:
            held = {info.name: (info.dtype, info.shape) for info in read_header(folder / name)}
        except InputError:
            held = {}
        if held != {tensor.name: (tensor.dtype, tensor.shape) for tensor in tensors}:
            faults.append(name)
    return faults


@contextmanager
def writing(folder: Path, again: str) -> Iterator[None]:
    """Turn a disk's error into the user's; `again` is how to continue the work afterwards."""
    try:
        yield
    except OSError as error:
        what = str(error.strerror)
        what = what if what.startswith("cannot ") else f"cannot be written: {what}"
        raise OlmfastError(f"{error.filename or folder}: {what}; free some space and use {again}") from error


def write_weights(
    tensors: Sequence[OutputTensor],
    sources: Sources,
    folder: Path,
    shard_size: int,
    finite: bool = False,
    written: Callable[[OutputTensor], None] = lambda _: None,
) -> None:
    """Write shards and index of `tensors`, in this order; what an earlier write left is replaced.

    `finite`: raise InputError naming the tensor when a value to be written is NaN or infinite. `written` is called
    with each tensor that is done.
    """
    for stale in (path for name in WEIGHTS for path in folder.glob(name)):
        stale.unlink()
    shards = _split(tensors, shard_size)
    memory = Scratch()
    for file_name, shard in shards.items():
        _write_shard(folder / file_name, shard, sources, memory, finite, written)
    if len(shards) > 1:
        write_json(folder / "model.safetensors.index.json", _index(shards))


def in_order(tensors: Iterable[OutputTensor]) -> list[OutputTensor]:
    """As they are written: wide dtypes first, so that all are aligned, then by name."""
    return sorted(tensors, key=lambda tensor: (-tensor.dtype.itemsize, tensor.name))


def _split(tensors: Sequence[OutputTensor], shard_size: int) -> dict[str, list[OutputTensor]]:
    shards: list[list[OutputTensor]] = [[]]
    room = shard_size
    for tensor in tensors:
        if shards[-1] and tensor.n_bytes > room:
            shards.append([])
            room = shard_size
        shards[-1].append(tensor)
        room -= tensor.n_bytes
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {f"model-{i:05d}-of-{len(shards):05d}.safetensors": shard for i, shard in enumerate(shards, 1)}


def _write_shard(
    path: Path,
    tensors: list[OutputTensor],
    sources: Sources,
    memory: Scratch,
    finite: bool,
    written: Callable[[OutputTensor], None],
) -> None:
    """One file, reserved whole: unchanged bytes are copied inside the kernel, computed ones tensor by tensor."""
    positions = [0, *accumulate(tensor.n_bytes for tensor in tensors)]
    unchanged = {tensor.name: info for tensor in tensors if (info := _unchanged(tensor, sources))}
    text = _header(tensors, positions)
    text += b" " * _padding(len(text), tensors, positions, unchanged)
    start = 8 + len(text)
    output = _shards.Output(path, start + positions[-1])
    output.write(0, struct.pack("<Q", len(text)) + text)
    for run in _runs(tensors, positions, unchanged):
        place = start + positions[run.start]
        info = unchanged.get(tensors[run.start].name)
        if info is None:
            _write_computed(output, place, tensors[run.start], sources, memory, finite)
        else:
            for tensor in [tensors[i] for i in run] if finite else []:
                _check_finite(tensor, sources)
            _copy_bytes(output, place, info, positions[run.stop] - positions[run.start])
        for i in run:
            written(tensors[i])
    output.finish()


def _header(tensors: list[OutputTensor], positions: list[int]) -> bytes:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    for tensor, begin, end in zip(tensors, positions, positions[1:], strict=False):
        entry = {"dtype": DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [begin, end]}
        header[tensor.name] = entry
    return json.dumps(header, separators=(",", ":")).encode()


def _unchanged(tensor: OutputTensor, sources: Sources) -> TensorInfo | None:
    """Where the tensor's bytes are in a donor's file, if they can be copied unchanged."""
    info = tensor.expression.info(sources)
    return info if info and (info.dtype, info.shape) == (tensor.dtype, tensor.shape) else None


def _padding(n_text: int, tensors: list[OutputTensor], positions: list[int], unchanged: dict[str, TensorInfo]) -> int:
    """Spaces after the header, so that most bytes keep their offset within a page.

    Copying between different offsets within a page is a quarter slower. The data begin at a multiple of 8.
    """
    votes: Counter[int] = Counter({-n_text % 8 + 8 + n_text: 0})
    for tensor, position in zip(tensors, positions, strict=False):
        if info := unchanged.get(tensor.name):
            wanted = (info.offset - position) % PAGE_BYTES
            if wanted % 8 == 0:
                votes[wanted] += tensor.n_bytes
    start = votes.most_common(1)[0][0]
    return (start - 8 - n_text) % PAGE_BYTES


def _runs(tensors: list[OutputTensor], positions: list[int], unchanged: dict[str, TensorInfo]) -> Iterator[range]:
    """Runs of tensors stored in one donor's file just as the result stores them; else one at a time."""
    begin = 0
    for end in range(1, len(tensors) + 1):
        first = unchanged.get(tensors[begin].name)
        here = unchanged.get(tensors[end].name) if end < len(tensors) else None
        if not (first and here and _lie_alike(first, here, positions[end] - positions[begin])):
            yield range(begin, end)
            begin = end


def _lie_alike(first: TensorInfo, here: TensorInfo, distance: int) -> bool:
    return first.shard is here.shard and here.offset - first.offset == distance


def _write_computed(
    output: _shards.Output, place: int, tensor: OutputTensor, sources: Sources, memory: Scratch, finite: bool
) -> None:
    """The tensor's values, a chunk at a time: computed, rounded, checked, written."""
    try:
        source = tensor.expression.open(sources, memory)
        if tuple(source.shape) != tensor.shape:
            raise ValueError(f"has shape {list(source.shape)}, expected {list(tensor.shape)}")
        if not tensor.n_values:
            return
        width = tensor.dtype.itemsize
        step = max(_shards.ROOM_BYTES // width, chunk_size(sources.device))
        for start in range(0, tensor.n_values, step):
            n_values, at = min(step, tensor.n_values - start), place + start * width
            # Where the disk takes it from, but for a GPU's chunks, which are larger.
            room = output.room(at, n_values * width) if n_values * width <= _shards.ROOM_BYTES else None
            values = (
                memory.take("written", n_values, tensor.dtype)
                if room is None
                else torch.frombuffer(room, dtype=tensor.dtype)
            )
            source.read_into(values, start)
            if finite and not are_finite(values):
                raise not_finite(tensor, sources)
            if room is None:
                output.write(at, values.view(torch.uint8).numpy().data)
        for info in tensor.expression.places(sources):  # read once more only by chance; else memory fills with it
            info.shard.advise(info.offset, info.n_bytes, "release")
    except (TypeError, ValueError) as error:
        raise InputError(f"{tensor.name}: {error}") from error


def _check_finite(tensor: OutputTensor, sources: Sources) -> None:
    source = tensor.expression.open(sources)
    if tensor.dtype.is_floating_point and not all(are_finite(values) for _, values in chunks_of(source)):
        raise not_finite(tensor, sources)


def chunks_of(source: Readable, step: int = CHUNK) -> Iterator[tuple[int, torch.Tensor]]:
    """(start, values) of a floating-point tensor, flat, in float32 or float64; the memory is reused."""
    n_values = prod(source.shape)
    dtype = torch.float64 if source.dtype == torch.float64 else torch.float32
    buffer = torch.empty(min(step, n_values), dtype=dtype)
    for start in range(0, n_values, step):
        values = buffer[: n_values - start]
        source.read_into(values, start)
        yield start, values


def not_finite(tensor: OutputTensor, sources: Sources) -> InputError:
    """The error that names the input that holds NaN or infinity, or says that only the result does."""
    advice = "repair it, or use --allow-nonfinite to continue anyway"
    for info in tensor.expression.places(sources):
        if info.dtype.is_floating_point and not is_finite(info):
            return InputError(f"{info.file}: {info.name}: holds NaN or infinity; {advice}")
    return InputError(f"{tensor.name}: the merge turns finite inputs into NaN or infinity; {advice}")


def _copy_bytes(output: _shards.Output, place: int, source: TensorInfo, n_bytes: int) -> None:
    try:
        output.copy(place, source.shard, source.offset, n_bytes)
    except OSError as error:
        if error.filename != source.shard.path:
            raise
        with reading():
            raise


def _index(shards: dict[str, list[OutputTensor]]) -> dict[str, object]:
    total = sum(tensor.n_bytes for shard in shards.values() for tensor in shard)
    placed = {tensor.name: file for file, shard in shards.items() for tensor in shard}
    return {"metadata": {"total_size": total}, "weight_map": dict(sorted(placed.items()))}


def _holds(path: Path, data: Mapping[str, Any]) -> bool:
    try:
        return read_json(path) == data
    except InputError:
        return False


def _check_copied(source: Path, is_same: bool) -> None:
    if not is_same:
        raise FileChanged(f"{source}: was changed while in use")


def copy_file(source: Path, target: Path) -> None:
    """A copy of the content, on the disk when this returns. Raises FileChanged if the source cannot be read."""
    with naming(target), target.open("wb") as file:
        for part in read_parts(source):
            file.write(part)
        _sync(file)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Give a disk's error the name of the file that was being written, which Python leaves out."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def write_json(path: Path, data: object) -> None:
    """An indented JSON file, on the disk when this returns."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """A UTF-8 file, on the disk when this returns."""
    with naming(path), path.open("wb") as file:
        file.write(text.encode())
        _sync(file)


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
