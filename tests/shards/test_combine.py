"""What the engine computes from files: the bits that a plain loop over float32 numbers gives, on every processor."""

import math
import os
from fractions import Fraction

import pytest
import torch
from safetensors.torch import save_file

from olmfast import _shards

np = pytest.importorskip("numpy")

DTYPES = {torch.bfloat16: "BF16", torch.float16: "F16", torch.float32: "F32"}
# Below, at and past what is computed together, and past a thread's turn.
SIZES = [0, 1, 31, 4095, 4096, 4097, 64 * 4096 + 5]
SPECIAL = [0.0, -0.0, math.inf, -math.inf, math.nan, 1e-40, -1e-45, 3e38, -3e38, 65504.0, 1e-7]


@pytest.fixture(params=["as this machine can", "portable"])
def instructions(request):
    _shards._use_portable(request.param == "portable")
    yield
    _shards._use_portable(False)


def numbers(n: int, dtype: torch.dtype, seed: int, scale: float = 1.0) -> torch.Tensor:
    """Of all magnitudes, every tenth of them special."""
    dice = torch.Generator().manual_seed(seed)
    values = torch.randn(n, generator=dice) * scale * 2.0 ** torch.randint(-9, 9, (n,), generator=dice)
    values[::10] = torch.tensor(SPECIAL).repeat(n // 110 + 1)[: len(values[::10])]
    return values.to(dtype)


class Stored:
    """Tensors in one file, as operands."""

    def __init__(self, folder, tensors: list[torch.Tensor]) -> None:
        self.tensors = tensors
        save_file({f"x{i:02d}": tensor for i, tensor in enumerate(tensors)}, folder / "x.safetensors")
        self.shard = _shards.Shard(folder / "x.safetensors")
        self.places = {name: (offset, dtype) for name, dtype, _, offset, _ in self.shard.tensors}

    def operand(self, i: int, rounded: torch.dtype = torch.float32, **values: object) -> _shards.Operand:
        """Tensor i, every third of them from memory."""
        offset, dtype = self.places[f"x{i:02d}"]
        in_memory = i % 3 == 2
        place = self.tensors[i].data_ptr() if in_memory else offset
        operand = _shards.Operand(None if in_memory else self.shard, place, dtype, DTYPES[rounded])
        for name, value in values.items():
            setattr(operand, name, value)
        return operand

    def values(self, i: int, rounded: torch.dtype = torch.float32) -> np.ndarray:
        """Those of tensor i as the engine is to take them."""
        return self.tensors[i].float().to(rounded).float().numpy()


def target(out: torch.Tensor, rounded: torch.dtype | None = None) -> _shards.Target:
    name = DTYPES[out.dtype]
    return _shards.Target(out.numel(), out.data_ptr(), out.nbytes, name, DTYPES[rounded] if rounded else name)


def nearest(exact: Fraction) -> np.float32:
    """The float32 nearest to a number, the even one of two."""
    guess = np.float32(float(exact))
    if not np.isfinite(guess):
        return guess
    around = [guess, np.nextafter(guess, np.float32(-np.inf)), np.nextafter(guess, np.float32(np.inf))]
    return min(
        (x for x in around if np.isfinite(x)),
        key=lambda x: (abs(Fraction(float(x)) - exact), int(np.float32(x).view(np.int32)) & 1),
    )


def multiplied_and_added(a: np.ndarray, weight: float, total: np.ndarray) -> np.ndarray:
    """weight * a + total, rounded once: in fractions, or where it is not finite, as it comes."""
    w = np.float32(weight)
    out = (a.astype(np.float64) * np.float64(w) + total).astype(np.float32)
    for i in np.flatnonzero(np.isfinite(a) & np.isfinite(total) & np.isfinite(out) & (out != 0)):
        out[i] = nearest(Fraction(float(a[i])) * Fraction(float(w)) + Fraction(float(total[i])))
    return out


def same(got: torch.Tensor, expected: torch.Tensor) -> bool:
    """Equal bit for bit, any NaN for any NaN."""
    integer = {2: torch.int16, 4: torch.int32}[expected.element_size()]
    return bool(((got.view(integer) == expected.view(integer)) | (got.isnan() & expected.isnan())).all())


@pytest.mark.parametrize("n_operands", [1, 2, 3, 8])
@pytest.mark.usefixtures("instructions")
def test_a_sum_is_rounded_as_exact_arithmetic_rounds(tmp_path, n_operands):
    dtypes = list(DTYPES)
    stored = Stored(tmp_path, [numbers(501, dtypes[i % 3], seed=i) for i in range(n_operands)])
    weights = [0.6, -0.3, 1.0, 0.1, 1e-3, -2.5, 0.25, 7.0][:n_operands]
    for dtype, rounded, divisor in [
        (torch.float32, torch.float32, 1.0), (torch.bfloat16, torch.bfloat16, 0.7), (torch.float32, torch.float16, 3.0)
    ]:  # fmt: skip
        with np.errstate(all="ignore"):
            total = stored.values(0, rounded) * np.float32(weights[0])
            for i in range(1, n_operands):
                total = multiplied_and_added(stored.values(i, rounded), weights[i], total)
            total = total / np.float32(divisor)
        out = torch.full((501,), math.nan, dtype=dtype)
        operands = [stored.operand(i, rounded, weight=weight) for i, weight in enumerate(weights)]
        _shards.combine(operands, divisor, target(out, rounded))
        assert same(out, torch.from_numpy(total).to(rounded).to(dtype))


@pytest.mark.usefixtures("instructions")
def test_a_sum_that_lies_halfway_is_rounded_once(tmp_path):
    """a * b + c where float64, rounded again, would take the wrong one of two float32 numbers."""
    dice = np.random.default_rng(0)
    c = (1 + dice.integers(2**23, size=1000) * 2.0**-23).astype(np.float32)
    for i in (1, 2, 7):
        # The product is half a step of c but for a part that float64 has no place for beside c.
        a, weight = (
            (2.0**-24 * (1 + i * 2.0**-23) * dice.choice([1, -1], size=1000)).astype(np.float32),
            1 - i * 2.0**-23,
        )
        stored = Stored(tmp_path, [torch.from_numpy(c), torch.from_numpy(a)])
        out = torch.empty(1000)
        _shards.combine([stored.operand(0), stored.operand(1, weight=weight)], 1.0, target(out))
        exact = [Fraction(float(x)) * Fraction(weight) + Fraction(float(y)) for x, y in zip(a, c, strict=True)]
        assert out.tolist() == [float(nearest(value)) for value in exact]


@pytest.mark.parametrize("n", SIZES)
def test_sums_of_any_length_have_the_same_bits_on_every_processor(tmp_path, n):
    dtypes = list(DTYPES)
    stored = Stored(tmp_path, [numbers(n, dtypes[i % 3], seed=i) for i in range(5)])
    results = []
    for portable in (False, True):
        out = torch.full((n + 1,), 7.0, dtype=torch.bfloat16)
        _shards._use_portable(portable)
        try:
            operands = [stored.operand(i, weight=0.3 * (i - 2.5)) for i in range(5)]
            _shards.combine(operands, 0.9, target(out[:n]))
        finally:
            _shards._use_portable(False)
        assert out[n] == 7.0
        results.append(out[:n])
    assert same(*results)


def kept(values: np.ndarray, n_first: int, largest_first: float, largest: float) -> np.ndarray:
    """What is not larger becomes 0; NaN stays."""
    at = np.arange(len(values))
    for those, limit in ((at < n_first, largest_first), (at >= n_first, largest)):
        if limit >= 0:
            values = np.where(those & (np.abs(values) <= np.float32(limit)), np.float32(0), values)
    return values


@pytest.mark.parametrize("signs", [True, False])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("n", "n_operands"), [*((n, 2) for n in SIZES), (777, 1), (5000, 3), (4097, 8)])
@pytest.mark.usefixtures("instructions")
def test_task_vectors_are_added_as_a_plain_loop_adds_them(tmp_path, signs, normalize, n, n_operands):
    dtypes = list(DTYPES)
    stored = Stored(tmp_path, [numbers(n, dtypes[i % 3], seed=i, scale=0.1) for i in range(n_operands + 1)])
    weights = [np.float32(w) for w in [0.5, -0.5, 1.0, 0.3, 0.2, 0.0, -0.1, 2.0][:n_operands]]
    scales = [np.float32(s) for s in [1.0, 1.7, 0.4, 1.0, 1.0, 2.0, 1.0, 1.0][:n_operands]]
    limits = [(n // 3, 0.01, 0.02), (0, -1.0, math.inf), (n, 0.05, -1.0), (9, -1.0, -1.0)]
    scale, least, divisor = np.float32(1.1), np.float32(1e-8), np.float32(sum(weights))
    base, parts, operands = stored.values(0), [], []
    with np.errstate(all="ignore"):
        for i, (weight, factor) in enumerate(zip(weights, scales, strict=True)):
            n_first, largest_first, largest = limits[i % 4]
            delta = stored.values(i + 1) - (base if i != 4 else 0)
            if i == 0 and n > 11:
                largest_first, largest = map(float, np.abs(delta[[1, n - 1 - (n % 10 == 1)]]))  # equal to these
            thinned = kept(delta, n_first, largest_first, largest)
            parts.append(thinned * factor * weight)
            thinning = {"n_first": n_first, "largest_first": largest_first, "largest": largest}
            options = {"from_base": i != 4, "scale": factor, "weight": weight, **thinning}
            operands.append(stored.operand(i + 1, **options))
        total = merged = sum(parts[1:], parts[0])
        weighed = np.full(n, divisor)
        if signs:
            sign = np.copysign(np.float32(1), total)
            agreeing = [np.where(part * sign < 0, np.float32(0), part * sign) for part in parts]
            merged = sum(agreeing[1:], agreeing[0]) * sign
            weighed = sum((np.where(x > 0, w, np.float32(0)) for x, w in zip(agreeing, weights, strict=True)))
        if normalize:
            merged = merged / (weighed + (np.abs(weighed) < least).astype(np.float32))
        expected = torch.from_numpy(base + merged * scale).to(torch.bfloat16)
    out = torch.full((n,), math.nan, dtype=torch.bfloat16)
    _shards.combine_task_vectors(stored.operand(0), operands, signs, normalize, divisor, least, scale, target(out))
    assert same(out, expected)


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("n", SIZES[1:])
@pytest.mark.usefixtures("instructions")
def test_magnitudes_are_counted(tmp_path, n, with_base):
    stored = Stored(tmp_path, [numbers(n, dtype, seed) for seed, dtype in enumerate((torch.bfloat16, torch.float16))])
    with np.errstate(all="ignore"):
        values = stored.values(0) - (stored.values(1) if with_base else np.float32(0))
    keys = np.abs(values).view(np.int32)
    ordered = np.sort(keys)
    brackets = [(-1, 2**31 - 1), (int(ordered[n // 3]), int(ordered[n // 2])), (int(ordered[n // 2]),) * 2]
    for low, high in brackets:
        base = stored.operand(1) if with_base else None
        *counts, between = _shards.count_magnitudes(stored.operand(0), base, n, low, high)
        assert counts == [int(found.sum()) for found in (keys > high, keys >= high, keys > low, keys >= low)]
        found = np.frombuffer(between, dtype=np.int32)
        # A NaN has the bits that the processor gives it.
        assert np.array_equal(np.minimum(found, 0x7F800001), np.minimum(keys[(keys > low) & (keys < high)], 0x7F800001))


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.usefixtures("instructions")
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype):
    name = {**DTYPES, torch.float64: "F64"}[dtype]
    values = torch.full((9001,), torch.finfo(dtype).max, dtype=dtype)
    values[::2] = -torch.finfo(dtype).tiny
    assert _shards.all_finite(values.data_ptr(), 9001, name)
    assert _shards.all_finite(0, 0, name)
    for at in (0, 31, 4095, 4096, 9000):
        for what in (math.nan, math.inf, -math.inf):
            spoilt = values.clone()
            spoilt[at] = what
            assert not _shards.all_finite(spoilt.data_ptr(), 9001, name)


@pytest.mark.usefixtures("instructions")
def test_subnormals_count_although_the_caller_flushes_them(tmp_path):
    values = torch.arange(1, 1000, dtype=torch.int32).view(torch.float32)
    stored, out = Stored(tmp_path, [values]), torch.empty(999)
    try:
        torch.set_flush_denormal(True)
        _shards.combine([stored.operand(0)], 1.0, target(out))
        finite = _shards.all_finite(values.data_ptr(), 999, "F32")
    finally:
        torch.set_flush_denormal(False)
    assert same(out, values)
    assert finite


def test_a_file_that_shrank_or_changed_is_named(tmp_path):
    stored = Stored(tmp_path, [torch.ones(3_000_000), torch.ones(3_000_000)])
    out = torch.empty(3_000_000)
    ways = (
        lambda: _shards.combine([stored.operand(0), stored.operand(1)], 1.0, target(out)),
        lambda: _shards.combine_task_vectors(
            stored.operand(0), [stored.operand(1)], True, True, 1.0, 1e-8, 1.0, target(out)
        ),
        lambda: _shards.count_magnitudes(stored.operand(0), stored.operand(1), 3_000_000, 0, 5),
    )
    for way in ways:
        way()
    os.utime(tmp_path / "x.safetensors", ns=(5, 5))
    for way in ways:
        with pytest.raises(OSError, match="was changed while in use"):
            way()
    os.truncate(tmp_path / "x.safetensors", 13_000_000)
    for way in ways:
        with pytest.raises(OSError, match="x01: shrank") as error:
            way()
        assert error.value.filename == str(tmp_path / "x.safetensors")


def test_what_does_not_fit_is_refused(tmp_path):
    stored, out = Stored(tmp_path, [torch.ones(100)]), torch.empty(100)
    one = stored.operand(0)
    short = _shards.Target(100, out.data_ptr(), 399, "F32", "F32")
    for call, error, words in [
        (lambda: _shards.combine([one], 1.0, short), IndexError, "needs 100 values of 4 bytes"),
        (lambda: _shards.combine([], 1.0, target(out)), ValueError, "no operands"),
        (lambda: _shards.combine([one], 1.0, target(torch.empty(101))), IndexError, "lie outside the file"),
        (
            lambda: _shards.combine([one], 1.0, _shards.Target(2**63, 8, 2**64 - 1, "F32", "F32")),
            IndexError,
            "needs 9223372036854775808",
        ),
        (lambda: _shards.combine([_shards.Operand(None, 0, "F32")], 1.0, target(out)), ValueError, "null pointer"),
        (lambda: _shards.combine([_shards.Operand(stored.shard, 0, "F64")], 1.0, target(out)), ValueError, "only F32"),
        (lambda: _shards.combine([one], 1.0, _shards.Target(1, 8, 8, "I32", "F32")), ValueError, "only F32"),
        (lambda: _shards.count_magnitudes(one, None, 101, 0, 1), IndexError, "lie outside the file"),
        (lambda: _shards.all_finite(out.data_ptr(), 1, "I64"), ValueError, "only floats"),
    ]:
        with pytest.raises(error, match=words):
            call()
