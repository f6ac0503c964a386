"""The command `olmfast dataflow`: what it takes, and what it calls. Nothing is imported before it is used."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from olmfast.errors import InputError
from olmfast.terminal.options import AllowMismatch, AllowNonfinite, AsJson, ComputedOn, DryRun, Overwrite


def dataflow_command(
    config: Annotated[
        str, typer.Argument(help="A data-flow file; docs/data-flow.md lists its keys. With --unfold: a checkpoint.")
    ],
    out: Annotated[Path, typer.Argument(help="The folder of the result.")],
    device: ComputedOn = "cpu",
    dtype: Annotated[str, typer.Option(help="bfloat16, float16, float32 or float64.")] = "bfloat16",
    classification: Annotated[
        bool, typer.Option("--classification", help="The output model is a sequence classifier.")
    ] = False,
    add_last_layer: Annotated[
        bool | None,
        typer.Option("--add-last-layer/--no-add-last-layer", help="End with the last layer of the output model."),
    ] = None,
    last_layer_scale: Annotated[float | None, typer.Option(help="The factor of that layer.")] = None,
    save_only_config: Annotated[
        bool, typer.Option("--save-only-config", help="Write config and tokenizer, and no weights.")
    ] = False,
    unfold: Annotated[
        bool, typer.Option("--unfold", help="Make an evo checkpoint, with input_layers of its own, a plain one.")
    ] = False,
    cache_dir: Annotated[Path | None, typer.Option(help="Where Hub models lie.")] = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
    allow_nonfinite: AllowNonfinite = False,
    allow_mismatch: AllowMismatch = None,
    as_json: AsJson = False,
) -> None:
    """Execute a path through the layers of several models, and write it as a plain model."""
    from olmfast.config.dataflow import load_dataflow_config
    from olmfast.dataflow.execution import write_path
    from olmfast.dataflow.plan import plan_dataflow
    from olmfast.dataflow.unfold import plan_unfolded
    from olmfast.static.write import read_options
    from olmfast.terminal import merges

    how: dict[str, Any] = {"dtype": dtype, "allow_mismatch": allow_mismatch or (), "models_dir": cache_dir}
    given = {"add_last_layer": add_last_layer, "last_layer_scale": last_layer_scale}
    overrides = {key: value for key, value in given.items() if value is not None}
    if unfold and (overrides or classification):
        raise InputError("--unfold: takes all from the checkpoint; options of the last layer and the head do not apply")
    read_options(device)
    if unfold:
        plan = plan_unfolded(config, **how)
    else:
        plan = plan_dataflow(load_dataflow_config(config, overrides), classification=classification, **how)
    if dry_run:
        merges.print_plan(plan, out, as_json)
        return
    with merges.Watcher(as_json) as observer:
        options = {"overwrite": overwrite, "allow_nonfinite": allow_nonfinite, "observer": observer}
        done = write_path(plan, out, save_only_config=save_only_config, device=device, **options)
    merges.print_written(done, as_json)
