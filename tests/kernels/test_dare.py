import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmfast.kernels import dare_mask


def naive(index, density, seed, stream=0):
    """One element in Python's own integers."""

    def mix(x):
        x = (x ^ x >> 16) * 0x7FEB352D & 0xFFFFFFFF
        x = (x ^ x >> 15) * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    page, counter = divmod(index, 1 << 32)
    first, second = 0x9E3779B9, 0x85EBCA6B
    for number in (seed, stream, page):
        for word in (number & 0xFFFFFFFF, number >> 32 & 0xFFFFFFFF):
            first, second = mix(first ^ word), mix(((second ^ word) + 0xC2B2AE35) & 0xFFFFFFFF)
    return mix(mix(counter ^ first) ^ second) < density * (1 << 32)


@pytest.mark.parametrize("start", [0, 5, (1 << 31) - 20, (1 << 32) - 20, (5 << 32) + 3])
@pytest.mark.parametrize("seed", [0, 1, 2**63 + 12345, -7])
def test_equals_the_formula_in_python_integers(seed, start, impl, device):
    mask = dare_mask((40,), 0.4, seed, stream=seed + 1, start=start, device=device, impl=impl)
    assert mask.dtype == torch.bool
    assert mask.tolist() == [naive(start + i, 0.4, seed, seed + 1) for i in range(40)]


def test_all_implementations_and_devices_agree(device, impl):
    # Several chunks on a CPU, several blocks on a GPU.
    shape = (3, 5001) if impl == "triton" else (90, 5001)
    mask = dare_mask(shape, 0.3, 11, stream=4, device=device, impl=impl)
    assert torch.equal(mask.cpu(), dare_mask(shape, 0.3, 11, stream=4, impl="torch"))


@settings(max_examples=30)
@given(size=st.integers(1, 3000), cut=st.integers(0, 3000), seed=st.integers(0, 1 << 62), density=st.floats(0, 1))
def test_pieces_in_any_order_make_the_whole(size, cut, seed, density):
    cut = min(cut, size)
    whole = dare_mask((size,), density, seed)
    last = dare_mask((size - cut,), density, seed, start=cut)
    first = dare_mask((cut,), density, seed)
    assert torch.equal(torch.cat((first, last)), whole)


def test_a_denser_mask_holds_the_sparser_one():
    sparse, dense = (dare_mask((10_000,), density, 5) for density in (0.2, 0.6))
    assert (dense | ~sparse).all()


@pytest.mark.parametrize("density", [0.1, 0.5, 0.9])
def test_keeps_the_share_asked_for_everywhere(density):
    n = 1 << 20
    mask = dare_mask((1024, 1024), density, 3).float()
    sigma = (density * (1 - density) / n) ** 0.5
    assert abs(float(mask.mean()) - density) < 4.5 * sigma
    for lines in (mask.mean(0), mask.mean(1)):
        # Chi-square of the rows' and columns' counts: mean 1, standard deviation (2 / 1024) ** 0.5.
        spread = float(((lines - density) ** 2).mean()) / (density * (1 - density) / 1024)
        assert abs(spread - 1) < 5 * (2 / 1024) ** 0.5


def test_seeds_streams_and_neighbours_are_uncorrelated():
    n = 1 << 20
    base = dare_mask((n,), 0.5, 7)
    others = [dare_mask((n,), 0.5, seed, stream=stream) for seed, stream in ((8, 0), (7, 1), (0, 7), (7, 1 << 40))]
    others += [base.roll(shift) for shift in (1, 2, 3, 16, 256, 4096)]
    for other in others:
        assert abs(float((base == other).float().mean()) - 0.5) < 5 * 0.5 / n**0.5


def test_all_and_nothing(impl, device):
    assert dare_mask((77,), 1.0, 1, device=device, impl=impl).all()
    assert not dare_mask((77,), 0.0, 1, device=device, impl=impl).any()
    assert dare_mask((0, 5), 0.5, 1, device=device, impl=impl).shape == (0, 5)


def test_out_is_written(impl, device):
    out = torch.zeros(7, 300, dtype=torch.bool, device=device)
    assert dare_mask((7, 300), 0.5, 9, out=out, impl=impl) is out
    assert torch.equal(out, dare_mask((7, 300), 0.5, 9, device=device, impl=impl))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"density": 1.5}, "density is 1.5, not in 0..1"),
        ({"density": float("nan")}, "density is nan"),
        ({"start": -1}, "start is -1"),
        ({"out": torch.zeros(5, dtype=torch.bool)}, "out has shape"),
    ],
)
def test_errors_say_what_is_wrong(change, message):
    with pytest.raises(ValueError, match=message):
        dare_mask(**{"shape": (4,), "density": 0.5, "seed": 1, **change})
