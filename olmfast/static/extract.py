"""From a fine-tune and its base to a LoRA adapter that PEFT loads: the best update of a given rank, module by module.

The difference of each linear layer and embedding is cut to its largest singular values, found by a randomised SVD with
power iterations (Halko, Martinsson and Tropp, SIAM Review 53, 2011); what else changed is kept whole.
"""

from __future__ import annotations

import math
import os
import re
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from olmfast import _shards
from olmfast.errors import FileChanged, InputError, Interrupted
from olmfast.output.card import adapter_card
from olmfast.output.folder import OutputFolder, check_space
from olmfast.output.writer import write_json, write_text, writing
from olmfast.weights.architecture import is_known
from olmfast.weights.checkpoint import FLOATS, Checkpoint, Tensor
from olmfast.weights.devices import pick_device
from olmfast.weights.draws import normal
from olmfast.weights.examination import Unknown, build, read_config
from olmfast.weights.hub import ADAPTER
from olmfast.weights.pool import Pool
from olmfast.weights.skeletons import Skeletons
from olmfast.weights.ties import Ties, ties_of

OVERSAMPLED, ITERATIONS = 16, 3
PREFIX = "base_model.model."  # PEFT's, of every name in an adapter's file


@dataclass(frozen=True)
class Module:
    """A linear layer or embedding of which an update is extracted; `turned`: its weight is stored (in, out)."""

    name: str
    weight: str
    shape: tuple[int, int]  # (out, in)
    kind: str  # linear or embedding
    turned: bool

    def rank(self, wanted: int) -> int:
        """The rank it gets."""
        return min(wanted, *self.shape)


@dataclass
class Extraction:
    """What goes into an adapter, decided before any difference is computed.

    `whole` maps parameters of the adapter to the model's tensors; `saved` are the modules they are all of. `left_out`
    says of tensors why the adapter cannot have them.
    """

    modules: list[Module] = field(default_factory=list)
    whole: dict[str, Tensor] = field(default_factory=dict)
    saved: list[str] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)
    has_biases: bool = False
    is_tied: bool = False
    ensures_tying: bool = False

    def n_bytes(self, rank: int) -> int:
        """Bytes of the adapter's tensors."""
        factors = sum(module.rank(rank) * sum(module.shape) for module in self.modules) * torch.float32.itemsize
        return factors + sum(tensor.n_bytes for tensor in self.whole.values())


@dataclass(frozen=True)
class Extracted:
    """An adapter that is on the disk.

    `errors` maps a module to |difference - update| / |difference| (Frobenius norms); `error` is that of all tensors
    together and of those left out; modules saved whole have none and are not counted in it.
    """

    output_dir: Path
    rank: int
    error: float
    errors: dict[str, float]
    saved: list[str]
    left_out: dict[str, str]
    n_bytes: int
    elapsed_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "output_dir": str(self.output_dir),
            "rank": self.rank,
            "error": self.error,
            "errors": self.errors,
            "modules_to_save": self.saved,
            "left_out": self.left_out,
            "bytes": self.n_bytes,
            "elapsed_s": round(self.elapsed_s, 3),
        }

    def account(self) -> list[str]:
        """What was extracted, in a few lines, the worst module first."""
        lines = [f"{len(self.errors)} modules at rank {self.rank}: {self.error:.2%} of the difference is left out"]
        if self.errors:
            worst = max(self.errors, key=self.errors.__getitem__)
            lines[0] += f"; at most {self.errors[worst]:.2%} of a module's ({worst})"
        if self.saved:
            lines.append(f"{len(self.saved)} modules saved whole: {_few(self.saved)}")
        for why in dict.fromkeys(self.left_out.values()):
            names = [name for name, reason in self.left_out.items() if reason == why]
            lines.append(f"{len(names)} tensors left out, {why}: {_few(names)}")
        return lines


