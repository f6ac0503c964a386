"""Kernels for merging language models, importable on their own: `import olmfast.kernels`.

Needs torch; uses triton where it is installed and the tensors are on a GPU. triton is imported when a kernel
is first launched, not before. Formulas, shapes and errors stand in each function's docstring and in
docs/kernels.md.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from olmfast.kernels.factors import SvdFactors, svd_factors
    from olmfast.kernels.noise import svd_noise
    from olmfast.kernels.scaling import row_scale
    from olmfast.kernels.scores import TokenScores, token_scores
    from olmfast.kernels.summing import weighted_sum

__all__ = [
    "SvdFactors",
    "TokenScores",
    "row_scale",
    "svd_factors",
    "svd_noise",
    "token_scores",
    "weighted_sum",
]

_FILE = {
    "SvdFactors": "factors",
    "TokenScores": "scores",
    "row_scale": "scaling",
    "svd_factors": "factors",
    "svd_noise": "noise",
    "token_scores": "scores",
    "weighted_sum": "summing",
}


def __getattr__(name: str) -> Any:
    if name not in _FILE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_FILE[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
