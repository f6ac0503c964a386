"""Score the demo's result on questions that nothing was tuned on: three fresh seeds, beside every donor.

    python examples/demo/fresh.py

Needs the demo's result (`make demo`).
"""

from __future__ import annotations

from pathlib import Path

from skills import write_datasets

from olmfast.config import load_config
from olmfast.driver import evaluate
from olmfast.progress import print_scoreboard

DEMO = Path(__file__).parent
SEEDS = (11, 12, 13)
COUNT = 128


def main() -> None:
    """Print a table of scores and skill retained per seed."""
    config = load_config(DEMO / "olm_config.yaml")
    donors = [str(config.models_dir / name) for name in config.models]
    for seed in SEEDS:
        folder = config.output_dir.parent / f"fresh-{seed}"
        write_datasets(folder, "fresh", seed, COUNT)
        datasets = {
            str(folder / name.replace("_holdout", "")): entry.model_dump() for name, entry in config.holdout.items()
        }
        board = evaluate(str(config.output_dir), datasets, donors, device=config.device, dtype=config.dtype)
        print_scoreboard(board, f"Fresh questions, seed {seed} (lower is better)", as_json=False)


if __name__ == "__main__":
    main()
