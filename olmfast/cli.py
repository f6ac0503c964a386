"""Commands: parse, call the library, print. No logic of merging lives here."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from olmfast import __version__
from olmfast.errors import InputError, cut, printable
from olmfast.terminal import boundary, dataflow, merging, pruning
from olmfast.terminal.options import AllowMismatch, AsJson, Device, DryRun, Dtype, Overrides, Overwrite, Seed

_USAGE_ERROR: Any = typer.BadParameter.__base__  # of the click that typer brings, or needs


class _Commands(TyperGroup):
    """`check linear ...` is `linear --dry-run ...`: one command line, checked and printed in one place. So are
    `check dataflow ...` and `check prune ...`."""

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        if args[:1] == ["check"] and args[1:2] in (["linear"], ["dataflow"], ["prune"]):
            args = [args[1], "--dry-run", *args[2:]]
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except _USAGE_ERROR as error:
            error.message = printable(error.message)  # it quotes what was given
            raise


app = typer.Typer(cls=_Commands, add_completion=False, no_args_is_help=True, pretty_exceptions_enable=False)


app.command("dataflow")(dataflow.dataflow_command)


def main() -> None:
    """Entry point: an error becomes one message and an exit code; with OLMFAST_DEBUG=1 its traceback is shown too."""
    raise SystemExit(boundary.run(app))


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"olmfast {__version__}")
        raise typer.Exit


@app.callback()
def olmfast(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Find the best merge that a pool of fine-tuned language models holds."""


