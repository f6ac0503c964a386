"""PEFT's LoRA folders, and a model with one applied: a Checkpoint some of whose tensors are computed as they are read.

What an adapter computes is what counts: where PEFT's `merge_and_unload` computes something else than its own forward
(a tied embedding that only the input side adapts), the forward is followed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from math import prod, sqrt
from pathlib import Path
from typing import Any

from olmfast.errors import InputError
from olmfast.weights.adapted import Added, LowRank, RowsReplaced, replaced
from olmfast.weights.adapter_files import AdapterWeights, read_settings, read_weights
from olmfast.weights.architecture import FAMILIES, is_known, numbered
from olmfast.weights.checkpoint import ADAPTER_CONFIG, Checkpoint, Tensor, TensorInfo
from olmfast.weights.digests import DigestCache
from olmfast.weights.experts import ExpertsLowRank, FusedExperts
from olmfast.weights.hub import ADAPTER, ADAPTER_WEIGHTS, parts_of, resolve
from olmfast.weights.skeletons import Skeletons
from olmfast.weights.ties import Ties, ties_of, untied
from olmfast.weights.tokenizer_files import token_ids


class AdaptedModel(Checkpoint):
    """`base` with the adapter of `folder` applied; what the adapter leaves alone is the base's, not a copy of it.

    The tokenizer is the adapter's if it has one whose tokens all have a row. Raises InputError, with everything that is
    wrong, for a folder that is no LoRA adapter, or one of another model, or one that needs what is not supported.
    """

    def __init__(self, base: Checkpoint, folder: Path, adapter: str) -> None:
        self.folder, self.digests = base.folder, base.digests
        self.name, self.made_of = f"{base.name}+{adapter}", (*base.made_of, adapter)
        self.folders, self.notes = (*base.folders, folder), base.notes
        settings = read_settings(folder)
        held = read_weights(folder / ADAPTER_WEIGHTS)
        applied = _Application(base, settings, held, folder)
        self.tensors, self.config, self.architecture = applied.tensors(), base.config, base.architecture
        if applied.unties:
            self.config = untied(base.config)
        self._resize(base, folder)
        self.file_names = {name: base.file_names.get(name, name) for name in self.tensors}
        self.tokenizer_folder = base.tokenizer_folder
        if _has_tokenizer(folder, self._n_rows):
            self.tokenizer_folder = folder

    @property
    def _n_rows(self) -> int:
        embedding = self.tensors.get(self.architecture.family.embedding)
        return embedding.shape[0] if embedding is not None else 0

    def _resize(self, base: Checkpoint, folder: Path) -> None:
        """Have the config say how many rows the adapter's embedding has."""
        embedding = self.architecture.family.embedding
        if embedding not in base.tensors or self._n_rows == base.tensors[embedding].shape[0]:
            return
        part = self.config if "vocab_size" in self.config else self.config.get("text_config", {})
        if "vocab_size" not in part:
            raise InputError(
                f"{folder}: changes the number of tokens, but config.json of {base.name} has no vocab_size"
            )
        resized = {**part, "vocab_size": self._n_rows}
        self.config = resized if part is self.config else {**self.config, "text_config": resized}


def open_model(
    name: str,
    models_dir: Path,
    folder: Path,
    digests: DigestCache,
    opened: dict[str, Checkpoint],
    any_family: bool = False,
    download: bool = True,
) -> Checkpoint:
    """The model that a name such as `model` or `model+adapter` means, found as `hub.resolve` finds it.

    `opened` keeps the models, so that adapters of one model share it. Raises InputError for what cannot be used.
    """
    first, *adapters = parts_of(name, models_dir, folder)
    if first not in opened:
        opened[first] = Checkpoint(resolve(first, models_dir, folder, download), first, digests, any_family)
    model = opened[first]
    for adapter in adapters:
        model = AdaptedModel(model, resolve(adapter, models_dir, folder, download, ADAPTER), adapter)
    return model


