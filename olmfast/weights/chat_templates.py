"""Chat templates by name, by model, or given in full in a merge file."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from olmfast.errors import InputError, did_you_mean, show
from olmfast.weights.files import read_text
from olmfast.weights.tokenizer_files import tokenizer_config

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'"
    " + message['content'] | trim + '<|eot_id|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + message['content'] + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + eos_token }}{% else %}{{ raise_exception('only user and assistant may speak') }}"
    "{% endif %}{% endfor %}"
)
ALPACA = (
    "{% for message in messages %}{% if message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% elif message['role'] == 'user' %}{{ '### Instruction:\\n' + message['content'] + '\\n\\n' }}"
    "{% else %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)
TEMPLATES = {"chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "alpaca": ALPACA}


def choose(wanted: str, models: Mapping[str, Path]) -> str | None:
    """The template that `chat_template` of a merge file means; None where `auto` finds none in the models.

    `auto` is the one most models have, in a tie the first. Raises InputError for anything that is not a template.
    """
    if wanted == "auto":
        held = [text.strip() for folder in models.values() if (text := of_model(folder))]
        return Counter(held).most_common(1)[0][0] if held else None
    if wanted in models:
        text = of_model(models[wanted])
        if text is None:
            raise InputError(f"chat_template: {wanted} has none")
        return text
    if wanted in TEMPLATES:
        return TEMPLATES[wanted]
    if "{" not in wanted:
        known = [*TEMPLATES, "auto", *models]
        raise InputError(
            f"chat_template: expected a Jinja template, a model, or one of {', '.join(TEMPLATES)}, auto; "
            f"got {show(wanted)}{did_you_mean(wanted, known)}"
        )
    return wanted


def of_model(folder: Path) -> str | None:
    """The (default) chat template of a model folder."""
    path = folder / "chat_template.jinja"
    if os.path.lexists(path):
        return read_text(path)
    held: str | list[dict[str, str]] | None = tokenizer_config(folder).get("chat_template")
    if isinstance(held, list):  # several, by name
        return next((entry["template"] for entry in held if entry["name"] == "default"), None)
    return held
