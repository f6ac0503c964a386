"""Sections of a run's config that stand for a search of their own: `evolve`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from olmfast.errors import InputError

# Keys of mergekit-evolve's genome that stand at the top level here.
LIFTED = {"models": "models", "base_model": "ancestor"}


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


def lift_genome(data: dict[str, Any], where: str) -> dict[str, Any]:
    """The config with what a genome of mergekit-evolve says of models at the top level.

    Raises InputError where both say it, and not the same.
    """
    section = data.get("evolve")
    if not isinstance(section, Mapping):
        return data
    data, section = dict(data), dict(section)
    for key, top in LIFTED.items():
        if key in section and data.get(top, section[key]) != section[key]:
            raise InputError(f"{where}: evolve.{key}: is given as {top} too, in another way; give one of them")
        if key in section:
            data[top] = section.pop(key)
    return {**data, "evolve": section}
