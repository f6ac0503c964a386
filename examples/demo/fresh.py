"""Score the demo's result on questions that nothing was tuned on: three fresh seeds, beside every donor.

    python examples/demo/fresh.py

Needs the demo's result (`make demo`).
"""

from __future__ import annotations

import argparse
from pathlib import Path

from skills import write_datasets

from olmfast import RunConfig, load_config
from olmfast.config.datasets import DatasetConfig
from olmfast.runs.scoreboard import evaluate
from olmfast.terminal.runs import print_scoreboard

CONFIG = Path(__file__).parent / "merge.yaml"
SEEDS = (21, 22, 23)
COUNT = 128


def fresh_datasets(config: RunConfig, seed: int, count: int) -> dict[str, DatasetConfig]:
    """Write one file of fresh questions per held-out dataset; returns them with that dataset's settings."""
    folder = config.output_dir.parent / f"fresh-{seed}"
    write_datasets(folder, "fresh", seed, count)
    return {str(folder / name.replace("_holdout", "")): entry for name, entry in config.holdout.items()}


def main() -> None:
    """Print a table of scores and skill retained per seed."""
    parser = argparse.ArgumentParser(description="Score the demo's result on fresh questions.")
    parser.add_argument("--config", type=Path, default=CONFIG, help="of the run; default: the demo's")
    parser.add_argument("--count", type=int, default=COUNT, help="questions per skill and seed")
    arguments = parser.parse_args()
    config = load_config(arguments.config)
    donors = [str(config.models_dir / name) for name in config.models]
    for seed in SEEDS:
        datasets = {name: entry.model_dump() for name, entry in fresh_datasets(config, seed, arguments.count).items()}
        board = evaluate(str(config.output_dir), datasets, donors, device=config.device, dtype=config.dtype)
        print_scoreboard(board, f"Fresh questions, seed {seed} (lower is better)", as_json=False)


if __name__ == "__main__":
    main()
