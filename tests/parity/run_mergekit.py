"""Runs merge files through mergekit, in mergekit's own environment: one process for many of them.

python run_mergekit.py LIST.json        a list of [merge file, output folder]; LIST.done gets a list of errors
"""

import json
import sys
from pathlib import Path

import torch

FACTOR = 2654435761  # the same numbers stand in test_parity.py


def chosen(probabilities: torch.Tensor) -> torch.Tensor:
    """In place of torch.bernoulli: a mask that both sides can make, from the flat index."""
    numbers = torch.arange(probabilities.numel(), dtype=torch.int64) * FACTOR % (1 << 32)
    return ((numbers.double() / (1 << 32)).float().view(probabilities.shape) < probabilities).to(probabilities.dtype)


def main() -> None:
    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions

    torch.bernoulli = chosen
    errors = []
    listed = Path(sys.argv[1])
    for file, out in json.loads(listed.read_text()):
        try:
            config = MergeConfiguration.model_validate(yaml.safe_load(Path(file).read_text()))
            run_merge(config, out, MergeOptions(quiet=True, write_model_card=False))
            errors.append(None)
        except Exception as error:
            errors.append(f"{type(error).__name__}: {error}")
    listed.with_suffix(".done").write_text(json.dumps(errors))


main()
