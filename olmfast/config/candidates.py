"""What a unit may become: the entries of the key `candidates`, `swap` and the blends."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict

from olmfast.errors import did_you_mean, show, shown


@dataclass(frozen=True)
class Blend:
    """One way to make candidates of a donor: what its number means, its default, and what is allowed."""

    default: float
    allowed: str
    is_allowed: Callable[[float], bool]


# How a unit's current values and a donor's make a candidate. `swap` takes the donor's alone and has no number.
BLENDS: dict[str, Blend] = {
    "linear": Blend(0.5, "shares of the donor between 0 and 1", lambda x: 0 < x < 1),
    "slerp": Blend(0.5, "t between 0 and 1", lambda x: 0 < x < 1),
    "ties": Blend(0.5, "densities above 0, at most 1", lambda x: 0 < x <= 1),
    "task_arithmetic": Blend(0.5, "weights other than 0", lambda x: x != 0),
}


class CandidateKind(BaseModel):
    """An entry of `candidates`: `swap`, or a blend with the numbers to try."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    method: str
    values: tuple[float, ...] = ()


def parse_candidates(value: object) -> list[CandidateKind]:
    """The entries of `candidates`. Raises ValueError for what is none."""
    if not isinstance(value, list) or not value:
        raise ValueError(f"expected a list such as [swap, {{linear: [0.25, 0.5]}}], got {shown(value)}")
    kinds = [entry if isinstance(entry, CandidateKind) else _parse_kind(entry) for entry in value]
    methods = [kind.method for kind in kinds]
    twice = next((method for method in methods if methods.count(method) > 1), None)
    if twice is not None:
        raise ValueError(f"{show(twice)} is listed twice; give its numbers as one list")
    return kinds


def _parse_kind(entry: object) -> CandidateKind:
    method, numbers = entry, None
    if isinstance(entry, dict) and len(entry) == 1:
        ((method, numbers),) = entry.items()
    known = ["swap", *BLENDS]
    if not isinstance(method, str) or method not in known:
        hint = did_you_mean(method, known) if isinstance(method, str) else ""
        raise ValueError(f"expected one of {', '.join(known)}, got {shown(entry)}{hint}")
    if method == "swap":
        if numbers is not None:
            raise ValueError(f"swap takes a donor's values unchanged and has no numbers, got {show(numbers)}")
        return CandidateKind(method="swap")
    blend = BLENDS[method]
    listed = [blend.default] if numbers is None else numbers if isinstance(numbers, list) else [numbers]
    try:
        values = tuple(float(x) for x in listed if not isinstance(x, bool))
    except (TypeError, ValueError, OverflowError):
        values = ()
    if not len(values) == len(listed) > 0 or not all(math.isfinite(x) and blend.is_allowed(x) for x in values):
        raise ValueError(f"{method}: expected {blend.allowed}, got {shown(numbers)}")
    if len(set(values)) != len(values):
        raise ValueError(f"{method}: a number is given twice in {show(numbers)}")
    return CandidateKind(method=method, values=values)
