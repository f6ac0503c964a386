"""The working model: a live Transformers module, kept in step with its recipe by copying bytes in place."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial

import torch

from olmfast.evaluation.blueprint import build_module, is_tied, map_slots
from olmfast.evaluation.fusing import fuse
from olmfast.evaluation.residency import RESIDENT, Buffers, Residency, Streamed
from olmfast.evaluation.scorer import Candidate
from olmfast.evaluation.upload import Uploader
from olmfast.weights.architecture import Architecture
from olmfast.weights.checkpoint import FLOATS, TensorInfo, copy_tensors
from olmfast.weights.chunks import Held, Readable
from olmfast.weights.filing import Wanted, filed
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Expression, Sources

View = Callable[[torch.Tensor], torch.Tensor]
CANDIDATE_SHARE = 8  # a candidate's values are kept if so many candidates' are


_Filling = tuple[str, Expression, torch.Tensor]  # a tensor's name, its values, and where they go


class Stack:
    """K values of each of some tensors: `values` are (K, *shape) by name, in the module's dtype and on its device.

    What lies in files is fetched a candidate at a time, when its row is first asked for: a GPU computes with those
    before it while it travels.
    """

    def __init__(
        self,
        values: Mapping[str, torch.Tensor],
        left: Mapping[int, list[_Filling]],
        fill: Callable[[Sequence[_Filling]], None],
    ) -> None:
        self.values, self._left, self._fill = values, dict(left), fill

    def bring(self, rows: Iterable[int]) -> None:
        """Have these rows filled."""
        rows = [row for row in dict.fromkeys(rows) if row in self._left]
        if rows:
            self._fill([one for row in rows for one in self._left[row]])
        for row in rows:  # not before they are: where that fails, it is tried again
            del self._left[row]


class WorkingModel:
    """A module in `dtype` on `device` whose parameters always equal `recipe`, outside of a trial.

    Values are rounded to the dtype they would be saved with before they are converted to the module's. Where blocks are
    `streamed`, `residency` has them: their parameters have values while they are visited (`residency.py`), which come
    from the donors' files, or where they are computed, from a file that they are kept in meanwhile.
    """

    def __init__(
        self, recipe: Recipe, sources: Sources, device: torch.device, dtype: torch.dtype, streamed: bool = False
    ) -> None:
        self.sources, self.device, self.dtype = sources, device, dtype
        self.residency: Residency = RESIDENT
        self._buffers = Buffers(device) if streamed else None
        self._uploader: Uploader | None = None
        self._left = set[str]()  # tensors whose live values are a candidate's still
        self._rebuild(recipe)

    def _rebuild(self, recipe: Recipe) -> None:
        """Build the module that the recipe configures, and fill it."""
        self.recipe = recipe
        self._kept: dict[str, dict[Expression, TensorInfo]] = {}  # where streamed tensors of these values lie
        self._build(recipe)
        self.apply(recipe.tensors)

    def _build(self, recipe: Recipe) -> None:
        pool = self.sources.pool
        base, architecture = pool[recipe.base], pool.architecture.edited(recipe.config_edits)
        where = base.folder / "config.json"
        module = build_module(recipe.config(base.config), where, is_tied(recipe, pool), self.dtype)
        self._slots = map_slots(module, architecture, recipe.tensors, where)
        if self._buffers is not None:
            self.residency = Streamed(module, architecture.family.blocks, self._slots, self._buffers)
        self.module = module.to(self.device)
        fuse(self.module)
        self._parameters: dict[str, torch.nn.Parameter] = dict(self.module.named_parameters())

    def apply(self, values: Mapping[str, Expression], keep: bool = True) -> None:
        """Make these (canonical name -> expression) the live parameters' values; the recipe is not changed.

        `keep` what is computed for them, if `Sources` keeps as much: they are wanted again. Otherwise only of a few
        tensors, such as a candidate's that is tried on one part of the questions after another.
        """
        known = {name: wanted for name, wanted in values.items() if name in self._slots}
        streamed = {name: known.pop(name) for name in list(known) if name in self.residency}
        self.residency.put(self._placed(streamed))
        self._fill([(name, wanted, self.live(name)) for name, wanted in known.items()], keep)

    def _placed(self, values: Mapping[str, Expression]) -> dict[str, TensorInfo]:
        """Where streamed tensors of these values lie: in a donor's file, or computed once for as long as they, or what
        the recipe says of them, are wanted."""
        places, wanted = dict[str, TensorInfo](), dict[str, Wanted]()
        for name, value in values.items():
            known = self._kept.get(name, {})
            own = self.recipe.tensors.get(name)
            self._kept[name] = {one: place for one, place in known.items() if one in (own, value)}
            saved, info, live = self._saved_dtype(name, value), value.info(self.sources), self.live(name)
            if info is not None and _passes_unchanged(info, saved, live):
                places[name] = info
            elif value in known:
                places[name] = known[value]
            else:
                wanted[name] = Wanted(value, saved, tuple(live.shape))
        if wanted:
            for name, place in filed(wanted, self.sources).items():
                self._kept[name][values[name]] = places[name] = place
        return places

    def stack(self, several: Sequence[Mapping[str, Expression]]) -> Stack:
        """K values of each of some tensors as they would be live; `several` are values of the same tensors."""
        values: dict[str, torch.Tensor] = {}
        left: dict[int, list[_Filling]] = {row: [] for row in range(len(several))}
        for name in several[0]:
            own = [one[name] for one in several]
            kind = type(own[0])
            stacked = kind.stack(own, self.sources) if all(type(one) is kind for one in own) else None
            if stacked is not None:
                values[name] = stacked.to(self.device, self._saved_dtype(name, own[0])).to(self.dtype)
                continue
            live = self.live(name)
            values[name] = live.new_empty(len(own), *live.shape)
            for row, one in enumerate(own):
                left[row].append((name, one, values[name][row]))
        return Stack(values, left, partial(self._fill, keep=False, of=len(several)))

    def live(self, name: str) -> torch.Tensor:
        """The parameter, or the view of one, that a tensor fills; NaN where it lies in a block that is not there."""
        slot = self._slots[name]
        return slot.of(self._parameters[slot.parameter].data)

    def equals(self, name: str, value: torch.Tensor) -> bool:
        """Whether a tensor's parameter, or its view of one, holds just these values."""
        block = self.architecture.block_of(name)
        with nullcontext() if block is None else self.residency.visit(block):
            return torch.equal(self.live(name), value)

    def parameters_of(self, names: Iterable[str]) -> list[tuple[torch.nn.Parameter, list[tuple[str, View]]]]:
        """The live parameters that tensors fill, each with these and the view of the parameter, or of what has its
        shape, that belongs to them."""
        found: dict[str, list[tuple[str, View]]] = {}
        for name in names:
            if name in self._slots:
                slot = self._slots[name]
                found.setdefault(slot.parameter, []).append((name, slot.of))
        return [(self._parameters[parameter], own) for parameter, own in found.items()]

    def difference(self, begin: Expression, end: Expression, dtype: torch.dtype) -> torch.Tensor:
        """`end` - `begin`, computed in `dtype` on the model's device."""
        found = []
        for expression in (begin, end):
            source = expression.open(self.sources)
            value = torch.empty(source.shape, dtype=source.dtype, device=self.device)
            self._read([(source, value)])
            found.append(value.to(dtype))
        return found[1] - found[0]

    def _saved_dtype(self, name: str, expression: Expression) -> torch.dtype:
        """The dtype that a tensor of the recipe is saved in: the base's, or its own where the base has none."""
        info = self.sources.pool[self.recipe.base].tensors.get(name)
        return expression.open(self.sources).dtype if info is None else info.dtype

    def _fill(self, wanted: Sequence[_Filling], keep: bool, of: int = 1) -> None:
        """Name, expression and the tensor its values are copied into, rounded on the way as saving would round them.

        They may be a part `of` as many alike, by all of which it goes whether what is computed is kept.
        """
        direct: list[tuple[TensorInfo, torch.Tensor]] = []
        others: list[tuple[Expression, torch.dtype, torch.Tensor]] = []
        n_bytes = 0  # of what is computed, in float32 at most
        for name, expression, target in wanted:
            saved = self._saved_dtype(name, expression)
            info = expression.info(self.sources)
            if info is not None and _passes_unchanged(info, saved, target):
                direct.append((info, target))
            else:
                others.append((expression, saved, target))
                n_bytes += 4 * target.numel() if info is None else 0
        keep = of * n_bytes <= (self.sources.memory if keep else self.sources.memory // CANDIDATE_SHARE)
        with torch.no_grad():
            self._read(self._computed(others, keep))
            self._copy(direct)

    def _computed(
        self, wanted: Iterable[tuple[Expression, torch.dtype, torch.Tensor]], keep: bool
    ) -> Iterator[tuple[Readable, torch.Tensor]]:
        """What can be read into its target a chunk at a time; the rest is copied as a whole."""
        for expression, saved, target in wanted:
            kept = self.sources.is_kept(expression) or (keep and expression.info(self.sources) is None)
            source = Held(self.sources.kept(expression)) if kept else expression.open(self.sources)
            if _passes_unchanged(source, saved, target) and target.is_contiguous():
                yield source, target
            else:
                value = torch.empty(source.shape, dtype=source.dtype)
                source.read_into(value.view(-1), 0)
                target.copy_(value.to(saved))

    def _read(self, parts: Iterable[tuple[Readable, torch.Tensor]]) -> None:
        """Compute values where they belong, or where they travel from."""
        if self.device.type == "cpu":
            for source, target in parts:
                source.read_into(target.view(-1), 0)
            return
        self._on_the_way().read(parts)

    def _copy(self, pairs: list[tuple[TensorInfo, torch.Tensor]]) -> None:
        """Bytes from mapped files straight into the parameters, converted on the way."""
        if self.device.type == "cpu":
            copy_tensors([info.into(slot) for info, slot in pairs])
            return
        self._on_the_way().upload(pairs)

    def _on_the_way(self) -> Uploader:
        if self._uploader is None:
            self._uploader = Uploader(self.device)
        return self._uploader

    @contextmanager
    def trial(self, candidate: Candidate, then: Candidate | None = None) -> Iterator[None]:
        """The model as the candidate has it, until the block ends.

        What candidate `then` sets anew is left as it is: it is tried next, or `settle` is called.

        A candidate that is a whole model, built in another way (with another base of its rotary embedding, say, or
        fewer blocks), is tried in a module of its own.
        """
        whole = candidate.recipe
        if whole is not None and not builds_alike(self.recipe, whole, self.sources.pool):
            kept = self.module, self._slots, self._parameters, self.residency, self._kept
            try:
                self._kept = {}
                self._build(whole)
                self.apply(whole.tensors)
                yield
            finally:
                self.module, self._slots, self._parameters, self.residency, self._kept = kept
            return
        values = candidate.values if whole is None else whole.tensors
        left, following = self._left, set[str]()
        try:
            self.apply({name: self.recipe.tensors[name] for name in left.difference(values)})
            left = set()
            self.apply(values, keep=False)
            yield
            if then is not None:
                following = set(then.values if then.recipe is None else then.recipe.tensors)
        finally:
            tried = left.union(values)
            self._left = tried & following
            self.apply({name: self.recipe.tensors[name] for name in tried - following})

    def settle(self) -> None:
        """Make the recipe's what a trial has left for the next one."""
        left, self._left = self._left, set()
        self.apply({name: self.recipe.tensors[name] for name in left})

    def set_recipe(self, recipe: Recipe) -> None:
        """Make `recipe` the model's: the tensors whose expressions changed are copied, nothing else.

        A recipe of another base, or with another config, gets a module of its own.
        """
        before = self.recipe
        if (recipe.base, recipe.config_edits) != (before.base, before.config_edits):
            self._rebuild(recipe)
            return
        changed = {n: e for n, e in recipe.tensors.items() if before.tensors.get(n) != e}
        self.recipe = recipe
        self.apply(changed)

    @property
    def architecture(self) -> Architecture:
        """What the tensor names mean, of as many blocks as the recipe has."""
        return self.sources.pool.architecture.edited(self.recipe.config_edits)

    @property
    def context(self) -> int:
        """The longest input the model is made for, in tokens."""
        return self.architecture.context


def builds_alike(recipe: Recipe, other: Recipe, pool: Pool) -> bool:
    """Whether two recipes' modules compute alike but for their weights."""
    return recipe.config_edits == other.config_edits and not pool.settings_differ(recipe.base, other.base)


def _passes_unchanged(source: Readable, saved: torch.dtype, slot: torch.Tensor) -> bool:
    """Whether values, rounded once to the slot's dtype, are what rounding to `saved` first gives."""
    if source.dtype == saved == slot.dtype:
        return tuple(source.shape) == tuple(slot.shape)
    floats = source.dtype in FLOATS and saved in FLOATS and slot.dtype in FLOATS
    widens = torch.promote_types(source.dtype, saved) == saved
    return floats and widens and tuple(source.shape) == tuple(slot.shape)