@app.command("run")
def run_command(
    file: Annotated[
        Path | None,
        typer.Argument(metavar="[CONFIG]", help="The run's YAML file; docs/config.md lists its keys."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="The same. Without either: olm_config.yaml of this folder.")
    ] = None,
    load: Annotated[
        Path | None,
        typer.Option("--load", metavar="REPORT", help="Begin with the choices of a merge_report.json."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue an unfinished run.")] = False,
    overwrite: Overwrite = False,
    set_: Overrides = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    dry_run: DryRun = False,
    as_json: AsJson = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Print a line for every decision.")] = False,
) -> None:
    """Search for the best merge of a pool of models and write it."""
    from olmfast.config.run import load_config

    if resume and overwrite:
        raise InputError("--resume and --overwrite: one continues a run, the other starts anew; give one of them")
    if file is not None and config is not None:
        raise InputError(f"--config {config}: the file is given already, as {file}; give one of them")
    chosen = file or config or Path("olm_config.yaml")
    if not (file or config or chosen.exists()):
        raise InputError(f"{chosen}: no such file in this folder; name the run's config: olmfast run CONFIG")
    loaded = load_config(chosen, _overrides(set_ or [], device=device, dtype=dtype, seed=seed))
    if loaded.prune is not None:
        pruning.prune_config(loaded, resume=resume, overwrite=overwrite, dry_run=dry_run, as_json=as_json)
        return
    from olmfast.terminal.progress import make_observer
    from olmfast.terminal.runs import print_plan, print_result

    observer = make_observer(quiet=quiet or as_json, verbose=verbose)
    from olmfast.dataflow.session import run
    from olmfast.runs.check import check

    boundary.quiet_libraries()
    if dry_run:
        print_plan(check(loaded, observer=observer), as_json)
        return
    with boundary.graceful_stop(observer) as stop_requested, observer:
        flags: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "report": load}
        result = run(loaded, **flags, observer=observer, stop_requested=stop_requested)
    print_result(result, as_json)


@app.command("rebuild")
def rebuild_command(
    report: Annotated[Path, typer.Argument(help="A merge_report.json of a run or of the original OLM, or its folder.")],
    out: Annotated[Path, typer.Argument(help="The folder of the model.")],
    models_dir: Annotated[
        Path | None, typer.Option("--models-dir", help="Where the donors are; default: where the run had them.")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(help="Of a joint pruning: the best model found of so many layers.")
    ] = None,
    overwrite: Overwrite = False,
    as_json: AsJson = False,
) -> None:
    """Make the model that a merge report describes again, without evaluating anything."""
    from olmfast.runs.rebuild import rebuild
    from olmfast.terminal import merges

    with merges.Watcher(as_json) as observer:
        done = rebuild(report, out, layers=layers, models_dir=models_dir, overwrite=overwrite, observer=observer)
    print(json.dumps(done.to_json(), indent=2) if as_json else done.account)


@app.command("report")
def report_command(
    run: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a run, or its OUT.partial.")],
    out: Annotated[Path | None, typer.Option("--out", help="The file to write; default: report.html in OUT.")] = None,
) -> None:
    """Tell a run on one HTML page, from its record alone: what came of it, how, and of what."""
    from olmfast.report.write import report

    print(report(run, out))


@app.command("push")
def push_command(
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The folder of a result.")],
    repo: Annotated[str, typer.Argument(metavar="ORG/NAME", help="The repository on the Hub; it is made if missing.")],
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    with_report: Annotated[
        bool,
        typer.Option("--with-report", help="Also report.html and merge_report.json, which hold questions and answers."),
    ] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print what would go; upload nothing.")] = False,
) -> None:
    """Upload a result to the Hub: the model, its card and its scores."""
    from olmfast.output.push import plan_upload, push

    upload = plan_upload(out, repo, with_report)
    for name, path in upload.files.items():
        print(f"{path.stat().st_size:>14,}  {name}")
    print(f"{upload.n_bytes:>14,}  bytes {'would go' if dry_run else 'go'} to {upload.repo}", flush=True)
    if not dry_run:
        print(push(upload, private))


app.command("merge")(merging.merge_command)
app.command("linear", context_settings={"ignore_unknown_options": True})(merging.linear_command)
app.command("extract-lora")(merging.extract_command)
app.command("prune")(pruning.prune_command)


@app.command("check")
def check_command(
    config: Annotated[Path, typer.Argument(help="A merge file, a data-flow file, or the YAML file of a run.")],
    out: Annotated[Path, typer.Option(help="Where the result of a merge would go.")] = Path("merged"),
    set_: Overrides = None,
    device: Device = None,
    dtype: Dtype = None,
    seed: Seed = None,
    allow_mismatch: AllowMismatch = None,
    classification: Annotated[
        bool, typer.Option("--classification", help="Of a data-flow file: its output model is a sequence classifier.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False,
) -> None:
    """Check a run's config, a merge file or a data-flow file and print the plan, without reading any weights.

    --set, --device, --dtype and --seed are those of a run; the others have no such keys.
    """
    from olmfast.config.run import RunConfig
    from olmfast.dataflow.check import check, read_config
    from olmfast.terminal import merges, runs

    loaded = read_config(config, _overrides(set_ or [], device=device, dtype=dtype, seed=seed))
    if classification and isinstance(loaded, RunConfig):
        raise InputError(f"--classification: is said of a data-flow file, and {config} is none")
    boundary.quiet_libraries()
    if isinstance(loaded, RunConfig) and loaded.prune is not None:
        pruning.prune_config(loaded, resume=False, overwrite=True, dry_run=True, as_json=as_json)
    elif isinstance(loaded, RunConfig):
        runs.print_plan(check(loaded), as_json)
    else:
        plan = check(loaded, allow_mismatch=allow_mismatch or (), classification=classification)
        merges.print_plan(plan, out, as_json)


@app.command("evaluate")
def evaluate_command(
    model: Annotated[str, typer.Argument(help="A model folder or hub id.")],
    dataset: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE:MODE[,KEY=VALUE...]", help="A dataset and how to score it, as in a run's config."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", help="Score on the datasets of this run's config, as the run scores.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(metavar="MODEL", help="Donors to compare it with, and with their plain average."),
    ] = None,
    mmlu: Annotated[
        Path | None, typer.Option("--mmlu", metavar="DIR", help="Score on MMLU's questions, in DIR/test and DIR/dev.")
    ] = None,
    mmlu_as: Annotated[
        str,
        typer.Option("--mmlu-as", help="spaced: letters as they follow a prompt; seed: as pruning by merging asks."),
    ] = "spaced",
    subjects: Annotated[str | None, typer.Option(metavar="A,B", help="Only these subjects of MMLU.")] = None,
    shots: Annotated[int, typer.Option(min=0, help="Worked examples before each question of MMLU.")] = 5,
    compare: Annotated[
        list[str] | None,
        typer.Option(metavar="FILE", help="An mmlu_results.json to compare with; several may be given."),
    ] = None,
    lm_eval: Annotated[
        str | None, typer.Option("--lm-eval", metavar="TASKS", help="Score on tasks of lm-evaluation-harness: a,b.")
    ] = None,
    limit: Annotated[
        float | None, typer.Option(help="The first N documents of each of these tasks, or a share below 1.")
    ] = None,
    lm_eval_path: Annotated[
        Path | None, typer.Option("--lm-eval-path", metavar="DIR", help="A folder of files of tasks.")
    ] = None,
    more_results: Annotated[list[str] | None, typer.Argument(hidden=True)] = None,
    samples: Annotated[int | None, typer.Option(help="The first N conversations of each dataset.")] = None,
    max_new_tokens: Annotated[int | None, typer.Option(help="Longest generation.")] = None,
    models_dir: Annotated[Path | None, typer.Option(help="Where hub models lie; default: models.")] = None,
    device: Device = None,
    dtype: Dtype = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the scores, of each sample too, as JSON.")] = False,
) -> None:
    """Score a model on datasets, alone or next to the donors it was merged from."""
    from olmfast.config.datasets import by_name, read_dataset_option
    from olmfast.config.run import load_config
    from olmfast.runs.scoreboard import evaluate, evaluate_like
    from olmfast.terminal.runs import print_scoreboard, print_scoreboards

    own: dict[str, dict[str, object]] = {"--mmlu": {"--subjects": subjects, "--compare": compare}}
    own["--lm-eval"] = {"--limit": limit, "--lm-eval-path": lm_eval_path}
    ways = [way for way, value in (("--mmlu", mmlu), ("--lm-eval", lm_eval)) if value is not None]
    others: dict[str, object] = {"--dataset": dataset, "--config": config, "--samples": samples}
    others |= {"--against": against} if mmlu is not None else {}
    for way, options in own.items():
        if (unfit := [name for name, value in options.items() if value]) and way not in ways:
            raise InputError(f"{unfit[0]}: is of {way} alone")
        unfit = [*(name for name, value in others.items() if value), *(name for name in ways if name != way)]
        if way in ways and unfit:
            raise InputError(f"{unfit[0]}: {way} has no use for it")
    if lm_eval is not None:
        from olmfast.terminal.harness import evaluate_lm_eval

        boundary.quiet_libraries()
        how = {"device": device or "auto", "dtype": dtype or "auto", "models_dir": models_dir or Path("models")}
        evaluate_lm_eval(model, lm_eval, as_json, against=against or [], include=lm_eval_path, limit=limit, **how)
        return
    if mmlu is not None:
        from olmfast.terminal.mmlu import evaluate_mmlu

        boundary.quiet_libraries()
        evaluate_mmlu(
            model,
            mmlu,
            subjects,
            [*(compare or []), *(more_results or [])],
            as_json,
            shots=shots,
            style=mmlu_as,
            models_dir=models_dir or Path("models"),
            device=device or "auto",
            dtype=dtype or "auto",
        )
        return
    if more_results:
        raise InputError(f"{cut(more_results[0])}: not expected here")
    if bool(dataset) == (config is not None):
        raise InputError(
            "evaluate: expected either --dataset FILE:MODE or --config CFG, or --mmlu DIR, or --lm-eval TASKS"
        )
    boundary.quiet_libraries()

    def note(text: str) -> None:
        print(text, file=sys.stderr)

    given = {"samples": samples, "max_new_tokens": max_new_tokens}
    common = {key: value for key, value in given.items() if value is not None}
    if config is not None:
        places = {"models_dir": None if models_dir is None else str(models_dir.absolute())}
        loaded = load_config(config, _overrides([], **common, **places, device=device, dtype=dtype))
        boards = evaluate_like(loaded, model, against or [], note)
        print_scoreboards(boards, as_json, model)
        return
    entries = {
        name: {**common, **entry}
        for name, entry in by_name(map(read_dataset_option, dataset or []), "--dataset").items()
    }
    place, device, dtype = models_dir or Path("models"), device or "auto", dtype or "auto"
    board = evaluate(model, entries, against or [], models_dir=place, device=device, dtype=dtype, note=note)
    print_scoreboard(board, "Scores", as_json, model)


@app.command()
def schema() -> None:
    """Print the JSON schema of a run's config, for editors."""
    from olmfast.config.schema import run_schema

    print(json.dumps(run_schema(), indent=2))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print as JSON.")] = False) -> None:
    """Print what olmfast finds on this machine: versions, GPU, kernels, extension."""
    from olmfast.terminal.doctor import examine

    found = examine()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    width = max(map(len, found))
    for name, value in found.items():
        print(f"{name:<{width}}  {value}")


def _overrides(entries: list[str], **options: str | int | None) -> dict[str, Any]:
    """Keys of a run's config by what the command line gives them; an option of its own wins over `--set`."""
    from olmfast.config.loading import parse_yaml

    overrides = {}
    for entry in entries:
        key, separator, value = entry.partition("=")
        if not separator or not key:
            raise InputError(f"--set {cut(entry)}: expected KEY=VALUE")
        try:
            overrides[key] = parse_yaml(value, "--set")
        except InputError as error:
            raise InputError(f"--set {cut(entry)}: the value is not valid YAML") from error
    return overrides | {key: value for key, value in options.items() if value is not None}


if __name__ == "__main__":
    main()
