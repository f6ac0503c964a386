"""The held-out score of three searches for the same merge, against how many evaluations each may take.

    python examples/demo/curve.py docs/search-curve.svg

Models and questions are the demo's (merge.yaml), or those of `--config`, which may not say how to search. The joint
search is begun anew for every budget, as what it does depends on it; the search by stages (as in olm_config.yaml) and
plain CMA-ES over the numbers of one merge continue from the smaller one. Prints a table and draws it.
An interrupted call is continued by the next one, from what it left in `--runs`.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.figure import Figure

from olmfast import load_config, run
from olmfast.runs.scoreboard import RESULT

HERE = Path(__file__).parent
Point = tuple[float, float, float]
"""Evaluations taken, skill retained on the selection and on the held-out questions."""

JOINT, STAGES, EVOLVE = "joint search", "search by stages", "CMA-ES over the numbers of one merge"
PARAMETERS = {"merge_method": "task_arithmetic", "layer_granularity": 2, "generations": 60}


def searches(config: Path) -> dict[str, dict[str, Any]]:
    """Of each search, what is set beside the keys of a config that says only what to merge, by which questions."""
    merging = set(yaml.safe_load(config.read_text())) | set(yaml.safe_load((HERE / "merge.yaml").read_text()))
    stages = yaml.safe_load((HERE / "olm_config.yaml").read_text())
    return {
        JOINT: {},
        STAGES: {key: value for key, value in stages.items() if key not in merging},
        EVOLVE: {"evolve": PARAMETERS},
    }


def curve(config: Path, name: str, budgets: list[int], samples: int | None, folder: Path) -> list[Point]:
    """One search's points by budget, as far as it has more to try."""
    overrides = searches(config)[name]
    if samples:
        keys = yaml.safe_load(config.read_text())
        overrides = {**overrides, **{key: fewer(keys[key], samples) for key in ("dataset", "holdout")}}
    folder /= name.replace(" ", "-")
    points, of = folder / "points.json", [config.read_text(), samples]
    known: dict[str, Any] = json.loads(points.read_text()) if points.exists() else {"of": of, "points": {}}
    if known["of"] != of:
        raise SystemExit(f"{points}: is of another config or number of samples; remove {folder} or give another --runs")
    found: dict[str, Point] = known["points"]
    if found:
        print(f"{name}: budgets {', '.join(found)} are taken from {points}")
    for budget in budgets:
        if str(budget) not in found:
            out = folder / (str(budget) if name == JOINT else "all")
            keys = {**overrides, "output_dir": str(out.absolute()), "budget": budget}
            done = run(load_config(config, keys), resume=True)
            if done.status == "finished" and done.record.evaluations < budget / 2:
                break  # it has nothing more to try
            found[str(budget)] = (
                done.record.evaluations,
                done.selection.retained(RESULT),
                done.holdout.retained(RESULT),
            )
            points.write_text(json.dumps(known))
        evaluations, selection, holdout = found[str(budget)]
        print(f"{name:38} budget {budget:4}: {evaluations:6.1f} {selection:7.3f} {holdout:7.3f}", flush=True)
    return [found[str(budget)] for budget in budgets if str(budget) in found]


def fewer(datasets: dict[str, Any], samples: int) -> dict[str, Any]:
    """The same datasets, of each the first samples."""
    return {name: {**entry, "samples": samples} for name, entry in datasets.items()}


def draw(found: dict[str, list[Point]], budgets: list[int], path: Path) -> None:
    """Held-out scores as lines, those on the selection questions thin and dashed."""
    matplotlib.rcParams["svg.hashsalt"] = "olmfast"
    figure = Figure(figsize=(7, 4))
    axes = figure.subplots()
    for name, points in found.items():
        x, selection, holdout = zip(*points, strict=True)
        (line,) = axes.plot(x, holdout, "o-", label=name)
        axes.plot(x, selection, "--", color=line.get_color(), linewidth=0.8)
    axes.set_xscale("log")
    axes.minorticks_off()
    axes.set_xticks(budgets, [str(budget) for budget in budgets])
    axes.set_xlabel("evaluations of all selection questions")
    axes.set_ylabel("skill retained (dashed: on the selection questions)")
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, frameon=False, fontsize="small")
    figure.savefig(path, metadata={"Date": None}, bbox_inches="tight")


def main() -> None:
    """Run, print and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--config", type=Path, default=HERE / "merge.yaml", help="what to merge, by which questions")
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 100, 200, 500])
    parser.add_argument("--samples", type=int, help="of each dataset; default: as in the configs")
    parser.add_argument("--runs", type=Path, default=Path("runs/curve"), help="where the results go")
    options = parser.parse_args()
    found = {
        name: curve(options.config, name, options.budgets, options.samples, options.runs)
        for name in searches(options.config)
    }
    draw(found, options.budgets, options.picture)


if __name__ == "__main__":
    main()
