import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmfast.kernels import ties_merge
from olmfast.kernels.ties import N_CHUNK, SAMPLE


def trimmed(delta, density):
    """Keep the k largest magnitudes; of equal ones the lowest flat index first (a stable sort)."""
    flat = delta.flatten()
    k = max(1, int(density * flat.numel())) if density > 0 else 0
    kept = flat.abs().sort(descending=True, stable=True).indices[:k]
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view(delta.shape)


def truth_of(tensors, weights, density, base=None, normalize=True, scale=1.0):
    """The formula in float64; deltas and weighted deltas in float32 as they are defined."""
    dtype = torch.float64 if tensors[0].dtype == torch.float64 else torch.float32
    tensors = [tensor.cpu().to(dtype) for tensor in tensors]
    deltas = [tensor - base.cpu().to(dtype) for tensor in tensors] if base is not None else tensors
    parts = torch.stack([trimmed(delta, density) * w for delta, w in zip(deltas, weights, strict=True)])
    total = torch.zeros_like(parts[0])
    for part in parts:
        total = total + part
    agree = parts.sign() == torch.where(total >= 0, 1.0, -1.0)
    merged = (parts.double() * agree).sum(0)
    if normalize:
        shape = [-1] + [1] * merged.dim()
        divisor = (torch.tensor(weights, dtype=torch.float64).view(shape) * agree).sum(0)
        merged = merged / torch.where(divisor.abs() < 1e-8, 1.0, divisor)
    return merged * scale + (base.cpu().double() if base is not None else 0.0)


def problem(n, shape, dtype, device, seed=0, with_base=True):
    generator = torch.Generator().manual_seed(seed)
    make = lambda: torch.randn(shape, generator=generator).to(dtype).to(device)  # noqa: E731
    return [make() for _ in range(n)], make() if with_base else None


def check(actual, truth, impl, slack=2e-6):
    dtype = actual.dtype
    ulps = 1.0 if impl == "triton" and dtype == torch.bfloat16 and actual.device.type == "cpu" else 0.5
    allowed = ulps * torch.finfo(dtype).eps * truth.abs() + slack
    wrong = (actual.cpu().double() - truth).abs() > allowed
    assert not wrong.any(), f"{int(wrong.sum())} of {wrong.numel()} elements are off"


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.5, 1.0])
def test_equals_the_formula(density, with_base, dtype, impl, device):
    tensors, base = problem(3, (37, 61), dtype, device, with_base=with_base)
    weights = [0.5, 0.8, -0.3]
    for options in ({}, {"normalize": False, "scale": 0.7}):
        result = ties_merge(tensors, weights, density, base=base, impl=impl, **options)
        check(result, truth_of(tensors, weights, density, base, **options), impl)


@pytest.mark.parametrize("size", [1, 1023, 1024, 1025, 20_000])
def test_sizes_around_a_block(size, impl, device):
    tensors, base = problem(2, (size,), torch.float32, device)
    check(ties_merge(tensors, [1.0, 0.5], 0.3, base=base, impl=impl), truth_of(tensors, [1.0, 0.5], 0.3, base), impl)


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_equal_magnitudes_keep_the_lowest_indices(density, dtype, impl, device):
    generator = torch.Generator().manual_seed(1)
    # Few values: the threshold always falls among equals, spread over several blocks.
    values = torch.tensor([-2.0, -1.0, 0.0, 1.0, 2.0])
    tensors = [values[torch.randint(0, 5, (5000,), generator=generator)].to(dtype).to(device) for _ in range(2)]
    result = ties_merge(tensors, [1.0, 1.0], density, impl=impl)
    check(result, truth_of(tensors, [1.0, 1.0], density), impl)
    alone = ties_merge(tensors[:1], [1.0], density, impl=impl)
    assert torch.equal(alone.cpu().float(), trimmed(tensors[0].cpu().float(), density))


def test_all_equal_deltas(impl, device):
    tensor = torch.full((3000,), -0.5, device=device)
    kept = ties_merge([tensor], [1.0], 0.25, impl=impl)
    assert (kept[:750] == -0.5).all()
    assert (kept[750:] == 0.0).all()


def test_no_change_gives_the_base(dtype, impl, device):
    _, base = problem(0, (40, 50), dtype, device)
    assert torch.equal(ties_merge([base, base], [1.0, 1.0], 0.5, base=base, impl=impl), base)


