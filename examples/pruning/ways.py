"""Prune the pool of `pool.py` by two searches, at equal evaluations, and print their closing table as Markdown.

    python examples/pruning/ways.py FOLDER [--remove 4] [--budget 200]

FOLDER is that of pool.py; results go to FOLDER/pruned. What is searched by is the likelihood of the answers: their
cross-entropy, a mean over arithmetic, sorting and grammar. The joint search starts from the alphas that `cma` found:
its closing table has them as `file`, beside what needs no search, all on held-out questions.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch

from olmfast.config.run import parse_config
from olmfast.pruning.prune import prune
from olmfast.pruning.session import Searched
from olmfast.search.record import Record

SKILLS = ("arithmetic", "sorting", "grammar")


def searched(folder: Path, method: str, budget: int, samples: int, models: list[str], **section: Any) -> Searched:
    """Prune by a search, unless that was done before."""
    out = folder / "pruned" / method
    if (out / "config.json").is_file():
        return Searched.of(Record.load(out), out)
    asked = {"mode": "exact", "samples": samples}
    data: dict[str, Any] = {
        "models": models,
        "models_dir": "models",
        "output_dir": str(out),
        "device": "cpu",
        "budget": budget,
        "dataset": {f"data/{skill}.json": asked for skill in SKILLS},
        "holdout": {f"data/{skill}_holdout.json": asked for skill in SKILLS},
        "prune": {"method": method, **section},
    }
    began = time.process_time()
    done = prune(parse_config(data, method, folder))
    print(f"{method}: {time.process_time() - began:.0f} CPU s", flush=True)
    assert isinstance(done, Searched)
    return done


def main() -> None:
    parser = argparse.ArgumentParser(description="Prune in every way and compare.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--remove", type=int, default=4, help="layers that go")
    parser.add_argument("--budget", type=int, default=200, help="evaluations of each search")
    parser.add_argument("--samples", type=int, default=160, help="questions of each skill at most")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    folder, asked = arguments.folder.absolute(), (arguments.budget, arguments.samples)
    alphas = searched(folder, "cma", *asked, ["base"], num_layer=arguments.remove)
    start = str(alphas.output_dir / "alphas.json")
    joint = searched(folder, "joint", *asked, ["base", "arithmetic", "sorting"], alphas_file=start)
    for done in (alphas, joint):
        assert done.closing is not None
        head, *rows = done.closing.table()
        print("", *(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows]), sep="\n")
        for label, shares in done.closing.kept.accuracy.items():
            right = [f"{name} {share:.1%}" for name, share in shares.items() if name.startswith("generated")]
            print(f"{label}: {', '.join(right)}")


if __name__ == "__main__":
    main()