def extract_lora(
    base: str | Path,
    model: str | Path,
    output: str | Path,
    rank: int,
    *,
    device: str = "cpu",
    seed: int = 0,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda _: None,
) -> Extracted:
    """Write the LoRA adapter of `rank` that brings `base` nearest to `model`, as a PEFT folder.

    Models are folders, or hub ids that lie in Hugging Face's cache. `seed` is that of the randomised SVD; `progress` is
    told each module that is done. Raises InputError, before anything is written, for models that do not fit together,
    an output that is there (unless `overwrite`) or too little space; Interrupted after Ctrl-C.
    """
    started, target, output = time.monotonic(), pick_device(device, "--device"), Path(output)
    if rank < 1:
        raise InputError(f"--rank {rank}: expected 1 or more")
    pool = Pool.open([str(base), str(model)], Path.cwd(), Path.cwd(), alike=False, download=False)
    before, after = pool[str(base)], pool[str(model)]
    plan = plan_extraction(before, after)
    folder = OutputFolder(output, overwrite=overwrite)
    folder.check({f"the model {donor.name}": donor.paths for donor in pool})
    check_space(output, plan.n_bytes(rank))
    with folder.lock(empty=True), writing(folder.partial, "the same command"):
        try:
            tensors, squares = _computed(plan, before, after, rank, seed, target, progress)
        except InputError:
            folder.discard()
            raise
        except FileChanged as error:
            raise error.with_advice("the same command") from error
        except KeyboardInterrupt as error:
            folder.discard()
            raise Interrupted(f"{output}: stopped; nothing of it is left") from error
        done = _told(output, plan, rank, squares, time.monotonic() - started)
        _write(folder.partial, plan, before, done, tensors)
        folder.rename()
    return done


def plan_extraction(base: Checkpoint, model: Checkpoint) -> Extraction:
    """What of the difference between two models goes where. Raises InputError for models that do not fit together."""
    faults = [
        f"{name}: has shape {list(model.tensors[name].shape)} in {model.name}, {list(own.shape)} in {base.name}"
        for name, own in base.tensors.items()
        if name in model.tensors and own.shape != model.tensors[name].shape
    ]
    theirs, ours = (_with_head(one) for one in (model, base))
    for one, names in ((base, ours.keys() - theirs.keys()), (model, theirs.keys() - ours.keys())):
        kept = sorted(name for name in names if not base.architecture.is_ignored(name))
        faults += [f"tensors that only {one.name} has: {_few(kept)}"] if kept else []
    if faults:
        more = [f"and {len(faults) - 5} more"] if len(faults) > 5 else []
        raise InputError("\n".join([*faults[:5], *more]))
    changed = [name for name in theirs if name in ours and _digest(model, theirs[name]) != _digest(base, ours[name])]
    head = base.architecture.family.head
    is_tied = base.is_tied and model.is_tied
    if is_tied:
        changed = [name for name in changed if name != head]
    if not changed:
        raise InputError(f"{model.name}: has the same weights as {base.name}, so there is no adapter to extract")
    return _Sorter(base, theirs, is_tied).sort(changed)


def _with_head(model: Checkpoint) -> dict[str, Tensor]:
    """A model's tensors; of a tied one, its embedding as its head."""
    family = model.architecture.family
    held = dict(model.tensors)
    if family.embedding in held:
        held.setdefault(family.head, held[family.embedding])
    return held


def _digest(model: Checkpoint, tensor: Tensor) -> str:
    """The digest of a tensor of a model."""
    return tensor.known_digest(model.digests)


