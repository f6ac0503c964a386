"""Bytes of safetensors files: mapped, checked, copied and written, and no idea of what they mean (csrc/).

Offsets are bytes from the start of a file. Every copy runs without the GIL. A file that cannot be used any
more (it shrank, changed, was removed, its disk failed) raises OSError with `filename` set and `strerror`
saying what happened, also where the bytes are mapped and the kernel sends SIGBUS.
"""

import os
from collections.abc import Sequence
from typing import Literal

from typing_extensions import Buffer

class FormatError(ValueError):
    """The file is no safetensors file. Reads `<file>: [<tensor>: ]<what, got and wanted>`."""

class Shard:
    """One safetensors file: its header is read and checked here, its bytes are mapped when first wanted.

    Raises FormatError or OSError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None: ...
    @property
    def path(self) -> str: ...
    @property
    def size(self) -> int:
        """Bytes of the file."""
    @property
    def modified_ns(self) -> int:
        """When the file was last changed, as `os.stat` has it, at the time it was opened."""
    @property
    def data_start(self) -> int:
        """Offset of the first tensor's first byte."""
    @property
    def tensors(self) -> list[tuple[str, str, tuple[int, ...], int, int]]:
        """(name, dtype as the file spells it, shape, offset, bytes) in the order of the bytes."""
    @property
    def metadata(self) -> dict[str, str] | None: ...
    @property
    def is_mapped(self) -> bool: ...
    def read_into(self, offset: int, buffer: Buffer) -> None:
        """Fill a writable buffer with the bytes from `offset` on, by all threads."""
    def advise(self, offset: int, n_bytes: int, how: Literal["prefetch", "load", "release", "drop"]) -> None:
        """`prefetch` starts reading from disk and returns; `load` returns when all is in memory and mapped.

        `release` takes the pages out of this process, `drop` also out of the page cache.
        """
    def view(self, offset: int, n_bytes: int) -> memoryview:
        """The mapped bytes themselves, read-only. Reading them is not guarded: a file that shrinks kills."""
    def check_unchanged(self) -> None:
        """Raise OSError if the file is not the one that was opened (place, size, time of change)."""
    def unmap(self) -> None:
        """Give the map back; views keep it alive."""

class Transfer:
    """One tensor in a shard and where its elements go: `address`, with `capacity` writable bytes from there.

    `shape` is the tensor's, row-major in the file; `strides` are the destination's, in elements, so that
    transposed, sliced and fused destinations are filled in place. F64, F32, F16 and BF16 are converted into
    each other, rounded once to nearest even as torch does (F64 by way of F32); other dtypes are only copied.
    Raises ValueError or IndexError for what does not fit, before anything is copied.
    """

    def __init__(
        self,
        shard: Shard,
        offset: int,
        dtype: str,
        shape: Sequence[int],
        address: int,
        capacity: int,
        to_dtype: str,
        strides: Sequence[int],
    ) -> None: ...
    @property
    def n_bytes(self) -> int:
        """Bytes that are read."""

def copy(transfers: Sequence[Transfer]) -> None:
    """Do all of them, spread over the threads; returns when all is done.

    Raises OSError, naming file and tensor; some destinations may then hold part of the new values.
    """

class Filling:
    """Groups of transfers into `n_buffers` buffers that are used in turns, done by the threads without a pause.

    A group is begun once the one `n_buffers` before it is released. What they fill must live until this is closed.
    """

    def __init__(self, n_buffers: int) -> None: ...
    def add(self, transfers: Sequence[Transfer]) -> None:
        """The transfers of the next group."""
    def wait(self) -> None:
        """Return when the oldest group that has not been waited for is there.

        Raises what `copy` raises; RuntimeError where there is no group, or its buffer has not been released.
        """
    def release(self) -> None:
        """The oldest buffer that has not been released may be overwritten."""
    def close(self) -> None:
        """Leave out what has not been begun; return when nothing is written any more."""

def release_copied(on: bool) -> None:
    """Whether mapped pages are taken out of this process once they have been read: they count as its memory.

    They may stay in the page cache, and are mapped again when they are next read. `advise` then loads none.
    """

ROOM_BYTES: int

