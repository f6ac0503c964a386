"""PEFT's LoRA folders, and a model with one applied: a Checkpoint some of whose tensors are computed as they are read.

What an adapter computes is what counts: where PEFT's `merge_and_unload` computes something else than its own forward
(a tied embedding that only the input side adapts), the forward is followed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod, sqrt
from pathlib import Path
from sys import float_info
from typing import Any

from olmfast.errors import InputError, show
from olmfast.weights.adapted import Added, LowRank, RowsReplaced, replaced
from olmfast.weights.architecture import FAMILIES, is_known, numbered
from olmfast.weights.checkpoint import ADAPTER_CONFIG, Checkpoint, Tensor, TensorInfo, read_header, read_json
from olmfast.weights.digests import DigestCache
from olmfast.weights.hub import ADAPTER, ADAPTER_WEIGHTS, parts_of, resolve
from olmfast.weights.skeletons import Skeletons
from olmfast.weights.ties import Ties, ties_of, untied
from olmfast.weights.tokenizer_files import token_ids
from olmfast.weights.wrappers import own_names

PREFIX = "base_model.model."  # of every name in an adapter's file

# Keys of adapter_config.json that say how it was trained or where it was put in; what it holds tells that here.
WITHOUT_EFFECT = {
    "auto_mapping",
    "base_model_name_or_path",
    "bias",  # trained biases lie in the file
    "corda_config",
    "ephemeral_gpu_offload",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_bias",  # so do these
    "lora_dropout",
    "lora_ga_config",
    "megatron_core",
    "modules_to_save",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
    "target_modules",
    "task_type",
}
READ = {
    "alpha_pattern",
    "ensure_weight_tying",
    "fan_in_fan_out",
    "init_lora_weights",
    "lora_alpha",
    "peft_type",
    "r",
    "rank_pattern",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
}
# Ways to begin that leave the base as it is; others train against a base that they have changed.
HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal", "mica")

_PART = re.compile(
    r"(?P<module>.+?)\.(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(?:\.(?!weight$|bias$)[^.]+)?(?:\.(?P<leaf>weight|bias))?"
)
_TOKENS = re.compile(r"(?P<module>.+)\.token_adapter\.trainable_tokens_delta(?:\.[^.]+)?")


@dataclass
class _Held:
    """What an adapter's file holds, by module (`model.layers.0.mlp.up_proj`) or parameter (`lm_head.weight`)."""

    low_rank: dict[str, dict[str, TensorInfo]] = field(default_factory=dict)
    rows: dict[str, TensorInfo] = field(default_factory=dict)
    whole: dict[str, TensorInfo] = field(default_factory=dict)

    def parameters(self) -> list[str]:
        """Every parameter that it changes."""
        changed = [f"{module}.weight" for module in (*self.low_rank, *self.rows)]
        changed += [f"{module}.bias" for module, parts in self.low_rank.items() if "lora_B.bias" in parts]
        return list(dict.fromkeys([*changed, *self.whole]))


class AdaptedModel(Checkpoint):
    """`base` with the adapter of `folder` applied; what the adapter leaves alone is the base's, not a copy of it.

    The tokenizer is the adapter's if it has one whose tokens all have a row. Raises InputError, with everything that is
    wrong, for a folder that is no LoRA adapter, or one of another model, or one that needs what is not supported.
    """

    def __init__(self, base: Checkpoint, folder: Path, adapter: str) -> None:
        self.folder, self.digests = base.folder, base.digests
        self.name, self.made_of = f"{base.name}+{adapter}", (*base.made_of, adapter)
        self.folders, self.notes = (*base.folders, folder), base.notes
        settings = _read_settings(folder)
        held = _read_weights(folder / ADAPTER_WEIGHTS)
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


def _read_settings(folder: Path) -> dict[str, Any]:
    """adapter_config.json. Raises InputError, naming them, for kinds of adapters and options that are not supported."""
    path = folder / ADAPTER_CONFIG
    if not path.is_file() and (folder / "config.json").is_file():
        raise InputError(
            f"{folder}: is a model, not a LoRA adapter; behind a '+' stands a folder with {ADAPTER_CONFIG}"
        )
    if not path.is_file():
        raise InputError(f"{folder}: no {ADAPTER_CONFIG} in this folder; expected a LoRA adapter that PEFT has saved")
    settings = read_json(path)
    kind = settings.get("peft_type")
    if kind is None:
        advice = "; mlx_lm.fuse makes a model of an adapter of MLX" if "lora_parameters" in settings else ""
        raise InputError(f"{path}: has no peft_type, so that it is no adapter that PEFT has saved{advice}")
    if kind != "LORA":
        raise InputError(f"{path}: peft_type {kind!r} is not supported, only LORA; merge it with PEFT first")
    faults = [
        f"{path}: {key}: not supported, got {value!r}; merge it with PEFT first"
        for key, value in settings.items()
        if value and key not in WITHOUT_EFFECT | READ
    ]
    start = settings.get("init_lora_weights")
    if start not in HARMLESS_STARTS:
        faults.append(
            f"{path}: init_lora_weights {start!r}: was trained against a base that it has changed; save it with PEFT's "
            "path_initial_model_for_weight_conversion, which makes a plain LoRA of it"
        )
    faults += [f"{path}: {fault}" for fault in _number_faults(settings)]
    if faults:
        raise InputError("\n".join(faults))
    return settings