class _Sorter:
    """Which changed tensor becomes a low-rank update, which is saved whole, and which cannot be had."""

    def __init__(self, base: Checkpoint, tensors: Mapping[str, Tensor], is_tied: bool) -> None:
        self.base, self.tensors = base, tensors
        self.plan = Extraction(is_tied=is_tied)
        self.live = _blueprint(base)
        with Skeletons() as skeletons:
            skeleton = skeletons.examine(base.config, {name: tensor.shape for name, tensor in tensors.items()})
            self.ties = ties_of(base, None if is_known(base.config) else skeletons) if is_tied else Ties()
        self.places = {name: place for name, place in skeleton.modules.items() if name not in skeleton.converted}
        self.names = {place: name for name, place in self.places.items()}

    def sort(self, changed: list[str]) -> Extraction:
        """Every changed tensor in its place. Raises InputError if none has one."""
        biases = []
        for name in changed:
            tensor = self.tensors[name]
            path, _, leaf = self.places.get(name, "").rpartition(".")
            module = self.live.get(path)
            if not leaf or module is None or leaf not in dict(module.named_parameters(recurse=False)):
                self.plan.left_out[name] = "which have no parameter of their own in the Transformers module"
            elif tensor.dtype not in FLOATS:
                self.plan.left_out[name] = "which are no floating-point numbers"
            elif (kind := _kind(module)) and leaf == "bias":
                biases.append((path, tensor))
            elif kind == "embedding" and (tied := self.ties.with_(name)):
                self._save_tied(tied, tensor)
            elif kind and len(tensor.shape) == 2:
                turned = kind != "linear"
                shape = (tensor.shape[1], tensor.shape[0]) if turned else (tensor.shape[0], tensor.shape[1])
                kind = "embedding" if kind == "embedding" else "linear"
                self.plan.modules.append(Module(path, name, shape, kind, turned))
            elif path not in self.plan.saved:
                self._save(name, path, module)
        self._leave_out_twice()
        updated = {module.name for module in self.plan.modules}
        for path, tensor in (bias for bias in biases if not self._is_saved(bias[0])):
            self.plan.has_biases = True
            self.plan.whole[f"{path}.base_layer.bias" if path in updated else f"{path}.bias"] = tensor
        if not self.plan.modules:
            raise InputError(
                f"{self.base.name}: no linear layer or embedding differs that is not part of what is saved whole, so "
                f"there is nothing of a rank to extract; what differs: {_few(changed)}"
            )
        self.plan.ensures_tying = bool(self.ties.groups and not self.ties.in_config and self.plan.saved)
        return self.plan

    def _save(self, name: str, path: str, module: Any) -> None:
        """A module whole, with what of it has not changed: PEFT wants all of it."""
        own = {
            parameter: self._tensor(parameter)
            for leaf, _ in module.named_parameters()
            if (parameter := f"{path}.{leaf}")
        }
        whole = {parameter: tensor for parameter, tensor in own.items() if tensor is not None}
        if len(whole) < len(own):
            self.plan.left_out[name] = "of a module that the file has not whole"
            return
        self.plan.saved.append(path)
        self.plan.whole |= whole

    def _save_tied(self, tied: Sequence[str], tensor: Tensor) -> None:
        """A tied embedding whole, and as what is tied to it: a low-rank update would change it on one side only."""
        places = [self.places.get(name, name) for name in tied]
        if self.ties.in_config:  # PEFT ties no more than a head to an embedding: it is told of each
            for path in (place.rpartition(".")[0] for place in places):
                self._save(tied[0], path, self.live[path])
            return
        self.plan.saved.append(places[0].rpartition(".")[0])
        self.plan.whole |= dict.fromkeys(places, tensor)

    def _tensor(self, parameter: str) -> Tensor | None:
        """What fills a parameter of the live module; None if the file has nothing for it."""
        name = self.names.get(parameter, parameter)
        return self.tensors.get(self.ties.stored(name))

    def _leave_out_twice(self) -> None:
        """What lies in a module that is saved whole is in it."""
        self.plan.saved = [path for path in dict.fromkeys(self.plan.saved) if not self._is_saved(path)]
        self.plan.modules = [module for module in self.plan.modules if not self._is_saved(module.name)]

    def _is_saved(self, path: str) -> bool:
        return any(path.startswith(f"{other}.") for other in self.plan.saved)


def _blueprint(base: Checkpoint) -> dict[str, Any]:
    """The modules of the live model by name, built without memory. Raises InputError if Transformers cannot."""
    try:
        return dict(build(read_config(base.config)).named_modules())
    except Unknown as error:
        raise InputError(f"{base.folder / 'config.json'}: {error}") from error


def _kind(module: Any) -> str:
    """What PEFT can update by a low-rank product: `linear`, `conv1d` (stored the other way round) or `embedding`.

    It looks up the rows of an embedding itself, as one that finds them in another way (by position) does not.
    """
    from transformers.pytorch_utils import Conv1D

    looks_up = getattr(type(module), "forward", None) is torch.nn.Embedding.forward or hasattr(module, "embed_scale")
    if isinstance(module, torch.nn.Embedding) and not looks_up:
        return ""
    routes = isinstance(module, torch.nn.Linear) and type(module).forward is not torch.nn.Linear.forward
    if routes:  # Llama 4's router gives more than a product, which PEFT cannot add to
        return ""
    kinds = {torch.nn.Linear: "linear", Conv1D: "conv1d", torch.nn.Embedding: "embedding"}
    return next((name for kind, name in kinds.items() if isinstance(module, kind)), "")


