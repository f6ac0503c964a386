"""Copies land where they should, with the values that torch would give, and nothing else is touched."""

import math
import struct
import threading

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from olmfast import _shards

NAMES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32", torch.float64: "F64"}
OTHERS = {torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.bool: "BOOL"}
SPELT = {**NAMES, **OTHERS}


def into(shard: _shards.Shard, target: torch.Tensor, name: str = "x") -> _shards.Transfer:
    """The tensor `name` of a shard on its way into a view of any strides."""
    dtype, shape, offset = next((d, s, o) for n, d, s, o, _ in shard.tensors if n == name)
    capacity = max(0, target.untyped_storage().nbytes() - target.storage_offset() * target.element_size())
    to_dtype = SPELT[target.dtype]
    return _shards.Transfer(shard, offset, dtype, shape, target.data_ptr(), capacity, to_dtype, target.stride())


def stored(tmp_path, tensor: torch.Tensor) -> _shards.Shard:
    save_file({"x": tensor}, tmp_path / "x.safetensors")
    return _shards.Shard(tmp_path / "x.safetensors")


def values_of(dtype: torch.dtype) -> torch.Tensor:
    """Every value of a 16-bit type; for wider ones, all rounding cases of every 16-bit value and random bits."""
    halves = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    if dtype in (torch.bfloat16, torch.float16):
        return halves.view(dtype)
    dice = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (100_000,), generator=dice).to(torch.int32)
    near = [halves.view(torch.float16).float().view(torch.int32), halves.to(torch.int32) << 16]
    ties = [bits] + [base + step for base in near for step in (0, 1, -1, 2**12, 2**12 - 1, 2**12 + 1, 2**15, 2**15 - 1)]
    floats = torch.cat([*ties, near[1] + 2**15 + 1]).view(torch.float32)
    if dtype == torch.float32:
        return floats
    wide = torch.cat([floats.double() * scale for scale in (1.0, 1 + 2**-40, 1 - 2**-30, 2.0**-126, 2.0**130)])
    return torch.cat([wide, torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan], dtype=torch.float64)])


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit, any NaN for any NaN."""
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.element_size()]
    alike = (got.view(integer) == expected.view(integer)) | (got.isnan() & expected.isnan())
    return bool(alike.all())


@pytest.fixture(params=["as this machine can", "portable"])
def instructions(request):
    _shards._use_portable(request.param == "portable")
    yield request.param
    _shards._use_portable(False)


@pytest.mark.parametrize("large", [False, True], ids=["small", "past the caches"])
@pytest.mark.parametrize("target", NAMES, ids=NAMES.get)
@pytest.mark.parametrize("source", NAMES, ids=NAMES.get)
def test_converts_every_value_as_torch_does(tmp_path, instructions, source, target, large):
    values = values_of(source)
    if large and instructions == "portable":
        pytest.skip("portable code has one way for all sizes")
    if large:
        values = values.repeat(-(-(9 << 20) // (values.numel() * target.itemsize)))
    elif values.numel() > 200_000:
        values = values[:: values.numel() // 200_000].contiguous()
    out = torch.full((values.numel(),), math.nan).to(target)
    _shards.copy([into(stored(tmp_path, values), out)])
    assert same(out, values.to(target))


def test_subnormals_count_although_the_caller_flushes_them(tmp_path):
    values = torch.arange(1, 1000, dtype=torch.int32).view(torch.float32)
    shard, out = stored(tmp_path, values), torch.zeros(999, dtype=torch.float64)
    expected = values.double()
    torch.set_flush_denormal(True)
    try:
        _shards.copy([into(shard, out)])
    finally:
        torch.set_flush_denormal(False)
    assert same(out, expected)


LAYOUTS = {
    "contiguous": lambda empty: empty(96, 200),
    "transposed": lambda empty: empty(200, 96).t(),
    "rows of a fused parameter": lambda empty: empty(300, 200)[100:196],
    "columns of a fused parameter": lambda empty: empty(96, 500)[:, 150:350],
    "every second column": lambda empty: empty(96, 400)[:, ::2],
    "an expert of a stack": lambda empty: empty(4, 96, 200)[2],
    "an expert's half, transposed": lambda empty: empty(4, 200, 192)[3, :, 96:].t(),
}


@pytest.mark.usefixtures("instructions")
@pytest.mark.parametrize("target", [torch.bfloat16, torch.float32], ids=["BF16", "F32"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fills_the_view_and_nothing_beside_it(tmp_path, layout, target):
    values = torch.randn(96, 200).bfloat16()
    whole = []

    def empty(*shape: int) -> torch.Tensor:
        whole.append(torch.full(shape, -7.0, dtype=target))
        return whole[-1]

    view = LAYOUTS[layout](empty)
    _shards.copy([into(stored(tmp_path, values), view)])
    expected = torch.full_like(whole[0], -7.0)
    LAYOUTS[layout](lambda *_: expected).copy_(values)
    assert torch.equal(whole[0], expected)


@pytest.mark.usefixtures("instructions")
@settings(max_examples=150, database=None)
@given(
    st.lists(st.integers(0, 70), min_size=0, max_size=4).filter(lambda shape: math.prod(shape) < 60_000),
    st.randoms(use_true_random=False),
    st.sampled_from(list(SPELT)),
)
def test_any_permutation_and_slice_is_filled(tmp_path_factory, shape, dice, dtype):
    values = torch.randint(0, 100, shape).to(dtype)
    folder = tmp_path_factory.getbasetemp()
    order = list(range(len(shape)))
    dice.shuffle(order)
    steps = [dice.choice((1, 1, 2)) for _ in shape]
    starts = [dice.choice((0, 0, 3)) for _ in shape]
    outer = [shape[i] * steps[i] + starts[i] for i in order]
    whole = torch.full(outer, 1).to(dtype)
    back = [order.index(i) for i in range(len(shape))]
    index = tuple(slice(starts[i], starts[i] + shape[i] * steps[i], steps[i]) for i in range(len(shape)))
    expected = whole.clone()
    expected.permute(back)[index] = values
    view = whole.permute(back)[index]
    _shards.copy([into(stored(folder, values), view)])
    assert torch.equal(whole, expected)


@pytest.mark.parametrize("n", [0, 1, 31, 32, 33, (1 << 20) - 1, (1 << 20) + 1, (5 << 20) + 3])
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int64], ids=OTHERS.get)
def test_sizes_around_a_piece(tmp_path, n, dtype):
    values = torch.randint(-100, 100, (n,), dtype=dtype)
    whole = torch.zeros(n + 2, dtype=dtype)
    _shards.copy([into(stored(tmp_path, values), whole[1:-1])])
    assert torch.equal(whole[1:-1], values)
    assert whole[0] == whole[-1] == 0


def test_a_list_of_transfers_is_one_copy(tmp_path):
    tensors = {f"t{i}": torch.randn(50 + i, 40) for i in range(30)}
    save_file(tensors, tmp_path / "many.safetensors")
    shard = _shards.Shard(tmp_path / "many.safetensors")
    out = {name: torch.zeros_like(value) for name, value in tensors.items()}
    _shards.copy([into(shard, out[name], name) for name in out])
    assert all(torch.equal(out[name], tensors[name]) for name in out)


def test_threads_are_settable_and_more_callers_than_the_pool_are_served(tmp_path):
    values = torch.randn(3 << 20)
    shard, before = stored(tmp_path, values), _shards.threads()
    outs = [torch.zeros_like(values) for _ in range(6)]
    try:
        for n in (1, 3, 2):
            _shards.set_threads(n)
            assert _shards.threads() == n
            callers = [threading.Thread(target=_shards.copy, args=([into(shard, out.zero_())],)) for out in outs]
            for caller in callers:
                caller.start()
            for caller in callers:
                caller.join()
            assert all(torch.equal(out, values) for out in outs)
    finally:
        _shards.set_threads(before)
    with pytest.raises(ValueError, match="expected 1 to 1024, got 0"):
        _shards.set_threads(0)


def test_bytes_are_read_into_any_buffer(tmp_path):
    shard = stored(tmp_path, torch.arange(1000, dtype=torch.int16))
    raw = (tmp_path / "x.safetensors").read_bytes()
    buffer = bytearray(100)
    shard.read_into(3, buffer)
    assert buffer == raw[3:103]
    with pytest.raises(IndexError, match=r"x\.safetensors: .*lie outside the file"):
        shard.read_into(len(raw) - 99, buffer)
    with pytest.raises(BufferError):
        shard.read_into(0, bytes(3))
    assert bytes(shard.view(5, 20)) == raw[5:25]
    assert shard.view(5, 20).readonly


def test_maps_when_bytes_are_wanted_and_views_outlive_the_shard(tmp_path):
    shard = stored(tmp_path, torch.arange(1000, dtype=torch.int16))
    assert not shard.is_mapped
    view = shard.view(0, 8)
    assert shard.is_mapped
    shard.unmap()
    del shard
    assert struct.unpack("<Q", view)[0] < 200


@pytest.mark.parametrize("how", ["prefetch", "load", "release", "drop"])
def test_advice_changes_no_byte(tmp_path, how):
    values = torch.randn(1 << 20)
    shard, out = stored(tmp_path, values), torch.zeros(1 << 20)
    shard.advise(shard.data_start + 5, (4 << 20) - 5, how)
    shard.advise(shard.size, 0, how)
    _shards.copy([into(shard, out)])
    assert torch.equal(out, values)
    with pytest.raises(ValueError, match="expected prefetch, load, release or drop"):
        shard.advise(0, 1, "guess")
    with pytest.raises(IndexError):
        shard.advise(0, shard.size + 1, how)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"capacity": 4799}, "x: needs 4800 bytes, the destination has 4799"),
        ({"strides": [60, 1]}, "needs 4840 bytes"),
        ({"strides": [0, 1]}, "two elements would go to the same place"),
        ({"strides": [10, 1]}, "two elements would go to the same place"),
        ({"strides": [1]}, "as many strides as dimensions"),
        ({"strides": [2**63, 1]}, "larger than any memory"),
        ({"shape": [2**40, 2**40], "strides": [2**40, 1]}, "larger than any memory"),
        ({"shape": [21, 60]}, "lie outside the file"),
        ({"offset": 2**64 - 1}, "lie outside the file"),
        ({"address": 0}, "null pointer"),
        ({"to_dtype": "I32"}, "cannot convert F32 to I32"),
        ({"to_dtype": "F4"}, "has no whole number of bytes"),
    ],
)
def test_what_does_not_fit_is_refused_before_anything_is_copied(tmp_path, change, message):
    shard, target = stored(tmp_path, torch.zeros(20, 60)), torch.ones(40, 61)
    given = {
        "offset": shard.data_start,
        "dtype": "F32",
        "shape": [20, 60],
        "address": target.data_ptr(),
        "capacity": 4800,
        "to_dtype": "F32",
        "strides": [60, 1],
    }
    if "strides" in change and change["strides"] == [60, 1]:
        change = {"strides": [61, 1]}
        message = "needs 4876 bytes"
    with pytest.raises((ValueError, IndexError), match=message):
        _shards.Transfer(shard, **{**given, **change})
    assert bool((target == 1).all())
