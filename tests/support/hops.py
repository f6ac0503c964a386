"""Paths through small models, and what they compute hop by hop, with Transformers' own modules."""

from __future__ import annotations

import functools
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
)

from olmfast.dataflow.execution import execute
from olmfast.testing import FAMILIES, tiny_model

D, DEPTH = 32, 3
MODELS = tempfile.TemporaryDirectory(prefix="dataflow-")  # removed when Python ends
IDS = torch.tensor([[5, 9, 30, 77, 12, 12, 64, 3, 99, 41, 8, 17, 23, 50, 2, 6, 70, 71, 33, 19]])

# The modules of a block whose sum is what it adds last; what multiplies that; the keys of a call.
WRITERS = {
    **dict.fromkeys(FAMILIES, ("mlp",)),
    "gemma2": ("post_feedforward_layernorm",),
    "cohere": ("self_attn", "mlp"),
    "phi": ("self_attn", "mlp"),
    "gptj": ("attn", "mlp"),
    "gpt_neox": ("attention", "mlp"),
}
BIASED = ("llama", "granite", "cohere", "phi", "gpt2", "gptj", "gpt_neox")  # where b can go behind a block
Factor = float | torch.Tensor | None
Path_ = Sequence[tuple[int, int, Factor, Factor]]  # model, layer, A, b


@functools.cache
def donors(family: str, dtype: torch.dtype = torch.float64, **config: Any) -> tuple[str, str]:
    folder = Path(tempfile.mkdtemp(prefix=f"{family}-", dir=MODELS.name))
    depth = "n_layer" if family in ("gpt2", "gptj") else "num_hidden_layers"
    for seed, name in enumerate("ab", 1):
        tiny_model(folder / name, family, seed, dtype=dtype, noise=0.3, **{depth: DEPTH, **config})
    return str(folder / "a"), str(folder / "b")


def loaded(folder: str | Path, **keys: Any) -> Any:
    if json.loads((Path(folder) / "config.json").read_text())["model_type"] in ("mixtral", "olmoe", "qwen3_moe"):
        keys["experts_implementation"] = "eager"  # torch's grouped product knows no float64
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **keys).eval()


@functools.cache
def whole(folder: str) -> Any:
    return loaded(folder, attn_implementation="eager")


def acted(scale: Factor, bias: Factor, d: torch.Tensor) -> torch.Tensor:
    if isinstance(scale, torch.Tensor) and scale.dim() == 2:
        d = torch.einsum("ij,bsj->bsi", scale.to(d), d)
    elif scale is not None:
        d = (scale.to(d) if isinstance(scale, torch.Tensor) else scale) * d
    return d if bias is None else d + (bias.to(d) if isinstance(bias, torch.Tensor) else bias)


@torch.no_grad()
def hop_by_hop(models: Sequence[Any], path: Path_, entry: int = 0, out: int = 0, ids: torch.Tensor = IDS) -> Any:
    """Logits of a path, with the donors' own blocks called one after another and r and d kept apart."""
    first, family = models[entry], models[entry].config.model_type
    base, length = first.base_model, ids.shape[1]
    e = first.get_input_embeddings()(ids)
    if family == "gpt2":
        e = e + base.wpe(torch.arange(length))
    e = e * getattr(first.config, "embedding_multiplier", 1.0)
    positions = torch.arange(length)[None]
    d, r = e, torch.zeros_like(e)
    for model, layer, scale, bias in path:
        x = r + acted(scale, bias, d)
        stack = models[model].base_model.h if hasattr(base, "h") else models[model].base_model.layers
        block, added = stack[layer], []
        hooks = [
            block.get_submodule(name).register_forward_hook(
                lambda _, __, given, added=added: added.append(given[0] if isinstance(given, tuple) else given)
            )
            for name in (WRITERS[family] if getattr(base.config, "use_parallel_residual", True) else ("mlp",))
        ]
        keys: dict[str, Any] = {"attention_mask": mask_of(models[model].config, layer, length)}
        if family != "gpt2":
            keys["position_ids"] = positions
        if hasattr(base, "rotary_emb"):
            keys["position_embeddings"] = models[model].base_model.rotary_emb(x, positions)
        y = block(x, **keys)
        for hook in hooks:
            hook.remove()
        d = sum(added) * getattr(first.config, "residual_multiplier", 1.0)
        r = (y[0] if isinstance(y, tuple) else y) - d
    end = models[out]
    norm = next(n for n in ("norm", "ln_f", "final_layernorm", "final_layer_norm") if hasattr(end.base_model, n))
    return logits_of(end, getattr(end.base_model, norm)(r + d))


def logits_of(model: Any, hidden: torch.Tensor) -> torch.Tensor:
    if hasattr(model, "score"):
        return model.score(hidden)[:, -1]
    logits = model.get_output_embeddings()(hidden)
    logits = logits * getattr(model.config, "logit_scale", None) if model.config.model_type == "cohere" else logits
    logits = logits / getattr(model.config, "logits_scaling", 1.0)
    cap = getattr(model.config, "final_logit_softcapping", None)
    return logits if cap is None else torch.tanh(logits / cap) * cap


def mask_of(config: Any, layer: int, length: int) -> torch.Tensor:
    kinds = getattr(config, "layer_types", None)
    window = getattr(config, "sliding_window", None)
    slides = kinds[layer] == "sliding_attention" if kinds else window is not None
    distance = torch.arange(length)[:, None] - torch.arange(length)
    seen = (distance >= 0) & ((distance < window) if slides else True)
    return torch.zeros(1, 1, length, length, dtype=torch.float64).masked_fill(~seen, float("-inf"))


def folded(folders: Sequence[str], data: dict[str, Any], **options: Any) -> torch.Tensor:
    with tempfile.TemporaryDirectory() as folder:
        options = {"dtype": "float64", **options}
        execute({"model_paths": [[name, None] for name in folders], **data}, Path(folder) / "out", **options)
        with torch.no_grad():
            return loaded(Path(folder) / "out")(input_ids=IDS, use_cache=False).logits


def file_of(path: Path_, n_models: int = 2, depth: int = DEPTH) -> dict[str, Any]:
    """A file of a path without its last hop: every hop gets a pass of its own."""
    mask = [[[False] * depth for _ in range(n_models)] for _ in path]
    scales, biases = ([[[None] * depth for _ in range(n_models)] for _ in path] for _ in range(2))
    for r, (model, layer, scale, bias) in enumerate(path):
        mask[r][model][layer] = True
        scales[r][model][layer] = 1.0 if scale is None else scale
        biases[r][model][layer] = 0 if bias is None else bias
    data = {"num_r": len(path), "layer_mask": mask, "scaling_factors": scales, "bias_factors": biases}
    return {**data, "add_last_layer": False} if path else data


def drawn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor(kind: str, seed: int) -> Factor:
    if kind == "matrix":
        return torch.eye(D, dtype=torch.float64) + 0.2 * drawn(seed, D, D)
    return 1 + 0.5 * drawn(seed, D) if kind == "diagonal" else float(kind)


def bias_of(kind: str, seed: int) -> Factor:
    return 0.5 * drawn(seed + 99, D) if kind == "vector" else float(kind)
