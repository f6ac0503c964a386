"""Which benchmark of the Hub a held-out dataset is, so that its score is told in the Hub's form."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Benchmark(BaseModel):
    """The Hub's dataset that hosts the leaderboard, its task, and what a share of 1 is told as."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    dataset: Annotated[str, Field(pattern=r"^[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*$")]
    task: Annotated[str, Field(min_length=1)] = "default"
    scale: float = Field(default=100.0, gt=0)
