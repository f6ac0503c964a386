"""The commands that merge without a search, `olmfast merge`, `linear` and `extract-lora`: what they take, and what they
call. Nothing is imported before it is used."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Annotated

import typer

from olmfast.errors import InputError, cut
from olmfast.terminal import boundary
from olmfast.terminal.options import (
    AllowMismatch,
    AllowNonfinite,
    AsJson,
    ComputedOn,
    DryRun,
    NoRemoteCodeFiles,
    Overwrite,
)


def merge_command(
    config: Annotated[Path, typer.Argument(help="A mergekit merge file; docs/mergekit.md lists its keys.")],
    out: Annotated[Path, typer.Argument(help="The folder of the result.")],
    device: ComputedOn = "cpu",
    shard_size: Annotated[str, typer.Option(help="The largest file of weights.")] = "5GB",
    max_ram: Annotated[
        str | None, typer.Option(help="Refuse to start if more memory than this is needed, such as 2GB.")
    ] = None,
    seed: Annotated[int, typer.Option(help="The random seed of DARE and DELLA.")] = 0,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    allow_nonfinite: AllowNonfinite = False,
    allow_mismatch: AllowMismatch = None,
    no_remote_code_files: NoRemoteCodeFiles = False,
    as_json: AsJson = False,
) -> None:
    """Merge models as a merge file says, without evaluating them."""
    from olmfast.config.mergekit import load_merge_config
    from olmfast.static.write import merge, read_options
    from olmfast.terminal import merges

    loaded = load_merge_config(config)
    if dry_run:
        from olmfast.runs.check import check  # what evaluates models, which no merge needs

        read_options(device, shard_size, max_ram)
        boundary.quiet_libraries()
        merges.print_plan(check(loaded, allow_mismatch=allow_mismatch or ()), out, as_json)
        return
    with merges.Watcher(as_json) as observer:
        done = merge(
            loaded,
            out,
            device=device,
            shard_size=shard_size,
            max_ram=max_ram,
            seed=seed,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            allow_mismatch=allow_mismatch or (),
            remote_code_files=not no_remote_code_files,
            observer=observer,
        )
    merges.print_written(done, as_json)


def linear_command(
    model_a: Annotated[str, typer.Option("--model_a", help="The base model A: a folder or a hub id.")],
    model_b: Annotated[str, typer.Option("--model_b", help="The model B to merge into it.")],
    alpha: Annotated[float, typer.Option("--alpha", help="The weight of A, from 0 to 1.")],
    more_layers: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    layers: Annotated[
        list[str] | None, typer.Option("--layers", metavar="N...", help="The layers to merge; default: all parameters.")
    ] = None,
    qkv_only: Annotated[bool, typer.Option("--qkv_only", help="Merge Q, K and V alone; requires --layers.")] = False,
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", help="The result's folder; default: a name in merged_models/.")
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    no_special_fixes: Annotated[
        bool, typer.Option("--no_special_fixes", help="Merge the rows of special tokens too, keep A's end tokens.")
    ] = False,
    layer_alphas: Annotated[
        Path | None, typer.Option("--layer_alphas", help="JSON or YAML: a list of alphas, or layer: alpha.")
    ] = None,
    method: Annotated[str, typer.Option("--method", help="linear, slerp, ties or dare.")] = "linear",
    density: Annotated[float, typer.Option("--density", help="The share that ties and dare keep.")] = 0.5,
    seed: Annotated[int, typer.Option("--seed", help="The random seed of dare.")] = 0,
    sensitivity: Annotated[
        str | None,
        typer.Option(
            "--sensitivity",
            metavar="FILE:MODE[,KEY=VALUE...]",
            help="Merge the layers whose merge improves the score on this dataset most.",
        ),
    ] = None,
    top: Annotated[int | None, typer.Option("--top", min=1, help="How many layers --sensitivity picks.")] = None,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    allow_nonfinite: AllowNonfinite = False,
    allow_mismatch: AllowMismatch = None,
    as_json: AsJson = False,
) -> None:
    """Merge two models linearly, as a whole or in some layers."""
    from olmfast.static import adaptive
    from olmfast.static.linear import merge_linear
    from olmfast.static.loading import check_result
    from olmfast.static.write import read_options
    from olmfast.terminal import merges

    # An option takes one value here: the layers after the first arrive as arguments, of which there are no others.
    listed = [*(layers or []), *(more_layers or [])]
    stray = next((text for text in listed if not re.fullmatch("-?[0-9]{1,9}", text)), None)
    if stray is not None or (more_layers and not layers):
        raise InputError(f"{cut(stray or listed[0])}: not expected here; layers are given as --layers 1 2 20")
    wanted = adaptive.LinearMerge(
        model_a,
        model_b,
        alpha,
        tuple(map(int, listed)) if listed else None,
        qkv_only,
        not no_special_fixes,
        method,
        adaptive.read_layer_alphas(layer_alphas) if layer_alphas else {},
        density,
        seed,
        " ".join(["olmfast", *sys.argv[1:]]),
        adaptive.read_sensitivity(sensitivity) if sensitivity else None,
        top,
        tuple(allow_mismatch or ()),
        layer_alphas,
    )
    if dry_run:
        read_options(device)
        plan = adaptive.plan_linear(wanted)
        boundary.quiet_libraries()
        check_result(plan.content)
        merges.print_plan(plan, output_dir or wanted.default_output, as_json)
        return
    if top is not None:
        boundary.quiet_libraries()
    with merges.Watcher(as_json) as observer:
        options = {"overwrite": overwrite, "allow_nonfinite": allow_nonfinite}
        done = merge_linear(wanted, output_dir, device=device, **options, observer=observer)
    merges.print_written(done, as_json)


def extract_command(
    base: Annotated[str, typer.Argument(help="The model that the adapter is for: a folder or a hub id.")],
    model: Annotated[str, typer.Argument(help="Its fine-tune.")],
    out: Annotated[Path, typer.Argument(help="The adapter's folder.")],
    rank: Annotated[int, typer.Option(help="The rank of each module's update.")],
    device: ComputedOn = "cpu",
    seed: Annotated[int, typer.Option(help="The random seed of the SVD.")] = 0,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Write what a fine-tune changed as a LoRA adapter, for PEFT and as base+adapter for olmfast."""
    from olmfast.static.extract import extract_lora
    from olmfast.terminal import merges

    boundary.quiet_libraries()
    done = extract_lora(base, model, out, rank, device=device, seed=seed, overwrite=overwrite)
    merges.print_extracted(done, as_json)
