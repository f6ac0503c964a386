"""What a tensor name means: one table of families, and the units that move together.

Three spellings of a name meet here. A *file* spells it as its author saved it (an old GPT-2 leaves out
`transformer.`); the *canonical* name is the one Transformers writes today, and the only one the rest of
olmfast sees; the *slot* is the live module's parameter, or the part of it, that the tensor fills.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch

from olmfast.errors import InputError, show


@dataclass(frozen=True)
class Flow:
    """What a block adds to the stream last, d, and what is added to the stream before the first block.

    d is the sum of what the `writers` give, modules of a block as regular expressions; several where attention and MLP
    are parallel. `norm` is the norm that d passes, whose weight is stored less one. A model has a bias in the `biased`
    modules if the key `bias_key` of its config says so. `positions` is a table that is added to the embedding, which
    is multiplied by the root of the width (`root_scaled`) or by a key of the config, as d is by `block_key`.
    """

    writers: tuple[str, ...] = (r"mlp\.down_proj",)
    norm: str = ""
    bias_key: str = ""
    biased: tuple[str, ...] = ()
    positions: str = ""
    root_scaled: bool = False
    embedding_key: str = ""
    block_key: str = ""


@dataclass(frozen=True)
class Experts:
    """Where the matrices of each expert lie in files, as `PATH.NUMBER.NAME.weight`; the module holds gate and up fused,
    experts stacked."""

    path: str = "mlp.experts"
    gate: str = "gate_proj"
    up: str = "up_proj"
    down: str = "down_proj"


@dataclass(frozen=True)
class Family:
    """How one model type names its parts. Names are canonical; `blocks` is the list of decoder layers."""

    blocks: str = "model.layers"
    embedding: str = "model.embed_tokens.weight"
    head: str = "lm_head.weight"
    other_boundary: tuple[str, ...] = ("model.norm.weight",)
    attention: str = "self_attn"  # what a block calls its attention
    mlp: str = "mlp"  # and its feed-forward part, or its mixture of experts
    optional_prefix: str = ""  # left out by files saved from the bare decoder
    transposed: tuple[str, ...] = ()  # modules whose weights are stored (in, out)
    renames: tuple[tuple[str, str], ...] = ()  # canonical name -> module name, as regular expressions
    ignored: tuple[str, ...] = ()  # stored by some files, recomputed by the module
    experts: Experts | None = None
    flow: Flow = Flow()


_ROTARY = (r"\.rotary_emb\.inv_freq$",)
_LLAMA = Family(optional_prefix="model.", ignored=_ROTARY)
_MLP_BIAS = ("mlp_bias", ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"))
_ATTENTION_BIAS = ("attention_bias", tuple(f"self_attn.{part}_proj" for part in "qkvo"))
_GPT2_BUFFERS = (r"\.attn\.(bias|masked_bias)$",)
_MIXTRAL = Family(
    optional_prefix="model.",
    mlp="block_sparse_moe",
    renames=((r"\.block_sparse_moe\.gate\.", ".mlp.gate."),),
    ignored=_ROTARY,
    experts=Experts("block_sparse_moe.experts", "w1", "w3", "w2"),
    flow=Flow((r"block_sparse_moe\.experts\.\d+\.w2",)),
)
_MOE = replace(_LLAMA, experts=Experts(), flow=Flow((r"mlp\.experts\.\d+\.down_proj",)))

FAMILIES: dict[str, Family] = {
    "llama": replace(_LLAMA, flow=Flow(bias_key=_MLP_BIAS[0], biased=_MLP_BIAS[1])),
    "mistral": _LLAMA,
    "qwen2": _LLAMA,
    "qwen3": _LLAMA,
    "gemma": replace(_LLAMA, flow=Flow(root_scaled=True)),
    "gemma2": replace(_LLAMA, flow=Flow(norm="post_feedforward_layernorm", root_scaled=True)),
    "phi3": _LLAMA,
    "granite": replace(
        _LLAMA,
        flow=Flow(
            bias_key=_MLP_BIAS[0],
            biased=_MLP_BIAS[1],
            embedding_key="embedding_multiplier",
            block_key="residual_multiplier",
        ),
    ),
    "cohere": replace(
        _LLAMA,
        flow=Flow((r"self_attn\.o_proj", r"mlp\.down_proj"), bias_key=_ATTENTION_BIAS[0], biased=_ATTENTION_BIAS[1]),
    ),
    "phi": Family(
        optional_prefix="model.",
        other_boundary=("model.final_layernorm.weight", "model.final_layernorm.bias", "lm_head.bias"),
        ignored=_ROTARY,
        flow=Flow((r"self_attn\.dense", r"mlp\.fc2")),
    ),
    "gpt2": Family(
        blocks="transformer.h",
        embedding="transformer.wte.weight",
        other_boundary=("transformer.wpe.weight", "transformer.ln_f.weight", "transformer.ln_f.bias"),
        attention="attn",
        optional_prefix="transformer.",
        transposed=("c_attn", "c_proj", "c_fc"),
        ignored=_GPT2_BUFFERS,
        flow=Flow((r"mlp\.c_proj",), positions="transformer.wpe.weight"),
    ),
    "gptj": Family(
        blocks="transformer.h",
        optional_prefix="transformer.",
        embedding="transformer.wte.weight",
        other_boundary=("transformer.ln_f.weight", "transformer.ln_f.bias", "lm_head.bias"),
        attention="attn",
        ignored=_GPT2_BUFFERS,
        flow=Flow((r"attn\.out_proj", r"mlp\.fc_out")),
    ),
    "gpt_neox": Family(
        blocks="gpt_neox.layers",
        optional_prefix="gpt_neox.",
        embedding="gpt_neox.embed_in.weight",
        head="embed_out.weight",
        other_boundary=("gpt_neox.final_layer_norm.weight", "gpt_neox.final_layer_norm.bias"),
        attention="attention",
        renames=((r"^embed_out\.", "lm_head."),),
        ignored=(*_ROTARY, r"\.attention\.(bias|masked_bias)$", r"\.attention\.rotary_emb\.inv_freq$"),
        flow=Flow((r"attention\.dense", r"mlp\.dense_4h_to_h")),
    ),
    "mixtral": _MIXTRAL,
    "olmoe": _MOE,
    "qwen3_moe": replace(
        _MOE,
        flow=Flow((r"mlp\.(experts\.\d+\.)?down_proj",)),  # some of its blocks may have a plain MLP
    ),
}


# What a family that is not in the table may call its embedding and its head.
_EMBEDDINGS = r"(^|\.)(embed_tokens|wte|word_embeddings|embed_in|tok_embeddings)\.weight$"
_HEADS = r"^(lm_head|embed_out|output)\.weight$"
_ROUTERS = re.compile(r"(^|_)(gate|router)$")  # modules that send tokens to experts
_CONTEXT = ("max_position_embeddings", "n_positions")
N_BLOCKS = ("num_hidden_layers", "n_layer", "num_layers", "n_layers")


def numbered(tensor: str) -> tuple[str, int, str] | None:
    """`model.layers`, 3, `mlp.up_proj.weight` of `model.layers.3.mlp.up_proj.weight`; None without a number."""
    found = re.match(r"(.+?)\.(\d+)\.(.+)$", tensor)
    return (found[1], int(found[2]), found[3]) if found else None


# Keys that olmfast itself reads, and what they hold where they are there: of any family, and of those in the table.
_KINDS: dict[str, type] = {
    "architectures": list,
    "tie_word_embeddings": bool,
    "text_config": dict,
    "id2label": dict,
}
SIZES = (
    *("hidden_size", "n_embd", "vocab_size", "num_attention_heads", "n_head", "num_key_value_heads", "head_dim"),
    *("intermediate_size", "moe_intermediate_size", "n_inner", "num_local_experts", "num_experts"),
    *("num_experts_per_tok", *_CONTEXT, *N_BLOCKS),
)
_NUMBERS = (
    *("final_logit_softcapping", "attn_logit_softcapping", "query_pre_attn_scalar", "logit_scale", "logits_scaling"),
    *("embedding_multiplier", "residual_multiplier", "attention_multiplier", "rope_theta", "rms_norm_eps"),
    *("layer_norm_eps", "layer_norm_epsilon"),
)
_CALLED = {list: "a list", bool: "true or false", dict: "an object"}


def is_known(config: Mapping[str, Any]) -> bool:
    """Whether the table of families has a config.json's model type."""
    return isinstance(config.get("model_type"), str) and config["model_type"] in FAMILIES


