"""The report of a pruned model: how it came to be, and the recipe from which `olmfast rebuild` makes it again."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from olmfast import __version__
from olmfast.config.run import RunConfig
from olmfast.pruning.target import Target
from olmfast.search.log import strict
from olmfast.weights.recipe import Recipe


def report_text(
    config: RunConfig, target: Target, recipe: Recipe, alphas: list[float], output: Path, more: Mapping[str, Any]
) -> str:
    """`merge_report.json` of a model that was pruned without a search; `more` is told of how its alphas were found."""
    places = {"models_dir": config.models_dir, "config_dir": config.config_dir}
    told = {
        "version": 1,
        "olmfast": __version__,
        "config": config.decisive(),
        "places": {key: os.path.relpath(place, output) for key, place in places.items()},
        "donors": {donor.name: donor.fingerprint() for donor in target.pool},
        "status": "finished",
        "recipe": recipe.to_json(),
        "pruned": {"first": target.first, "steps": target.n_steps, "alphas": alphas, **more},
    }
    return json.dumps({"olmfast": strict(told)}, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
