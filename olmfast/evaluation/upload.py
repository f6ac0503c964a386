"""Donor bytes -> parameters on another device, through page-locked buffers and a stage on the device.

While one buffer's bytes travel on a stream of their own, the shard engine's threads fill the next ones from the mapped
file, already in the parameter's dtype, and pause only where none is free. They arrive in a stage, not in the
parameters: what is queued on the device may still read these, and need not be waited for. From there they are copied on
the device, in the order of its work. Into memory that nothing reads any more after a known event, they travel straight.
What has to be computed is computed into the same buffers, and is copied in the order of the device's work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from contextlib import closing
from itertools import cycle
from typing import Any, NamedTuple

import torch

from olmfast import _shards
from olmfast.weights.checkpoint import TensorInfo, copy_tensors, reading
from olmfast.weights.chunks import Readable, chunked

BUFFER_BYTES = 16 << 20
N_BUFFERS = 8
UNDERWAY = 2  # buffers whose bytes travel or are queued to, while the others are filled
STAGE_BYTES = 512 << 20  # a block of a 7B model
ALIGNMENT = 256
CONTIGUOUS = torch.contiguous_format


_Pair = tuple[TensorInfo, torch.Tensor]  # a tensor, and where it goes


class _Piece(NamedTuple):
    """Some values on their way, flat: where they lie in a buffer, and where they go."""

    filled: torch.Tensor
    target: torch.Tensor


class Uploader:
    """Copies tensors of checkpoints into parameters on `device`; on a CPU (for tests) without streams."""

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES, stage_bytes: int = STAGE_BYTES) -> None:
        self.device, self.buffer_bytes, self.stage_bytes = device, buffer_bytes, stage_bytes
        self._is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=self._is_cuda) for _ in range(N_BUFFERS)
        ]
        self._last: torch.cuda.Event | None = None  # after which no buffer's bytes travel
        self._stage: torch.Tensor | None = None

    def upload(self, pairs: Iterable[_Pair]) -> None:
        """Fill each parameter (or view of one) from its tensor of the same shape.

        Work that is queued on the current stream afterwards sees the new values. Raises OlmfastError naming the
        file and tensor that cannot be read.
        """
        for several in self._rounds(pairs):
            places = self._staged([target for _, target in several])
            self.send([(info, place) for (info, _), place in zip(several, places, strict=True)], None)
            if self._stream is not None:
                torch.cuda.current_stream(self.device).wait_stream(self._stream)
            torch._foreach_copy_([target for _, target in several], places)
            self._wait_for_work()  # then the stage is free

    def send(self, pairs: Iterable[_Pair], after: torch.cuda.Event | None) -> Any:
        """Fill memory from tensors of the same shapes, once `after` has happened, without a stage.

        Returns the event by which all has arrived (None on a CPU); the bytes have left their files when this returns.
        Raises what `upload` raises.
        """
        if self._stream is not None and after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):  # on a CPU this does nothing
            flat: list[_Pair] = []
            scattered: list[tuple[torch.Tensor, torch.Tensor]] = []
            for info, target in pairs:
                info.check_fits(target)
                together = target if target.is_contiguous() else torch.empty_like(target, memory_format=CONTIGUOUS)
                flat.append((info, together.view(-1)))
                if together is not target:
                    scattered.append((target, together))
            with closing(self._filled(flat)) as groups:
                for pieces in groups:
                    for piece in pieces:
                        piece.target.copy_(piece.filled, non_blocking=True)
            for target, together in scattered:
                target.copy_(together)
        return None if self._stream is None else marked(self._stream)

    def read(self, parts: Iterable[tuple[Readable, torch.Tensor]]) -> None:
        """Fill each parameter (contiguous) with what is computed as it is read, a buffer at a time: while one travels,
        the next is computed.

        Work that is queued on the current stream before still sees the old values.
        """
        if self._last is not None:
            self._last.synchronize()
        buffers, underway = cycle(self._buffers), deque[torch.cuda.Event]()
        for source, target in parts:
            flat = target.view(-1)
            n, row = self.buffer_bytes // flat.itemsize, max(1, source.shape[-1] if source.shape else 1)
            step = n // row * row or n  # whole rows, which some can be read by alone
            for start, stop in chunked(len(flat), step):
                if len(underway) == N_BUFFERS:
                    underway.popleft().synchronize()
                filled = next(buffers)[: (stop - start) * flat.itemsize].view(flat.dtype)
                source.read_into(filled, start)
                flat[start:stop].copy_(filled, non_blocking=True)
                if self._is_cuda:
                    self._last = marked(torch.cuda.current_stream(self.device), blocking=True)
                    underway.append(self._last)

    def _filled(self, pairs: Sequence[_Pair]) -> Generator[list[_Piece], None, None]:
        """The tensors, which go to flat memory, in pieces: as many at a time as fit a buffer, with their values there.

        Before the next are asked for, they are sent on by the stream (on a CPU: copied). It has to be closed: until
        then threads may be writing into the buffers.
        """
        if self._last is not None:
            self._last.synchronize()
        ahead: deque[list[_Piece]] = deque()
        underway: deque[torch.cuda.Event] = deque()

        def first(filling: _shards.Filling) -> Iterator[list[_Piece]]:
            with reading():
                filling.wait()
            yield ahead.popleft()
            if self._stream is not None:
                underway.append(marked(self._stream, blocking=True))
                if len(underway) <= UNDERWAY:
                    return
                underway.popleft().synchronize()
            filling.release()

        try:
            with closing(_shards.Filling(N_BUFFERS)) as filling:
                for n, (transfers, pieces) in enumerate(self._buffers_of(pairs)):
                    # At first one is sent on for every two that are begun: the first does not wait until all are.
                    if n % 2 and n < 2 * N_BUFFERS and len(ahead) > 1:
                        yield from first(filling)
                    while len(ahead) + len(underway) == N_BUFFERS:
                        yield from first(filling)
                    with reading():
                        filling.add(transfers)
                    ahead.append(pieces)
                while ahead:
                    yield from first(filling)
        finally:
            if self._stream is not None:
                self._last = marked(self._stream, blocking=True)

    def _buffers_of(self, pairs: Sequence[_Pair]) -> Iterator[tuple[list[_shards.Transfer], list[_Piece]]]:
        """The tensors in pieces, as many as fit a buffer at a time, and what fills it with them."""
        buffers = cycle(self._buffers)
        buffer, begin = next(buffers), 0
        transfers: list[_shards.Transfer] = []
        pieces: list[_Piece] = []
        for info, target in pairs:
            start, end, size = 0, target.numel(), target.itemsize
            while start < end:
                n = min(end - start, (self.buffer_bytes - begin) // size)
                if n <= 0:
                    yield transfers, pieces
                    buffer, begin, transfers, pieces = next(buffers), 0, [], []
                    continue
                filled = buffer[begin : begin + n * size].view(target.dtype)
                transfers.append(info.values_into(filled, start))
                pieces.append(_Piece(filled, target[start : start + n]))
                begin += n * size
                begin += -begin % ALIGNMENT
                start += n
        if pieces:
            yield transfers, pieces

    def _rounds(self, pairs: Iterable[_Pair]) -> Iterator[list[_Pair]]:
        """The tensors, or rows of them, in turns that a stage has room for."""
        several: list[_Pair] = []
        n_bytes = 0
        for whole, goes in pairs:
            whole.check_fits(goes)
            for info, target in _by_rows(whole, goes, self.stage_bytes):
                if several and n_bytes + _room_of(target) > self.stage_bytes:
                    yield several
                    several, n_bytes = [], 0
                several.append((info, target))
                n_bytes += _room_of(target)
        if several:
            yield several

    def _staged(self, targets: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Memory on the device for all of these, in a stage that stays."""
        n_bytes = sum(map(_room_of, targets))
        if self._stage is None or len(self._stage) < n_bytes:
            self._stage = None  # given back before more is taken
            self._stage = torch.empty(n_bytes, dtype=torch.uint8, device=self.device)
            self._wait_for_work()  # which may have had this memory before
        places, begin = [], 0
        for target in targets:
            n = target.numel() * target.itemsize
            places.append(self._stage[begin : begin + n].view(target.dtype).view(target.shape))
            begin += _room_of(target)
        return places

    def _wait_for_work(self) -> None:
        """Let the bytes that follow travel after what is queued on the device now."""
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))


