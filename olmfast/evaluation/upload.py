"""Donor bytes -> parameters on another device, through a small ring of page-locked buffers.

While one buffer's bytes travel on a stream of their own, the shard engine fills the next from the mapped
file, already in the parameter's dtype. Nothing as large as a tensor is allocated on either side.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import nullcontext

import torch

from olmfast.weights.checkpoint import TensorInfo, copy_tensors

BUFFER_BYTES = 32 << 20
N_BUFFERS = 3


class Uploader:
    """Copies tensors of checkpoints into parameters on `device`; on a CPU (for tests) without streams."""

    def __init__(self, device: torch.device, buffer_bytes: int = BUFFER_BYTES) -> None:
        self.device = device
        self._is_cuda = device.type == "cuda"
        self._stream = torch.cuda.Stream(device) if self._is_cuda else None  # type: ignore[no-untyped-call]
        self._buffers = [
            torch.empty(buffer_bytes, dtype=torch.uint8, pin_memory=self._is_cuda) for _ in range(N_BUFFERS)
        ]
        self._sent: list[torch.cuda.Event | None] = [None] * N_BUFFERS
        self._next = 0

    def upload(self, pairs: Iterable[tuple[TensorInfo, torch.Tensor]]) -> None:
        """Fill each parameter (or view of one) from its tensor of the same shape.

        Work that is queued on the current stream afterwards sees the new values. Raises OlmfastError naming the
        file and tensor that cannot be read.
        """
        if self._stream is not None:
            self._stream.wait_stream(torch.cuda.current_stream(self.device))  # earlier work still reads the old values
        with torch.cuda.stream(self._stream) if self._stream is not None else nullcontext():
            for info, target in pairs:
                self._upload(info, target)
        if self._stream is not None:
            torch.cuda.current_stream(self.device).wait_stream(self._stream)

    def _upload(self, info: TensorInfo, target: torch.Tensor) -> None:
        if not info.n_bytes:
            return
        rows = target if target.dim() else target.view(1)
        row_bytes = rows[0].numel() * target.element_size()
        step = self._buffers[0].numel() // row_bytes
        if step == 0:  # one row is larger than a buffer
            staged = torch.empty(info.shape, dtype=target.dtype)
            copy_tensors([info.into(staged)])
            target.copy_(staged)
            return
        for begin in range(0, rows.shape[0], step):
            part = rows[begin : begin + step]
            staged = self._buffer(part)
            copy_tensors([info.rows(begin, begin + part.shape[0]).into(staged)])
            part.copy_(staged, non_blocking=True)
            if self._stream is not None:
                event = torch.cuda.Event()  # type: ignore[no-untyped-call]
                event.record(self._stream)
                self._sent[self._next] = event
            self._next = (self._next + 1) % N_BUFFERS

    def _buffer(self, part: torch.Tensor) -> torch.Tensor:
        """The next buffer, in the part's shape and dtype, once its last bytes have left."""
        event = self._sent[self._next]
        if event is not None:
            event.synchronize()
        n_bytes = part.numel() * part.element_size()
        return self._buffers[self._next][:n_bytes].view(part.dtype).view(part.shape)
