"""The adaptive linear merge, done: ranked where that is asked for, planned, written."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from olmfast.observer import Observer
from olmfast.output.folder import OutputFolder
from olmfast.static import sensitivity as ranking
from olmfast.static.adaptive import LinearMerge, plan_linear, read_layer_alphas, read_sensitivity
from olmfast.static.write import Written, check_output, read_options, write_merge


def linear(
    model_a: str | Path,
    model_b: str | Path,
    alpha: float,
    output: str | Path | None = None,
    *,
    layers: Iterable[int] | None = None,
    qkv_only: bool = False,
    layer_alphas: Mapping[int, float] | Sequence[float] | str | Path | None = None,
    method: str = "linear",
    density: float = 0.5,
    seed: int = 0,
    sensitivity: str | None = None,
    top: int | None = None,
    no_special_fixes: bool = False,
    device: str = "cpu",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    allow_mismatch: Collection[str] = (),
    observer: Observer | None = None,
) -> Written:
    """Merge two models as `alpha * A + (1 - alpha) * B`, as a whole or in some layers, and write the result.

    Models are folders, or hub ids that lie in Hugging Face's cache. The keywords are the options of `olmfast linear`
    (docs/linear.md): `layers` counts from 0, and what is not merged is A's, byte for byte; `layer_alphas` gives layers
    an alpha of their own (a list with one for each, some by number, or a file); `sensitivity`, a dataset and a mode as
    `FILE:MODE`, ranks layers on `device`, and the `top` best of them are merged. Without `output` the result goes to
    a folder in `merged_models`, named after the merge. `allow_mismatch` is that of `merge`.

    Raises InputError, before anything is written, for values out of range, models that do not fit together, an output
    that is there (unless `overwrite`), too little space, and, unless `allow_nonfinite`, for NaN and infinity;
    Interrupted after Ctrl-C, OlmfastError when a model's file is changed meanwhile.
    """
    wanted = LinearMerge(
        str(model_a),
        str(model_b),
        alpha,
        None if layers is None else tuple(layers),
        qkv_only,
        not no_special_fixes,
        method,
        {} if layer_alphas is None else read_layer_alphas(layer_alphas),
        density,
        seed,
        sensitivity=None if sensitivity is None else read_sensitivity(sensitivity),
        top=top,
        allow_mismatch=tuple(allow_mismatch),
        alphas_file=Path(layer_alphas) if isinstance(layer_alphas, (str, Path)) else None,
    )
    return merge_linear(
        wanted,
        None if output is None else Path(output),
        device=device,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        observer=observer,
    )


def merge_linear(
    wanted: LinearMerge,
    output: Path | None = None,
    *,
    device: str = "cpu",
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    observer: Observer | None = None,
) -> Written:
    """Do what `linear` or its command line asks for, and raise what `linear` raises."""
    plan = plan_linear(wanted)
    read = plan.read
    if wanted.top is not None:
        read_options(device)
        if output is not None:  # else it is named after the layers
            check_output(plan, OutputFolder(output, overwrite=overwrite), None)
        ranked = ranking.rank_layers(wanted, output or wanted.default_output, device)
        (observer or Observer()).ranked(ranked, wanted.top)
        picked = tuple(one.layer for one in ranked[: wanted.top])
        wanted = replace(wanted, layers=picked, sensitivity=None, top=None)
        plan = replace(plan_linear(wanted), read=read)
    return write_merge(
        plan,
        output or wanted.default_output,
        device=device,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        observer=observer,
    )
