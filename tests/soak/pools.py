"""Random small pools, most of which no merge helps: how often a joint search's result is worse than its start.

    python tests/soak/pools.py [--pools 30] [--first 0] [--budget 120]

Each pool has 12 or 60 questions per dataset to choose by and 300 on which result and start are compared.
"""

from __future__ import annotations

import argparse
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from olmfast import run
from olmfast.testing import own_answers, sums, tiny_model, write_dataset

ASKED, HELD = (12, 60), 300
KINDS = ("skills", "one skill", "copies", "noise", "noise alone")
MODES = ("exact_match", "exact", "perplexity")


def make(folder: Path, seed: int) -> Mapping[str, Any]:
    """A pool's config. Donors differ from one base at random: each is best at imitating itself, which is its skill.

    skills: each donor has a dataset. one skill: only the first has, so that whatever is mixed in does harm. copies:
    two donors are the same. noise: besides, a dataset of random answers. noise alone: nothing but that.
    """
    drawn, kind = random.Random(seed), KINDS[seed % len(KINDS)]
    donors = [f"donor{i}" for i in range(drawn.choice((2, 3)))]
    noise, mode, n_asked = drawn.choice((0.05, 0.1, 0.2)), drawn.choice(MODES), drawn.choice(ASKED)
    for i, name in enumerate(donors):
        tiny_model(folder / "models" / name, seed=1 + i, noise=noise, num_hidden_layers=2)
    skilled = {"noise alone": [], "one skill": donors[:1]}.get(kind, donors)
    for i, name in enumerate(skilled):
        own_answers(folder / f"asked{i}.json", folder / "models" / name, n_asked, 1000 + i)
        own_answers(folder / f"held{i}.json", folder / "models" / name, HELD, 2000 + i)
    names = [str(i) for i in range(len(skilled))]
    if kind.startswith("noise"):
        names.append("noise")
        for part, n in (("asked", n_asked), ("held", HELD)):
            pairs = [(question, str(drawn.randrange(100))) for question, _ in sums(n, drawn.randrange(10**6))]
            write_dataset(folder / f"{part}noise.json", pairs)
    if kind == "copies":
        shutil.copytree(folder / "models" / donors[0], folder / "models" / "copy")
        donors.append("copy")
    datasets = {
        key: {f"{part}{name}.json": {"mode": mode} for name in names}
        for key, part in (("dataset", "asked"), ("holdout", "held"))
    }
    return {"models": donors, "models_dir": "models", "output_dir": "out", "seed": seed, "samples": HELD, **datasets}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pools", type=int, default=30)
    parser.add_argument("--first", type=int, default=0, help="seed of the first pool")
    parser.add_argument("--budget", type=int, default=120)
    args = parser.parse_args()
    outcomes: Counter[str] = Counter()
    for seed in range(args.first, args.first + args.pools):
        with tempfile.TemporaryDirectory() as scratch:
            config = Path(scratch) / "run.yaml"
            config.write_text(yaml.safe_dump({**make(Path(scratch), seed), "budget": args.budget, "device": "cpu"}))
            result = run(config)
        board, first = result.holdout, result.record.steps["base"].winner
        rows = {label: board.retained(label) for label in board.rows}
        start = rows.get("start", rows[first])  # no row of its own: it is the best donor
        gain = rows["merged"] - start
        outcome = "better" if gain > 1e-6 else "worse" if gain < -1e-6 else "equal"
        outcomes[outcome] += 1
        print(f"pool {seed} ({KINDS[seed % len(KINDS)]}): {outcome}, {start:.3f} -> {rows['merged']:.3f}", flush=True)
    told = ", ".join(f"{outcomes[one]} {one}" for one in ("better", "equal", "worse"))
    print(f"{args.pools} pools: {told}")


if __name__ == "__main__":
    main()
