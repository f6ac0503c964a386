"""Datasets as a config has them: how a file, or a task of lm-evaluation-harness, is read and scored."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from olmfast.config.loading import explain
from olmfast.config.overriding import override
from olmfast.errors import InputError, show, shown

Mode = Literal[
    "exact_match", "bigram_loss", "diversity", "exact", "bigram", "quality", "likelihood", "perplexity", "choice"
]
Template = Literal["auto", "tokenizer", "chatml", "raw"]
Wanted = Literal["prompt", "response", "system", "choices", "answer"]  # of an item of a dataset
Fields = Mapping[Wanted, str | list[str]]  # the keys that hold it; of several each has an option, or part of the prompt
HAN = "[\u4e00-\u9fff]"
MODES: tuple[str, ...] = Mode.__args__  # type: ignore[attr-defined]

SCORED = "test"  # the split that a task is scored by, which no choice may be made by


class DatasetConfig(BaseModel):
    """How one dataset file, or a task of lm-evaluation-harness, is read and scored."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        allow_inf_nan=False,
        json_schema_extra={"required": [], "anyOf": [{"required": ["mode"]}, {"required": ["lm_eval"]}]},
    )
    mode: Mode
    fields: dict[Wanted, str | list[str]] | None = None
    think: bool = True
    weight: float = Field(default=1.0, ge=0)
    strict: bool = False
    include_eos: bool = False
    forbid: str | None = HAN
    template: Template = "auto"
    max_new_tokens: int = Field(default=1024, ge=1)
    samples: int = Field(default=200, ge=1)
    file: str | None = None
    subjects: list[str] | None = Field(default=None, min_length=1)
    shots: int = Field(default=5, ge=0)
    of_question: bool = False
    lm_eval: str | None = None
    lm_eval_path: str | None = None
    split: Literal["train", "validation", "test"] | None = None

    def path(self, folder: Path, name: str) -> Path:
        """Where the dataset `name` of a folder is: its name is that of its file, unless it says another.

        Of a task it is where its files are, if that is said.
        """
        return folder / ((self.lm_eval_path or self.lm_eval) if self.lm_eval else self.file or name)

    def source(self, name: str) -> str:
        """What tells the questions of the dataset `name` from those of others."""
        return f"{self.lm_eval} {self.split}" if self.lm_eval else self.file or name

    @model_validator(mode="before")
    @classmethod
    def _with_mode(cls, data: Any) -> Any:
        if isinstance(data, str):
            raise ValueError(f"expected how it is scored, such as {{mode: exact_match}}, got {shown(data)}")
        return {"mode": "exact", **data} if isinstance(data, dict) and data.get("lm_eval") else data

    @model_validator(mode="after")
    def _check(self) -> DatasetConfig:
        if self.of_question and self.mode in ("likelihood", "choice", "diversity", "quality"):
            raise ValueError(f"of_question: mode {self.mode} is of answers; use exact or perplexity")
        for name, key in (self.fields or {}).items():
            if isinstance(key, list) and (name not in ("choices", "prompt") or len(key) < 2):
                raise ValueError(f"fields: {name}: expected a key, or several for prompt and choices, got {show(key)}")
        keys = self.fields or {}
        if isinstance(keys.get("choices"), list) and keys.get("answer") in keys["choices"]:
            raise ValueError(
                f"fields: answer: {show(keys['answer'])} is one of choices, so that the right letter would always be "
                "the same; write the file with its options in random order"
            )
        if self.lm_eval is None and (self.split or self.lm_eval_path):
            raise ValueError("split, lm_eval_path: are of a task; add lm_eval: TASK")
        if self.lm_eval and (self.file or self.fields or self.subjects):
            raise ValueError("lm_eval: a task has its own documents; leave file, fields and subjects out")
        return self


def one_or_more(keys: str | list[str]) -> list[str]:
    """The keys of one entry of `fields`."""
    return [keys] if isinstance(keys, str) else keys


# Dataset keys that may be given at the top level, as the default of every dataset.
DATASET_DEFAULTS = ("forbid", "template", "max_new_tokens", "samples")
LM_EVAL_PATH = "lm_eval_path"  # the default of those that are tasks


