"""The Python front door: a data-flow file executed, its folded model written and loaded."""

from __future__ import annotations

import tempfile
from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from olmfast.config.dataflow import load_dataflow_config
from olmfast.dataflow.plan import plan_dataflow
from olmfast.observer import Observer
from olmfast.static.plan import Plan
from olmfast.static.write import Written, write_merge


def execute(
    merge_config: str | Path | Mapping[str, Any],
    output_path: str | Path | None = None,
    device: str = "cpu",
    cache_dir: str | Path | None = None,
    classification: bool = False,
    add_last_layer: bool | None = None,
    last_layer_scale: float | None = None,
    save_only_config: bool = False,
    debug: bool = False,
    *,
    dtype: str = "bfloat16",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    allow_mismatch: Collection[str] = (),
    observer: Observer | None = None,
) -> tuple[Any, Any]:
    """Execute a data-flow file, or what one holds, and return the folded model and its tokenizer.

    The model is a plain one of Transformers, in `dtype` (`bfloat16`, `float16`, `float32`, `float64`), on `device`,
    where it is computed too. It is written to the folder `output_path`; without one, it is kept in memory alone.
    `cache_dir` is where Hub models lie, as folders or as Hugging Face's cache has them. `classification` is for an
    output model that is a sequence classifier. `add_last_layer` and `last_layer_scale` win over those of the file.
    `save_only_config` writes config and tokenizer and no weights, and the model returned is None; `debug` prints the
    path. The others are those of `olmfast.merge`.

    Raises InputError, before anything is written, for a file, factors or models that do not fit, and for an output
    that is there (unless `overwrite`); Interrupted after Ctrl-C. Neither leaves a folder `output_path`.
    """
    overrides = {"add_last_layer": add_last_layer, "last_layer_scale": last_layer_scale}
    config = load_dataflow_config(merge_config, {key: value for key, value in overrides.items() if value is not None})
    plan = plan_dataflow(
        config,
        dtype=dtype,
        classification=classification,
        allow_mismatch=allow_mismatch,
        models_dir=None if cache_dir is None else Path(cache_dir),
    )
    if debug:
        print("\n".join(plan.notes))
    how: dict[str, Any] = {"device": device, "allow_nonfinite": allow_nonfinite, "observer": observer}
    if output_path is not None:
        write_path(plan, Path(output_path), save_only_config=save_only_config, overwrite=overwrite, **how)
        return _loaded(Path(output_path), device, classification, save_only_config)
    with tempfile.TemporaryDirectory() as folder:
        write_path(plan, Path(folder) / "model", save_only_config=save_only_config, **how)
        return _loaded(Path(folder) / "model", device, classification, save_only_config)


dfs_excute_from_config = execute  # the original's name, spelt as it spells it


def write_path(plan: Plan, output: Path, *, save_only_config: bool = False, **options: Any) -> Written:
    """Write a path's plan, or its config and tokenizer alone; `options` are those of `write_merge`."""
    if save_only_config:
        plan = replace(plan, content=replace(plan.content, tensors=()))
    return write_merge(plan, output, **options)


def _loaded(folder: Path, device: str, classification: bool, only_config: bool) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from olmfast.weights.devices import pick_device

    tokenizer = AutoTokenizer.from_pretrained(folder)
    if only_config:
        return None, tokenizer
    kind = AutoModelForSequenceClassification if classification else AutoModelForCausalLM
    model = kind.from_pretrained(folder, dtype="auto").to(pick_device(device, "device"))
    return model.eval(), tokenizer
