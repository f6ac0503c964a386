"""The working model: a live Transformers module, kept in step with its recipe by copying bytes in place."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from olmfast.errors import InputError
from olmfast.evaluation.upload import Uploader
from olmfast.weights.architecture import Architecture
from olmfast.weights.checkpoint import FLOATS, TensorInfo, copy_tensors
from olmfast.weights.methods import Sources, Values
from olmfast.weights.offspring import Offspring
from olmfast.weights.recipe import Copy, Recipe


def pick_device(wanted: str) -> torch.device:
    """`auto`: the GPU if there is one. Raises InputError for a device that is not there."""
    if wanted == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(wanted)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise InputError(f"device: {wanted!r} cannot be used here: {str(error).splitlines()[0]}") from None
    return device


def pick_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on a GPU, float32 on a CPU, whatever the checkpoints' own dtype is."""
    if wanted == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, wanted)
    return dtype


class WorkingModel:
    """A module in `dtype` on `device` whose parameters always equal `recipe`, outside of a trial.

    Values are rounded to the dtype they would be saved with before they are converted to the module's.
    """

    def __init__(self, recipe: Recipe, sources: Sources, device: torch.device, dtype: torch.dtype) -> None:
        self.sources, self.device, self.dtype = sources, device, dtype
        self._uploader: Uploader | None = None
        self._reader = ThreadPoolExecutor(1, "prefetch")
        self.rebuild(recipe)

    def rebuild(self, recipe: Recipe) -> None:
        """Build the module that the recipe's base configures, and fill it."""
        self.recipe = recipe
        self._build(recipe.base)
        self._order = {name: i for i, (name, _) in enumerate(self.module.named_parameters())}
        self.apply(recipe.tensors)

    def _build(self, donor: str) -> None:
        pool = self.sources.pool
        self.module = build_module(pool[donor].folder, pool.tied, self.dtype).to(self.device)
        self._slots = _map_slots(self.module, pool.architecture, self.recipe)

    def in_parameter_order(self, tensors: tuple[str, ...]) -> list[str]:
        """Canonical names in the order in which the module declares its parameters."""
        architecture = self.sources.pool.architecture
        last = len(self._order)
        return sorted(tensors, key=lambda name: self._order.get(architecture.slot(name).parameter, last))

    def apply(self, values: Mapping[str, Values]) -> None:
        """Copy values (canonical name -> values) over the live parameters; the recipe is not changed."""
        self._fill((name, wanted, self._slots[name]) for name, wanted in values.items() if name in self._slots)

    def stack(self, name: str, several: Sequence[Values]) -> torch.Tensor:
        """K values of one tensor as they would be live: (K, *shape) in the module's dtype, on its device."""
        first = several[0]
        saved = self.sources.pool[self.recipe.base].tensors[name].dtype
        if isinstance(first, Offspring):
            siblings = [one for one in several if type(one) is type(first) and one.parent is first.parent]
            if len(siblings) == len(several):
                return first.stack(siblings).to(self.device, saved).to(self.dtype)
        slot = self._slots[name]
        result = slot.new_empty(len(several), *slot.shape)
        self._fill((name, wanted, target) for wanted, target in zip(several, result, strict=True))
        return result

    def live_bytes(self, name: str) -> int:
        """Bytes of one tensor as it is live."""
        return self._slots[name].nbytes

    def _fill(self, wanted: Iterable[tuple[str, Values, torch.Tensor]]) -> None:
        """Name, values and the tensor they are copied into, rounded on the way as saving would round them."""
        base = self.sources.pool[self.recipe.base]
        direct = []
        with torch.no_grad():
            for name, values, target in wanted:
                saved = base.tensors[name].dtype
                info = self.sources.info(values)
                if info is not None and _passes_unchanged(info, saved, target):
                    direct.append((info, target))
                else:
                    target.copy_(self.sources.value(values).to(saved))
            self._copy(direct)

    def prefetch(self, values: Mapping[str, Values]) -> None:
        """Let a thread read from disk what `apply` will want next; returns at once."""
        wanted: dict[str, list[str]] = {}
        for name, value in values.items():
            if name in self._slots and isinstance(value, Copy):
                wanted.setdefault(value.donor, []).append(value.tensor)
        for donor, tensors in wanted.items():
            self._reader.submit(self.sources.pool[donor].prefetch, tensors)

    def _copy(self, pairs: list[tuple[TensorInfo, torch.Tensor]]) -> None:
        """Bytes from mapped files straight into the parameters, converted on the way."""
        if self.device.type == "cpu":
            copy_tensors([info.into(slot) for info, slot in pairs])
            return
        if self._uploader is None:
            self._uploader = Uploader(self.device)
        self._uploader.upload(pairs)

    @contextmanager
    def trial(self, values: Mapping[str, Values], settings: str | None = None) -> Iterator[None]:
        """The model with other values, until the block ends.

        `settings` names a donor of which `values` are all tensors. Where its config differs in what acts on the
        values (the base of its rotary embedding, say), it is tried in a module of its own.
        """
        pool, kept = self.sources.pool, (self.module, self._slots)
        if settings is not None and pool.settings_differ(self.recipe.base, settings):
            try:
                self._build(settings)
                self.apply(values)
                yield
            finally:
                self.module, self._slots = kept
            return
        try:
            self.apply(values)
            yield
        finally:
            self.apply({name: self.recipe.tensors[name] for name in values})

    def set_recipe(self, recipe: Recipe) -> None:
        """Make `recipe` the model's: the tensors whose expressions changed are copied, nothing else."""
        changed = {n: e for n, e in recipe.tensors.items() if self.recipe.tensors.get(n) != e}
        self.recipe = recipe
        self.apply(changed)

    @property
    def context(self) -> int:
        """The longest input the model is made for, in tokens."""
        return self.sources.pool.architecture.context


