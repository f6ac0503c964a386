"""Where the parameters of blocks are: in memory all along, or in one of two buffers while a block is visited.

A model that fits is `Resident`: nothing is fetched. Of one that does not, only what is outside of the blocks has memory
of its own, and is `Streamed`: a block's parameters are filled from mapped files when it is visited, and while it
computes, the block that is likely to come next is brought to the other buffer, by a thread, and on a GPU on a stream of
its own. Whoever runs a block visits it: its forward does so by itself. Whoever has more to do in it (several
batches, a gradient) visits it around all of that, so that it is fetched once.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from itertools import count
from typing import Any, Protocol
from weakref import ref

import torch

from olmfast.evaluation.memory import N_BUFFERS
from olmfast.evaluation.upload import Carrier
from olmfast.weights.architecture import Slot
from olmfast.weights.checkpoint import TensorInfo

ALIGNMENT = 256  # of parameters in a buffer, in bytes


class Residency(Protocol):
    """Who knows where blocks' parameters are."""

    def visit(self, block: int, then: int | None = None) -> AbstractContextManager[None]:
        """While the block's parameters are in memory; `then` is the block that will be visited next, if it is known.

        Visits nest, no more than two blocks deep.
        """
        ...

    def __contains__(self, tensor: str) -> bool:
        """Whether a tensor (by canonical name) is in memory only while its block is visited."""
        ...

    def put(self, places: Mapping[str, TensorInfo]) -> None:
        """Have such tensors filled from these places from now on. None of their blocks may be visited now."""
        ...


class Resident:
    """Of a model that fits."""

    def visit(self, block: int, then: int | None = None) -> AbstractContextManager[None]:  # noqa: ARG002
        """See `Residency.visit`: all is there."""
        return nullcontext()

    def __contains__(self, tensor: str) -> bool:
        """See `Residency`."""
        return False

    def put(self, places: Mapping[str, TensorInfo]) -> None:
        """See `Residency.put`: there are none."""


RESIDENT = Resident()


def buffer_bytes(sizes: Iterable[int]) -> int:
    """What a buffer takes for a block whose parameters have so many bytes."""
    return sum(map(_aligned, sizes))


