import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmfast.kernels import svd_factors, svd_noise

# Below, at and past a tile of 128.
SHAPES = [(128, 128, 32, 2), (130, 257, 33, 3), (1, 5, 1, 1), (67, 127, 70, 2)]


def problem(rows, cols, k, n, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator).to(dtype)
    u, vh = (torch.randn(*shape, generator=generator) * k**-0.5 for shape in ((rows, k), (k, cols)))
    coefficients = torch.randn(n, k, generator=generator)
    return [tensor.to(device) for tensor in (weight, u, vh, coefficients)]


def truth_of(weight, u, vh, coefficients, clamp=3.0):
    weight, u, vh, coefficients = (t.cpu().double() for t in (weight, u, vh, coefficients))
    return weight * ((u * coefficients[:, None]) @ vh).clamp(-clamp, clamp).exp()


@pytest.mark.parametrize("shape", SHAPES)
def test_is_rounded_once(shape, dtype, impl, device, check_rounded_once):
    inputs = problem(*shape, dtype, device)
    result = svd_noise(*inputs, precision="ieee", impl=impl)
    check_rounded_once(result, truth_of(*inputs), impl, slack=5e-6)


def test_default_precision_keeps_the_noise_within_a_thousandth(impl, device):
    weight, u, vh, c = problem(130, 140, 96, 2, torch.float32, device)
    noise = svd_noise(torch.ones_like(weight), u, vh, c, clamp=50.0, impl=impl).double().log().cpu()
    truth = truth_of(torch.ones_like(weight), u, vh, c, clamp=50.0).log()
    assert ((noise - truth).norm() / truth.norm()) < 1e-3


def test_bf16_products_are_within_a_hundredth(impl, device):
    weight, u, vh, c = problem(70, 140, 96, 2, torch.float32, device)
    noise = svd_noise(torch.ones_like(weight), u, vh, c, clamp=50.0, precision="bf16", impl=impl).double().log()
    truth = truth_of(torch.ones_like(weight), u, vh, c, clamp=50.0).log()
    assert ((noise.cpu() - truth).norm() / truth.norm()) < 1e-2


def test_clamps_on_both_sides(impl, device, check_rounded_once):
    weight, u, vh, c = problem(40, 50, 8, 2, torch.float32, device)
    result = svd_noise(weight, u, vh, c * 100, clamp=0.25, precision="ieee", impl=impl)
    assert (result / weight).max() <= 1.2841
    assert (result / weight).min() >= 0.7787
    check_rounded_once(result, truth_of(weight, u, vh, c * 100, clamp=0.25), impl, slack=2e-4)


def test_zero_coefficients_give_the_weight_bit_for_bit(dtype, impl, device):
    weight, u, vh, c = problem(130, 70, 20, 3, dtype, device)
    weight[3] = 0.0
    weight[4] = -0.0
    result = svd_noise(weight, u, vh, c * 0, impl=impl)
    assert torch.equal(result.view(torch.uint8), weight.expand_as(result).contiguous().view(torch.uint8))


def test_k_of_zero_gives_the_weight(impl, device):
    weight, u, vh, c = problem(33, 20, 4, 2, torch.bfloat16, device)
    result = svd_noise(weight, u[:, :0], vh[:0], c[:, :0], impl=impl)
    assert torch.equal(result, weight.expand_as(result))


def test_an_offspring_does_not_depend_on_its_company(dtype, impl, device):
    weight, u, vh, c = problem(150, 130, 40, 5, dtype, device)
    together = svd_noise(weight, u, vh, c, impl=impl)
    for j in (0, 3):
        assert torch.equal(svd_noise(weight, u, vh, c[j : j + 1], impl=impl)[0], together[j])
    assert torch.equal(svd_noise(weight, u, vh, c, impl=impl), together)


def test_any_strides(impl, device, check_rounded_once):
    weight, u, vh, c = problem(60, 130, 24, 2, torch.float32, device)
    strided = (weight.T.contiguous().T, torch.stack((u, u), 2)[..., 0], vh.flip(0).T.contiguous().T, c[:, ::2])
    strided = (strided[0], strided[1][:, ::2], strided[2][::2], strided[3])
    result = svd_noise(*strided, precision="ieee", impl=impl)
    check_rounded_once(result, truth_of(*strided), impl, slack=5e-6)


def test_writes_all_of_out_and_only_out(dtype, impl, device, guarded):
    inputs = problem(70, 131, 9, 2, dtype, device)
    out = guarded((2, 70, 131), dtype)
    assert svd_noise(*inputs, out=out, impl=impl) is out
    assert torch.equal(out, svd_noise(*inputs, impl=impl))


def test_nan_in_a_factor_stays_nan(impl, device):
    weight, u, vh, c = problem(20, 30, 5, 1, torch.float32, device)
    u[7, 2] = float("nan")
    result = svd_noise(weight, u, vh, c, impl=impl)[0]
    assert result[7].isnan().all()
    assert not result[:7].isnan().any()


def test_float64_weights_run_in_float64(device):
    inputs = problem(20, 30, 5, 2, torch.float64, device)
    torch.testing.assert_close(svd_noise(*inputs).cpu(), truth_of(*inputs), rtol=1e-12, atol=0)


@settings(max_examples=15)
@given(rows=st.integers(1, 40), cols=st.integers(1, 40), seed=st.integers(0, 1 << 30))
def test_factors_of_the_weight_itself(rows, cols, seed):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator)
    u, s, vh = svd_factors(weight)
    assert torch.equal(svd_noise(weight, u, vh, torch.zeros(2, len(s)))[1], weight)
    # exp of the weight itself, scaled: U diag(s) Vh is the weight.
    expected = weight.double() * (weight.double() / weight.abs().max()).clamp(-3, 3).exp()
    torch.testing.assert_close(svd_noise(weight, u, vh, s[None])[0].double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"u": torch.ones(4, 9)}, ValueError, r"svd_noise: u has shape \(4, 9\), weight has 4 rows and k is 8"),
        ({"vh": torch.ones(8, 5)}, ValueError, r"svd_noise: vh has shape \(8, 5\), weight has 6 columns and k is 8"),
        ({"weight": torch.ones(4, 6).int()}, TypeError, "svd_noise: weight has dtype int32"),
        ({"coefficients": torch.ones(8)}, ValueError, "svd_noise: coefficients has shape"),
        ({"precision": "fp8"}, ValueError, "svd_noise: precision is 'fp8'; use"),
        ({"clamp": -1.0}, ValueError, "svd_noise: clamp is -1.0"),
        ({"clamp": float("nan")}, ValueError, "svd_noise: clamp is nan"),
        ({"out": torch.ones(2, 4, 5)}, ValueError, "svd_noise: out has shape"),
        ({"out": torch.ones(2, 4, 6).half()}, TypeError, "svd_noise: out has dtype float16"),
        ({"impl": "cuda"}, ValueError, "svd_noise: impl is 'cuda'; use"),
    ],
)
def test_errors_say_what_is_wrong(change, error, message):
    arguments = {
        "weight": torch.ones(4, 6),
        "u": torch.ones(4, 8),
        "vh": torch.ones(8, 6),
        "coefficients": torch.ones(2, 8),
    }
    with pytest.raises(error, match=message):
        svd_noise(**{**arguments, **change})
