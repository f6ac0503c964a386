"""What a key of the original OLM means here, in all versions of its `olm_config.yaml`: plain data in, plain data out.

Its newest version has a switch for every stage. Its first versions have none: they searched every block, began from a
donor chosen by a metric unless one was named, and took the candidate of the lowest average rank. docs/original.md says
what is the same and what differs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

# Keys of a search by stages: a config that gives one of them searches as the original tool does.
STAGE_KEYS = (
    "base_select",
    "boundary_select",
    "layer_swap",
    "tensor_swap",
    "skip_norm",
    "es_svd",
    "es_norm",
    "candidates",
    "scales",
    "direction",
    "markov",
    "max_models",
    "improve_all",
    "racing",
)
# Keys of these stages that the original did not have, and others that say how to search in this tool's own words.
OWN_KEYS = ("candidates", "scales", "units", "search", "evolve", "dataflow", "racing", "ancestor", "start")
# Keys of the original that decide nothing here.
IGNORED = {
    "metric_dir": "metrics are in the output folder",
    "db_dir": "scores are in the output folder",
    "models_db": "scores are in the output folder",
    "skip_quality": "every dataset is scored",
}
RENAMED = {"es_swap": "es_svd", "es_generations": "es_svd_generations", "es_sigma": "es_svd_sigma"}
FIRST_KEYS = ("db_dir", "models_db", "skip_quality", *RENAMED)  # that only first versions had
FIRST_MODES = {"exact_uncertain": "exact", "uncertain_bigram": "bigram"}
SWITCHES = ("layer_swap", "tensor_swap", "skip_norm", "es_svd", "es_norm")
# The words for one metric in the versions of the original.
SAME_METRIC = (("exact", "exact_match"), ("bigram", "bigram_loss"), ("quality", "diversity"))
NAMES_A_METRIC = ("base_select", "boundary_select", "improve_all")
DATASETS = ("dataset", "holdout", "validation")
BOUNDARY = "boundary"  # in `units`: the modules of embedding, final norm and head


def read_original(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """A config's data with the original's keys and words in place of older ones, and what was read as what.

    Data without any of the original's keys comes back as it is.
    """
    first = _first_version(data)
    data, notes = dict(data), []
    for key, why in IGNORED.items():
        if key in data:
            del data[key]
            notes.append(f"{key}: a key of the original, accepted and ignored; {why}")
            data.setdefault("direction", "forward")  # still a search by stages
    for old, new in RENAMED.items():
        if old in data:
            value = data.pop(old)
            data.setdefault(new, value)
            notes.append(f"{old}: read as {new}")
    for key in DATASETS:
        data |= {key: _with_new_modes(data[key])} if isinstance(data.get(key), dict) else {}
    if not _is_original(data):
        return data, notes
    notes += _drop_repeated(data)
    if first:
        notes += _read_first(data, first)
    notes += [note for key in NAMES_A_METRIC for note in _metric_in_use(data, key)]
    if data.get("tensor_swap") and "units" not in data:
        data["units"] = ["*", BOUNDARY]
        notes.append("tensor_swap: as in the original, embedding, final norm and head are among the modules")
    return data, notes


def _is_original(data: Mapping[str, Any]) -> bool:
    """Whether a config says how to search in the original's words alone."""
    return any(key in data for key in STAGE_KEYS) and not any(key in data for key in OWN_KEYS)


def _first_version(data: Mapping[str, Any]) -> str:
    """Why a config is one of the original's first versions; empty if it is not."""
    told = [key for key in FIRST_KEYS if key in data]
    told += [mode for entry in _entries(data) if (mode := str(entry.get("mode"))) in FIRST_MODES]
    if told:
        return f"it has {told[0]}"
    chosen = any(isinstance(data.get(key), bool) for key in ("base_select", "boundary_select"))
    has = next((key for key in ("direction", "metric_dir") if key in data), None)
    if has is None or chosen or any(key in data for key in (*SWITCHES, *OWN_KEYS)):
        return ""
    return f"it has a {has} and no switch of a stage"


def _read_first(data: dict[str, Any], why: str) -> Iterator[str]:
    """Spell out what first versions did without being told."""
    searched = "the stages that it switches on are searched"
    if not any(key in data for key in ("layer_swap", "tensor_swap")):
        data["layer_swap"] = True
        searched = "every block is searched"
    named = data.get("base_model_name")
    if data.get("base_select") is None:
        metric = "quality" if any(entry.get("mode") == "quality" for entry in _entries(data)) else True
        data["base_select"] = metric if named is None else False
    if data.get("selection") in (None, "ranks"):
        data["selection"] = "average_rank"
    by = data["base_select"]
    base = f"chosen by {'all datasets' if by is True else by}" if by else (named or "the first model")
    read = "read as a config of the original's first versions"
    yield f"{read}, as {why}: {searched}; the base is {base}; the lowest average rank wins"


def _metric_in_use(data: dict[str, Any], key: str) -> Iterator[str]:
    """Where a key names a metric by another version's word, or one that no dataset has."""
    wanted = FIRST_MODES.get(str(data.get(key)), data.get(key))
    if wanted is None or isinstance(wanted, bool):
        return
    data[key] = wanted
    used = [entry.get("mode") for entry in _entries(data)]
    same = next((pair for pair in SAME_METRIC if wanted in pair), None)
    if same is None or not used or wanted in used:
        return
    other = same[1 - same.index(wanted)]
    if other in used:
        data[key] = other
        yield f"{key}: {wanted} is read as {other}"
    elif key == "improve_all":
        data[key] = None
        yield f"{key}: no dataset has the mode {wanted}, so nothing is guarded"
    else:
        data[key] = True
        yield f"{key}: no dataset has the mode {wanted}, so all of them choose"


def _drop_repeated(data: dict[str, Any]) -> Iterator[str]:
    """A model that is listed twice is one model."""
    models = data.get("models")
    if isinstance(models, list) and all(isinstance(name, str) for name in models):
        data["models"] = list(dict.fromkeys(models))
        yield from (f"models: {name} is listed twice" for name in data["models"] if models.count(name) > 1)


def _entries(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The selection datasets' settings, as far as they are given as such."""
    datasets = data.get("dataset")
    return [entry for entry in datasets.values() if isinstance(entry, dict)] if isinstance(datasets, dict) else []


def _with_new_modes(entries: Mapping[Any, Any]) -> dict[Any, Any]:
    """Dataset entries with the words of later versions for their modes."""
    return {
        name: {**entry, "mode": FIRST_MODES[entry["mode"]]}
        if isinstance(entry, dict) and entry.get("mode") in list(FIRST_MODES)
        else entry
        for name, entry in entries.items()
    }
