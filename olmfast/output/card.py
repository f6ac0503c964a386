"""Model cards: front matter for the hub, and the card of a static merge."""

from __future__ import annotations

from collections.abc import Sequence

import yaml

from olmfast import __version__


def front_matter(models: Sequence[str]) -> str:
    """What the hub reads: the models it is made of, the base first."""
    front = {
        "base_model": list(models),
        "base_model_relation": "merge",
        "library_name": "transformers",
        "tags": ["merge", "olmfast"],
    }
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n"


def merge_card(models: Sequence[str], method: str, recipe: str, account: str, notes: Sequence[str]) -> str:
    """README.md of a static merge; `recipe` is the file or command that says what was merged, as it was given."""
    listed = "\n".join(f"- `{model}`" for model in models)
    parts = [
        front_matter(models),
        "# Merged model\n",
        f"Made by olmfast {__version__} from {len(models)} models by `{method}`; config and other files are those of "
        f"the first:\n\n{listed}\n",
        *(f"{note}.\n" for note in notes),
        f"## Recipe\n\n```yaml\n{recipe.rstrip()}\n```\n\n{account}.\n",
    ]
    return "\n".join(parts)