class _Application:
    """One adapter on one model: which tensor becomes what. Everything that does not fit is collected.

    `unties` says that config.json has to untie, once `tensors` have been asked for.
    """

    def __init__(self, base: Checkpoint, settings: Mapping[str, Any], held: AdapterWeights, folder: Path) -> None:
        self.base, self.settings, self.held, self.file = base, settings, held, folder / ADAPTER_WEIGHTS
        self.head, self.embedding = base.architecture.family.head, base.architecture.family.embedding
        self.faults: list[str] = []
        self.unties = False
        with Skeletons() as skeletons:
            self.experts = self._experts(skeletons) if settings.get("target_parameters") else {}
            parameters = held.parameters()
            # Of a type that is not in the table, Transformers says what is tied; inside blocks nothing is.
            asks = not is_known(base.config) and any(numbered(parameter) is None for parameter in parameters)
            self.ties = ties_of(base, skeletons if asks else None)
            self.canonical = _spelling(parameters, base, self.ties, skeletons)

    def tensors(self) -> dict[str, Tensor]:
        """Canonical name -> the tensor of the adapted model. Raises InputError with everything that is wrong."""
        changed = self._of_experts()
        for parameter in self.held.parameters():
            name = self.canonical(parameter)
            source = None if name is None else self.base.tensors.get(self.ties.stored(name))
            if name is None or source is None:
                self.faults.append(f"no tensor {parameter} in {self.base.name}{self._why_missing(parameter)}")
                continue
            tensor = self._changed(parameter, name, source)
            if tensor is not None:
                changed[name] = tensor
        self._refuse()
        found = {**self.base.tensors, **changed}
        touched = [(group, [name for name in group if name in changed]) for group in self.ties.groups]
        touched = [(group, names) for group, names in touched if names]
        if any(self._parts(group, changed) for group, _ in touched):
            self.unties = self.ties.in_config
            apart, faults = self.ties.parted(self.base.tensors, changed)
            self.faults += faults
            found |= apart
        else:
            for group, names in touched:
                found[group[0]] = changed[names[0]]
                found = {name: tensor for name, tensor in found.items() if name not in group[1:]}
        self._refuse()
        return dict(sorted(found.items()))

    def _why_missing(self, parameter: str) -> str:
        """What is known of a parameter that the base has no tensor of."""
        each = re.compile(rf"{re.escape(parameter.rpartition('.')[0])}\.\d+\.")
        if any(each.match(name) for name in self.base.tensors):
            return ", which stores each expert by itself; merge it with PEFT first"
        return ""

    def _parts(self, group: Sequence[str], changed: Mapping[str, Tensor]) -> bool:
        """Whether parameters that are one are no longer, where the adapter has these changes for some of them.

        Rows that an embedding gets of its own, PEFT gives a tied head too.
        """
        own = [changed[name] for name in group if name in changed]
        rows_alone = all(isinstance(tensor, RowsReplaced) for tensor in own)
        as_one = len(own) == len(group) and len({tensor.known_digest(self.base.digests) for tensor in own}) == 1
        return not (rows_alone or as_one or self.settings.get("ensure_weight_tying"))

    def _changed(self, parameter: str, name: str, source: Tensor) -> Tensor | None:
        """One tensor as the adapter has it; None if something is wrong with it."""
        module, _, leaf = parameter.rpartition(".")
        whole, parts = self.held.whole.get(parameter), self.held.low_rank.get(module, {})
        if whole is not None:
            may_grow = name in (self.head, self.embedding) and whole.shape[1:] == source.shape[1:]
            if whole.shape != source.shape and not may_grow:
                self.faults.append(f"{parameter}: has shape {list(whole.shape)}, {self._has(source)}")
                return None
            source = replaced(source, whole)
        if leaf == "bias" and "lora_B.bias" in parts:
            return self._biased(module, source, parts)
        if leaf == "weight" and module in self.held.rows:
            if parts:
                self.faults.append(f"{module}: has both a low-rank update and tokens of its own")
            return self._with_rows(module, source)
        return self._low_rank(module, name, source, parts) if leaf == "weight" and parts else source

    def _has(self, source: Tensor) -> str:
        return f"{self.base.name} has {list(source.shape)}; is it an adapter of another model?"

    def _biased(self, module: str, source: Tensor, parts: Mapping[str, TensorInfo]) -> Tensor | None:
        bias = parts["lora_B.bias"]
        if bias.shape != source.shape:
            self.faults.append(f"{module}: lora_B.bias has shape {list(bias.shape)}, {self._has(source)}")
            return None
        return Added(source, bias, self._scale(module))

    def _with_rows(self, module: str, source: Tensor) -> Tensor | None:
        rows, given = self.held.rows[module], self.settings.get("trainable_token_indices")
        if isinstance(given, Mapping):
            own = [value for key, value in given.items() if module == key or module.endswith(f".{key}")]
            given = own[0] if own else None
        n_rows = source.shape[0]
        if not isinstance(given, list) or not all(isinstance(i, int) and 0 <= i < n_rows for i in given):
            self.faults.append(f"trainable_token_indices: expected numbers of {module}'s {n_rows} rows, got {given!r}")
        elif rows.shape != (len(given), *source.shape[1:]):
            self.faults.append(
                f"{rows.name}: has shape {list(rows.shape)} for {len(given)} tokens, {self._has(source)}"
            )
        else:
            return RowsReplaced(source, rows, tuple(given))
        return None

    def _low_rank(self, module: str, name: str, source: Tensor, parts: Mapping[str, TensorInfo]) -> Tensor | None:
        of = "lora_embedding_" if "lora_embedding_A" in parts else "lora_"
        a, b, magnitude = (parts.get(part) for part in (f"{of}A", f"{of}B", "lora_magnitude_vector"))
        rank = int(self._of_pattern("rank_pattern", "r", module))
        what = None
        if a is None or b is None:
            what = f"{of}{'A' if a is None else 'B'} is missing"
        elif len(a.shape) != 2 or len(b.shape) != 2 or len(source.shape) != 2:
            shapes = ", ".join(str(list(tensor.shape)) for tensor in (a, b, source))
            what = f"only matrices are supported (linear layers and embeddings), got shapes {shapes}"
        elif not a.shape[0] == b.shape[1] == rank:
            what = f"has rank {a.shape[0]} and {b.shape[1]}, {ADAPTER_CONFIG} says {rank}"
        elif source.shape not in ((b.shape[0], a.shape[1]), (a.shape[1], b.shape[0])):
            what = f"changes {[b.shape[0], a.shape[1]]} values, {self._has(source)}"
        elif (magnitude is not None) != bool(self.settings.get("use_dora")):
            what = f"{'no' if magnitude is None else 'a'} magnitude, with use_dora {self.settings.get('use_dora')}"
        elif magnitude is not None and prod(magnitude.shape) != b.shape[0]:
            what = f"lora_magnitude_vector has shape {list(magnitude.shape)} for {b.shape[0]} features"
        if what is not None or a is None or b is None:
            self.faults.append(f"{module}: {what}")
            return None
        turned = of == "lora_embedding_" or self._is_turned(name, source, a, b)
        return LowRank(source, a, b, self._scale(module), turned, magnitude)

    def _experts(self, skeletons: Skeletons) -> dict[str, tuple[FusedExperts | None, TensorInfo, TensorInfo]]:
        """Parameter of fused experts -> what of the base lies in it, A and B, which are taken from `held`.

        PEFT puts a wrapper around a module for each of its parameters, in the order in which Transformers declares them
        (`gate_up_proj` before `down_proj`), and names the inner ones `base_layer`.
        """
        skeleton = skeletons.examine(self.base.config, dict.fromkeys(self.base.tensors, ()))
        if skeleton.unknown:
            self.faults.append(f"target_parameters: {skeleton.unknown}")
        filled: dict[str, dict[str, Tensor]] = {}
        for name, parameter in skeleton.modules.items():
            filled.setdefault(parameter, {})[name] = self.base.tensors[name]
        wrappers: dict[str, list[str]] = {}
        for module in self.held.low_rank:
            wrappers.setdefault(re.sub(r"(\.base_layer)+$", "", module), []).append(module)
        targets, experts = tuple(f".{target}" for target in self.settings["target_parameters"]), {}
        for module, names in wrappers.items():
            own = [name for name in filled if name.rpartition(".")[0] == module and f".{name}".endswith(targets)]
            own.sort(key=lambda name: name.endswith(".down_proj"))
            if own and len(own) != len(names):
                self.faults.append(f"{module}: has {len(names)} updates for {', '.join(own)}")
            for parameter, name in zip(own, sorted(names, key=len, reverse=True), strict=False):
                parts = self.held.low_rank.pop(name)
                if sorted(parts) == ["lora_A", "lora_B"]:
                    experts[parameter] = FusedExperts.of(filled[parameter]), parts["lora_A"], parts["lora_B"]
                else:
                    self.faults.append(f"{parameter}: expected lora_A and lora_B, got {', '.join(sorted(parts))}")
        return experts

    def _of_experts(self) -> dict[str, Tensor]:
        """Name -> the tensor of the adapted model, of those that lie in fused experts."""
        ways = {name: list(fused.fits(a, b)) for name, (fused, a, b) in self.experts.items() if fused is not None}
        told = {  # Transformers stores all experts of a model alike
            own[0]
            for name, own in ways.items()
            if len(own) == 1 and (fused := self.experts[name][0]) is not None and fused.n_experts > 1
        }
        changed: dict[str, Tensor] = {}
        for parameter, (fused, a, b) in self.experts.items():
            rank = int(self._of_pattern("rank_pattern", "r", parameter))
            what = None
            if fused is None:
                what = "only experts as Transformers fuses them are supported; merge it with PEFT first"
            elif not ways[parameter]:
                own = [fused.n_experts, fused.rows, fused.columns]
                what = f"A and B have shapes {list(a.shape)} and {list(b.shape)}, {self.base.name} has {own}"
            elif len(ways[parameter]) > 1 and len(told) != 1:
                what = "experts are square, so that A and B could be meant either way; merge it with PEFT first"
            elif not a.shape[0] == b.shape[1] == rank * fused.n_experts:
                what = f"has {a.shape[0]} and {b.shape[1]} ranks, expected {rank} for each of {fused.n_experts} experts"
            if what is not None or fused is None:
                self.faults.append(f"{parameter}: {what}")
                continue
            turned = ways[parameter][0] if len(ways[parameter]) == 1 else next(iter(told))
            for name, source, expert, row in fused.places:
                changed[name] = ExpertsLowRank(
                    source, a, b, self._scale(parameter), fused.n_experts, turned, expert, row
                )
        return changed

    def _is_turned(self, name: str, source: Tensor, a: TensorInfo, b: TensorInfo) -> bool:
        """Whether a linear layer's weight is stored (in, out)."""
        if a.shape[1] != b.shape[0]:
            return source.shape != (b.shape[0], a.shape[1])
        architecture = self.base.architecture
        if architecture.model_type in FAMILIES:
            return architecture.row_axis(name) == 1
        return bool(self.settings.get("fan_in_fan_out"))

    def _scale(self, module: str) -> float:
        alpha, rank = (self._of_pattern(*of, module) for of in (("alpha_pattern", "lora_alpha"), ("rank_pattern", "r")))
        return alpha / (sqrt(rank) if self.settings.get("use_rslora") else rank)

    def _of_pattern(self, patterns: str, default: str, module: str) -> float:
        """The value of the first pattern that a module's name ends with, as PEFT matches them."""
        for pattern, value in (self.settings.get(patterns) or {}).items():
            try:
                if re.match(rf"(.*\.)?({pattern})$", module):
                    return float(value)
            except re.error as error:
                raise InputError(
                    f"{self.file.parent / ADAPTER_CONFIG}: {patterns}: {pattern!r}: {value!r}: {error}"
                ) from error
        return float(self.settings[default])

    def _refuse(self) -> None:
        faults = list(dict.fromkeys(self.faults))
        if faults:
            made_for = self.settings.get("base_model_name_or_path")
            more = f"\n{self.file}: and {len(faults) - 3} more" if len(faults) > 3 else ""
            of = f" (its base is {made_for})" if made_for else ""
            raise InputError("\n".join(f"{self.file}: {fault}{of}" for fault in faults[:3]) + more)