def check_kinds(config: Mapping[str, Any], where: str) -> None:
    """Raise InputError with every key of a config.json that holds another kind of value than it must."""
    faults = []
    for key, kind in _KINDS.items():
        if config.get(key) is not None and type(config[key]) is not kind:
            faults.append(f"{where}: {key}: expected {_CALLED[kind]}, got {show(config[key])}")
    if not faults and is_known(config):
        for key in SIZES:
            size = config.get(key)
            if size is not None and not (type(size) is int and 0 < size < 2**31):
                faults.append(f"{where}: {key}: expected a positive whole number, got {show(size)}")
        for key in _NUMBERS:
            number = config.get(key)
            if number is not None and not (type(number) in (int, float) and 0 <= number <= sys.float_info.max):
                faults.append(f"{where}: {key}: expected a finite number, 0 or more, got {show(number)}")
    if faults:
        raise InputError("\n".join(faults))


def stated_blocks(config: dict[str, Any]) -> int | None:
    """The number of decoder blocks that a config.json states, for the whole or for its text part."""
    parts = [part for part in (config, config.get("text_config")) if isinstance(part, dict)]
    stated = (part.get(key) for part in parts for key in N_BLOCKS)
    return next((n for n in stated if isinstance(n, int) and n > 0), None)


@dataclass(frozen=True)
class Unit:
    """Tensors (canonical names) that are proposed, evaluated and committed together."""

    name: str
    kind: str  # model, depth, kind, boundary, block, module
    tensors: tuple[str, ...]
    blocks: tuple[int, ...] = ()  # the blocks it lies in; empty for the whole model and the boundary


