"""How models are named: `model@revision+adapter`, or mergekit's mappings of the same parts."""

from __future__ import annotations


def parse_model(value: object) -> object:
    """A model's name, or `model+adapter`; mergekit also writes {model: {path, revision}, lora: {path, revision}}."""
    if isinstance(value, dict) and set(value) <= {"model", "lora", "override_architecture", "path", "revision"}:
        names = [_parse_path(value.get("model", value)), _parse_path(value.get("lora"))]
        if names[0] is not None and (names[1] is not None or not value.get("lora")):
            return "+".join(name for name in names if name is not None)
    return value


def _parse_path(value: object) -> str | None:
    """`path` or `path@revision` of a path, or of {path, revision}; None for anything else."""
    entry = {"path": value} if isinstance(value, str) else value
    if not isinstance(entry, dict) or not isinstance(entry.get("path"), str):
        return None
    return f"{entry['path']}@{entry['revision']}" if entry.get("revision") else str(entry["path"])
