"""Model cards: front matter for the hub, the card of a static merge and that of an adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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


def merge_card(
    models: Sequence[str], made_of: Sequence[str], method: str, recipe: str, account: str, notes: Sequence[str]
) -> str:
    """README.md of a static merge; `recipe` is the file or command that says what was merged, as it was given.

    `made_of` names the adapters among the models by themselves.
    """
    listed = "\n".join(f"- `{model}`" for model in models)
    parts = [
        front_matter(made_of),
        "# Merged model\n",
        f"Made by olmfast {__version__} from {len(models)} models by `{method}`; config and other files are those of "
        f"the first:\n\n{listed}\n",
        *(f"{note}.\n" for note in notes),
        f"## Recipe\n\n```yaml\n{recipe.rstrip()}\n```\n\n{account}.\n",
    ]
    return "\n".join(parts)


def adapter_card(base: Sequence[str], account: Sequence[str], errors: Mapping[str, float]) -> str:
    """README.md of an extracted adapter; `errors` are the shares of each module's difference that it leaves out."""
    front = {"base_model": list(base), "library_name": "peft", "tags": ["lora", "olmfast"]}
    worst = sorted(errors, key=errors.__getitem__, reverse=True)[:10]
    rows = "\n".join(f"| {name} | {errors[name]:.2%} |" for name in worst)
    said = "\n".join(f"{line}.\n" for line in account)
    return (
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n# LoRA adapter\n\n"
        f"Extracted by olmfast {__version__} from a fine-tune of `{'+'.join(base)}`.\n\n{said}\n"
        f"| module | left out |\n|---|---|\n{rows}\n"
    )
