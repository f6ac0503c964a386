"""From a data-flow file to a plan: its models opened, its path folded, and the result held against Transformers."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from olmfast.config.dataflow import DataflowConfig
from olmfast.dataflow.folding import SCORE, fold, unlike_blocks
from olmfast.dataflow.hops import Hop, hops_of
from olmfast.errors import InputError, show
from olmfast.output.beside import texts_without_code
from olmfast.output.writer import COMPUTED, TIED, Content, OutputTensor, in_order
from olmfast.static.differences import find_differences
from olmfast.static.loading import DTYPE_KEYS, check_loads
from olmfast.static.plan import Plan, check_copied
from olmfast.weights.architecture import FAMILIES, is_known
from olmfast.weights.checkpoint import GENERATION_CONFIG, Checkpoint, read_json
from olmfast.weights.hub import folders_of
from olmfast.weights.pool import LANGUAGE_MODELS, Pool, vocabulary_differences
from olmfast.weights.recipe import Recipe
from olmfast.weights.skeletons import Skeletons
from olmfast.weights.sources import Sources

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "float64")}
CLASSIFIER = "ForSequenceClassification"


def open_donors(config: DataflowConfig, models_dir: Path | None = None) -> Pool:
    """The models that a data-flow file names, as far as they can be of one path.

    Raises InputError that lists every one that is missing or of another family.
    """
    names, here = list(dict.fromkeys(config.model_paths)), models_dir or Path.cwd()
    places = {name: place for name in names if (place := _without_revision(name, here, config.folder))}
    pool = Pool.open(names, here, config.folder, alike=False, download=False, places=places)
    types = {str(donor.config.get("model_type")): donor.name for donor in pool}
    if len(types) > 1:
        listed = ", ".join(f"{name} is {kind}" for kind, name in types.items())
        raise InputError(f"models of different architectures have no path in common: {listed}")
    first = pool[config.input_model]
    if not is_known(first.config):
        known = ", ".join(sorted(FAMILIES))
        kind = show(first.config.get("model_type"))
        raise InputError(f"{first.name}: model_type {kind} is not supported; supported are {known}")
    return pool


def _without_revision(name: str, models_dir: Path, folder: Path) -> Path | None:
    """The folder of `folder@revision`: a folder has one revision, whichever is named."""
    path, _, revision = name.rpartition("@")
    if not revision or not path:
        return None
    return None if folders_of(name, models_dir, folder) else next(iter(folders_of(path, models_dir, folder)), None)


def plan_dataflow(
    config: DataflowConfig,
    *,
    dtype: str = "bfloat16",
    classification: bool = False,
    allow_mismatch: Collection[str] = (),
    models_dir: Path | None = None,
) -> Plan:
    """Open the models of a data-flow file and say for every tensor of the folded model what it is made of.

    Reads headers, configs and tokenizers, and of weights only factors and what is stored twice. Raises InputError that
    lists everything that does not fit.
    """
    pool = open_donors(config, models_dir)
    hops = hops_of(config, pool)
    read = {"the data-flow file": [config.file]} if config.file else {}
    return plan_path(
        hops,
        pool,
        config.input_model,
        config.output_model,
        text=config.text,
        dtype=dtype,
        classification=classification,
        allow_mismatch=allow_mismatch,
        read={**read, "the factors": config.factor_files},
    )


def plan_path(
    hops: Sequence[Hop],
    pool: Pool,
    input_model: str,
    output_model: str,
    *,
    text: str,
    dtype: str = "bfloat16",
    classification: bool = False,
    allow_mismatch: Collection[str] = (),
    read: Mapping[str, Sequence[Path]] | None = None,
) -> Plan:
    """The plan of a path's folded model; `text` says the path in the result's card, `read` are files read for it.

    Raises what `plan_dataflow` raises.
    """
    if dtype not in DTYPES:
        raise InputError(f"--dtype: expected one of {', '.join(DTYPES)}, got {show(dtype)}")
    entry, out = pool[input_model], pool[output_model]
    names = list(dict.fromkeys([entry.name, out.name, *(hop.donor for hop in hops)]))
    used = Pool([pool[name] for name in names], alike=False)
    faults = [*unlike_blocks(hops, used, entry.name), *_head_faults(out, classification)]
    faults += _vocabulary_faults(entry, out, classification, allow_mismatch)
    if faults:
        raise InputError("\n".join(faults))
    with Skeletons() as skeletons:
        allowed = [key for key in allow_mismatch if key != "tokenizer"]
        notes, faults = find_differences(used, entry, skeletons, allowed, True, blocks_only=True)
        if faults:
            raise InputError("\n".join(faults))
        kind = DTYPES[dtype]
        recipe = fold(hops, used, entry.name, out.name, skeletons, classification=classification, dtype=kind)
        tensors = list(_written(recipe, used, kind))
        config = _config(recipe, entry, dtype)
        notes += check_loads(entry, config, tensors, skeletons)
    texts = {**_generation_text(entry), **texts_without_code(entry, entry, {})}
    left_out = _left_out(recipe, entry, classification)
    content = Content(in_order(tensors), entry, config, entry, texts, left_out, code=False)
    check_copied(content)
    return Plan(
        "dataflow",
        used,
        content,
        text,
        "dataflow.yml",
        warnings=[*used.warnings, *notes],
        notes=[f"{len(hops)} hops: {told(hops)}"],
        read=read or {},
    )


def told(hops: Sequence[Hop]) -> str:
    """A path in words: runs of layers of one model."""
    runs: list[tuple[str, int, int]] = []
    for hop in hops:
        if runs and runs[-1][0] == hop.donor and runs[-1][2] + 1 == hop.block:
            runs[-1] = (hop.donor, runs[-1][1], hop.block)
        else:
            runs.append((hop.donor, hop.block, hop.block))
    return ", ".join(f"{name} {first if first == last else f'{first}-{last}'}" for name, first, last in runs)


def _written(recipe: Recipe, pool: Pool, dtype: torch.dtype) -> Iterator[OutputTensor]:
    sources = Sources(pool, Path())
    for name, expression in recipe.tensors.items():
        yield OutputTensor(name, dtype, tuple(expression.open(sources).shape), expression)


def _left_out(recipe: Recipe, entry: Checkpoint, classification: bool) -> dict[str, str]:
    """Why the result does not have tensors of the input model, but for those of blocks and of other heads."""
    left_out = {name: COMPUTED for name in entry.tensors if entry.architecture.is_ignored(name)}
    head = entry.architecture.family.head
    if head in entry.tensors and head not in recipe.tensors and not classification:
        left_out[head] = TIED
    return left_out


def _config(recipe: Recipe, entry: Checkpoint, dtype: str) -> dict[str, Any]:
    """The result's config.json: no code of the donor's own, and the dtype that is written."""
    config = recipe.config(entry.config)
    config.pop("auto_map", None)
    for key in [key for key in DTYPE_KEYS if key in config] or ["dtype"]:
        config[key] = dtype
    return config


def _head_faults(out: Checkpoint, classification: bool) -> Iterator[str]:
    """An output model of another task than is asked for."""
    names = [str(name) for name in out.config.get("architectures") or ()]
    classifies = any(name.endswith(CLASSIFIER) for name in names) or (not names and SCORE in out.tensors)
    if classifies and not classification:
        yield f"{out.name}: is {names[0] if names else 'a classifier'}; use --classification (classification=True)"
    elif classification and not classifies:
        kind = names[0] if names else "no classifier"
        yield f"{out.name}: is {kind}, and --classification needs a sequence classifier as output model"
    elif not classification and names and not _is_language_model(names[0], out):
        yield f"{out.name}: is {names[0]}, and the output model has to be a language model or a sequence classifier"


def _is_language_model(name: str, out: Checkpoint) -> bool:
    return name.endswith(LANGUAGE_MODELS) or (name.endswith("Model") and out.architecture.tied_in_config)


def _vocabulary_faults(
    entry: Checkpoint, out: Checkpoint, classification: bool, allowed: Collection[str]
) -> Iterator[str]:
    """A head whose rows are other tokens than the embedding's; of a classifier's head no row is a token's."""
    if out is entry or classification:
        return
    family = entry.architecture.family
    head = out.tensors.get(family.head) or out.tensors.get(family.embedding)
    embedding = entry.tensors.get(family.embedding)
    if head is not None and embedding is not None and head.shape != embedding.shape:
        yield (
            f"{out.name}: has a head of shape {list(head.shape)}, and the embedding of {entry.name}, whose tokenizer "
            f"the result has, {list(embedding.shape)}; take both from one model"
        )
    elif "tokenizer" not in allowed:
        for line in vocabulary_differences(entry, out):
            yield f"{out.name}: {line}; take embedding and head from one model, or --allow-mismatch tokenizer"


def _generation_text(entry: Checkpoint) -> dict[str, str]:
    """generation_config.json, if it says that no cache is used."""
    if GENERATION_CONFIG not in entry.companions:
        return {}
    settings = read_json(entry.companion(GENERATION_CONFIG))
    if settings.get("use_cache") is not False:
        return {}
    return {GENERATION_CONFIG: json.dumps({**settings, "use_cache": True}, ensure_ascii=False, indent=2) + "\n"}