def written_out(entries: Any, section: str) -> Any:
    """A section of datasets with an entry for each mode of a file; what is no mapping stays as it is.

    `{math.json: {mode: [exact, perplexity]}}` has `math.json:exact` and `math.json:perplexity`; `{lm_eval: T}` has `T`.
    A task of the section `holdout` is asked by the split that it is scored by, unless it says another.
    """
    if not isinstance(entries, dict):
        return entries
    if isinstance(entries.get("lm_eval"), str):
        split = entries.get("split") or (SCORED if section == "holdout" else None)
        entries = {entries["lm_eval"] + (f" {split}" if split else ""): entries}
    found: dict[Any, Any] = {}
    for name, entry in entries.items():
        if isinstance(entry, dict) and entry.get("lm_eval") and section == "holdout" and entry.get("split") is None:
            entry = {**entry, "split": SCORED}
        modes = entry.get("mode") if isinstance(entry, dict) else None
        if isinstance(modes, list) and modes:
            file = {} if entry.get("lm_eval") else {"file": entry.get("file") or name}
            found |= {f"{name}:{mode}": {**entry, "mode": mode, **file} for mode in modes}
        else:
            found[name] = entry
    return found


def by_name(given: Iterable[tuple[str, Mapping[str, Any]]], option: str) -> dict[str, dict[str, Any]]:
    """Datasets of a command line, (file, entry): under the file's name, or `FILE:MODE` where it is given again.

    Raises InputError for a file that is given twice in one mode.
    """
    found: dict[str, dict[str, Any]] = {}
    listed = list(given)
    files = [file for file, _ in listed]
    for file, entry in listed:
        name = file if files.count(file) == 1 else f"{file}:{entry['mode']}"
        if name in found:
            raise InputError(f"{option} {file}:{entry['mode']}: is given twice")
        found[name] = dict(entry) if name == file else {**entry, "file": file}
    return found


def with_tasks(entries: Any, place: Any) -> Any:
    """Datasets, of which those that are tasks of lm-evaluation-harness have its default place."""
    if not isinstance(entries, dict) or place is None:
        return entries
    return {
        name: {LM_EVAL_PATH: place, **entry} if isinstance(entry, dict) and entry.get("lm_eval") else entry
        for name, entry in entries.items()
    }


def check_pattern(dataset: str, pattern: str | None) -> None:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of what a later Python may read in another way
            re.compile(pattern or "")
    except re.error as error:
        raise ValueError(f"dataset {show(dataset)}: forbid: not a regular expression: {error}") from error


class _Datasets(BaseModel):
    dataset: dict[str, DatasetConfig]

    @model_validator(mode="after")
    def _check(self) -> _Datasets:
        for name, entry in self.dataset.items():
            check_pattern(name, entry.forbid)
        return self


def parse_datasets(entries: Mapping[str, Mapping[str, Any]], where: str) -> dict[str, DatasetConfig]:
    """Check plain data as dataset entries: file name -> how it is scored. Raises InputError with all faults."""
    try:
        return _Datasets.model_validate({"dataset": written_out(dict(entries), "dataset")}).dataset
    except ValidationError as error:
        raise explain(where, error.errors(), lambda _: DatasetConfig.model_fields) from error


def read_dataset_option(text: str, option: str = "--dataset") -> tuple[str, dict[str, Any]]:
    """A dataset as a command line gives it, `FILE:MODE[,KEY=VALUE...]`: the file, and its entry's keys, unchecked.

    Values are YAML; `fields.prompt=KEY` is a key of `fields`. Raises InputError, naming the option, for another form.
    """
    found = re.fullmatch(r"(?P<file>.+?):(?P<mode>[a-z_]+)(?P<more>(,.*)?)", text)
    if found is None:
        raise InputError(
            f"{option} {text}: expected FILE:MODE[,KEY=VALUE...], such as math.json:exact_match,think=false"
        )
    entry: dict[str, Any] = {"mode": found["mode"]}
    for part in re.split(r",(?![^\[{]*[\]}])", found["more"])[1:]:  # not those of a list
        key, separator, value = part.partition("=")
        if not separator:
            raise InputError(f"{option} {text}: expected KEY=VALUE after a comma, got {show(part)}")
        try:
            override(entry, key.strip(), yaml.safe_load(value), DatasetConfig)
        except (yaml.YAMLError, ValueError, RecursionError) as error:
            raise InputError(f"{option} {text}: {key}: the value is not valid YAML") from error
    return found["file"], entry