def _room_of(target: torch.Tensor) -> int:
    """Bytes in a stage."""
    n_bytes = target.numel() * target.itemsize
    return n_bytes + -n_bytes % ALIGNMENT


def _by_rows(info: TensorInfo, target: torch.Tensor, n_bytes: int) -> Iterator[_Pair]:
    """A tensor, in parts of as many rows as `n_bytes` hold where it is larger."""
    if _room_of(target) <= n_bytes or not target.dim():
        yield info, target
        return
    step = max(1, n_bytes // max(_room_of(target[:1]), 1))
    for begin, end in chunked(len(target), step):
        yield info.rows(begin, end), target[begin:end]


def marked(stream: torch.cuda.Stream, blocking: bool = False) -> torch.cuda.Event:
    """The event after all that is queued on a stream; who waits for it keeps a core busy, unless it is `blocking`."""
    event = torch.cuda.Event(blocking=blocking)  # type: ignore[no-untyped-call]
    event.record(stream)
    return event


class Carrier:
    """Brings tensors from mapped files to memory on a device that is used in turns, from a thread of its own.

    On a CPU they are copied straight, and nothing is queued that could still read the memory.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._uploader = Uploader(device) if device.type == "cuda" else None

    def carry(self, pairs: list[tuple[TensorInfo, torch.Tensor]], after: Any) -> Any:
        """Fill memory once the event `after` has happened; returns what `wait_for` takes."""
        if self._uploader is not None:
            with torch.cuda.device(self.device), torch.no_grad():
                return self._uploader.send(pairs, after)
        copy_tensors([info.into(target) for info, target in pairs])
        return None

    def mark(self) -> Any:
        """The event after all that is queued on the device now, which is what `carry` takes."""
        return None if self._uploader is None else marked(torch.cuda.current_stream(self.device))

    def wait_for(self, arrived: Any) -> None:
        """Have what is queued from now on wait until it is there."""
        if arrived is not None:
            torch.cuda.current_stream(self.device).wait_event(arrived)
