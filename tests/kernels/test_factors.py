import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmfast.kernels import svd_factors

MATRICES = {
    "tall": lambda: torch.randn(120, 80),
    "wide": lambda: torch.randn(40, 97),
    "equal singular values": lambda: torch.linalg.qr(torch.randn(60, 60)).Q,
    "rank 5": lambda: torch.randn(90, 5) @ torch.randn(5, 70),
    "steep": lambda: torch.randn(100, 100) @ torch.diag(torch.logspace(0, -9, 100)),
    "one row": lambda: torch.randn(1, 30),
    "one entry": lambda: torch.tensor([[-3.0]]),
    "huge": lambda: torch.randn(30, 20) * 1e30,
    "tiny": lambda: torch.randn(30, 20) * 1e-30,
}


def check(weight, factors, tolerance=1e-6):
    u, s, vh = (factor.cpu().double() for factor in factors)
    scaled = weight.cpu().double() / weight.cpu().double().abs().max()
    one = torch.eye(len(s), dtype=torch.float64)
    assert (u.T @ u - one).abs().max() < 2 * tolerance
    assert (vh @ vh.T - one).abs().max() < 2 * tolerance
    assert (s[1:] <= s[:-1]).all()
    # What is left out is smaller than the bound.
    dropped = min(weight.shape) * (float(s[0]) * max(weight.shape) * 2.0**-23) ** 2
    assert ((u * s) @ vh - scaled).norm() < tolerance * float(s.norm()) + 1.01 * dropped**0.5


def tolerance_of(weight, method):
    """A GPU's own decomposition in float32 is orthogonal to some 2e-5 only; ours is not excused by it."""
    if method == "auto" and weight.device.type == "cuda":
        try:
            svd_factors(weight, method="gram")
            method = "gram"
        except ArithmeticError:
            method = "svd"
    return 1e-6 if method == "gram" else 2e-5 if weight.device.type == "cuda" else 2e-6


@pytest.mark.parametrize("method", ["auto", "gram", "svd"])
@pytest.mark.parametrize("name", MATRICES)
def test_factors_are_accurate(name, method, device):
    torch.manual_seed(0)
    weight = MATRICES[name]().to(device)
    check(weight, svd_factors(weight, method=method), tolerance_of(weight, method))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(dtype, device):
    weight = torch.randn(50, 30).to(dtype).to(device)
    factors = svd_factors(weight)
    assert factors.u.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    check(weight, factors, 1e-12 if dtype == torch.float64 else 2e-6)


def test_null_directions_are_dropped_unless_kept(device):
    torch.manual_seed(0)
    weight = MATRICES["rank 5"]().to(device)
    assert len(svd_factors(weight).s) == 5
    kept = svd_factors(weight, drop=False)
    assert len(kept.s) == 70
    check(weight, kept, tolerance_of(weight, "svd"))
    with pytest.raises(ArithmeticError, match="method='gram' is not accurate here"):
        svd_factors(weight, drop=False, method="gram")


def test_zero_weight_has_no_directions(device):
    factors = svd_factors(torch.zeros(5, 7, device=device))
    assert [tuple(factor.shape) for factor in factors] == [(5, 0), (0,), (0, 7)]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_values_that_are_not_finite_are_refused(value, device):
    weight = torch.ones(4, 5, device=device)
    weight[2, 2] = value
    with pytest.raises(ValueError, match="svd_factors: weight holds NaN or infinite values"):
        svd_factors(weight)


def test_the_weight_is_not_changed_and_any_strides_do(device):
    weight = torch.randn(30, 40, device=device)
    copy = weight.clone()
    factors = svd_factors(weight.T.contiguous().T)
    assert torch.equal(weight, copy)
    for strided, plain in zip(factors, svd_factors(weight), strict=True):
        torch.testing.assert_close(strided, plain, rtol=1e-4, atol=1e-6)
    assert factors.u.is_contiguous()
    # As products read it: V in one piece on a GPU, its transpose on a CPU.
    assert (factors.vh.T if device.type == "cuda" else factors.vh).is_contiguous()


@settings(max_examples=25)
@given(rows=st.integers(1, 30), cols=st.integers(1, 30), seed=st.integers(0, 1 << 30))
def test_factors_are_canonical_and_repeatable(rows, cols, seed):
    weight = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed))
    first, second = svd_factors(weight), svd_factors(weight.clone())
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)
    largest = first.u.abs().argmax(0, keepdim=True)
    assert (first.u.gather(0, largest) > 0).all()
    check(weight, first, 2e-6)
    # A weight and its negative differ in the signs of Vh alone.
    for one, other in zip(first, svd_factors(-weight), strict=True):
        torch.testing.assert_close(one.abs(), other.abs())
