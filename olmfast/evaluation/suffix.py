"""The blocks that a unit can change, for several candidates at once.

What a block computes before its first leaf in which candidates differ is the same for all of them. It is computed
once, and replayed for any number of candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from olmfast.evaluation.blocks import BlockwiseModel, Needed, Passing, Recorder
from olmfast.evaluation.cache import Kept
from olmfast.evaluation.forwards import replaced
from olmfast.evaluation.leaves import Leaf, tile


class Suffix:
    """Block `first` and all above it, on one batch of inputs: `hidden`, (batch, width, hidden), enters it.

    `leaves` lie in the first block. `states_below` has room for the keys and values of the blocks below, by task,
    where nothing else keeps them.
    """

    def __init__(
        self, blockwise: BlockwiseModel, first: int, hidden: torch.Tensor, leaves: Sequence[Leaf], needed: Needed
    ) -> None:
        self.blockwise, self.first, self.hidden, self.leaves, self.needed = blockwise, first, hidden, leaves, needed
        self.states_below: dict[int, list[Kept]] = {}
        self._recorder = Recorder()
        self._outputs: dict[Any, list[Any]] = {}  # module -> what it returned, call by call
        self._first_leaf: Leaf | None = None
        self._input = hidden
        blockwise.calls(hidden.shape[1])  # recorded now, while every module has its own forward and no hook
        if leaves:
            self._run_to_first_leaf()

    def begin(self, candidates: Sequence[int], recorder: Recorder | None) -> Passing:
        """What leaves the first block, (K * batch, width, hidden), of candidates by their rows in the stack.

        Keys and values that all candidates share are recorded once.
        """
        return Passing(self._run_first_block(candidates, recorder), recorder, self.needed)

    def forget(self) -> None:
        """No more candidates will begin here: let go of what they have in common."""
        self._outputs = {}
        self.hidden = self._input = self.hidden.new_empty(0)

    def _run_first_block(self, candidates: Sequence[int], recorder: Recorder | None) -> torch.Tensor:
        k, sizes = len(candidates), (len(self.hidden), len(self.needed.rows))
        forwards: dict[Any, Callable[..., Any]] = {
            module: _replay(module, [_tile_all(out, k, sizes) for out in outputs])
            for module, outputs in self._outputs.items()
        }
        for leaf in self.leaves:
            if leaf is self._first_leaf:
                forwards[leaf.module] = lambda _, leaf=leaf: leaf.shared(self._input, candidates)
            else:
                forwards[leaf.module] = lambda x, leaf=leaf: leaf.each(x, candidates, [len(x) // k] * k)
        # Where the MLP's output is at hand, there is nothing of it to leave out.
        mlp = getattr(self.blockwise.blocks[self.first], "mlp", None)
        needed = None if mlp in self._outputs else self.needed
        with replaced(forwards):
            out = self.blockwise.run(tile(self.hidden, k), self.first, self.first + 1, recorder, needed)
        if recorder is not None:
            recorder.states = {**self._recorder.states, **recorder.states}
        return out

    def _run_to_first_leaf(self) -> None:
        """Run the block on one batch until a leaf is reached; keep what modules returned on the way."""
        block, leaves = self.blockwise.blocks[self.first], {leaf.module: leaf for leaf in self.leaves}
        outputs: dict[Any, list[Any]] = {}

        def reach(module: Any, args: tuple[Any, ...]) -> None:
            self._first_leaf, self._input = leaves[module], args[0]
            raise _Reached

        def keep(module: Any, _: Any, out: Any) -> None:
            outputs.setdefault(module, []).append(out)

        hooks = [module.register_forward_pre_hook(reach) for module in leaves]
        hooks += [module.register_forward_hook(keep) for module in block.modules() if module not in leaves]
        try:
            self.blockwise.run(self.hidden, self.first, self.first + 1, self._recorder, self.needed)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        self._outputs = dict(_outermost(block, outputs))


class _Reached(Exception):
    pass


def _tile_all(out: Any, k: int, sizes: tuple[int, ...]) -> Any:
    """Tile the tensors whose first dimension is the batch, or the positions needed of it."""
    if isinstance(out, tuple):
        return tuple(_tile_all(part, k, sizes) for part in out)
    return tile(out, k) if isinstance(out, torch.Tensor) and out.dim() and len(out) in sizes else out


def _replay(module: Any, outputs: list[Any]) -> Callable[..., Any]:
    """A forward that returns these outputs, and computes again once they are used up (a dropout called twice)."""
    left = iter(outputs)

    def forward(*args: Any, **kwargs: Any) -> Any:
        for out in left:
            return out
        return type(module).forward(module, *args, **kwargs)

    return forward


def _outermost(module: Any, finished: Mapping[Any, list[Any]]) -> Iterator[tuple[Any, list[Any]]]:
    """The finished modules below `module` that lie in no other finished one, with their outputs."""
    for child in module.children():
        if child in finished:
            yield child, finished[child]
        else:
            yield from _outermost(child, finished)
