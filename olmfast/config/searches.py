"""Sections of a run's config that say how to search: `markov`, `racing`, and those that are a search of their own."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from itertools import pairwise
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from olmfast.config.naming import parse_model
from olmfast.errors import InputError, shown

# Keys of mergekit-evolve's genome that stand at the top level here.
LIFTED = {"models": "models", "base_model": "ancestor"}


class Windows(BaseModel):
    """Which blocks are chosen together: each with `window` neighbours; windows that `slide` overlap."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    window: int = Field(0, ge=0)
    slide: bool = True


def parse_windows(value: object) -> object:
    """A number of blocks stands for windows that slide."""
    if isinstance(value, dict | Windows):
        return value
    number = int(value) if isinstance(value, str) and re.fullmatch(r"\s*[+-]?\d{1,9}\s*", value) else value
    if isinstance(number, bool) or not isinstance(number, int) or number < 0:
        raise ValueError(f"expected a number of blocks from 0 on, or {{window: 1, slide: false}}, got {shown(value)}")
    return Windows(window=number)


class Racing(BaseModel):
    """Racing: after how many samples candidates may be dropped, and how sure that must be."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    rungs: list[Annotated[int, Field(ge=2)]] = Field(default=[25, 50, 100, 200, 400], min_length=1)
    confidence: float = Field(default=0.95, gt=0.5, lt=1)

    @model_validator(mode="after")
    def _check(self) -> Racing:
        if any(a >= b for a, b in pairwise(self.rungs)):
            raise ValueError(f"rungs: expected growing numbers of samples, got {self.rungs}")
        return self


def parse_racing(value: object) -> object:
    """`true` stands for the defaults, `false` for none."""
    if value is False or value is None:
        return None
    return Racing() if value is True else value


class Evolve(BaseModel):
    """The numbers of a merge, searched by CMA-ES; the keys are those of mergekit-evolve's genome, and three more."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    merge_method: Literal["linear", "task_arithmetic", "ties", "dare_ties"]
    layer_granularity: int = Field(0, ge=-1)  # none, 0, -1: all blocks share their numbers
    normalize: bool | None = None  # as the method does
    allow_negative_weights: bool = False
    smooth: bool = False
    filters: list[str] = []
    generations: int = Field(30, ge=1)
    population: int | None = Field(None, ge=4)
    sigma: float = Field(1 / 6, gt=0)

    @property
    def has_density(self) -> bool:
        """Whether each task vector has a density too."""
        return self.merge_method in ("ties", "dare_ties")


class FinalEval(BaseModel):
    """Tasks of lm-evaluation-harness that the result and its donors are scored on at the end."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    tasks: list[str] = Field(min_length=1)
    limit: float | None = Field(None, gt=0)


def parse_final_eval(value: object) -> object:
    """Names of tasks, a text or a list, stand for all of their documents."""
    if isinstance(value, str):
        return {"tasks": [name.strip() for name in value.split(",") if name.strip()]}
    return {"tasks": value} if isinstance(value, list) else value


REPEATS = ("grid", "keep", "shown", "racing")
PATHS = ("method", "passes", "max_hops", "factors", "generations", "population")


class Dataflow(BaseModel):
    """Paths through the blocks of models, or with `repeat` contiguous ranges of one model's run twice."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    repeat: bool = False
    models: Literal["one", "all"] = "all"
    # With `repeat`
    grid: int = Field(64, ge=1)  # ranges of the first, coarsest round at most
    keep: int = Field(4, ge=1)  # ranges around which each finer round looks
    shown: int = Field(10, ge=1)  # ranges that are scored on held-out questions
    racing: Annotated[Racing | None, BeforeValidator(parse_racing)] = Racing(rungs=[10, 20, 40, 80, 160, 320])
    # Without
    method: Literal["catcma", "paper"] = "catcma"
    passes: int = Field(2, ge=1)  # through all blocks of all models
    max_hops: int | None = Field(None, ge=1)
    factors: bool = True
    generations: int | None = Field(None, ge=1)
    population: int | None = Field(None, ge=4)

    @model_validator(mode="after")
    def _check(self) -> Dataflow:
        given = self.model_fields_set
        if self.repeat and self.models == "all" and "models" in given:
            raise ValueError("models: ranges are run twice in one model; give models: one")
        unfit = [key for key in (PATHS if self.repeat else REPEATS) if key in given]
        if unfit:
            raise ValueError(f"{', '.join(unfit)}: not with repeat: {'true' if self.repeat else 'false'}")
        return self

    @property
    def of_one(self) -> bool:
        """Whether all blocks are of one model."""
        return self.repeat or self.models == "one"

    @property
    def n_generations(self) -> int:
        """How many generations there are; the paper has 100."""
        return self.generations or (100 if self.method == "paper" else 40)

    def population_of(self, n_entries: int) -> int:
        """Paths of a generation, where each is drawn from so many entries."""
        n_numbers = n_entries * (1 + self.factors)
        return self.population or (128 if self.method == "paper" else 4 + math.floor(3 * math.log(n_numbers)))

    def most_hops(self, n_blocks: int) -> int:
        """The longest path that is run: half as deep again as the model, unless `max_hops` says."""
        return self.max_hops or math.ceil(1.5 * n_blocks)


def lift_genome(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The config with what a genome of mergekit-evolve says of models at the top level.

    Raises InputError where both say it, and not the same.
    """
    section = data.get("evolve")
    if not isinstance(section, Mapping):
        return data
    data, section = dict(data), dict(section)
    for key, top in LIFTED.items():
        named = section.get(key)
        if isinstance(named, (dict, list)):
            section[key] = [parse_model(one) for one in named] if isinstance(named, list) else parse_model(named)
        if key in section and data.get(top, section[key]) != section[key]:
            raise InputError(f"{where}: evolve.{key}: is given as {top} too, in another way; give one of them")
        if key in section:
            data[top] = section.pop(key)
    return {**data, "evolve": section}
