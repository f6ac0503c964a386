"""Paths that run without being written: modules of hops over blocks that lie in memory once.

A hop is a donor's own block at a place of its own, with a place of its own in a cache; what the factors of the hop
behind it do is done to what the block's writers give. The rest (embedding, final norm, head) is shared too. The
result is that of the folded model but for rounding: here factors meet activations, there the weights.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from olmfast.dataflow.folding import fold
from olmfast.dataflow.hops import Hop
from olmfast.errors import InputError
from olmfast.evaluation.blocks import BlockwiseModel, take_hidden
from olmfast.evaluation.blueprint import build_module
from olmfast.evaluation.forwards import replaced
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.scorer import Candidate
from olmfast.weights.expressions import Copy
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe
from olmfast.weights.skeletons import Skeletons
from olmfast.weights.sources import Expression

Act = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class PathCandidate(Candidate):
    """A path as a candidate: its hops, and the recipe of the folded model, which any Scorer can build."""

    hops: tuple[Hop, ...] = ()

    @classmethod
    def of_hops(cls, label: str, hops: Sequence[Hop], pool: Pool, ends: tuple[str, str], skeletons: Skeletons) -> Any:
        """The candidate of a path; `ends` are the input and the output model. Raises what `fold` raises."""
        return cls(label, recipe=fold(hops, pool, *ends, skeletons), hops=tuple(hops))


class HopBlock(torch.nn.Module):
    """A block at one place of a path. `before` acts on what enters it, `writing` on what its writers give."""

    def __init__(self, block: Any, place: int, before: Act | None, writing: Sequence[tuple[Any, Act]]) -> None:
        super().__init__()
        self.block, self.place, self.before = block, place, before
        counted = [(module, getattr(module, "layer_idx", None)) for module in block.modules()]
        self._counted = [(module, index) for module, index in counted if isinstance(index, int)]
        self._forwards = {module: _acted(module.forward, act) for module, act in writing}

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)  # what a model asks its blocks, such as their kind

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own forward, as this place has it."""
        hidden, args, kwargs = take_hidden(args, kwargs)
        hidden = hidden if self.before is None else self.before(hidden)
        try:
            for module, _ in self._counted:
                module.layer_idx = self.place
            with replaced(self._forwards):
                return self.block(hidden, *args, **kwargs)
        finally:
            for module, index in self._counted:
                module.layer_idx = index