def test_a_density_per_tensor(impl, device):
    tensors, _ = problem(2, (3000,), torch.float32, device, with_base=False)
    tensors[1] = tensors[1].abs() + 5
    result = ties_merge(tensors, [1.0, 1.0], [1.0, 1e-5], normalize=False, impl=impl)
    expected = tensors[0].clone()
    top = tensors[1].argmax()
    expected[top] = tensors[1][top] + tensors[0][top].clamp_min(0)
    torch.testing.assert_close(result, expected)
    without = ties_merge(tensors, [1.0, 1.0], [1.0, 0.0], normalize=False, impl=impl)
    torch.testing.assert_close(without, tensors[0])


def test_nan_stays_visible(impl, device):
    tensors, base = problem(2, (2000,), torch.float32, device)
    tensors[1][77] = float("nan")
    result = ties_merge(tensors, [0.5, 0.5], 0.5, base=base, impl=impl)
    assert result.isnan().nonzero().tolist() == [[77]]


def test_any_strides_and_out_that_is_an_input(impl, device):
    tensors, base = problem(2, (30, 40), torch.float32, device)
    expected = ties_merge(tensors, [1.0, 2.0], 0.4, base=base, impl=impl)
    strided = [tensor.T.contiguous().T for tensor in tensors]
    assert torch.equal(ties_merge(strided, [1.0, 2.0], 0.4, base=base, impl=impl), expected)
    assert torch.equal(ties_merge(tensors, [1.0, 2.0], 0.4, base=base, out=base, impl=impl), expected)


def test_implementations_agree_bit_for_bit_where_they_round_alike(device):
    pytest.importorskip("triton")
    tensors, base = problem(3, (5001,), torch.float32, device)
    plain = ties_merge(tensors, [0.5, 0.25, 0.25], 0.3, base=base, impl="torch")
    if device.type == "cuda":
        torch.testing.assert_close(ties_merge(tensors, [0.5, 0.25, 0.25], 0.3, base=base), plain)


def test_a_sample_that_misleads_costs_time_only():
    # Every sampled entry is large, all others are small: the bracket misses.
    delta = torch.linspace(0.1, 0.2, N_CHUNK // 2)
    delta[::64] += 10
    assert torch.equal(ties_merge([delta], [1.0], 0.5), trimmed(delta, 0.5))


@pytest.mark.parametrize("density", [0.2, 0.7])
@pytest.mark.parametrize("sampled", [10.0, 1e-3])
def test_a_gpus_sample_that_misleads_costs_time_only(sampled, density, impl, device):
    size = 2 * SAMPLE + 77
    place = torch.arange(SAMPLE)
    delta = torch.linspace(0.1, 0.2, size)
    delta[place * 2 + (place * 40503 >> 4) % 2] *= sampled  # exactly those that the kernel looks at
    kept = ties_merge([delta.to(device)], [1.0], density, impl=impl)
    assert torch.equal(kept.cpu(), trimmed(delta, density))


def test_float64_runs_in_float64():
    tensors, base = problem(2, (999,), torch.float64, "cpu")
    result = ties_merge(tensors, [0.5, 0.3], 0.3, base=base)
    torch.testing.assert_close(result, truth_of(tensors, [0.5, 0.3], 0.3, base), rtol=1e-12, atol=1e-12)


@settings(max_examples=40)
@given(size=st.integers(1, 400), levels=st.integers(1, 50), density=st.floats(0, 1), seed=st.integers(0, 1 << 30))
def test_keeps_exactly_k(size, levels, density, seed):
    generator = torch.Generator().manual_seed(seed)
    delta = torch.randint(1, levels + 1, (size,), generator=generator).float()
    kept = ties_merge([delta], [1.0], density)
    assert int((kept != 0).sum()) == (max(1, int(density * size)) if density > 0 else 0)
    assert torch.equal(kept, trimmed(delta, density))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([torch.ones(3)], [1.0, 2.0], 0.5), "1 tensors, 2 weights, 1 densities"),
        (([torch.ones(3)], [1.0], 1.5), "density is 1.5, not in 0..1"),
        (([torch.ones(3), torch.ones(4)], [1.0, 1.0], 0.5), r"tensors\[1\] has shape"),
    ],
)
def test_errors_say_what_is_wrong(arguments, message):
    with pytest.raises(ValueError, match=message):
        ties_merge(*arguments)
    with pytest.raises(ValueError, match="base has shape"):
        ties_merge([torch.ones(3)], [1.0], 0.5, base=torch.ones(4))
