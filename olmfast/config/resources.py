"""What a run may spend, and whose machines compute it."""

from __future__ import annotations

import math
import re

from pydantic import BaseModel, ConfigDict, Field

from olmfast.errors import shown


class Budget(BaseModel):
    """How much a run may spend: seconds of wall time, or a number of candidate evaluations."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    seconds: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    evaluations: int | None = Field(default=None, ge=1)


class Ray(BaseModel):
    """The Ray cluster whose machines do the work."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    address: str = Field(min_length=1)


def parse_budget(value: object) -> object:
    """A time with its unit, or a number of evaluations, which may be a string."""
    if isinstance(value, int) and not isinstance(value, bool) and value > 0:
        return Budget(evaluations=value)
    if isinstance(value, str):
        parts = re.fullmatch(r"\s*0*([1-9][0-9]{0,17})\s*", value)
        if parts:
            return Budget(evaluations=int(parts[1]))
        parts = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([smhd])\s*", value)
        if parts and 0 < float(parts[1]) < math.inf:
            unit = {"s": 1, "m": 60, "h": 3600, "d": 86400}[parts[2]]
            return Budget(seconds=float(parts[1]) * unit)
    if value is None or isinstance(value, (Budget, dict)):
        return value
    raise ValueError(f"expected a time such as '2h' or '30m', or a number of evaluations above 0, got {shown(value)}")
