"""Donor bytes -> parameters on another device, through page-locked buffers and a stage on the device.

While one buffer's bytes travel on a stream of their own, the shard engine's threads fill the next ones from the mapped
file, already in the parameter's dtype, and pause only where none is free. They arrive in a stage, not in the
parameters: what is queued on the device may still read these, and need not be waited for. From there they are copied on
the device, in the order of its work. Into memory that nothing reads any more after a known event, they travel straight.
What has to be computed is computed into the same buffers, and is copied in the order of the device's work.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable, Iterator
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


class _Piece(NamedTuple):
    """Some rows of a tensor on their way: where they come from, where they go, where in a buffer they lie."""

    info: TensorInfo
    target: torch.Tensor
    begin: int

    def within(self, memory: torch.Tensor) -> torch.Tensor:
        """Their place in a buffer's bytes, in their shape and dtype."""
        n_bytes = self.target.numel() * self.target.element_size()
        return memory[self.begin : self.begin + n_bytes].view(self.target.dtype).view(self.target.shape)


class Uploader:
    """Copies tensors of checkpoints into parameters on `device`; on a CPU (for tests) without streams."""

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES, stage_bytes: int = STAGE_BYTES) -> None:
        self.device, self.buffer_bytes, self.stage_bytes = device, buffer_bytes, max(stage_bytes, buffer_bytes)
        self._is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=self._is_cuda) for _ in range(N_BUFFERS)
        ]
        self._last: torch.cuda.Event | None = None  # after which no buffer's bytes travel
        self._stage: torch.Tensor | None = None

    def upload(self, pairs: Iterable[tuple[TensorInfo, torch.Tensor]]) -> None:
        """Fill each parameter (or view of one) from its tensor of the same shape.

        Work that is queued on the current stream afterwards sees the new values. Raises OlmfastError naming the
        file and tensor that cannot be read.
        """
        pairs = [(info, target) for info, target in pairs if info.n_bytes]
        arrived: list[tuple[_Piece, torch.Tensor]] = []
        begin = 0
        stage = self._staged(pairs)
        with closing(self._filled(pairs)) as groups:
            for pieces, filled in groups:
                if stage is None:
                    for piece in pieces:
                        piece.target.copy_(piece.within(filled))
                    continue
                if begin + len(filled) > len(stage):
                    self._spread(arrived)
                    arrived, begin = [], 0
                place = stage[begin : begin + len(filled)]
                with torch.cuda.stream(self._stream):
                    place.copy_(filled, non_blocking=True)
                arrived += [(piece, place) for piece in pieces]
                begin += len(filled)
        self._spread(arrived)

    def send(self, pairs: Iterable[tuple[TensorInfo, torch.Tensor]], after: torch.cuda.Event | None) -> Any:
        """Fill memory from tensors of the same shapes, once `after` has happened, without a stage.

        Returns the event by which all has arrived (None on a CPU); the bytes have left their files when this returns.
        Raises what `upload` raises.
        """
        if self._stream is not None and after is not None:
            self._stream.wait_event(after)
        with closing(self._filled([pair for pair in pairs if pair[0].n_bytes], straight=True)) as groups:
            for pieces, filled in groups:
                with torch.cuda.stream(self._stream):  # on a CPU this does nothing
                    for piece in pieces:
                        piece.target.copy_(piece.within(filled), non_blocking=True)
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

    def _filled(
        self, pairs: Iterable[tuple[TensorInfo, torch.Tensor]], straight: bool = False
    ) -> Generator[tuple[list[_Piece], torch.Tensor], None, None]:
        """The tensors in pieces, as many as fit a buffer at a time, and the buffer's bytes with them in it.

        Before the next is asked for, they are sent on by the stream (on a CPU: copied). It has to be closed: until then
        threads may be writing into the buffers.
        """
        if self._last is not None:
            self._last.synchronize()
        buffers = cycle(self._buffers)
        ahead: deque[tuple[list[_Piece], torch.Tensor]] = deque()
        underway: deque[torch.cuda.Event] = deque()

        def first(filling: _shards.Filling) -> Iterator[tuple[list[_Piece], torch.Tensor]]:
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
                for n, (pieces, n_bytes) in enumerate(self._buffers_of(pairs, straight)):
                    # At first one is sent on for every two that are begun: the first does not wait until all are.
                    if n % 2 and n < 2 * N_BUFFERS and len(ahead) > 1:
                        yield from first(filling)
                    while len(ahead) + len(underway) == N_BUFFERS:
                        yield from first(filling)
                    buffer = next(buffers)[:n_bytes]
                    with reading():
                        filling.add([piece.info.into(piece.within(buffer)) for piece in pieces])
                    ahead.append((pieces, buffer))
                while ahead:
                    yield from first(filling)
        finally:
            if self._stream is not None:
                self._last = marked(self._stream, blocking=True)

    def _buffers_of(
        self, pairs: Iterable[tuple[TensorInfo, torch.Tensor]], straight: bool = False
    ) -> Iterator[tuple[list[_Piece], int]]:
        """The tensors in pieces, as many as fit a buffer at a time, and the bytes they take there."""
        pieces: list[_Piece] = []
        begin = 0
        for info, target in pairs:
            rows = target if target.dim() else target.view(1)
            row_bytes = rows[0].numel() * target.element_size()
            if row_bytes > self.buffer_bytes:
                staged = torch.empty(info.shape, dtype=target.dtype)
                copy_tensors([info.into(staged)])
                with torch.cuda.stream(self._stream if straight else None):
                    target.copy_(staged)
                continue
            at = 0
            while at < rows.shape[0]:
                n = min(rows.shape[0] - at, max(0, self.buffer_bytes - begin) // row_bytes)
                if n:
                    pieces.append(_Piece(info.rows(at, at + n), rows[at : at + n], begin))
                    begin += n * row_bytes
                    begin += -begin % ALIGNMENT
                    at += n
                if at < rows.shape[0]:
                    yield pieces, min(begin, self.buffer_bytes)
                    pieces, begin = [], 0
        if pieces:
            yield pieces, min(begin, self.buffer_bytes)

    def _staged(self, pairs: list[tuple[TensorInfo, torch.Tensor]]) -> torch.Tensor | None:
        """Memory on the device for all of it, if it may be that much; None where nothing travels."""
        if self._stream is None or not pairs:
            return None
        wanted = sum(target.numel() * target.element_size() + ALIGNMENT for _, target in pairs)
        n_bytes = min(self.stage_bytes, max(wanted, self.buffer_bytes))
        if self._stage is None or len(self._stage) < n_bytes:
            if self._stage is not None:
                self._wait_for_work()
            self._stage = torch.empty(n_bytes, dtype=torch.uint8, device=self.device)
            self._wait_for_work()  # which may have had this memory before
        return self._stage

    def _wait_for_work(self) -> None:
        """Let the bytes that follow travel after what is queued on the device now."""
        assert self._stream is not None
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def _spread(self, arrived: list[tuple[_Piece, torch.Tensor]]) -> None:
        """Copy what is in the stage to where it belongs, after the work that is queued; then the stage is free."""
        if self._stream is None or not arrived:
            return
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        torch._foreach_copy_([piece.target for piece, _ in arrived], [piece.within(place) for piece, place in arrived])
        self._wait_for_work()


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
