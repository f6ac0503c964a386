"""The command `olmfast prune`: what it takes, and what it calls. Nothing is imported before it is used."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from olmfast.errors import InputError
from olmfast.terminal import boundary
from olmfast.terminal.options import AsJson, Device, DryRun, Dtype, Overwrite, Seed

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
        typer.Option("--method", help="file, similarity, uniform, drop, cma, bayes, gradient or joint."),
    ] = None,
    pool: Annotated[
        list[str] | None,
        typer.Option("--pool", metavar="MODEL", help="A donor of layers, for joint; several may be given."),
    ] = None,
    merge: Annotated[
        str, typer.Option("--merge", help="What is merged of a layer: projections, or all of it.")
    ] = "projections",
    start: Annotated[int | None, typer.Option("--start", help="The first layer of the run that is merged.")] = None,
    count: Annotated[int | None, typer.Option("--count", help="How many layers, from it on, become one.")] = None,
    objective: Annotated[
        str | None,
        typer.Option("--objective", help="What a search goes by, on MMLU: likelihood, accuracy, anatomy,virology, ..."),
    ] = None,
    dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE:MODE[,KEY=VALUE...]", help="A dataset that a search goes by; several may be given."),
    ] = None,
    holdout: Annotated[
        list[str] | None,
        typer.Option(metavar="SHARE or FILE:MODE", help="The share of questions that is held out (0.5), or datasets."),
    ] = None,
    budget: Annotated[
        str | None, typer.Option("--budget", help="Evaluations of a search (100), or a time such as 2h.")
    ] = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished search.")] = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    as_json: AsJson = False,
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
        "objective": objective,
    }
    section = {key: value for key, value in given.items() if value is not None}
    shares = [text for text in holdout or [] if re.fullmatch(r"[0-9.]+", text)]
    if len(shares) == len(holdout or []) == 1:
        section["holdout"], holdout = shares[0], []
    elif shares:
        raise InputError(f"--holdout {shares[0]}: expected a share alone, or datasets FILE:MODE")
    options = {"device": device, "dtype": dtype, "seed": seed, "budget": budget}
    loaded = parse_config(
        {
            "models": [model_path, *(pool or [])],
            "models_dir": ".",
            "output_dir": output_dir or default_output(model_path, section),
            "prune": section,
            "dataset": _entries(dataset or [], "--dataset"),
            "holdout": _entries(holdout or [], "--holdout"),
            **{key: value for key, value in options.items() if value is not None},
        },
        "prune",
        Path.cwd(),
    )
    prune_config(loaded, resume=resume, overwrite=overwrite, dry_run=dry_run, as_json=as_json)


def _entries(options: list[str], what: str) -> dict[str, dict[str, Any]]:
    """Datasets as a config has them."""
    from olmfast.config.datasets import by_name, read_dataset_option

    return by_name(map(read_dataset_option, options), what)


def prune_config(config: RunConfig, *, resume: bool, overwrite: bool, dry_run: bool, as_json: bool) -> None:
    """What `olmfast prune` does, and `olmfast run` with a config that prunes."""
    from olmfast.pruning.prune import Pruned, plan_pruning, prune
    from olmfast.terminal import merges

    if resume and overwrite:
        raise InputError("--resume and --overwrite: one continues a search, the other starts anew; give one of them")
    command = " ".join(["olmfast", *sys.argv[1:]])
    pruning = config.prune
    if pruning is not None and pruning.is_evaluated:
        boundary.quiet_libraries()
    if dry_run:
        merges.print_plan(plan_pruning(config, command), config.output_dir, as_json)
        return
    if pruning is not None and pruning.is_search:
        _search(config, resume=resume, overwrite=overwrite, command=command, as_json=as_json)
        return
    with merges.Watcher(as_json) as observer:
        done = prune(config, resume=resume, overwrite=overwrite, command=command, observer=observer)
    assert isinstance(done, Pruned)
    if as_json:
        print(json.dumps(done.to_json(), indent=2))
        return
    if done.mmlu is not None:
        from olmfast.terminal.mmlu import print_board

        print_board(done.mmlu, [], False)
    merges.print_written(done.written, as_json)


def _search(config: RunConfig, *, as_json: bool, **options: Any) -> None:
    from olmfast.pruning.prune import prune
    from olmfast.pruning.session import Searched
    from olmfast.search.costs import Schedule
    from olmfast.terminal.progress import make_observer

    observer = make_observer(quiet=as_json, verbose=False)
    with boundary.graceful_stop(observer) as stop_requested, observer:
        observer.planned(Schedule(()))
        done = prune(config, **options, observer=observer, stop_requested=stop_requested)
    assert isinstance(done, Searched)
    if as_json:
        print(json.dumps(done.to_json(), indent=2))
        return
    from olmfast.terminal.runs import print_comparison, print_rows

    for title, board in (("Questions that decided", done.selection), ("Held-out questions", done.holdout)):
        if board.rows:
            print_comparison(board, title)
    if done.closing is not None:
        asked = "held-out questions" if done.closing.held_out else "questions that decided"
        print_rows(done.closing.table(), f"What is kept and what it costs, {asked} (mean over datasets)")
    if done.alphas:
        print("alphas " + ", ".join(f"{alpha:.4f}" for alpha in done.alphas))
    for layers, found in done.front.items():
        print(f"{layers} layers: {found['objective']:.4f}, without {', '.join(map(str, found['gone']))}")
    left = "" if done.status == "finished" else "; the budget is spent, --resume with a larger one continues"
    print(f"{os.path.relpath(done.output_dir)}: {done.status}{left}")
