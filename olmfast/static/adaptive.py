"""The adaptive linear merge: two models, some layers, a weight for each. From a command line to a plan.

alpha * A + (1 - alpha) * B in float32, rounded to A's dtype; what is not selected is A's, byte for byte.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import groupby
from pathlib import Path
from typing import Any

from olmfast.config.datasets import DatasetConfig, parse_datasets, read_dataset_option
from olmfast.config.loading import read_any_yaml
from olmfast.errors import InputError, did_you_mean, show
from olmfast.output.writer import Content, OutputTensor, in_order
from olmfast.static.differences import find_differences
from olmfast.static.plan import Plan, check_copied
from olmfast.static.spelling import align_names
from olmfast.static.stacking import learn_architecture
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.chunks import Setting
from olmfast.weights.expressions import Copy, Rows, merge
from olmfast.weights.pool import Pool, vocabulary_differences
from olmfast.weights.skeletons import Skeletons
from olmfast.weights.sources import Expression
from olmfast.weights.tokenizer_files import GENERATION, added_tokens, end_tokens, generation_config

METHODS = ("linear", "slerp", "ties", "dare")
# What is called attention's query, key and value; q_norm and k_norm are norms.
QKV = re.compile(
    r"\.(q_proj|k_proj|v_proj|qkv_proj|c_attn|query|key|value|query_key_value|qkv|W_?pack|wqkv|wq|wk|wv)\.(weight|bias)$"
)
RANKED_ON = 200  # conversations of the dataset that ranks layers, unless it says how many
MOST_LISTED = 10  # more layers than this are counted in the name of the output folder, not listed


@dataclass(frozen=True)
class LinearMerge:
    """What a command line asks for. Raises InputError, in the words of the first tool of this kind.

    `layers` are the blocks that are merged, None for all parameters; `layer_alphas` gives the weight of A in some
    blocks, `alpha` in everything else. `density` is the share of B's difference that `ties` and `dare` keep.
    `sensitivity`, a dataset and how to score it, ranks the layers; the `top` best of them are merged. `alphas_file` is
    where `layer_alphas` were read.
    """

    model_a: str
    model_b: str
    alpha: float
    layers: tuple[int, ...] | None = None
    qkv_only: bool = False
    special_fixes: bool = True
    method: str = "linear"
    layer_alphas: Mapping[int, float] = field(default_factory=dict)
    density: float = 0.5
    seed: int = 0
    command: str = ""
    sensitivity: tuple[Path, Mapping[str, Any]] | None = None
    top: int | None = None
    allow_mismatch: tuple[str, ...] = ()
    alphas_file: Path | None = None

    def __post_init__(self) -> None:
        _refuse(self._faults())

    def _faults(self) -> Iterator[str]:
        if not 0 <= self.alpha <= 1:
            yield f"--alpha must be in range [0, 1], got {self.alpha:g}"
        negative = [layer for layer in self.layers or () if layer < 0]
        if negative:
            yield f"Layer indices must be non-negative. Got: {negative}"
        if self.layers == ():
            yield "--layers: expected at least one layer index"
        if self.qkv_only and self.layers is None and self.sensitivity is None:
            yield "--qkv_only requires --layers"
        if self.method not in METHODS:
            yield f"--method {self.method}: expected one of {', '.join(METHODS)}{did_you_mean(self.method, METHODS)}"
        if not 0 < self.density <= 1:
            yield f"--density must be in range (0, 1], got {self.density:g}"
        if self.top is not None and self.top < 1:
            yield f"--top {self.top}: expected 1 or more"
        if (self.sensitivity is None) != (self.top is None):
            yield "--sensitivity and --top: one ranks the layers, the other says how many are merged; give both"

    @property
    def folder_name(self) -> str:
        """`A_B_alpha0.70`, and what else tells this merge from others."""
        names = [_short(model) for model in (self.model_a, self.model_b)]
        parts = [*names, f"alpha{self.alpha:.2f}"]
        if self.layers is not None:
            chosen = sorted(set(self.layers))
            if len(chosen) > MOST_LISTED:
                parts.append(f"layerscount{len(chosen)}_range{chosen[0]}-{chosen[-1]}")
            else:
                parts.append("layers" + "-".join(map(str, chosen)))
        parts += ["qkv"] * self.qkv_only + ["layeralphas"] * bool(self.layer_alphas)
        parts += [self.method] * (self.method != "linear")
        return "_".join(parts)

    @property
    def default_output(self) -> Path:
        """Where the result goes if nothing else is said."""
        return Path("merged_models") / self.folder_name

    def ranked_layers(self, n_blocks: int) -> tuple[int, ...]:
        """The layers that `sensitivity` ranks: those of `layers`, or all."""
        return tuple(sorted(set(range(n_blocks) if self.layers is None else self.layers)))

    def blend(self, tensor: str, block: int | None, b: Expression, n_dims: int) -> Expression:
        """One tensor of A merged with B's; those of one dimension are always merged linearly."""
        a, weight = Copy(self.model_a, tensor), self.layer_alphas.get(-1 if block is None else block, self.alpha)
        if self.method == "linear" or n_dims < 2:
            return merge("linear", (a, b), weight=(weight, 1 - weight), normalize=False)
        if self.method == "slerp":
            return merge("slerp", (a, b), t=1 - weight)
        thinned: dict[str, Setting] = {"weight": (1 - weight,), "density": (self.density,), "normalize": False}
        if self.method == "ties":
            return merge("ties", (b,), a, **thinned)
        drawn: dict[str, Setting] = {"rescale": True, "seed": self.seed, "stream": tensor}
        return merge("dare_linear", (b,), a, **thinned, **drawn)


