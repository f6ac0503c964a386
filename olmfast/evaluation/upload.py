"""Donor bytes -> parameters on another device, through page-locked buffers and a stage on the device.

Several threads, each with buffers of its own, have the shard engine fill them from the mapped file, already in the
parameter's dtype, while others travel on a stream of their own. Buffers are small, so that what travels is still in a
cache. The bytes arrive in a stage, not in the parameters: what is queued on the device may still read these, and need
not be waited for. From there they are copied on the device, in the order of its work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from queue import SimpleQueue
from typing import NamedTuple

import torch

from olmfast import _shards
from olmfast.weights.checkpoint import TensorInfo, copy_tensors

BUFFER_BYTES = 6 << 20  # below eight the engine's copies stay in the caches
MAX_THREADS = 12
BUFFERS_PER_THREAD = 2
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


class _Buffer(NamedTuple):
    """Page-locked memory, and when its last bytes have left."""

    memory: torch.Tensor
    sent: torch.cuda.Event | None


class Uploader:
    """Copies tensors of checkpoints into parameters on `device`; on a CPU (for tests) without streams and threads."""

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES, stage_bytes: int = STAGE_BYTES) -> None:
        self.device, self.buffer_bytes, self.stage_bytes = device, buffer_bytes, max(stage_bytes, buffer_bytes)
        self._is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._n_threads = min(_shards.threads(), MAX_THREADS) if self._is_cuda else 1
        self._threads = ThreadPoolExecutor(self._n_threads, "upload") if self._is_cuda else None
        self._free: SimpleQueue[_Buffer] = SimpleQueue()
        for _ in range(self._n_threads * BUFFERS_PER_THREAD if self._is_cuda else 1):
            memory = torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=self._is_cuda)
            self._free.put(_Buffer(memory, torch.cuda.Event() if self._is_cuda else None))  # type: ignore[no-untyped-call]
        self._stage: torch.Tensor | None = None

    def upload(self, pairs: Iterable[tuple[TensorInfo, torch.Tensor]]) -> None:
        """Fill each parameter (or view of one) from its tensor of the same shape.

        Work that is queued on the current stream afterwards sees the new values. Raises OlmfastError naming the
        file and tensor that cannot be read.
        """
        pairs = [(info, target) for info, target in pairs if info.n_bytes]
        arriving: list[tuple[Future[None], list[_Piece], torch.Tensor]] = []
        begin = 0
        with _one_thread_a_copy(self._is_cuda):
            for pieces, n_bytes in self._buffers_of(pairs):
                if self._threads is None:
                    self._deliver(pieces)
                    continue
                stage = self._staged(pairs)
                if begin + n_bytes > len(stage):
                    self._spread(arriving)
                    arriving, begin = [], 0
                place = stage[begin : begin + n_bytes]
                arriving.append((self._threads.submit(self._send, pieces, place), pieces, place))
                begin += n_bytes
            self._spread(arriving)

    def _buffers_of(self, pairs: Iterable[tuple[TensorInfo, torch.Tensor]]) -> Iterator[tuple[list[_Piece], int]]:
        """The tensors in pieces, as many as fit a buffer at a time, and the bytes they take there."""
        pieces: list[_Piece] = []
        begin = 0
        for info, target in pairs:
            rows = target if target.dim() else target.view(1)
            row_bytes = rows[0].numel() * target.element_size()
            if row_bytes > self.buffer_bytes:
                staged = torch.empty(info.shape, dtype=target.dtype)
                copy_tensors([info.into(staged)])
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

    def _deliver(self, pieces: list[_Piece]) -> None:
        """By way of a buffer, but on this device."""
        buffer = self._free.get()
        copy_tensors([piece.info.into(piece.within(buffer.memory)) for piece in pieces])
        for piece in pieces:
            piece.target.copy_(piece.within(buffer.memory))
        self._free.put(buffer)

    def _send(self, pieces: list[_Piece], place: torch.Tensor) -> None:
        """Have these pieces copied into a free buffer, and its bytes into their place on the device."""
        buffer = self._free.get()
        try:
            assert buffer.sent is not None
            buffer.sent.synchronize()
            copy_tensors([piece.info.into(piece.within(buffer.memory)) for piece in pieces])
            with torch.cuda.stream(self._stream):
                place.copy_(buffer.memory[: len(place)], non_blocking=True)
                buffer.sent.record(self._stream)
        finally:
            self._free.put(buffer)

    def _staged(self, pairs: list[tuple[TensorInfo, torch.Tensor]]) -> torch.Tensor:
        """Memory on the device for all of it, if it may be that much."""
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

    def _spread(self, arriving: list[tuple[Future[None], list[_Piece], torch.Tensor]]) -> None:
        """Copy what comes to the stage to where it belongs, after the work that is queued; then the stage is free."""
        if self._stream is None or not arriving:
            return
        failed = [error for sending, _, _ in arriving if (error := sending.exception()) is not None]
        if failed:
            raise failed[0]
        torch.cuda.current_stream(self.device).wait_stream(self._stream)
        targets = [piece.target for _, pieces, _ in arriving for piece in pieces]
        torch._foreach_copy_(targets, [piece.within(place) for _, pieces, place in arriving for piece in pieces])
        self._wait_for_work()


@contextmanager
def _one_thread_a_copy(wanted: bool) -> Iterator[None]:
    """The engine's own threads would wait for each other after each small buffer."""
    n_threads = _shards.threads()
    if wanted:
        _shards.set_threads(1)
    try:
        yield
    finally:
        if wanted:
            _shards.set_threads(n_threads)