def _aligned(n_bytes: int) -> int:
    return -(-n_bytes // ALIGNMENT) * ALIGNMENT


@dataclass
class _Buffer:
    """Memory for a block, and which it `holds`: its model's number, since models can share buffers, and its own."""

    memory: torch.Tensor
    holds: tuple[int, int] | None = None
    coming: Future[Any] | None = None  # which is done when the last byte has been sent
    left: Any = None  # on a GPU, the event after which nothing that is queued reads it


class Buffers:
    """Two buffers on a device, as large as the largest block that was asked for, and who fills them.

    `fetched` counts the blocks that were brought, `waited` those of them that were not there in time.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.carrier = device, Carrier(device)
        self.fetched = self.waited = 0
        self.each: list[_Buffer] = []
        self.numbers = count()  # of models
        self._thread = ThreadPoolExecutor(1, "blocks")

    def fit(self, n_bytes: int) -> None:
        """Have room for blocks of so many bytes. What the buffers hold may be lost."""
        if self.each and self.each[0].memory.numel() >= n_bytes:
            return
        for buffer in self.each:
            if buffer.coming is not None and buffer.coming.exception() is None:
                self.carrier.wait_for(buffer.coming.result())
        self.each = []  # given back before more is taken
        with torch.inference_mode(False):  # gradients pass what lies there
            zeros = [torch.zeros(n_bytes, dtype=torch.uint8, device=self.device) for _ in range(N_BUFFERS)]
        self.each = [_Buffer(memory, left=self.carrier.mark()) for memory in zeros]

    def drop(self, stale: Container[tuple[int, int]]) -> None:
        """Forget blocks that have other values now, once they have come."""
        for buffer in self.each:
            if buffer.holds in stale:
                if buffer.coming is not None:
                    buffer.coming.exception()
                buffer.holds = None

    def fetch(self, buffer: _Buffer, key: tuple[int, int], pairs: list[tuple[TensorInfo, torch.Tensor]]) -> None:
        """Begin to bring a block to a buffer."""
        if buffer.coming is not None:
            buffer.coming.exception()  # what was on its way there in vain has come, or failed, which nobody minds
        self.fetched += 1
        buffer.holds = key
        buffer.coming = self._thread.submit(self.carrier.carry, pairs, buffer.left)

    def wait_for(self, buffer: _Buffer) -> None:
        """Until the block is there, for what is queued on the device from now on. Raises what fetching raised."""
        assert buffer.coming is not None
        self.waited += not buffer.coming.done()
        try:
            self.carrier.wait_for(buffer.coming.result())
        except BaseException:
            buffer.holds = None
            raise


class Streamed:
    """Of a module whose blocks take turns in `buffers`; between visits their parameters are NaN and take no memory.

    `slots` say where tensors (by canonical name) land. A block's values are those that `put` said last.
    """

    def __init__(self, module: Any, blocks: str, slots: Mapping[str, Slot], buffers: Buffers) -> None:
        """Takes the blocks' parameters out of the module, and moves the rest to the buffers' device."""
        self.buffers, self._number = buffers, next(buffers.numbers)
        self._blocks = list(module.get_submodule(blocks))
        self._parameters = [
            {name: own for name, own in module.named_parameters() if name.startswith(f"{blocks}.{index}.")}
            for index in range(len(self._blocks))
        ]
        owner = {name: index for index, own in enumerate(self._parameters) for name in own}
        self._block_of = {name: owner[slot.parameter] for name, slot in slots.items() if slot.parameter in owner}
        self._slots = {name: slots[name] for name in self._block_of}
        self._places: list[dict[str, TensorInfo]] = [{} for _ in self._blocks]
        self._open: dict[int, _Buffer] = {}
        self._latest, self._step, self._began = -1, 1, 0
        buffers.fit(max(buffer_bytes(one.nbytes for one in own.values()) for own in self._parameters))
        shapes = [{name: one.shape for name, one in own.items()} for own in self._parameters]
        for own in self._parameters:
            for one in own.values():
                one.data = one.data.new_empty(())
        module.to(buffers.device)
        self._absent = [
            {name: torch.full_like(own[name], torch.nan).expand(shape) for name, shape in of_block.items()}
            for own, of_block in zip(self._parameters, shapes, strict=True)
        ]
        for index, block in enumerate(self._blocks):
            self._point(index, self._absent[index])
            block.forward = _visiting(ref(block), index, ref(self))

    def __contains__(self, tensor: str) -> bool:
        """See `Residency`: whether it lies in a block."""
        return tensor in self._block_of

    def put(self, places: Mapping[str, TensorInfo]) -> None:
        """See `Residency.put`."""
        changed = set()
        for name, place in places.items():
            own = self._places[self._block_of[name]]
            if own.get(name) is not place:
                own[name] = place
                changed.add((self._number, self._block_of[name]))
        self.buffers.drop(changed)

    @contextmanager
    def visit(self, block: int, then: int | None = None) -> Iterator[None]:
        """See `Residency.visit`."""
        if block in self._open:
            yield
            return
        buffer = self._brought(block)
        self._open[block] = buffer
        self._point(block, self._views(block, buffer))
        try:
            self._bring_ahead(block, then)
            yield
        finally:
            del self._open[block]
            self._point(block, self._absent[block])
            buffer.left = self.buffers.carrier.mark()

    def _brought(self, block: int) -> _Buffer:
        """The buffer that holds the block, once it is there."""
        buffer = self._holder_of(block)
        if buffer is None:
            last = self._holder_of(self._latest)
            free = [one for one in self.buffers.each if not any(one is open for open in self._open.values())]
            buffer = next((one for one in free if one is not last), free[0])
            self._fetch(block, buffer)
        self.buffers.wait_for(buffer)
        return buffer

    def _bring_ahead(self, block: int, then: int | None) -> None:
        """Begin to bring what comes after this block: as a sweep that goes up or down goes on, or begins again."""
        if block != self._latest:
            step = block - self._latest
            if step in (1, -1):
                self._step = step
            else:
                self._step, self._began = 1, block
            self._latest = block
        if then is None:
            then = block + self._step
            then = then if 0 <= then < len(self._blocks) else self._began
        others = [one for one in self.buffers.each if not any(one is open for open in self._open.values())]
        if others and self._holder_of(then) is None:
            self._fetch(then, others[0])

    def _holder_of(self, block: int) -> _Buffer | None:
        return next((one for one in self.buffers.each if one.holds == (self._number, block)), None)

    def _fetch(self, block: int, buffer: _Buffer) -> None:
        views = self._views(block, buffer)
        pairs = [
            (place, self._slots[name].of(views[self._slots[name].parameter]))
            for name, place in self._places[block].items()
        ]
        self.buffers.fetch(buffer, (self._number, block), pairs)

    def _views(self, block: int, buffer: _Buffer) -> dict[str, torch.Tensor]:
        """The block's parameters as they lie in a buffer."""
        found, begin = {}, 0
        for name, absent in self._absent[block].items():
            n_bytes = absent.numel() * absent.element_size()
            found[name] = buffer.memory[begin : begin + n_bytes].view(absent.dtype).view(absent.shape)
            begin += _aligned(n_bytes)
        return found

    def _point(self, block: int, at: Mapping[str, torch.Tensor]) -> None:
        for name, parameter in self._parameters[block].items():
            parameter.data = at[name]


def _visiting(block: ref[Any], index: int, residency: ref[Streamed]) -> Callable[..., Any]:
    """A block's own forward, during a visit. It holds nothing, so that a module is let go with its last user."""

    def visiting(*args: Any, **kwargs: Any) -> Any:
        own, visited = block(), residency()
        assert own is not None
        assert visited is not None
        with visited.visit(index):
            return type(own).forward(own, *args, **kwargs)

    return visiting