def _computed(
    plan: Extraction,
    base: Checkpoint,
    model: Checkpoint,
    rank: int,
    seed: int,
    device: torch.device,
    progress: Callable[[str], None],
) -> tuple[dict[str, torch.Tensor], dict[str, tuple[float, float]]]:
    """The adapter's tensors by name, and per module the squared norms of its difference and of what is left of it."""
    held = {PREFIX + name: tensor.read() for name, tensor in plan.whole.items()}
    ours, theirs, squares = _with_head(base), _with_head(model), dict[str, tuple[float, float]]()
    for module in plan.modules:
        difference = _difference(ours[module.weight], theirs[module.weight], device)
        difference = difference.T if module.turned else difference
        before = float(difference.double().square().sum())
        b, a = low_rank(difference, module.rank(rank), seed, module.name)
        left = float((difference - b @ a).double().square().sum())
        squares[module.name] = before, left
        parts = (
            ("lora_embedding_A", "lora_embedding_B")
            if module.kind == "embedding"
            else ("lora_A.weight", "lora_B.weight")
        )
        for part, factor in zip(parts, (a, b), strict=True):
            held[f"{PREFIX}{module.name}.{part}"] = factor.cpu().contiguous()
        progress(module.name)
    for name in plan.left_out:
        if theirs[name].dtype in FLOATS:
            square = float(_difference(ours[name], theirs[name], device).double().square().sum())
            squares[name] = square, square
    return held, squares


def _difference(base: Tensor, model: Tensor, device: torch.device) -> torch.Tensor:
    """model - base in float32. Raises InputError for NaN and infinity."""
    ours, theirs = (tensor.read().to(device, torch.float32) for tensor in (base, model))
    for tensor, values in ((base, ours), (model, theirs)):
        if not bool(values.isfinite().all()):
            raise InputError(f"{tensor.file}: {tensor.name}: holds NaN or infinity; repair it")
    return theirs.sub_(ours)


def low_rank(matrix: torch.Tensor, rank: int, *address: object) -> tuple[torch.Tensor, torch.Tensor]:
    """B (rows, rank) and A (rank, columns), float32, whose product is nearest to `matrix`; each has half of the scale.

    A randomised range with power iterations, each orthonormalised; where that would be most of the matrix, its SVD.
    The random numbers are a function of `address`.
    """
    n_found = min(rank + OVERSAMPLED, *matrix.shape)
    if 2 * n_found >= min(matrix.shape):
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    else:
        drawn = normal(matrix.shape[1] * n_found, *address).view(-1, n_found)
        found = matrix @ drawn.to(matrix.device, matrix.dtype)
        for _ in range(ITERATIONS):
            found = matrix @ torch.linalg.qr(matrix.T @ torch.linalg.qr(found)[0])[0]
        basis = torch.linalg.qr(found)[0]
        u, s, v = torch.linalg.svd(basis.T @ matrix, full_matrices=False)
        u = basis @ u
    half = s[:rank].sqrt()
    return u[:, :rank] * half, half[:, None] * v[:rank]


def _told(
    output: Path, plan: Extraction, rank: int, squares: Mapping[str, tuple[float, float]], elapsed_s: float
) -> Extracted:
    """The errors, from squared norms."""
    total, left = (sum(pair[i] for pair in squares.values()) for i in (0, 1))
    errors = {
        module.name: math.sqrt(squares[module.name][1] / max(squares[module.name][0], 1e-45)) for module in plan.modules
    }
    error = math.sqrt(left / total) if total else 0.0
    return Extracted(output, rank, error, errors, plan.saved, plan.left_out, plan.n_bytes(rank), elapsed_s)


def _write(folder: Path, plan: Extraction, base: Checkpoint, done: Extracted, tensors: dict[str, torch.Tensor]) -> None:
    """The adapter's files, all on the disk when this returns."""
    path = folder / ADAPTER[1]
    save_file(tensors, path, metadata={"format": "pt"})
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    write_json(folder / ADAPTER[0], _settings(plan, base, done.rank))
    write_text(folder / "README.md", adapter_card(base.made_of, done.account(), done.errors))
    _shards.sync_folder(folder)


def _settings(plan: Extraction, base: Checkpoint, rank: int) -> dict[str, Any]:
    """adapter_config.json: of scale 1, whatever a module's rank."""
    smaller = {rf"^{re.escape(m.name)}": m.rank(rank) for m in plan.modules if m.rank(rank) != rank}
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if any("CausalLM" in str(x) for x in base.config.get("architectures") or ()) else None,
        "base_model_name_or_path": base.name,
        "r": rank,
        "lora_alpha": rank,
        "rank_pattern": smaller,
        "alpha_pattern": smaller,
        "target_modules": [module.name for module in plan.modules],
        "modules_to_save": plan.saved or None,
        "bias": "all" if plan.has_biases else "none",
        "fan_in_fan_out": any(module.turned and module.kind == "linear" for module in plan.modules),
        "ensure_weight_tying": plan.ensures_tying,
        "lora_dropout": 0.0,
        "inference_mode": True,
    }


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more
