"""Fixtures of the kernel tests: every implementation, the device at hand, and the rules errors are held to.

Without a GPU the Triton code runs in its interpreter; the root conftest.py asks for that.
"""

import os

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    """The same inputs in every run; OLMFAST_TEST_SEED draws others."""
    torch.manual_seed(int(os.environ.get("OLMFAST_TEST_SEED", "0")))


def _interpreter_is_on() -> bool:
    if os.environ.get("TRITON_INTERPRET") != "1":
        return False
    from triton.language import standard

    return type(standard.cdiv).__name__ != "JITFunction"


@pytest.fixture(scope="session")
def device():
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(params=["torch", "triton"])
def impl(request, device):
    """Every implementation an operation has."""
    if request.param == "triton":
        pytest.importorskip("triton")
        if device.type == "cpu" and not _interpreter_is_on():
            pytest.fail("triton was imported before its interpreter was asked for: set TRITON_INTERPRET=1")
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def dtype(request):
    return request.param


def _ulp(truth: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The distance between neighbours of `dtype` around each value."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(truth.abs().clamp_min(info.tiny)))
    return info.eps * torch.exp2(exponent)


def assert_rounded_once(actual, truth, impl="torch", slack=1e-6):
    """Within half an ulp of the float64 truth, plus `slack` (relative) for float32 arithmetic.

    Triton's interpreter cuts float32 -> bfloat16 off instead of rounding: one ulp there.
    """
    assert actual.dtype != torch.float64
    actual, truth, dtype = actual.detach().cpu().double(), truth.cpu().double(), actual.dtype
    ulps = 1.0 if impl == "triton" and dtype == torch.bfloat16 and not torch.cuda.is_available() else 0.5
    allowed = ulps * _ulp(truth, dtype) + slack * truth.abs() + 1e-12
    wrong = ~((actual - truth).abs() <= allowed)
    assert not wrong.any(), (
        f"{int(wrong.sum())} of {wrong.numel()} elements are off, the first at {wrong.nonzero()[0].tolist()}: "
        f"{actual[wrong][0].item()!r}, truth {truth[wrong][0].item()!r}"
    )


@pytest.fixture(scope="session")
def check_rounded_once():
    return assert_rounded_once


@pytest.fixture
def guarded(device):
    """A contiguous-looking out of any shape inside a larger poisoned tensor, and a check that the rest is intact."""
    made = []

    def make(shape, dtype, pad=3):
        whole = torch.full([*shape[:-1], shape[-1] + 2 * pad], 7.0, dtype=dtype, device=device)
        inside = whole[..., pad : pad + shape[-1]]
        inside.fill_(float("nan"))
        made.append((whole, pad, shape[-1]))
        return inside

    yield make
    for whole, pad, width in made:
        assert (whole[..., :pad] == 7.0).all(), "written before the output's rows"
        assert (whole[..., pad + width :] == 7.0).all(), "written past the output's rows"
        assert not whole[..., pad : pad + width].isnan().any(), "elements were not written"