def _short(model: str) -> str:
    """The last part of a model's path, and of its adapter's."""
    parts = [model] if Path(model).is_dir() else model.split("+")
    return "+".join(Path(part).name for part in parts)


def _refuse(faults: Iterable[str]) -> None:
    """Raise InputError with all that is wrong, if anything is."""
    listed = list(faults)
    if listed:
        raise InputError("\n".join(listed))


def read_sensitivity(text: str) -> tuple[Path, dict[str, Any]]:
    """The dataset of `FILE:MODE[,KEY=VALUE...]` and its entry. Raises InputError for anything else."""
    file, entry = read_dataset_option(text, "--sensitivity")
    return Path(file).absolute(), entry


def read_layer_alphas(source: Mapping[int, float] | Sequence[float] | str | Path) -> dict[int, float]:
    """Layer -> alpha: a list with one number per layer, a mapping of some, or the JSON or YAML file of either.

    Raises InputError for anything else.
    """
    named = isinstance(source, (str, Path))
    data = read_any_yaml(Path(source)) if named else source  # type: ignore[arg-type]
    where = source if named else "--layer_alphas"
    entries = dict(enumerate(data)) if isinstance(data, Sequence) and not isinstance(data, str) else data
    if not isinstance(entries, Mapping) or not entries:
        raise InputError(f"{where}: expected a list of alphas, or a mapping of layers to alphas, got {show(data)}")
    alphas = {}
    for key, value in entries.items():
        if isinstance(key, bool) or not re.fullmatch(r"[0-9]{1,9}", str(key)):
            raise InputError(f"{where}: expected a layer index, got {show(key)}")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value <= 1:
            raise InputError(f"{where}: layer {key}: alpha must be in range [0, 1], got {show(value)}")
        alphas[int(key)] = float(value)
    return alphas


def plan_linear(wanted: LinearMerge) -> Plan:
    """Open both models and say for every tensor what it is made of; reads no weights.

    Before layers are ranked, the plan is that of as many layers as will be picked. Raises InputError with everything
    that does not fit: layers that do not exist, keys or shapes that differ, a dataset that cannot be used.
    """
    names = list(dict.fromkeys([wanted.model_a, wanted.model_b]))
    pool = Pool.open(names, Path.cwd(), Path.cwd(), alike=False, download=False)
    a, b = pool[wanted.model_a], pool[wanted.model_b]
    with Skeletons() as skeletons:
        align_names(pool, a, skeletons)
        warnings, faults = find_differences(pool, a, skeletons, wanted.allow_mismatch, tokens_are_aligned=True)
        learn_architecture(a, skeletons)
    theirs = _counterparts(a, b)
    _refuse(
        [
            *_layer_faults(wanted, a.architecture.n_blocks),
            *_ranking_faults(wanted, a.architecture.n_blocks),
            *_key_faults(a, b, theirs),
            *faults,
        ]
    )
    notes = []
    dataset = wanted.sensitivity
    if dataset is not None:
        ranked = wanted.ranked_layers(a.architecture.n_blocks)
        wanted = replace(wanted, layers=ranked[: wanted.top])
        listed = ", ".join(map(str, ranked))
        notes.append(f"The ranking decides which {wanted.top} of the layers {listed} are merged and named")
    n_alphas, n_blocks = len(wanted.layer_alphas), a.architecture.n_blocks
    if n_alphas < n_blocks and set(wanted.layer_alphas) == set(range(n_alphas)) != set():
        warnings = [*warnings, f"layer_alphas has {n_alphas} of {n_blocks} layers; the others have --alpha"]
    special = _special_rows(a, b) if wanted.special_fixes else []
    tensors = [_tensor(wanted, a, name, theirs.get(name, ""), special) for name in a.tensors]
    texts = _generation_config(a, b) if wanted.special_fixes else {}
    if special and wanted.layers is None:
        notes.append(f"Rows of {len(special)} special tokens are those of {a.name}")
    if (head := a.architecture.family.head) in b.tensors and head not in a.tensors:
        warnings = [*warnings, f"{b.name}: its own {head} is not used, as {a.name} is tied; as model A it would be"]
    notes += [f"{b.name}: {difference}; rows are merged by id" for difference in vocabulary_differences(a, b)]
    title = f"{wanted.method} (adaptive)"
    content = Content(in_order(tensors), a, a.config, a, texts)
    check_copied(content)
    read: dict[str, list[Path]] = {}
    if wanted.alphas_file is not None:
        read["the file of --layer_alphas"] = [wanted.alphas_file.absolute()]
    if dataset is not None:
        read["the dataset of --sensitivity"] = [dataset[0]]
    recipe = wanted.command or wanted.folder_name
    return Plan(title, pool, content, recipe_text=recipe, notes=notes, warnings=[*pool.warnings, *warnings], read=read)