class PathModel:
    """What runs paths: from the embedding of `entry`, whose working model `model` is, to the head of `out`.

    The blocks of each donor are read once, when a path first uses one of them. Those of the entry are the working
    model's own, so that this must have the entry's values while a path runs.
    """

    def __init__(self, model: WorkingModel, entry: str, out: str, skeletons: Skeletons) -> None:
        self.sources, self.device, self.dtype = model.sources, model.device, model.dtype
        self.whole, self.tensors, self.architecture = model.module, tuple(model.recipe.tensors), model.architecture
        self.entry, self.out, self.skeletons = entry, out, skeletons
        self._stacks: dict[str, BlockwiseModel] = {}
        self._shells: dict[str, Any] = {}

    @property
    def pool(self) -> Pool:
        """The donors."""
        return self.sources.pool

    def taken_apart(self, donor: str) -> BlockwiseModel:
        """A donor's blocks, as the entry's config has them, each of the kind that it is in the donor."""
        if donor not in self._stacks:
            module = self.whole if donor == self.entry else self._load(donor)
            with torch.inference_mode():
                self._stacks[donor] = BlockwiseModel(module, self.architecture)
        return self._stacks[donor]

    def blocks_of(self, hops: Sequence[Hop]) -> list[HopBlock]:
        """The blocks of a path, in order."""
        behind = [*hops[1:], None]
        return [
            self._block(hop, place, next_hop) for place, (hop, next_hop) in enumerate(zip(hops, behind, strict=True))
        ]

    def module_of(self, hops: Sequence[Hop]) -> Any:
        """The Transformers module of a path, of shared parts; the next one asked for may be the same object."""
        layers = [[(hop.donor, hop.block)] for hop in hops]
        module, family = self._shell(self._config(layers)), self.architecture.family
        parent, _, name = family.blocks.rpartition(".")
        setattr(module.get_submodule(parent), name, torch.nn.ModuleList(self.blocks_of(hops)))
        return module

    def _block(self, hop: Hop, place: int, behind: Hop | None) -> HopBlock:
        block, architecture = self.taken_apart(hop.donor).blocks[hop.block], self.architecture
        before = self._act(hop.scale, hop.bias) if place == 0 and hop.changes else None
        writing: list[tuple[Any, Act]] = []
        if behind is not None and behind.changes:
            *others, last = [getattr(block, name) for name in architecture.writing_parts]
            writing += [(module, self._act(behind.scale, None)) for module in others]
            writing.append((last, self._act(behind.scale, behind.bias, architecture.block_scale)))
        return HopBlock(block, place, before, writing)

    def _act(self, scale: float | Expression | None, bias: float | Expression | None, times: float = 1.0) -> Act:
        """`scale * d + bias / times`: the factors of a hop, for what the model multiplies by `times` afterwards."""
        a, b = (
            factor.value(self.sources).to(self.device, self.dtype) if isinstance(factor, Expression) else factor
            for factor in (scale, bias)
        )

        def act(d: torch.Tensor) -> torch.Tensor:
            if isinstance(a, torch.Tensor) and a.dim() == 2:
                d = torch.matmul(d, a.T)
            elif a is not None:
                d = d * a
            return d if b is None else d + b / times

        return act

    def _load(self, donor: str) -> Any:
        """A donor's model with the entry's settings. What it shares with the entry's is not kept twice."""
        layers = [[(donor, index)] for index in range(self.pool[donor].architecture.n_blocks)]
        config, base = self._config(layers), self.pool[self.entry].config
        edits = {key: value for key, value in config.items() if base.get(key) != value}
        tensors = {name: Copy(donor, name) for name in self.tensors}
        module = WorkingModel(Recipe(self.entry, tensors, edits), self.sources, self.device, self.dtype).module
        if donor != self.out:
            module.set_input_embeddings(self.whole.get_input_embeddings())
            module.set_output_embeddings(self.whole.get_output_embeddings())
        return module

    def _config(self, layers: Sequence[Sequence[tuple[str, int]]]) -> dict[str, Any]:
        used = sorted({name for layer in layers for name, _ in layer})
        answer = self.skeletons.stack(
            self.pool[self.entry].config, {name: self.pool[name].config for name in used}, layers
        )
        if "config" not in answer:
            raise InputError(f"{self.entry}: {answer.get('fault') or answer['unknown']}")
        return dict(answer["config"])

    def _shell(self, config: dict[str, Any]) -> Any:
        """A module of a config without blocks of its own; all else is the entry's, and after the blocks the output
        model's."""
        key = json.dumps(config, sort_keys=True, default=str)
        if key not in self._shells:
            with torch.device("meta"):
                where = self.pool[self.entry].folder / "config.json"
                shell = build_module(config, where, self.pool.tied, self.dtype)
            _share(shell, self.whole, self.architecture.family.blocks)
            out = self.whole if self.out == self.entry else self.taken_apart(self.out).module
            for name in self.architecture.family.other_boundary:
                module = name.rpartition(".")[0]
                if self.architecture.is_norm(module):
                    parent, _, own = module.rpartition(".")
                    setattr(shell.get_submodule(parent), own, out.get_submodule(module))
            shell.set_output_embeddings(out.get_output_embeddings())
            self._shells[key] = shell.eval()
        return self._shells[key]


def _share(shell: Any, module: Any, blocks: str) -> None:
    """Give a module the parts of another, all but its blocks."""
    parent, _, name = blocks.rpartition(".")
    for part, own in list(module.get_submodule(parent).named_children()):
        if part != name:
            setattr(shell.get_submodule(parent), part, own)
    first = parent.split(".")[0]
    for part, own in list(module.named_children()):
        if part != first:
            setattr(shell, part, own)


def _acted(compute: Callable[..., Any], act: Act) -> Callable[..., Any]:
    """A module's forward, with something done to what it gives."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        out = compute(*args, **kwargs)
        return (act(out[0]), *out[1:]) if isinstance(out, tuple) else act(out)

    return forward
