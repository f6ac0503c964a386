"""The held-out score of three searches for the same demo, against how many evaluations each may take.

    python examples/demo/curve.py docs/search-curve.svg

The joint search (merge.yaml) is begun anew for every budget, as what it does depends on it; the search by stages
(olm_config.yaml) and plain CMA-ES over the numbers of one merge (evolve.yaml) continue from the smaller one. Prints a
table and draws it.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import matplotlib
import yaml
from matplotlib.figure import Figure

from olmfast import load_config, run
from olmfast.runs.scoreboard import RESULT

HERE = Path(__file__).parent
SEARCHES: dict[str, tuple[str, dict[str, Any]]] = {
    "joint search": ("merge.yaml", {}),
    "search by stages": ("olm_config.yaml", {}),
    "CMA-ES over the numbers of one merge": (
        "evolve.yaml",
        {"evolve": {"merge_method": "task_arithmetic", "layer_granularity": 2, "generations": 60}},
    ),
}


def curve(name: str, budgets: list[int], samples: int | None, folder: Path) -> list[tuple[float, float, float]]:
    """Evaluations taken, skill retained on the selection and on the held-out questions, by budget."""
    file, overrides = SEARCHES[name]
    found, anew = [], file == "merge.yaml"
    if samples:
        keys = yaml.safe_load((HERE / file).read_text())
        overrides = {**overrides, **{key: fewer(keys[key], samples) for key in ("dataset", "holdout")}}
    for budget in budgets:
        out = folder / (f"{Path(file).stem}-{budget}" if anew else Path(file).stem)
        config = load_config(HERE / file, {"output_dir": str(out.absolute()), "budget": budget, **overrides})
        done = run(config, resume=out.exists() and not anew, overwrite=anew)
        if done.status == "finished" and done.record.evaluations < budget / 2:
            break  # it has nothing more to try
        point = (done.record.evaluations, done.selection.retained(RESULT), done.holdout.retained(RESULT))
        print(f"{name:38} budget {budget:4}: {point[0]:6.1f} {point[1]:7.3f} {point[2]:7.3f}", flush=True)
        found.append(point)
    return found


def fewer(datasets: dict[str, Any], samples: int) -> dict[str, Any]:
    """The same datasets, of each the first samples."""
    return {name: {**entry, "samples": samples} for name, entry in datasets.items()}


def draw(found: dict[str, list[tuple[float, float, float]]], budgets: list[int], path: Path) -> None:
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
    parser.add_argument("--budgets", type=int, nargs="+", default=[50, 100, 200, 500])
    parser.add_argument("--samples", type=int, help="of each dataset; default: as in the configs")
    parser.add_argument("--runs", type=Path, default=Path("runs/curve"), help="where the results go")
    options = parser.parse_args()
    found = {name: curve(name, options.budgets, options.samples, options.runs) for name in SEARCHES}
    draw(found, options.budgets, options.picture)


if __name__ == "__main__":
    main()
