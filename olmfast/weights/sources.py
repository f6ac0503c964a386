"""Where expressions find what they are made of: the donors, the stored tensors, and what was computed lately."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from olmfast.errors import OlmfastError
from olmfast.weights.checkpoint import TensorInfo, prefetch, read_header
from olmfast.weights.offspring import Parent
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Expression


class Sources:
    """The donors and the folder of stored tensors that expressions refer to.

    The values of expressions that were wanted last are kept, `memory` bytes of them. `device` is where what is read a
    chunk at a time is computed, `evolve_on` where the parents of offspring lie.
    """

    def __init__(
        self,
        pool: Pool,
        folder: Path,
        memory: int = 0,
        device: torch.device | str = "cpu",
        evolve_on: torch.device | str = "cpu",
    ) -> None:
        self.pool, self.folder, self.memory = pool, folder, memory
        self.device, self.evolve_on = torch.device(device), torch.device(evolve_on)
        self._opened: dict[tuple[str, str, str], TensorInfo] = {}
        self._kept: OrderedDict[Expression, torch.Tensor] = OrderedDict()
        self._n_kept = 0
        self._parent: tuple[tuple[Expression, torch.dtype], Parent] | None = None
        self._reader = ThreadPoolExecutor(1, "prefetch")

    def value(self, expression: Expression) -> torch.Tensor:
        """The tensor on the CPU, in the dtype it is or would be saved with. It is not the caller's to change."""
        return expression.value(self)

    def kept(self, expression: Expression, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """The expression's value, computed unless it is among those kept."""
        if expression in self._kept:
            self._kept.move_to_end(expression)
            return self._kept[expression]
        value = compute()
        self._kept[expression] = value
        self._n_kept += value.nbytes
        while self._n_kept > self.memory:
            self._n_kept -= self._kept.popitem(last=False)[1].nbytes
        return value

    def parent(self, expression: Expression, dtype: torch.dtype) -> Parent:
        """The weight that offspring descend from, rounded to `dtype`; the last one is kept with its factors."""
        key = (expression, dtype)
        if self._parent is None or self._parent[0] != key:
            self._parent = None  # given back before more is taken
            self._parent = (key, Parent(self.value(expression).to(dtype).to(self.evolve_on)))
        return self._parent[1]

    def release_parent(self) -> None:
        """Give back the memory of the parent kept."""
        self._parent = None

    def stored(self, file: str, tensor: str, digest: str) -> TensorInfo:
        """Where a refined tensor lies. Raises OlmfastError if its bytes are not those of the digest."""
        key = (file, tensor, digest)
        if key not in self._opened:
            path = self.folder / file
            info = next((info for info in read_header(path) if info.name == tensor), None)
            if info is None or info.digest() != digest:
                raise OlmfastError(f"{path}: {tensor}: the bytes have changed since the report was written")
            self._opened[key] = info
        return self._opened[key]

    def prefetch(self, expressions: Iterable[Expression]) -> None:
        """Let a thread read from disk the bytes that will be wanted next as they are; returns at once."""
        infos = [info for expression in expressions if (info := expression.info(self)) is not None]
        if infos:
            self._reader.submit(prefetch, infos)
