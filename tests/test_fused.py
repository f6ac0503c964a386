"""What the engine merges in one pass has torch's values, whatever the operands are and wherever they lie."""

import itertools
import math

import pytest
import torch
from safetensors.torch import save_file

from olmfast import _shards
from olmfast.errors import FileChanged
from olmfast.weights.by_row import _piece
from olmfast.weights.checkpoint import read_header
from olmfast.weights.chunks import Held, Operands, Streamed
from olmfast.weights.fused import Fused, RowSum, operand
from olmfast.weights.methods import METHODS
from olmfast.weights.task_vectors import in_rows

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
SETTINGS = {
    "linear": {"weight": (0.6, 0.3, -0.2)},
    "slerp": {"t": 0.3},
    "multislerp": {"weight": (0.6, 0.3, 0.2)},
    "task_arithmetic": {"weight": (0.6, 0.3, -0.2), "lambda": 0.9},
    "model_stock": {},
    "passthrough": {"scale": (0.7,)},
    "ties": {"weight": (0.5, 0.7, -0.4), "density": (0.5, 1.0, 0.3), "lambda": 1.1},
    "breadcrumbs": {"weight": (0.5, 0.7, -0.4), "density": (0.5, 0.9, 0.3), "gamma": 0.02},
    "dare_ties": {"weight": (0.5, 0.7, -0.4), "density": (0.5, 1.0, 0.3), "seed": 3, "stream": "x"},
    "dare_linear": {"weight": (0.5, 0.7, -0.4), "density": (0.5, 1.0, 0.3), "normalize": True},
}
DTYPES = [
    ((BF16, BF16, BF16), BF16, None),
    ((F16, F16, F16), F16, None),
    ((F32, F32, F32), F32, None),
    ((BF16, F32, F16), BF16, BF16),  # what is wider than the result is rounded to it first
    ((F16, F16, BF16), F32, None),
    ((F32, BF16, F16), F32, F16),  # read in a dtype that is wider than the result's
]


def multiplies_and_adds_at_once() -> bool:
    """Whether torch does here, as the engine does everywhere."""
    a, c = torch.full((64,), 1 + 2.0**-12), torch.full((64,), -1 - 2.0**-11)
    return bool((c.add(a, alpha=1 + 2.0**-12) == 2.0**-24).all())


def operands_of(method: str, tensors: list[torch.Tensor], folder, dtype: torch.dtype | None, where: str) -> Operands:
    """As a merge has them: in a file, in memory, or some here and some there."""
    save_file({f"x{i}": tensor for i, tensor in enumerate(tensors)}, folder / "x.safetensors")
    found = {info.name: info for info in read_header(folder / "x.safetensors")}
    in_file = {"file": lambda _: True, "memory": lambda _: False, "both": lambda i: i % 2 == 0}[where]
    terms = [found[f"x{i}"] if in_file(i) else Held(tensor) for i, tensor in enumerate(tensors)]
    base = terms.pop()
    most = METHODS[method].n_terms[1]
    return Operands(terms[:most], base if METHODS[method].base == "required" else None, dtype=dtype)


def alike(shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], seed: int) -> list[torch.Tensor]:
    """Models of one family: small differences, many of them equal, and the base."""
    dice = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=dice) * 0.02
    noise = [torch.randn(shape, generator=dice) * 0.001 for _ in dtypes]
    return [*((base + one).to(dtype) for one, dtype in zip(noise, dtypes, strict=True)), base.to(dtypes[0])]


@pytest.mark.parametrize("where", ["file", "both"])
@pytest.mark.parametrize("method", SETTINGS)
@pytest.mark.parametrize(("dtypes", "out_dtype", "result"), DTYPES, ids=str)
def test_a_merge_in_one_pass_has_torchs_values(tmp_path, method, dtypes, out_dtype, result, where):
    # So many that a threshold is bracketed by a sample, and some in the last chunk.
    shape = (443, 300) if method in ("ties", "breadcrumbs") else (91, 37)
    tensors = alike(shape, dtypes, seed=5)
    plain, fused = (operands_of(method, tensors, tmp_path, result, place) for place in ("memory", where))
    prepare, settings = METHODS[method].prepare, METHODS[method].settings(SETTINGS[method])
    reference = prepare(plain, settings)
    expected = torch.cat([reference(*chunk).to(plain.result_dtype, copy=True) for chunk in plain.chunks()]).to(
        out_dtype
    )
    out = torch.full((plain.n_values,), math.nan, dtype=out_dtype)
    piece = prepare(fused, settings)
    assert isinstance(piece, Fused)
    assert piece.fits(out)
    source = Streamed(fused, lambda: piece)
    source.read_into(out[:1000], 0)
    source.read_into(out[1000:], 1000)
    if multiplies_and_adds_at_once():
        assert torch.equal(out, expected)
    else:
        step = torch.finfo(plain.result_dtype).eps
        torch.testing.assert_close(out, expected, rtol=step, atol=step * 1e-3)


