"""The command `olmfast prune`: what it takes, and what it calls. Nothing is imported before it is used."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from olmfast.terminal import boundary
from olmfast.terminal.options import Device, Dtype, Seed

if TYPE_CHECKING:
    from olmfast.config.run import RunConfig


def prune_command(
    model_path: Annotated[str, typer.Option("--model_path", help="The model: a folder or a hub id.")],
    alphas_file: Annotated[
        Path | None, typer.Option("--alphas_file", help="JSON: a list of steps with ratio_i_alpha.")
    ] = None,
    num_layer: Annotated[
        int | None, typer.Option("--num_layer", "-i", help="How many layers are merged into the one below them.")
    ] = None,
    output_dir: Annotated[
        Path | None, typer.Option("--output_dir", help="The result's folder; default: a name in pruned_models/.")
    ] = None,
    data_dir: Annotated[
        Path | None, typer.Option("--data_dir", "-d", help="MMLU's folder: the result is scored on its questions.")
    ] = None,
    ntrain: Annotated[int, typer.Option("--ntrain", "-k", help="Worked examples before each question.")] = 5,
    num_tasks: Annotated[
        int | None, typer.Option("--num_tasks", "-n", help="The first N subjects, for similarity; default: all.")
    ] = None,
    num_samples: Annotated[
        int | None, typer.Option("--num_samples", "-m", help="Questions of each subject, for similarity; default: 1.")
    ] = None,
    mmlu_as: Annotated[
        str | None,
        typer.Option("--mmlu-as", help="spaced: letters as they follow a prompt; seed: as pruning by merging asks."),
    ] = None,
    ngpu: Annotated[int | None, typer.Option("--ngpu", "-g", help="Ignored; see --device.")] = None,
    method: Annotated[
        str | None,
        typer.Option("--method", help="file, similarity, uniform or drop; default: file with --alphas_file."),
    ] = None,
    merge: Annotated[
        str, typer.Option("--merge", help="What is merged of a layer: projections, or all of it.")
    ] = "projections",
    start: Annotated[int | None, typer.Option("--start", help="The first layer of the run that is merged.")] = None,
    count: Annotated[int | None, typer.Option("--count", help="How many layers, from it on, become one.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Prune a model by merging layers into those below them."""
    from olmfast.config.pruning import default_output
    from olmfast.config.run import parse_config

    if ngpu is not None:
        print(f"note: --ngpu {ngpu} is ignored: the model is run on one device; --device names it", file=sys.stderr)
    given = {
        "method": method,
        "alphas_file": alphas_file,
        "num_layer": num_layer,
        "start": start,
        "count": count,
        "merge": merge,
        "data_dir": data_dir,
        "mmlu_as": mmlu_as,
        "ntrain": ntrain,
        "num_tasks": num_tasks,
        "num_samples": num_samples,
    }
    section = {key: value for key, value in given.items() if value is not None}
    options = {"device": device, "dtype": dtype, "seed": seed}
    loaded = parse_config(
        {
            "models": [model_path],
            "models_dir": ".",
            "output_dir": output_dir or default_output(model_path, section),
            "prune": section,
            **{key: value for key, value in options.items() if value is not None},
        },
        "prune",
        Path.cwd(),
    )
    prune_config(loaded, overwrite=overwrite, dry_run=dry_run, as_json=as_json)


def prune_config(config: RunConfig, *, overwrite: bool, dry_run: bool, as_json: bool) -> None:
    """What `olmfast prune` does, and `olmfast run` with a config that prunes."""
    from olmfast.pruning.prune import plan_pruning, prune
    from olmfast.terminal import merges

    command = " ".join(["olmfast", *sys.argv[1:]])
    if config.prune is not None and config.prune.is_evaluated:
        boundary.quiet_libraries()
    if dry_run:
        merges.print_plan(plan_pruning(config, command), config.output_dir, as_json)
        return
    with merges.Watcher(as_json) as observer:
        done = prune(config, overwrite=overwrite, command=command, observer=observer)
    if as_json:
        print(json.dumps(done.to_json(), indent=2))
        return
    if done.mmlu is not None:
        from olmfast.terminal.mmlu import print_board

        print_board(done.mmlu, [], False)
    merges.print_written(done.written, as_json)
