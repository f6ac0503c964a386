"""weighted_sum, slerp and stacked_linear."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmfast.kernels import slerp, stacked_linear, weighted_sum

SHAPES = [(2048,), (2047,), (2049,), (45, 91), (1,)]


def problem(n, shape, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype).to(device) for _ in range(n)]


def truth_of_sum(tensors, weights):
    return sum(tensor.cpu().double() * weight for tensor, weight in zip(tensors, weights, strict=True))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("n", [1, 2, 5])
def test_sum_is_rounded_once(n, shape, dtype, impl, device):
    tensors, weights = problem(n, shape, dtype, device), [0.3, 0.8, -0.4, 1.7, 0.01][:n]
    for normalize in (False, True):
        divisor = sum(weights) if normalize else 1.0
        result = weighted_sum(tensors, weights, normalize=normalize, impl=impl).cpu().double()
        truth = truth_of_sum(tensors, weights) / divisor
        # Terms may cancel: float32's error is one of the terms, not of the sum.
        terms = sum(tensor.cpu().double().abs() * abs(weight) for tensor, weight in zip(tensors, weights, strict=True))
        ulps = 1.0 if impl == "triton" and dtype == torch.bfloat16 and device.type == "cpu" else 0.5
        allowed = ulps * torch.finfo(dtype).eps * truth.abs() + 3e-7 * terms / abs(divisor) + 1e-7
        assert ((result - truth).abs() <= allowed).all()


def test_one_tensor_of_weight_one_is_itself(dtype, impl, device):
    (tensor,) = problem(1, (300, 7), dtype, device)
    assert torch.equal(weighted_sum([tensor], [1.0], impl=impl), tensor)
    assert torch.equal(weighted_sum([tensor], [4.0], normalize=True, impl=impl), tensor)


def test_sum_takes_any_strides_and_writes_only_out(dtype, impl, device, guarded):
    a, b, c = problem(3, (40, 60), dtype, device)
    expected = weighted_sum([a, b, c], [0.2, 0.3, 0.5], impl=impl)
    strided = [a.T.contiguous().T, torch.stack((b, b), 2)[..., 0], c]
    out = guarded((40, 60), dtype)
    assert weighted_sum(strided, [0.2, 0.3, 0.5], out=out, impl=impl) is out
    assert torch.equal(out, expected)


@pytest.mark.parametrize("position", [0, 1, 2])
def test_sum_may_overwrite_an_input(position, dtype, impl, device):
    tensors = problem(3, (3000,), dtype, device)
    expected = weighted_sum(tensors, [0.2, 0.3, 0.5], impl=impl)
    weighted_sum(tensors, [0.2, 0.3, 0.5], out=tensors[position], impl=impl)
    assert torch.equal(tensors[position], expected)


def test_sum_of_mixed_dtypes_takes_the_firsts(device):
    a, b = problem(2, (50,), torch.float32, device)
    result = weighted_sum([a.bfloat16(), b], torch.tensor([0.5, 0.5]))
    assert torch.equal(result, ((a.bfloat16().float() + b) * 0.5).bfloat16())


@settings(max_examples=25)
@given(
    weights=st.lists(st.floats(-4, 4).filter(lambda x: abs(x) > 1e-3), min_size=1, max_size=6),
    size=st.integers(1, 3000),
    seed=st.integers(0, 1 << 30),
)
def test_sum_of_equal_tensors_is_scaled(weights, size, seed):
    (tensor,) = problem(1, (size,), torch.float64, "cpu", seed)
    result = weighted_sum([tensor] * len(weights), weights)
    torch.testing.assert_close(result, tensor * sum(weights), rtol=1e-9, atol=1e-9)


def truth_of_slerp(a, b, t):
    x, y = a.cpu().double().flatten(), b.cpu().double().flatten()
    theta = torch.arccos(x @ y / (x.norm() * y.norm()))
    return ((torch.sin((1 - t) * theta) * x + torch.sin(t * theta) * y) / torch.sin(theta)).view(a.shape)


@pytest.mark.parametrize("shape", SHAPES[:-1])
@pytest.mark.parametrize("t", [0.0, 0.3, 1.0])
def test_slerp_follows_the_arc(t, shape, dtype, impl, device, check_rounded_once):
    a, b = problem(2, shape, dtype, device)
    check_rounded_once(slerp(a, b, t, impl=impl), truth_of_slerp(a, b, t), impl, slack=1e-4)


def test_slerp_of_nearly_parallel_tensors_is_a_straight_line(impl, device, check_rounded_once):
    a, noise = problem(2, (500,), torch.float32, device)
    for b in (a * 2, a + 0.01 * noise, -a):
        truth = 0.75 * a.cpu().double() + 0.25 * b.cpu().double()
        check_rounded_once(slerp(a, b, 0.25, impl=impl), truth, impl, slack=1e-5)


def test_slerp_from_or_to_zero(impl, device):
    (a,) = problem(1, (500,), torch.float32, device)
    result = slerp(torch.zeros_like(a), a, 0.5, impl=impl)
    # The angle to nothing is a right one.
    torch.testing.assert_close(result, a * 0.5**0.5)


def test_slerp_may_overwrite_an_input(impl, device):
    a, b = problem(2, (5000,), torch.bfloat16, device)
    expected = slerp(a, b, 0.4, impl=impl)
    assert torch.equal(slerp(a.clone(), b, 0.4, out=b, impl=impl), expected)


@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("shared", [False, True])
def test_stacked_linear_equals_separate_layers(shared, biased, dtype, device):
    x = torch.randn(3, 7, 20, device=device).to(dtype)
    weights, bias = torch.randn(3, 11, 20, device=device).to(dtype), torch.randn(3, 11, device=device).to(dtype)
    result = stacked_linear(x[0] if shared else x, weights, bias if biased else None)
    assert result.shape == (3, 7, 11)
    for k in range(3):
        own = x[0] if shared else x[k]
        truth = own.double() @ weights[k].double().T + (bias[k].double() if biased else 0.0)
        rival = torch.nn.functional.linear(own, weights[k], bias[k] if biased else None).double()
        # One rounding of the result, and float32 sums in another order than the rival's.
        terms = own.double().abs() @ weights[k].double().abs().T
        summing = 4 * torch.finfo(torch.float32).eps * terms.max()
        allowed = 2 * (rival - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max() + summing
        assert (result[k].double() - truth).abs().max() <= allowed
    out = torch.empty(3, 7, 11, dtype=dtype, device=device)
    assert torch.equal(stacked_linear(x[0] if shared else x, weights, bias if biased else None, out=out), result)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda _: weighted_sum([], []), ValueError, "weighted_sum: no tensors"),
        (lambda a: weighted_sum([a], [1, 2]), ValueError, "weighted_sum: 2 weights for 1 tensors"),
        (lambda a: weighted_sum([a, a[:2]], [1, 2]), ValueError, r"tensors\[1\] has shape \(2, 4\)"),
        (lambda a: weighted_sum([a, a], [1, -1], normalize=True), ValueError, "the weights sum to 0"),
        (lambda a: weighted_sum([a, 3.0], [1, -1]), TypeError, r"tensors\[1\] is of type float, not a tensor"),
        (lambda a: slerp(a, a[:2], 0.5), ValueError, r"slerp: tensors\[1\] has shape"),
        (lambda a: stacked_linear(a, a), ValueError, "stacked_linear: weights has shape"),
        (lambda a: stacked_linear(a, a.expand(2, 3, 4), a), ValueError, "stacked_linear: bias has shape"),
        (lambda a: stacked_linear(a[:, :2], a.expand(2, 3, 4)), ValueError, "stacked_linear: x has shape"),
        (lambda a: stacked_linear(a, a.expand(2, 3, 4), impl="triton"), ValueError, "no Triton kernel"),
    ],
)
def test_errors_say_what_is_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call(torch.ones(3, 4))