def _layer_faults(wanted: LinearMerge, n_blocks: int) -> Iterator[str]:
    outside = [n for n in dict.fromkeys((*(wanted.layers or ()), *wanted.layer_alphas)) if n >= n_blocks]
    if outside:
        yield f"Layer indices out of range. Model has {n_blocks} layers (0-{n_blocks - 1}), but got indices: {outside}"


def _ranking_faults(wanted: LinearMerge, n_blocks: int) -> Iterator[str]:
    if wanted.sensitivity is None or wanted.top is None:
        return
    if not wanted.sensitivity[0].is_file():
        yield f"--sensitivity: {wanted.sensitivity[0]}: no such file"
    try:
        ranking_dataset(wanted)
    except InputError as error:
        yield str(error)
    ranked = wanted.ranked_layers(n_blocks)
    if wanted.top > len(ranked):
        yield f"--top {wanted.top}: expected at most {len(ranked)}, the number of layers that are ranked"


def ranking_dataset(wanted: LinearMerge) -> dict[str, DatasetConfig]:
    """The dataset that ranks the layers and how it is scored. Raises InputError for keys or values that are none."""
    path, entry = wanted.sensitivity or (Path(), {})
    return parse_datasets({str(path): {"samples": RANKED_ON, **entry}}, where="--sensitivity")


def is_selected(wanted: LinearMerge, tensor: str, block: int | None) -> bool:
    """Whether a tensor is merged; everything else is A's."""
    if wanted.layers is None:
        return True
    return block in wanted.layers and (not wanted.qkv_only or bool(QKV.search(tensor)))


def _counterparts(a: Checkpoint, b: Checkpoint) -> dict[str, str]:
    """A's tensor -> B's. Where one has a head and the other ties it to its embedding, that embedding is its head."""
    family = a.architecture.family
    theirs = {name: name for name in a.tensors if name in b.tensors}
    if family.head in a.tensors and family.head not in b.tensors and family.embedding in b.tensors:
        theirs[family.head] = family.embedding
    return theirs


def _key_faults(a: Checkpoint, b: Checkpoint, theirs: Mapping[str, str]) -> Iterator[str]:
    family = a.architecture.family
    only_a = [name for name in a.tensors if name not in theirs and not a.architecture.is_ignored(name)]
    tied = [family.head] if family.embedding in a.tensors else []
    only_b = [name for name in b.tensors if name not in theirs.values() and name not in tied]
    only_b = [name for name in only_b if not a.architecture.is_ignored(name)]
    if only_a or only_b:
        sides = [(a.name, only_a), (b.name, only_b)]
        listed = "; ".join(f"only in {name}: {_few(names)}" for name, names in sides if names)
        yield f"State dictionaries have mismatched keys. {listed}"
    for name, other in theirs.items():
        ours, its = a.tensors[name].shape, b.tensors[other].shape
        if ours != its:
            yield f"shapes differ: {name}: {list(ours)} in {a.name}, {list(its)} in {b.name}"


def _few(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _tensor(wanted: LinearMerge, a: Checkpoint, name: str, other: str, special: Sequence[int]) -> OutputTensor:
    info, block = a.tensors[name], a.architecture.block_of(name)
    own = Copy(a.name, name)
    expression: Expression = own
    if other and info.dtype.is_floating_point and is_selected(wanted, name, block):
        expression = wanted.blend(name, block, Copy(wanted.model_b, other), len(info.shape))
        if name in (a.architecture.family.embedding, a.architecture.family.head):
            expression = _with_rows_of(own, expression, [row for row in special if row < info.shape[0]], info.shape[0])
    return OutputTensor(a.file_names[name], info.dtype, info.shape, expression)


def _with_rows_of(own: Copy, merged: Expression, kept: Sequence[int], n_rows: int) -> Expression:
    """The merged matrix with some rows of A's."""
    if not kept:
        return merged
    inside = set(kept)
    runs = [list(rows) for _, rows in groupby(range(n_rows), inside.__contains__)]
    return Rows(tuple((own if rows[0] in inside else merged, rows[0], rows[-1] + 1) for rows in runs))


def _special_rows(*models: Checkpoint) -> list[int]:
    """The ids of the special tokens of both tokenizers."""
    found: set[int] = set()
    for model in models:
        found |= {entry["id"] for entry in added_tokens(model.tokenizer_folder) if entry.get("special")}
    return sorted(found)


def _generation_config(a: Checkpoint, b: Checkpoint) -> dict[str, str]:
    """generation_config.json with the end tokens of both models, if B has any that A does not."""
    ends = list(dict.fromkeys([*end_tokens(a.folder), *end_tokens(b.folder)]))
    if ends == end_tokens(a.folder):
        return {}
    changed = {**generation_config(a.folder), "eos_token_id": ends if len(ends) > 1 else ends[0]}
    return {GENERATION: json.dumps(changed, indent=2, sort_keys=True) + "\n"}
