import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmfast.kernels import row_scale


def problem(rows, cols, n, dtype, device, axis=0, seed=0):
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, cols, generator=generator).to(dtype)
    log_scale = torch.randn(n, (rows, cols)[axis], generator=generator) * 0.1
    return weight.to(device), log_scale.to(device)


def truth_of(weight, log_scale, axis=0):
    factor = log_scale.cpu().double().exp()
    return weight.cpu().double() * (factor[:, :, None] if axis == 0 else factor[:, None, :])


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("shape", [(8, 512, 2), (7, 511, 3), (19, 513, 1), (1, 1, 1)])
def test_is_rounded_once(shape, axis, dtype, impl, device, check_rounded_once):
    weight, log_scale = problem(*shape, dtype, device, axis)
    result = row_scale(weight, log_scale, axis=axis, impl=impl)
    check_rounded_once(result, truth_of(weight, log_scale, axis), impl)


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
def test_zeros_give_the_weight_bit_for_bit(axis, dtype, impl, device):
    weight, log_scale = problem(30, 70, 2, dtype, device, axis)
    weight[2] = 0.0
    weight[3] = -0.0
    result = row_scale(weight, log_scale * 0, axis=axis, impl=impl)
    assert torch.equal(result.view(torch.uint8), weight.expand_as(result).contiguous().view(torch.uint8))


def test_zero_rows_stay_zero(dtype, impl, device):
    weight, log_scale = problem(20, 33, 2, dtype, device)
    weight[5] = 0.0
    assert (row_scale(weight, log_scale, impl=impl)[:, 5] == 0).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_any_strides(axis, impl, device, check_rounded_once):
    weight, log_scale = problem(37, 90, 2, torch.float32, device, axis)
    weight, log_scale = weight.T.contiguous().T, torch.stack((log_scale, log_scale), 2)[..., 0]
    check_rounded_once(row_scale(weight, log_scale, axis=axis, impl=impl), truth_of(weight, log_scale, axis), impl)
    transposed_out = torch.empty(2, 90, 37, device=device).transpose(1, 2)
    row_scale(weight, log_scale, axis=axis, out=transposed_out, impl=impl)
    check_rounded_once(transposed_out, truth_of(weight, log_scale, axis), impl)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (0, 0)])
@pytest.mark.parametrize("axis", [0, 1])
def test_an_empty_weight_gives_empty_offspring(shape, axis, impl, device):
    out = row_scale(torch.zeros(shape, device=device), torch.zeros(2, shape[axis], device=device), axis=axis, impl=impl)
    assert out.shape == (2, *shape)


def test_writes_all_of_out_and_only_out(dtype, impl, device, guarded):
    weight, log_scale = problem(13, 515, 2, dtype, device)
    out = guarded((2, 13, 515), dtype)
    assert row_scale(weight, log_scale, out=out, impl=impl) is out


@settings(max_examples=25)
@given(rows=st.integers(1, 50), cols=st.integers(1, 50), axis=st.sampled_from([0, 1]), seed=st.integers(0, 1 << 30))
def test_a_scaled_linear_layer_gives_scaled_outputs(rows, cols, axis, seed):
    weight, log_scale = problem(rows, cols, 2, torch.float64, "cpu", axis, seed)
    expected = truth_of(weight, log_scale, axis)
    torch.testing.assert_close(row_scale(weight, log_scale, axis=axis), expected, rtol=1e-14, atol=0)
    assert torch.equal(row_scale(weight, log_scale * 0, axis=axis)[0], weight)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"log_scale": torch.ones(2, 6)}, ValueError, "log_scale has shape .2, 6., weight has 4 entries along axis 0"),
        ({"axis": 2}, ValueError, "row_scale: axis is 2"),
        ({"weight": torch.ones(4)}, ValueError, "row_scale: weight has shape"),
        ({"out": torch.ones(1, 4, 6)}, ValueError, "row_scale: out has shape"),
    ],
)
def test_errors_say_what_is_wrong(change, error, message):
    with pytest.raises(error, match=message):
        row_scale(**{"weight": torch.ones(4, 6), "log_scale": torch.ones(2, 4), **change})