def _number_faults(settings: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with the ranks, which are divided by, and the alphas, which need only be finite."""
    for key, patterns, is_rank in (("r", "rank_pattern", True), ("lora_alpha", "alpha_pattern", False)):
        given = settings.get(patterns) or {}
        if not isinstance(given, dict):
            yield f"{patterns}: expected a mapping, got {given!r}"
            given = {}
        values = {key: settings.get(key), **{f"{patterns}: {name!r}": one for name, one in given.items()}}
        for where, value in values.items():
            kinds = (int,) if is_rank else (int, float)
            if type(value) not in kinds or not abs(value) <= float_info.max or (is_rank and value < 1):
                wanted = "a whole number from 1" if is_rank else "a number"
                yield f"{where}: expected {wanted}, got {show(value)}"


def _read_weights(path: Path) -> _Held:
    """What the adapter's file holds. Raises InputError for a file that is missing, or names of no LoRA."""
    if not path.is_file():
        pickled = path.with_suffix(".bin").is_file()
        advice = "only pickled weights, which can run code" if pickled else "download it again"
        advice += "; if its repository has only a .bin file, load it with PEFT and save_pretrained it"
        raise InputError(f"{path.parent}: no {path.name} in this folder; {advice}")
    held, faults, infos = _Held(), list[str](), read_header(path)
    own = own_names([info.name for info in infos], str(path), "front")
    for info in infos:
        name = own[info.name].removeprefix(PREFIX)
        if ".original_module." in name:
            continue  # the base's, which old versions of PEFT saved as well
        if found := _PART.fullmatch(name):
            part = found["part"] + (".bias" if found["leaf"] == "bias" else "")
            parts = held.low_rank.setdefault(found["module"], {})
            if part in parts:
                faults.append(f"{path}: {info.name}: {part} of this module is there twice: more than one adapter")
            parts[part] = info
        elif found := _TOKENS.fullmatch(name):
            held.rows[found["module"]] = info
        elif re.search(r"\.lora_\w+", name):
            faults.append(f"{path}: {info.name}: not supported; merge the adapter with PEFT first")
        else:
            held.whole[re.sub(r"\.base_layer\.|\.modules_to_save\.(default\.)?", ".", name)] = info
    if not faults and not held.parameters():
        faults.append(f"{path}: holds no tensors")
    if faults:
        raise InputError("\n".join(faults))
    return held


class _Application:
    """One adapter on one model: which tensor becomes what. Everything that does not fit is collected.

    `unties` says that config.json has to untie, once `tensors` have been asked for.
    """

    def __init__(self, base: Checkpoint, settings: Mapping[str, Any], held: _Held, folder: Path) -> None:
        self.base, self.settings, self.held, self.file = base, settings, held, folder / ADAPTER_WEIGHTS
        self.head, self.embedding = base.architecture.family.head, base.architecture.family.embedding
        parameters = held.parameters()
        with Skeletons() as skeletons:
            # Of a type that is not in the table, Transformers says what is tied; inside blocks nothing is.
            asks = not is_known(base.config) and any(numbered(parameter) is None for parameter in parameters)
            self.ties = ties_of(base, skeletons if asks else None)
            self.canonical = _spelling(parameters, base, self.ties, skeletons)
        self.faults: list[str] = []
        self.unties = False

    def tensors(self) -> dict[str, Tensor]:
        """Canonical name -> the tensor of the adapted model. Raises InputError with everything that is wrong."""
        changed: dict[str, Tensor] = {}
        for parameter in self.held.parameters():
            name = self.canonical(parameter)
            source = None if name is None else self.base.tensors.get(self.ties.stored(name))
            if name is None or source is None:
                self.faults.append(f"no tensor {parameter} in {self.base.name}")
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
