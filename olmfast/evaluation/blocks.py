"""A Transformers model taken apart into blocks: what enters them, any run of them, and what follows them.

No family is known here. What a block is called with depends on the width of the input alone (inputs are padded on
the right, positions count from 0), so it is recorded once per width and handed over again.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from olmfast.evaluation.forwards import replaced
from olmfast.evaluation.head import head_of
from olmfast.evaluation.residency import RESIDENT, Residency
from olmfast.evaluation.transit import sent
from olmfast.weights.architecture import Architecture

WIDTH_STEP = 8  # widths are multiples of it, so that few are recorded; of less, where that were an eighth or more
State = tuple[torch.Tensor, torch.Tensor]  # one block's keys and values


class _Entered(Exception):
    """Carries what enters the first block out of the model's own forward."""


class _Call(NamedTuple):
    """What a block was called with, its hidden states taken out; `_CACHE` stands where the cache stood."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]


_CACHE = object()


class Needed(NamedTuple):
    """The positions of a batch that matter after the last block: rows and columns, (positions,) each."""

    batch: int
    rows: torch.Tensor
    columns: torch.Tensor

    def of(self, hidden: torch.Tensor) -> torch.Tensor:
        """hidden (K * batch, width, hidden) -> (K * positions, hidden), one copy of the batch after another."""
        return hidden[self._index(hidden)]

    def spread(self, values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """The values (K * positions, out) where `of(like)` takes its own; zeros elsewhere."""
        full = values.new_zeros(*like.shape[:2], values.shape[-1])
        full[self._index(like)] = values
        return full

    def _index(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        k = len(hidden) // self.batch
        copies = torch.arange(k, device=self.rows.device)[:, None] * self.batch
        return (self.rows + copies).flatten(), self.columns.repeat(k)


class Recorder:
    """Stands in for a KV cache while whole inputs run through blocks: keeps each block's keys and values."""

    def __init__(self) -> None:
        self.states: dict[int, State] = {}

    def update(self, key: torch.Tensor, value: torch.Tensor, layer_idx: int, *_: object, **__: object) -> State:
        """Called by the attention of block `layer_idx`; keys and values are (batch, heads, width, head size)."""
        self.states[layer_idx] = (key, value)
        return key, value


@dataclass
class Passing:
    """Inputs on their way through the blocks: activations (batch, width, hidden), and what is recorded and needed of
    them."""

    hidden: torch.Tensor
    recorder: Recorder | None = None
    needed: Needed | None = None