@pytest.mark.parametrize("has_base", [True, False])
@pytest.mark.parametrize("where", ["file", "both"])
@pytest.mark.parametrize(("dtypes", "out_dtype", "result"), DTYPES, ids=str)
def test_rows_that_move_by_their_own_numbers_have_torchs_values(tmp_path, dtypes, out_dtype, result, where, has_base):
    tensors = alike((91, 137), dtypes, seed=6)
    plain, fused = (operands_of("task_arithmetic", tensors, tmp_path, result, place) for place in ("memory", where))
    if not has_base:
        plain.base = fused.base = None
    numbers = torch.randn(len(dtypes) - 1, 91, generator=torch.Generator().manual_seed(7))
    by_torch = in_rows(_piece(plain, numbers.to(plain.dtype), 0), plain, plain.row)
    expected = torch.cat([by_torch(*chunk).to(plain.result_dtype, copy=True) for chunk in plain.chunks()])
    piece = RowSum(fused, in_rows(_piece(fused, numbers.to(fused.dtype), 0), fused, fused.row), numbers)
    out = torch.full((plain.n_values,), math.nan, dtype=out_dtype)
    assert piece.fits(out)
    for start, stop in itertools.pairwise([0, 1000, 1001, 5000, plain.n_values]):  # within rows, and across them
        Streamed(fused, lambda: piece).read_into(out[start:stop], start)
    assert torch.equal(out, expected.to(out_dtype))
    target, one = _shards.Target(5, out.data_ptr(), out.nbytes, "F32", "F32"), operand(fused, fused.terms[0], 0, 0, 5)
    with pytest.raises(IndexError, match="weights of 91 rows for 92"):
        _shards.combine_by_row(one, None, [], numbers.data_ptr(), 91, 137, 91 * 137 - 1, target)


@pytest.mark.parametrize("out_dtype", [F64, torch.int32])
def test_what_the_engine_does_not_compute_is_left_to_torch(tmp_path, out_dtype):
    operands = operands_of("linear", alike((5, 7), (F64, F64), 0), tmp_path, None, "file")
    piece = METHODS["linear"].prepare(operands, METHODS["linear"].settings({"weight": 1.0}))
    assert isinstance(piece, Fused)
    assert not piece.fits(torch.empty(35, dtype=F32))
    assert not piece.fits(torch.empty(35, dtype=out_dtype))
    out = torch.empty(35, dtype=F64)
    Streamed(operands, lambda: piece).read_into(out, 0)
    assert torch.equal(out, piece(0, 35))


@pytest.mark.parametrize("method", ["linear", "task_arithmetic", "ties"])
def test_tensors_without_values_are_merged_into_one_without(method, tmp_path):
    operands = operands_of(method, [torch.empty(0, 4)] * 3, tmp_path, None, "file")
    prepare, settings = METHODS[method].prepare, METHODS[method].settings({"weight": 1.0, "density": 0.5})
    Streamed(operands, lambda: prepare(operands, settings)).read_into(torch.empty(0), 0)


def test_a_weight_that_is_no_float32_is_refused_whoever_computes(tmp_path):
    operands = operands_of("linear", alike((5, 7), (F32, F32), 0), tmp_path, None, "file")
    piece = METHODS["linear"].prepare(operands, METHODS["linear"].settings({"weight": 1e39, "normalize": False}))
    with pytest.raises(ValueError, match=r"weights\[0\] is 1e\+39"):
        Streamed(operands, lambda: piece).read_into(torch.empty(35), 0)


def test_a_model_that_changed_is_named(tmp_path):
    operands = operands_of("linear", alike((500, 700), (F32, F32), 0), tmp_path, None, "file")
    piece = METHODS["linear"].prepare(operands, METHODS["linear"].settings({"weight": 1.0}))
    (tmp_path / "x.safetensors").write_bytes(b"")
    out = torch.empty(350_000)
    with pytest.raises(FileChanged, match=r"x\.safetensors: shrank from"):
        Streamed(operands, lambda: piece).read_into(out, 0)
