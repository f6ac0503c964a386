"""Alphas: how much of the lower layer is kept at each step of pruning by merging, in files and as weights of layers.

Step k merges a run's last layer but k into the one below it: W_i <- alpha_k W_i + (1 - alpha_k) W_j, where W_j is what
the step before it made. So n steps make one layer of n + 1, whose weights are a convex combination of theirs.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from olmfast.errors import InputError, show, told
from olmfast.weights.files import read_text

ALPHAS = "alphas.json"
KEYS = ("layer_to_merge_into", "layer_to_remove", "ratio_i_alpha")
TOLERANCE = 1e-6  # by which ratio_i_alpha and ratio_j may add up to something else than 1


def weights_of(alphas: Sequence[float]) -> list[float]:
    """The weight of each of the n + 1 layers of a run, the lowest first, that n alphas in order of steps give it."""
    weights = [1.0]
    for alpha in alphas:
        weights = [alpha, *((1 - alpha) * weight for weight in weights)]
    return weights


def alphas_of(weights: Sequence[float]) -> list[float]:
    """The alphas, in order of steps, under which a run's layers have these weights; the inverse of `weights_of`."""
    alphas, below = [], [*weights]
    for index in range(len(below) - 2, -1, -1):
        total = math.fsum(below[index:])
        alphas.append(min(1.0, max(0.0, below[index] / total)) if total > 0 else 1.0)
    return alphas


def steps_of(first: int, n_steps: int) -> list[tuple[int, int]]:
    """(layer to merge into, layer to remove) of each step, for a run of `n_steps` + 1 layers from `first` on."""
    return [(first + n_steps - 1 - k, first + n_steps - k) for k in range(n_steps)]


def to_json(first: int, alphas: Sequence[float]) -> str:
    """The text of an alpha file."""
    entries = [
        {"step": step, "layer_to_merge_into": into, "layer_to_remove": removed, "ratio_i_alpha": float(alpha)}
        for step, ((into, removed), alpha) in enumerate(zip(steps_of(first, len(alphas)), alphas, strict=True))
    ]
    return json.dumps(entries, indent=2) + "\n"


def read_alphas(path: Path) -> list[Mapping[str, Any]]:
    """The entries of an alpha file, each with the keys that it must have; `step` is ignored.

    Raises InputError naming the file and the entry.
    """
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such file{_similar(path)}")
    try:
        data = json.loads(read_text(path, "utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not readable as JSON: {told(error)}") from error
    if not isinstance(data, list) or not data:
        raise InputError(f"{path}: expected a list of steps with {', '.join(KEYS)}, got {show(data)}")
    faults = [fault for index, entry in enumerate(data) if (fault := _fault(entry, index))]
    if faults:
        raise InputError("\n".join(f"{path}: {fault}" for fault in faults))
    return data


def alphas_in(path: Path, entries: Sequence[Mapping[str, Any]], first: int, n_steps: int) -> list[float]:
    """The alphas of the first `n_steps` entries of an alpha file, for a run of layers from `first` on.

    Raises InputError naming the file and the entry that is missing, or is not of its turn.
    """
    if len(entries) < n_steps:
        raise InputError(
            f"{path}: holds {len(entries)} entries, and {n_steps} steps need {n_steps}: entry {len(entries)} is missing"
        )
    for index, (entry, wanted) in enumerate(zip(entries, steps_of(first, n_steps), strict=False)):
        got = entry["layer_to_merge_into"], entry["layer_to_remove"]
        if got != wanted:
            raise InputError(
                f"{path}: entry {index}: merges layer {got[1]} into {got[0]}, expected {wanted[1]} into {wanted[0]}"
            )
    return [float(entry["ratio_i_alpha"]) for entry in entries[:n_steps]]


def _fault(entry: object, index: int) -> str:
    """What is wrong with an entry; nothing if it is one."""
    where = f"entry {index}"
    if not isinstance(entry, dict):
        return f"{where}: expected an object with {', '.join(KEYS)}, got {show(entry)}"
    missing = [key for key in KEYS if key not in entry]
    if missing:
        return f"{where}: {missing[0]} is missing, got {show(', '.join(map(str, entry)))}"
    for key in KEYS[:2]:
        if type(entry[key]) is not int or entry[key] < 0:
            return f"{where}: {key}: expected the number of a layer, got {show(entry[key])}"
    for key in ("ratio_i_alpha", "ratio_j"):
        if key in entry and not _is_share(entry[key]):
            return f"{where}: {key}: expected a number from 0 to 1, got {show(entry[key])}"
    if "ratio_j" in entry and abs(entry["ratio_i_alpha"] + entry["ratio_j"] - 1) > TOLERANCE:
        alpha, rest = entry["ratio_i_alpha"], entry["ratio_j"]
        return f"{where}: ratio_i_alpha {alpha} and ratio_j {rest} add up to {alpha + rest:g} instead of 1"
    return ""


def _is_share(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= 1


def _similar(path: Path) -> str:
    """`; did you mean ...?` for a file beside it whose name differs in signs, or in upper and lower case, alone."""

    def bare(name: str) -> str:
        return "".join(letter for letter in name.lower() if letter.isalnum())

    folder = path.parent
    try:
        names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    except OSError:
        names = []
    close = [name for name in names if bare(name) == bare(path.name)]
    return f"; did you mean {show(close[0])}?" if close else ""