class BlockwiseModel:
    """A causal language model that is run block by block, on right-padded inputs of positions 0, 1, 2, ..."""

    def __init__(self, module: Any, architecture: Architecture, residency: Residency = RESIDENT) -> None:
        family = architecture.family
        self.module, self.context, self.visit = module, architecture.context, residency.visit
        self.is_resident = residency is RESIDENT  # all blocks are in memory, all along
        self.blocks = list(module.get_submodule(family.blocks))
        norm = next(name for name in family.other_boundary if architecture.is_norm(name.rsplit(".", 1)[0]))
        self.head = head_of(module, self.blocks, module.get_submodule(norm.rsplit(".", 1)[0]))
        weight = module.get_output_embeddings().weight
        self.device: torch.device = weight.device
        self.hidden_bytes: int = weight[0].nbytes  # of a token's activations between two blocks
        self.state_bytes = 0  # of a token's keys and values in all blocks; known once a call has been recorded
        self._calls: dict[int, list[_Call]] = {}
        self._n_outputs: int | None = None  # of a block, 0 where it gives a tensor; None: not seen yet

    def pad(self, inputs: Sequence[Sequence[int]]) -> torch.Tensor:
        """Token ids (batch, width) on the model's device, zeros after each input."""
        ids = torch.zeros(len(inputs), self.width([len(ids) for ids in inputs]), dtype=torch.long)
        for row, tokens in enumerate(inputs):
            ids[row, : len(tokens)] = torch.tensor(tokens)
        return sent(ids, self.device)

    def pad_hidden(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """Activations (tokens, hidden) of several inputs as one batch (batch, width, hidden), zeros after each."""
        width = self.width([len(x) for x in inputs])
        hidden = inputs[0].new_zeros(len(inputs), width, inputs[0].shape[1])
        for row, x in enumerate(inputs):
            hidden[row, : len(x)] = x
        return hidden

    def width(self, lengths: Sequence[int]) -> int:
        """How wide a batch of inputs of these lengths is."""
        longest = max(lengths)
        step = min(WIDTH_STEP, 1 << max(longest // 8, 1).bit_length() - 1)
        return max(longest, min(-(-longest // step) * step, self.context))

    def enter(self, ids: torch.Tensor) -> torch.Tensor:
        """Token ids (batch, width) -> what enters the first block, (batch, width, hidden)."""

        def stop(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            raise _Entered(take_hidden(args, kwargs)[0])

        hook = self.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.module.base_model(input_ids=ids, use_cache=False)
        except _Entered as entered:
            hidden: torch.Tensor = entered.args[0]
            return hidden
        finally:
            hook.remove()
        raise AssertionError("the model never called its first block")

    def run(
        self,
        hidden: torch.Tensor,
        first: int,
        last: int,
        recorder: Recorder | None = None,
        needed: Needed | None = None,
    ) -> torch.Tensor:
        """Activations entering block `first` -> those leaving block `last` - 1; both (batch, width, hidden).

        With `needed`, the last block's MLP computes nothing for other positions, whose results are then void.
        """
        for index in range(first, last):
            args, kwargs = self.arguments(index, hidden.shape[1], recorder)
            with mlp_only_for(self.blocks[index], needed if index == len(self.blocks) - 1 else None):
                out = self.blocks[index](hidden, *args, **kwargs)
            hidden = out[0] if isinstance(out, tuple) else out
        return hidden

    def run_together(self, several: Sequence[Passing], first: int, last: int) -> None:
        """Bring what enters block `first` to where it leaves block `last` - 1: all through one block, then through the
        next, each by itself, so that a block is visited once."""
        for index in range(first, last):
            with self.visit(index):
                for one in several:
                    one.hidden = self.run(one.hidden, index, index + 1, one.recorder, one.needed)

    def arguments(self, index: int, width: int, cache: Any = None) -> _Call:
        """What block `index` is called with for inputs of this width, `cache` in the cache's place."""
        call = self.calls(width)[index]
        return _Call(
            tuple(cache if arg is _CACHE else arg for arg in call.args),
            {key: cache if arg is _CACHE else arg for key, arg in call.kwargs.items()},
        )

    def calls(self, width: int) -> list[_Call]:
        """What each block is called with for inputs of this width; batch dimensions are 1 and broadcast.

        Blocks compute nothing for it, but for the first time, when it is seen what they give.
        """
        if width not in self._calls:
            from transformers import DynamicCache

            cache = DynamicCache(config=self.module.config)
            calls: list[_Call] = []

            def record(_: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                _, args, kwargs = take_hidden(args, kwargs)
                calls.append(
                    _Call(
                        tuple(_CACHE if arg is cache else arg for arg in args),
                        {key: _CACHE if arg is cache else arg for key, arg in kwargs.items()},
                    )
                )

            def see(_: Any, __: Any, out: Any) -> None:
                self._n_outputs = len(out) if isinstance(out, tuple) else 0

            with ExitStack() as hooks:
                for block in self.blocks:
                    hooks.callback(block.register_forward_pre_hook(record, with_kwargs=True).remove)
                if self._n_outputs is None:
                    hooks.callback(self.blocks[-1].register_forward_hook(see).remove)
                else:
                    hooks.enter_context(replaced(dict.fromkeys(self.blocks, self._as_it_came)))
                ids = torch.zeros(1, width, dtype=torch.long, device=self.device)
                self.module.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
            self._calls[width] = calls
            if not self.state_bytes:
                self.state_bytes = 2 * sum(layer.keys.nbytes // layer.keys.shape[2] for layer in cache.layers)
        return self._calls[width]

    def _as_it_came(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of a block that computes nothing."""
        hidden = take_hidden(args, kwargs)[0]
        return (hidden, *[None] * (self._n_outputs - 1)) if self._n_outputs else hidden


@contextmanager
def mlp_only_for(block: Any, needed: Needed | None) -> Iterator[None]:
    """An MLP mixes no positions, so that in the last block it can leave out those that nobody looks at."""
    mlp = getattr(block, "mlp", None)
    if needed is None or mlp is None:
        yield
        return
    compute = mlp.forward

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        out = compute(needed.of(x)[:, None], *args, **kwargs)
        if isinstance(out, tuple):
            return needed.spread(out[0][:, 0], x), *out[1:]
        return needed.spread(out[:, 0], x)

    with replaced({mlp: forward}):
        yield


def take_hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[torch.Tensor, tuple[Any, ...], dict[str, Any]]:
    """What a block was called with: its hidden states, and the other arguments."""
    if args:
        return args[0], args[1:], kwargs
    return kwargs["hidden_states"], args, {key: arg for key, arg in kwargs.items() if key != "hidden_states"}
