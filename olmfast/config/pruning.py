"""The section `prune` of a run's config: which layers are merged into one, and how their alphas are found."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from olmfast.errors import show

Method = Literal["file", "similarity", "uniform", "drop", "bayes", "cma", "gradient", "joint"]
SEARCHES = ("bayes", "cma", "gradient", "joint")
PER_SUBJECT = 10  # questions of each subject of MMLU, that a search decides by or holds out
SHOTS = 5  # worked examples before each question of MMLU, as many as a subject has


@dataclass(frozen=True)
class Term:
    """A part of an objective on MMLU: its weight, the mode of the questions' datasets, and which subjects (None: all);
    `of_question`: what is scored is the question's text, and not the answer."""

    name: str
    weight: float
    mode: str
    subjects: tuple[str, ...] | None = None
    of_question: bool = False


# What objectives are called where that is not their mode's name. Perplexities are followed by their logarithm.
_OBJECTIVES = {"accuracy": ("choice", False), "perplexity": ("exact", True), "exact": ("exact", False)}
_PLAIN = ("likelihood", "exact_match", "bigram_loss", "bigram", "choice")


def _term(text: str) -> Term:
    found = re.fullmatch(r"(?:(\d+(?:\.\d+)?)\s*\*\s*)?([a-z_]+(?:\s*,\s*[a-z_]+)*)", text)
    if found is None or (found[1] is not None and float(found[1]) == 0):
        wanted = "such as likelihood, accuracy + 0.1 * perplexity, or subjects: anatomy,virology"
        raise ValueError(f"objective: expected {wanted}, got {show(text)}")
    weight, name = float(found[1] or 1), found[2]
    if name in _OBJECTIVES:
        mode, of_question = _OBJECTIVES[name]
        return Term(name, weight, mode, of_question=of_question)
    if name in _PLAIN:
        return Term(name, weight, name)
    return Term(name, weight, "likelihood", tuple(part.strip() for part in name.split(",")))


class Pruning(BaseModel):
    """How a model is pruned; see docs/pruning.md. Paths are absolute once loaded."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    method: Method | None = None
    alphas_file: Path | None = None
    num_layer: int | None = Field(None, ge=1)
    start: int | None = Field(None, ge=0)
    count: int | None = Field(None, ge=2)
    merge: Literal["projections", "all"] = "projections"
    data_dir: Path | None = None
    mmlu_as: Literal["spaced", "seed"] = "spaced"
    ntrain: int = Field(SHOTS, ge=0)
    num_tasks: int | None = Field(None, ge=1)
    num_samples: int | None = Field(None, ge=1)
    objective: str | None = None
    holdout: float = Field(0.5, ge=0, lt=1)

    @property
    def way(self) -> str:
        """The method: that which is named, else the file's where there is one, else similarity."""
        return self.method or ("similarity" if self.alphas_file is None else "file")

    @property
    def is_search(self) -> bool:
        """Whether alphas are searched."""
        return self.way in SEARCHES

    @property
    def is_evaluated(self) -> bool:
        """Whether the model or its result is run."""
        return self.way == "similarity" or self.is_search or self.data_dir is not None

    @property
    def terms(self) -> list[Term]:
        """What a search on MMLU goes by. Raises ValueError for an objective that is none."""
        return [_term(part.strip()) for part in (self.objective or "likelihood").split("+")]

    @model_validator(mode="after")
    def _check(self) -> Pruning:
        if self.way == "file" and self.alphas_file is None:
            raise ValueError("method file: alphas_file is missing")
        if self.alphas_file is not None and self.way in ("similarity", "uniform", "drop"):
            raise ValueError(f"alphas_file: method {self.way} makes its own alphas; leave one of the two out")
        if self.num_layer is not None and self.count is not None and self.count != self.num_layer + 1:
            raise ValueError(
                f"count {self.count} and num_layer {self.num_layer} differ: num_layer steps make one layer of "
                f"{self.num_layer + 1}; leave one of them out"
            )
        if self.num_layer is None and self.count is None and self.alphas_file is None:
            raise ValueError("num_layer: say how many layers go (or count: how many become one)")
        if self.way == "joint" and (self.start is not None or self.count is not None):
            raise ValueError("method joint: chooses the layers itself; leave start and count out")
        if self.objective is not None and not self.is_search:
            raise ValueError(f"objective: method {self.way} searches nothing; use cma, bayes, gradient or joint")
        _ = self.terms
        return self

    def steps(self, n_entries: int | None) -> int:
        """How many layers are merged into the one below them; `n_entries` are those of the alpha file, if any."""
        if self.num_layer is not None:
            return self.num_layer
        return self.count - 1 if self.count is not None else n_entries or 0

    def first_layer(self, n_blocks: int, n_steps: int) -> int:
        """The layer that the others are merged into. Raises ValueError for layers that are not there."""
        if n_steps >= n_blocks:
            raise ValueError(
                f"num_layer {n_steps}: the model has {n_blocks} layers, of which at most {n_blocks - 1} can go"
            )
        first = n_blocks - n_steps - 1 if self.start is None else self.start
        if first + n_steps >= n_blocks:
            raise ValueError(
                f"start {first}: {n_steps + 1} layers from it on end at {first + n_steps}, and the model's last layer "
                f"is {n_blocks - 1}"
            )
        return first


def default_output(model: str, section: Mapping[str, Any]) -> Path:
    """Where a pruned model goes if nothing else is said: `pruned_models/MODEL_METHOD_STEPS`."""
    method = section.get("method") or ("similarity" if section.get("alphas_file") is None else "file")
    steps = section.get("num_layer") or (section["count"] - 1 if section.get("count") else None)
    parts = [Path(model).name, str(method), *([] if steps is None else [str(steps)])]
    return Path("pruned_models") / "_".join(parts)