@dataclass(frozen=True)
class Slot:
    """Where a tensor lands in the live module: a parameter, or the part of it that `index` selects, of which it may be
    the first or the second half (0, 1) of the rows."""

    parameter: str
    index: tuple[int, ...] = ()
    half: int | None = None

    def of(self, parameter: torch.Tensor) -> torch.Tensor:
        """The view of the parameter that this slot fills."""
        part = parameter[self.index] if self.index else parameter
        return part if self.half is None else part.tensor_split(2)[self.half]


@dataclass(frozen=True)
class Architecture:
    """The family and dimensions that a config.json states."""

    model_type: str
    family: Family
    n_blocks: int
    config: dict[str, Any] = field(repr=False, compare=False)

    @classmethod
    def from_config(cls, config: dict[str, Any], where: str) -> Architecture:
        """Look up a config.json's `model_type`. Raises InputError for a type that is not in the table."""
        model_type = config.get("model_type")
        if not isinstance(model_type, str) or model_type not in FAMILIES:
            known = ", ".join(sorted(FAMILIES))
            raise InputError(
                f"{where}: model_type {show(model_type)} is not supported; supported are {known}; merges that need no "
                "evaluation take any (olmfast merge)"
            )
        n_blocks = config.get("num_hidden_layers", config.get("n_layer"))
        if type(n_blocks) is not int or n_blocks < 1:
            raise InputError(f"{where}: expected the number of layers as a positive number, got {show(n_blocks)}")
        return cls(model_type, FAMILIES[model_type], n_blocks, config)

    @classmethod
    def from_names(cls, config: dict[str, Any], where: str, names: Iterable[str]) -> Architecture:
        """The same for any model type: what is not in the table is inferred from the tensors' names.

        The blocks are the list with as many entries as the config has layers, else the longest list.
        """
        if is_known(config):
            return cls.from_config(config, where)
        names, counts = list(names), dict[str, int]()
        for prefix, index, _ in filter(None, map(numbered, names)):
            counts[prefix] = max(counts.get(prefix, 0), index + 1)
        stated = stated_blocks(config)
        blocks = max(counts, key=lambda prefix: (counts[prefix] == stated, counts[prefix]), default="")
        family = Family(
            blocks=blocks,
            embedding=next((name for name in names if re.search(_EMBEDDINGS, name)), ""),
            head=next((name for name in names if re.search(_HEADS, name)), "lm_head.weight"),
            other_boundary=(),
            ignored=_ROTARY,
        )
        return cls(str(config.get("model_type")), family, counts.get(blocks, 0), config)

    def edited(self, config_edits: Mapping[str, Any]) -> Architecture:
        """The architecture of a result whose config differs in these keys."""
        if not config_edits:
            return self
        config = {**self.config, **config_edits}
        return replace(self, config=config, n_blocks=stated_blocks(config) or self.n_blocks)

    @property
    def context(self) -> int:
        """The longest input the model is made for, in tokens."""
        return next((int(self.config[key]) for key in _CONTEXT if self.config.get(key)), 2048)

    @property
    def tied_in_config(self) -> bool:
        """Whether config.json ties the head to the embedding (absent means the model type's default)."""
        default = self.model_type in ("gpt2", "gemma", "gemma2", "cohere")
        return bool(self.config.get("tie_word_embeddings", default))

    def canonical(self, names: Iterable[str]) -> dict[str, str]:
        """Canonical name -> name in the file, for all tensors of one checkpoint."""
        names = list(names)
        prefix = self.family.optional_prefix
        bare = bool(prefix) and not any(name.startswith(prefix) for name in names)
        keep = (self.family.head,)
        return {name if not bare or name in keep else prefix + name: name for name in names}

    def block_of(self, tensor: str) -> int | None:
        """The block a canonical name lies in, or None."""
        found = re.match(re.escape(self.family.blocks) + r"\.(\d+)\.", tensor)
        return int(found[1]) if found else None

    def is_boundary(self, tensor: str) -> bool:
        """Embeddings, final norm and LM head: what comes before the first and after the last block."""
        return tensor in (self.family.embedding, self.family.head, *self.family.other_boundary)

    def is_ignored(self, tensor: str) -> bool:
        """Stored in some files although the module computes it: travels with the base, lands nowhere."""
        return any(re.search(pattern, tensor) for pattern in self.family.ignored)

    def is_norm(self, module: str) -> bool:
        """Whether a module's name is that of a normalisation layer."""
        return bool(re.search(r"(norm|ln_\w+)$", module.rsplit(".", 1)[-1]))

    def is_projection(self, tensor: str, n_dims: int) -> bool:
        """Whether a tensor of so many dimensions is a matrix that a block projects with.

        Those are query, key, value and output, the MLP's and its experts', fused ones too: no norm, bias or router.
        """
        if n_dims < 2 or self.block_of(tensor) is None or self.is_ignored(tensor) or tensor.endswith("bias"):
            return False
        module = tensor.removesuffix(".weight").rsplit(".", 1)[-1]
        return not self.is_norm(module) and not _ROUTERS.search(module)

    def row_axis(self, tensor: str) -> int:
        """The dimension of a stored 2-D weight that counts output features."""
        module = tensor.rsplit(".", 2)[-2]
        return 1 if module in self.family.transposed else 0

    @property
    def writers(self) -> tuple[str, ...]:
        """See `Flow`: those whose sum is d, which is the MLP's alone where attention comes before it."""
        writers = self.family.flow.writers
        return writers if self.config.get("use_parallel_residual", True) else writers[-1:]

    @property
    def writing_parts(self) -> tuple[str, ...]:
        """The parts of a live block whose sum is d, before it is multiplied by `block_scale`."""
        if self.family.flow.norm:
            return (self.family.flow.norm,)
        live = {self.family.mlp: "mlp"}  # Transformers calls every MLP so
        parts = (writer.split("\\.")[0] for writer in self.writers)
        return tuple(live.get(part, part) for part in parts)

    def embedding_scale(self, dtype: torch.dtype) -> float:
        """What the model multiplies embeddings by, in the dtype that it is run in."""
        flow = self.family.flow
        if flow.root_scaled:
            return float(torch.tensor(self.config["hidden_size"] ** 0.5, dtype=dtype))
        return float(self.config.get(flow.embedding_key, 1.0))

    @property
    def block_scale(self) -> float:
        """What the model multiplies d by before it is added."""
        return float(self.config.get(self.family.flow.block_key, 1.0))

    def slot(self, tensor: str) -> Slot:
        """Where a canonical tensor lands in the Transformers module."""
        experts = self.family.experts
        if experts is not None:
            found = re.match(rf"(.*)\.{re.escape(experts.path)}\.(\d+)\.(\w+)\.weight$", tensor)
            if found:
                return self._expert_slot(experts, f"{found[1]}.mlp.experts", int(found[2]), found[3])
        name = tensor
        for pattern, replacement in self.family.renames:
            name = re.sub(pattern, replacement, name)
        return Slot(name)

    def _expert_slot(self, experts: Experts, module: str, index: int, name: str) -> Slot:
        if name == experts.down:
            return Slot(f"{module}.down_proj", (index,))
        return Slot(f"{module}.gate_up_proj", (index,), 0 if name == experts.gate else 1)

    def model_unit(self, tensors: Sequence[str]) -> Unit:
        """Every tensor that the module uses."""
        return Unit("model", "model", tuple(name for name in tensors if not self.is_ignored(name)))

    def depth_units(self, tensors: Sequence[str], n_parts: int = 3) -> list[Unit]:
        """The blocks in `n_parts` contiguous parts, as equal as possible; fewer where there are fewer blocks."""
        parts = min(n_parts, self.n_blocks)
        edges = [round(part * self.n_blocks / parts) for part in range(parts + 1)]
        units = []
        for first, end in pairwise(edges):
            blocks = tuple(range(first, end))
            name = f"{first}-{end - 1}" if end - first > 1 else str(first)
            units.append(Unit(name, "depth", self.window_unit(tensors, blocks).tensors, blocks))
        return units

    def kind_units(self, tensors: Sequence[str]) -> list[Unit]:
        """The attention of all blocks, and the MLP of all blocks; norms between them belong to neither."""
        units = []
        for name, part in (("attention", self.family.attention), ("mlp", self.family.mlp)):
            inside = re.compile(rf"{re.escape(self.family.blocks)}\.\d+\.{re.escape(part)}\.")
            chosen = tuple(t for t in tensors if inside.match(t) and not self.is_ignored(t))
            units.append(Unit(name, "kind", chosen, tuple(range(self.n_blocks))))
        return units

    def boundary_unit(self, tensors: Sequence[str]) -> Unit:
        """Embedding, final norm and head as one unit."""
        return Unit("boundary", "boundary", tuple(name for name in tensors if self.is_boundary(name)))

    def window_unit(self, tensors: Sequence[str], blocks: Sequence[int]) -> Unit:
        """The blocks of a window (usually one) as one unit."""
        chosen = tuple(name for name in tensors if self.block_of(name) in set(blocks) and not self.is_ignored(name))
        return Unit("+".join(map(str, blocks)), "block", chosen, tuple(blocks))

    def module_units(self, tensors: Sequence[str], skip_norm: bool = False, boundary: bool = False) -> list[Unit]:
        """One unit per module inside the blocks (weight and bias together), in the order of `tensors`.

        With `boundary` also of embedding, final norm and head, which lie in no block.
        """
        modules: dict[str, list[str]] = {}
        for name in tensors:
            inside = self.block_of(name) is not None or (boundary and self.is_boundary(name))
            if inside and not self.is_ignored(name):
                modules.setdefault(name.rsplit(".", 1)[0], []).append(name)
        blocks = {module: self.block_of(names[0]) for module, names in modules.items()}
        return [
            Unit(module, "module", tuple(names), () if (block := blocks[module]) is None else (block,))
            for module, names in modules.items()
            if not (skip_norm and self.is_norm(module))
        ]