class Output:
    """A file of `n_bytes`, reserved on disk. Raises OSError, at once if the disk is full.

    What is written goes past the page cache where the file system allows it, while the caller goes on: an error may be
    that of an earlier call.
    """

    def __init__(self, path: str | os.PathLike[str], n_bytes: int) -> None: ...
    def write(self, offset: int, buffer: Buffer) -> None: ...
    def room(self, offset: int, n_bytes: int) -> memoryview:
        """Memory for so many bytes at `offset`, at most ROOM_BYTES, to be filled before the next call.

        Its address leaves the same rest as `offset` when divided by 4096.
        """
    def copy(self, offset: int, shard: Shard, source_offset: int, n_bytes: int) -> str:
        """Copy bytes of a shard inside the kernel; the name of the way that worked.

        `copy_file_range`, else `sendfile`, else `buffer`.
        """
    _direct: bool
    _first_method: int
    def finish(self) -> None:
        """Return when all is on the disk; the file is then closed."""

class Operand:
    """Consecutive F32, F16 or BF16 values from `place` on: an offset in a shard, or without one an address.

    They are rounded to `rounded` first. In `combine_task_vectors` they are then thinned: the base is subtracted if
    `from_base`; what is not larger in magnitude than `largest` (of the first `n_first` values: `largest_first`)
    becomes 0, nothing where that is negative; and the rest is multiplied by `scale`. Lastly they are multiplied by
    `weight`, unless they are counted.
    """

    def __init__(
        self, shard: Shard | None, place: int, dtype: str, rounded: str = "F32", weight: float = 1.0
    ) -> None: ...
    weight: float
    from_base: bool
    n_first: int
    largest_first: float
    largest: float
    scale: float

class Target:
    """Where `n` values go: memory of `capacity` bytes. They are rounded to `rounded` and then to `dtype`."""

    def __init__(self, n: int, address: int, capacity: int, dtype: str, rounded: str) -> None: ...

def combine(operands: Sequence[Operand], divisor: float, target: Target) -> None:
    """The first times its weight, then `weight * operand + sum` rounded once for each other, over `divisor`.

    In float32, with the same bits on every processor: those of torch where it multiplies and adds in one instruction.
    Raises ValueError or IndexError for what does not fit, OSError as `copy` does.
    """

def combine_task_vectors(
    base: Operand,
    operands: Sequence[Operand],
    signs: bool,
    normalize: bool,
    divisor: float,
    least: float,
    scale: float,
    target: Target,
) -> None:
    """base + scale * the sum of the operands, or with `signs` of what has the sign of that sum, + where it is 0.

    `normalize`: over the sum of the weights of what counts (`divisor` where all does), 1 more where that is below
    `least` in magnitude. Raises what `combine` raises.
    """

def combine_by_row(
    moving: Operand,
    base: Operand | None,
    operands: Sequence[Operand],
    weights: int,
    n_rows: int,
    row: int,
    first: int,
    target: Target,
) -> None:
    """moving + the sum of `weight[row] * (operand - base)`, each product and sum rounded to float32.

    `weights` is the address of float32 (operands, n_rows), `row` the values in a row, `first` where in the tensor the
    target's first value lies. Raises what `combine` raises.
    """

def count_magnitudes(
    operand: Operand, base: Operand | None, n: int, low: int, high: int
) -> tuple[int, int, int, int, bytearray]:
    """Of the float32 bits of `n` magnitudes, of the operand or of its difference from the base, as integers:

    how many are above `high`, at least `high`, above `low`, at least `low`; and as int32 those between the two.
    """

def all_finite(address: int, n: int, dtype: str) -> bool:
    """Whether none of `n` F64, F32, F16 or BF16 values is NaN or infinite."""

def sync_folder(path: str | os.PathLike[str]) -> None:
    """Make a folder's entries durable: files created in it, or renamed."""

def threads() -> int:
    """Threads that copies are spread over: one per core that this process may use, unless set."""

def set_threads(n: int) -> None: ...
def _use_portable(only: bool) -> None: ...
def install_guard() -> None:
    """Make the guard the handler of SIGBUS, if another was installed since. Every copy does this itself."""