def _parameters(base: Checkpoint, ties: Ties) -> dict[str, str]:
    """Parameter of the live module, or name in files -> canonical name."""
    names = [*base.tensors, *(name for group in ties.groups for name in group if name not in base.tensors)]
    slots = {slot.parameter: name for name in names if not (slot := base.architecture.slot(name)).index}
    files = {file: name for name, file in base.file_names.items()}
    return {**files, **slots, **{name: name for name in names}}


def _spelling(
    wanted: Collection[str], base: Checkpoint, ties: Ties, skeletons: Skeletons
) -> Callable[[str], str | None]:
    """From an adapter's parameters to canonical names. What the base's own names do not tell, Transformers says.

    They may lie in a module around, or inside, the base's: an adapter of a bare decoder says `layers.0` where the model
    with a head says `model.layers.0`.
    """
    known = _parameters(base, ties)
    unknown = [parameter for parameter in wanted if parameter not in known]
    if not unknown:
        return known.get
    for before, after in _changes_of_prefix(unknown[0], known):
        if all(parameter.startswith(before) and after + parameter[len(before) :] in known for parameter in wanted):
            return lambda parameter: known.get(after + parameter[len(before) :])
    # As if the adapter's parameters were tensors of a file, of any version.
    skeleton = skeletons.examine(base.config, dict.fromkeys([*base.tensors, *unknown], ()))
    places = {name: place for name, place in skeleton.modules.items() if name not in skeleton.converted}
    names = {place: name for name, place in places.items() if name in base.tensors}
    names |= {name: name for group in ties.groups for name in group if name not in base.tensors}
    return {**{parameter: names.get(places.get(parameter, "")) for parameter in unknown}, **known}.get


def _changes_of_prefix(parameter: str, known: Collection[str]) -> Iterator[tuple[str, str]]:
    """Prefixes (as it is, as it is known) by which a parameter's name may differ from a known one."""
    pieces = parameter.split(".")
    for cut in range(len(pieces) - 1):
        before, rest = "".join(f"{piece}." for piece in pieces[:cut]), ".".join(pieces[cut:])
        yield from ((before, name[: -len(rest)]) for name in known if name == rest or name.endswith(f".{rest}"))


def _has_tokenizer(folder: Path, n_rows: int) -> bool:
    """Whether an adapter's folder has a tokenizer that fits the embedding."""
    path = folder / "tokenizer.json"
    if not path.is_file() or not (folder / "tokenizer_config.json").is_file():
        return False
    return max(token_ids(folder).values(), default=n_rows) < n_rows
