"""Kernels for merging language models, importable on their own: `import olmfast.kernels`.

Needs torch; uses triton where it is installed and the tensors are on a GPU. triton is imported when a kernel
is first launched, not before. Formulas, shapes and errors stand in each function's docstring and in
docs/kernels.md. `python -m olmfast.kernels` checks every kernel on the machine at hand.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from olmfast.kernels.dare import dare_mask
    from olmfast.kernels.evolution import offspring_count, svd_coefficients
    from olmfast.kernels.factors import SvdFactors, svd_factors
    from olmfast.kernels.fused import gated, rms_norm, rotate
    from olmfast.kernels.noise import svd_noise
    from olmfast.kernels.scaling import row_scale
    from olmfast.kernels.scores import TokenScores, token_scores
    from olmfast.kernels.spherical import slerp
    from olmfast.kernels.stacked import stacked_linear
    from olmfast.kernels.summing import weighted_sum
    from olmfast.kernels.ties import ties_merge

__all__ = [
    "SvdFactors",
    "TokenScores",
    "dare_mask",
    "gated",
    "offspring_count",
    "rms_norm",
    "rotate",
    "row_scale",
    "slerp",
    "stacked_linear",
    "svd_coefficients",
    "svd_factors",
    "svd_noise",
    "ties_merge",
    "token_scores",
    "weighted_sum",
]

# Files are named apart from the functions: a submodule's name would take the function's place here.
_FILES = {
    "SvdFactors": "factors",
    "TokenScores": "scores",
    "dare_mask": "dare",
    "gated": "fused",
    "offspring_count": "evolution",
    "rms_norm": "fused",
    "rotate": "fused",
    "row_scale": "scaling",
    "slerp": "spherical",
    "stacked_linear": "stacked",
    "svd_coefficients": "evolution",
    "svd_factors": "factors",
    "svd_noise": "noise",
    "ties_merge": "ties",
    "token_scores": "scores",
    "weighted_sum": "summing",
}


def __getattr__(name: str) -> Any:
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_FILES[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
