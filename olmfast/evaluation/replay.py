"""Work that is queued on a GPU again and again: captured as a CUDA graph, and replayed by one launch.

A step of decoding is a thousand small kernels, which Python queues more slowly than a GPU runs them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from olmfast.evaluation.memory import is_out_of_memory


class Replayed:
    """Does the same work at each call: on a GPU as a CUDA graph, elsewhere by calling it.

    The work takes and leaves everything in memory that stays where it is. Unless `is_loaded`, the first call is not
    captured: it compiles and loads what it launches. Work that cannot be captured after such a call, because it waits
    for the device, `is_refused`, and goes on being called.
    """

    def __init__(self, device: torch.device, is_loaded: bool = False) -> None:
        self.device, self._is_loaded = device, is_loaded
        self._graph: Any = None
        self._was_called = self.is_refused = False

    def __call__(self, work: Callable[[], None]) -> None:
        """Queue the work on the current stream. It is not held: it may hold this."""
        ready = self._was_called or self._is_loaded
        if self._graph is None and ready and not self.is_refused and self.device.type == "cuda":
            self._graph = self._captured(work)
            self._is_loaded = self._graph is not None
            self.is_refused = self._was_called and not self._is_loaded
        if self._graph is not None:
            self._graph.replay()
            return
        work()
        self._was_called = True

    @property
    def is_captured(self) -> bool:
        """Whether calls replay a graph."""
        return self._graph is not None

    def _captured(self, work: Callable[[], None]) -> Any:
        """The work as a graph, or None. What is captured is not done."""
        graph, stream, current = torch.cuda.CUDAGraph(), _stream(self.device), torch.cuda.current_stream(self.device)
        failure: BaseException | None = None
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            # Other threads go on with what they do: bringing the next weights.
            graph.capture_begin(capture_error_mode="thread_local")
            try:
                work()
            except BaseException as error:  # a capture has to be ended, whatever comes
                failure = error
            try:
                graph.capture_end()
            except RuntimeError as error:
                failure = failure or error
        current.wait_stream(stream)
        if failure is None:
            return graph
        if is_out_of_memory(failure) or not isinstance(failure, RuntimeError):
            raise failure
        return None


@functools.cache
def _stream(device: torch.device) -> Any:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