def _passes_unchanged(info: TensorInfo, saved: torch.dtype, slot: torch.Tensor) -> bool:
    """Whether the donor's values, rounded once to the slot's dtype, are what rounding to `saved` first gives."""
    if info.dtype == saved == slot.dtype:
        return info.shape == tuple(slot.shape)
    floats = info.dtype in FLOATS and saved in FLOATS and slot.dtype in FLOATS
    return floats and torch.promote_types(info.dtype, saved) == saved and info.shape == tuple(slot.shape)


def build_module(folder: Path, tied: bool, dtype: torch.dtype) -> Any:
    """An empty Transformers module. Raises InputError when its config is not one Transformers can build."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    try:
        config = AutoConfig.from_pretrained(folder)
        config.tie_word_embeddings = tied
        if dtype == torch.float64:
            config._experts_implementation = "eager"  # torch's grouped product knows no float64
        with no_init_weights():
            module = AutoModelForCausalLM.from_config(config, dtype=dtype)
        module.tie_weights()  # part of the initialisation that was just left out
    except (ValueError, OSError, ImportError, KeyError, TypeError) as error:
        raise InputError(f"{folder / 'config.json'}: Transformers cannot build this model: {error}") from None
    return module.eval().requires_grad_(False)


def _map_slots(module: Any, architecture: Architecture, recipe: Recipe) -> dict[str, torch.Tensor]:
    """Canonical name -> the view of the live parameter it fills; every parameter must be filled."""
    parameters = dict(module.named_parameters())
    buffers = dict(module.named_buffers())
    slots: dict[str, torch.Tensor] = {}
    filled: dict[str, int] = dict.fromkeys(parameters, 0)
    unknown = []
    for name in recipe.tensors:
        slot = architecture.slot(name)
        if slot.parameter in parameters:
            slots[name] = slot.of(parameters[slot.parameter].data)
            filled[slot.parameter] += slots[name].numel()
        elif not architecture.is_ignored(name) and slot.parameter not in buffers:
            unknown.append(name)
    empty = [name for name, n in filled.items() if n != parameters[name].numel()]
    if empty or unknown:
        raise InputError(
            f"{recipe.base}: checkpoint and module do not match: nothing in the files fills "
            f"{empty[:3] or 'nothing'}, and no parameter takes {unknown[:3] or 'nothing'}"
        )
    return slots
