"""The same merge files through mergekit 0.1.5 and through olmfast: `make parity`.

linear and passthrough agree bit for bit, everything else within one rounding of bfloat16 where mergekit computes in
float32. Masks of DARE and DELLA, which no two programs draw alike, are injected. docs/mergekit.md lists what differs
on purpose.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import olmfast
from olmfast.testing import tiny_model
from olmfast.weights import task_vectors

MERGEKIT = Path(os.environ.get("OLMFAST_MERGEKIT", "build/parity/bin/python")).absolute()
FAMILIES = ("llama", "qwen2", "mistral")  # qwen2: biases, tied head
N_LAYERS = 4
EXACT = ("linear", "passthrough")
WEIGHTS = ("0.6", "0.3", "0.4")

# Parameters of the whole merge, and of each model that is merged, by method and variant.
PARAMETERS: dict[str, list[dict[str, Any]]] = {
    "linear": [{"weight": 1.0}, {"weight": [0.2, 0.9], "normalize": False}, {"weight": [0.1, 0.7, 0.3]}],
    "slerp": [{"t": 0.4}, {"t": [0, 0.5, 1]}, {"t": [{"filter": "mlp", "value": [0.1, 0.9]}, {"value": 0.3}]}],
    "nuslerp": [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}],
    "multislerp": [{}, {"normalize_weights": False}],
    "karcher": [{}, {"max_iter": 3}],
    "task_arithmetic": [{}, {"normalize": True, "lambda": 0.7}, {"lambda": [0.2, 1.0]}],
    "ties": [{"density": 0.5}, {"density": 0.2, "normalize": False, "lambda": 0.8}, {"density": [0.2, 0.9]}, {}],
    "dare_linear": [{"density": 0.6}, {"density": 0.4, "rescale": False}],
    "dare_ties": [{"density": 0.6}, {"density": 0.4, "normalize": True}],
    "della": [{"density": 0.5, "epsilon": 0.2}],
    "della_linear": [{"density": 0.5, "epsilon": 0.2, "rescale": False}],
    "breadcrumbs": [{"density": 0.6, "gamma": 0.1}],
    "breadcrumbs_ties": [{"density": 0.6, "gamma": 0.02}],
    "model_stock": [{}, {"filter_wise": True}],
    "sce": [{"select_topk": 0.4}, {}],
    "ram": [{}, {"epsilon": 0.03}, {"epsilon": [0.01, 0.05]}],
    "ramplus_tl": [{"epsilon": 0.03}, {"r": 0.6, "alpha": 4.0, "epsilon": 0.02}, {"r": [0.1, 0.9], "epsilon": 0.03}],
    "arcee_fusion": [{}],
    "passthrough": [{}, {"scale": [{"filter": "down_proj", "value": 0.5}, {"value": 1.0}]}],
}
N_MODELS = {"slerp": 1, "arcee_fusion": 1, "passthrough": 1, "nuslerp": 2}
NO_BASE = ("linear", "karcher", "passthrough")
WEIGHTED = {"nuslerp", "multislerp", "task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "della_linear",
            "breadcrumbs", "breadcrumbs_ties"}  # fmt: skip


@dataclass
class Case:
    """One merge file, and where its two results are."""

    name: str
    config: dict[str, Any]
    exact: bool = False
    error: str | None = None

    def folder(self, root: Path, tool: str) -> Path:
        return root / f"{self.name}-{tool}"


def side_by_side(family: str, method: str, variant: int) -> Case:
    """All layers of two or three models."""
    parameters = dict(PARAMETERS[method][variant])
    n = N_MODELS.get(method, 2 if variant == 0 else 3)
    models: list[dict[str, Any]] = [{"model": f"{family}{i}"} for i in range(1, n + 1)]
    if method in WEIGHTED:
        for entry, weight in zip(models, WEIGHTS, strict=False):
            entry["parameters"] = {"weight": float(weight)}
    config: dict[str, Any] = {"merge_method": method, "models": models, "parameters": parameters}
    if method not in NO_BASE:
        config["base_model"] = f"{family}0"
        if method in ("slerp", "arcee_fusion"):
            config["models"].append({"model": f"{family}0"})
    config |= {"dtype": "float32", "out_dtype": "bfloat16"}
    return Case(f"{family}-{method}-{variant}", config, method in EXACT)


def stacked(family: str) -> list[Case]:
    """Slices of one and of several models."""

    def source(i: int, *layers: int, **parameters: Any) -> dict[str, Any]:
        return {"model": f"{family}{i}", "layer_range": list(layers), "parameters": parameters}

    # Of Qwen2, whose config lists a type per layer, mergekit makes no model with another number of layers.
    first = 2 if family == "qwen2" else 3
    franken = [{"sources": [source(1, 0, first)]}, {"sources": [source(2, 1, 2)]}, {"sources": [source(1, 3, 4)]}]
    blended = [
        {"sources": [source(0, 0, first), source(1, 0, first)], "parameters": {"t": [0.1, 0.8]}},
        {"sources": [source(0, 2, 4), source(2, 1, 3)]},
    ]
    weighted = [
        {"sources": [source(1, 0, 2, weight=0.3), source(2, 2, 4, weight=[0.1, 0.5])]},
        {"sources": [source(2, 1, 3), source(3, 1, 3)], "parameters": {"weight": 0.5}},
    ]
    return [
        Case(f"{family}-slices-passthrough", {"merge_method": "passthrough", "slices": franken}, exact=True),
        Case(
            f"{family}-slices-slerp",
            {
                "merge_method": "slerp",
                "base_model": f"{family}0",
                "slices": blended,
                "parameters": {"t": [{"filter": "self_attn", "value": [0, 1]}, {"value": 0.4}]},
                "dtype": "float32",
                "out_dtype": "bfloat16",
            },
        ),
        Case(f"{family}-slices-linear", {"merge_method": "linear", "slices": weighted, "dtype": "bfloat16"}, True),
    ]


def dtypes(family: str) -> list[Case]:
    """linear in every combination of what is read, computed and written."""
    models = [{"model": f"{family}{i}", "parameters": {"weight": w}} for i, w in ((1, 0.7), (2, 0.2), (3, 0.4))]
    config = {"merge_method": "linear", "models": models}
    return [
        Case(f"{family}-linear-none", config, exact=True),
        Case(f"{family}-linear-float16", {**config, "dtype": "float16"}, exact=True),
        Case(f"{family}-linear-bfloat16-float32", {**config, "dtype": "bfloat16", "out_dtype": "float32"}, exact=True),
        Case(f"{family}-linear-float32", {**config, "dtype": "float32"}, exact=True),
    ]


VARIANTS = [(method, i) for method, variants in PARAMETERS.items() for i in range(len(variants))]
CASES = [side_by_side(family, method, i) for family in FAMILIES for method, i in VARIANTS]
CASES += [case for family in FAMILIES for case in (*stacked(family), *dtypes(family))]
VOCABULARIES = [
    Case(f"vocabulary-{source}", {
        "merge_method": "linear", "base_model": "llama0", "models": [{"model": "llama0"}, {"model": "words"}],
        "parameters": {"weight": [0.5]}, "tokenizer": {"source": source, **more}, "dtype": "float32",
    }, exact=True)
    for source, more in (("union", {}), ("base", {}), ("words", {}))
]  # fmt: skip


@pytest.fixture(scope="session")
def merged(tmp_path_factory) -> Path:
    """A folder with the models and both results of every case."""
    if not MERGEKIT.is_file():
        pytest.fail(f"{MERGEKIT} is not there; run `make parity`, or name mergekit's python in OLMFAST_MERGEKIT")
    root = tmp_path_factory.mktemp("parity")
    for family in FAMILIES:
        for seed in range(4):
            size = "40KB" if seed == 2 else "5GB"
            tiny_model(root / f"{family}{seed}", family, seed, num_hidden_layers=N_LAYERS, shard_size=size)
    other_words(root / "words")
    listed = []
    for case in (*CASES, *VOCABULARIES):
        file = root / f"{case.name}.yml"
        file.write_text(yaml.safe_dump(case.config))
        listed.append((str(file), str(case.folder(root, "mergekit"))))
    (root / "list.json").write_text(json.dumps(listed))
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    script = Path(__file__).with_name("run_mergekit.py").absolute()
    subprocess.run([MERGEKIT, script, "list.json"], cwd=root, check=True, env=environment, capture_output=True)
    for case, error in zip((*CASES, *VOCABULARIES), json.loads((root / "list.done").read_text()), strict=True):
        case.error = error
    return root


def other_words(folder: Path) -> None:
    """A model whose tokenizer lacks some of the tokens, has others, and orders them differently."""
    tiny_model(folder, "llama", 9, num_hidden_layers=N_LAYERS, vocab_size=108)
    path = folder / "tokenizer.json"
    data = json.loads(path.read_text())
    vocabulary = data["model"]["vocab"]
    special = {entry["content"] for entry in data["added_tokens"]}
    words = [*[token for token in vocabulary if token not in special][5:], "Ω", "ß", "é"]
    n_special = len(special)
    data["model"]["vocab"] = {token: i for token, i in vocabulary.items() if token in special}
    data["model"]["vocab"] |= {token: n_special + i for i, token in enumerate(reversed(words))}
    path.write_text(json.dumps(data))


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def steps_apart(a: torch.Tensor, b: torch.Tensor) -> int:
    """How many bfloat16 numbers lie between two tensors, where they differ most."""
    ordered = [x.view(torch.int16).int() for x in (a, b)]
    ordered = [torch.where(x < 0, -(x & 0x7FFF), x) for x in ordered]
    return int((ordered[0] - ordered[1]).abs().max())


def inject_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    def numbers(n: int, _seed: int, _stream: int, start: int, _device: Any) -> torch.Tensor:
        index = torch.arange(start, start + n, dtype=torch.int64)
        return ((index * 2654435761 % (1 << 32)).double() / (1 << 32)).float()

    def mask(shape: tuple[int, ...], density: float, seed: int, *, start: int, **_: Any) -> torch.Tensor:
        return numbers(shape[0], seed, 0, start, None) < torch.tensor(density)

    monkeypatch.setattr(task_vectors, "uniform", numbers)
    monkeypatch.setattr(task_vectors.kernels, "dare_mask", mask)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_tensors_are_those_of_mergekit(case, merged, monkeypatch):
    assert case.error is None
    inject_masks(monkeypatch)
    theirs = tensors(case.folder(merged, "mergekit"))
    ours = merge(case, merged)
    assert set(ours) == set(theirs)
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        if case.exact:
            assert torch.equal(ours[name], tensor), name
        else:
            assert steps_apart(ours[name], tensor) <= 1, name


def merge(case: Case, root: Path) -> dict[str, torch.Tensor]:
    olmfast.merge(root / f"{case.name}.yml", case.folder(root, "olmfast"))
    return tensors(case.folder(root, "olmfast"))


def by_token(folder: Path, name: str) -> dict[str, torch.Tensor]:
    from transformers import AutoTokenizer

    rows = tensors(folder)[name]
    return {token: rows[i] for token, i in AutoTokenizer.from_pretrained(folder).get_vocab().items() if i < len(rows)}


@pytest.mark.parametrize("case", VOCABULARIES, ids=lambda case: case.name)
def test_each_token_has_the_embedding_that_mergekit_gives_it(case, merged):
    assert case.error is None
    merge(case, merged)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        theirs = by_token(case.folder(merged, "mergekit"), name)
        ours = by_token(case.folder(merged, "olmfast"), name)
        assert set(theirs) == set(ours)
        for token, row in theirs.items():
            assert torch.equal(ours[token], row), (name, token)


@pytest.mark.parametrize("method", ["dare_linear", "dare_ties", "della", "della_linear"])
def test_with_masks_of_its_own_the_share_that_is_kept_is_the_density(method):
    base, donor, density = torch.zeros(400, 300), torch.randn(400, 300), 0.3
    run: Callable[..., torch.Tensor] = task_vectors_of(method)
    kept = run(base, donor, density) != 0
    assert kept.float().mean().sub(density).abs() < 4 * (density * (1 - density) / kept.numel()) ** 0.5
    if "della" in method:
        order = donor.abs().argsort(dim=1)
        assert kept.gather(1, order)[:, 150:].float().mean() > kept.gather(1, order)[:, :150].float().mean() + 0.1


def task_vectors_of(method: str) -> Callable[..., torch.Tensor]:
    from olmfast.weights.methods import METHODS

    settings = {"epsilon": 0.25, "seed": 1, "stream": "x"}
    return lambda base, donor, density: METHODS[method]([donor], base, {**settings, "density": density})
