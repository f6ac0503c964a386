"""RAM and RAM+ against a loop over entries in float64, whatever the chunks, and with what the formulas leave open."""

from __future__ import annotations

import pytest
import torch

from olmfast.weights.chunks import Held, Operands
from olmfast.weights.methods import METHODS

SETTINGS = [
    ("ram", {}),
    ("ram", {"epsilon": 0.02}),
    ("ramplus_tl", {}),
    ("ramplus_tl", {"r": 0.7, "alpha": 3.0}),
    ("ramplus_tl", {"r": -0.5, "alpha": 0.9, "epsilon": 0.02}),
    ("ramplus_tl", {"epsilon": 0.0, "alpha": 1.5}),
]
SHAPES = [(), (1,), (7, 13), (3, 5, 11)]


def sparse(shape: tuple[int, ...], n_terms: int, seed: int = 0) -> tuple[list[torch.Tensor], torch.Tensor]:
    """Terms each of which changed some entries of the base, by more and by less than 0.02, and the base."""
    dice = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=dice, dtype=torch.float64)
    terms = []
    for _ in range(n_terms):
        changed = torch.rand(shape, generator=dice) < 0.4
        terms.append(base + changed * torch.randn(shape, generator=dice, dtype=torch.float64) * 0.05)
    return terms, base


def plain(method: str, terms: list[torch.Tensor], base: torch.Tensor, settings: dict[str, float]) -> torch.Tensor:
    """The formulas of arXiv 2601.13572 an entry at a time, the counts over the tensor."""
    epsilon = settings.get("epsilon", 1e-5)
    deltas = [(term - base).flatten().tolist() for term in terms]
    changed = [[abs(x) > epsilon for x in delta] for delta in deltas]
    counts = [sum(column) for column in zip(*changed, strict=True)]
    scales = [1.0] * len(terms)
    if method == "ramplus_tl":
        for i, row in enumerate(changed):
            alone = sum(c == 1 for c, one in zip(counts, row, strict=True) if one)
            shared = sum(c > 1 for c, one in zip(counts, row, strict=True) if one)
            if alone:
                scales[i] = 1 + settings.get("r", 0.1) * min(shared / alone, settings.get("alpha", 0.2))
    out = []
    for at, value in enumerate(base.flatten().tolist()):
        own = [(scales[i], deltas[i][at]) for i in range(len(terms)) if changed[i][at]]
        if len(own) == 1:
            value += own[0][0] * own[0][1]
        elif own:
            value += sum(delta for _, delta in own) / len(own)
        out.append(value)
    return torch.tensor(out, dtype=torch.float64).view(base.shape)


@pytest.mark.parametrize("n_terms", [1, 2, 4])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize(("method", "settings"), SETTINGS, ids=str)
def test_what_one_changed_is_kept_and_what_several_changed_is_averaged(method, settings, shape, n_terms):
    terms, base = sparse(shape, n_terms)
    expected = plain(method, terms, base, settings)
    torch.testing.assert_close(METHODS[method](terms, base, settings), expected, rtol=1e-13, atol=1e-13)


def test_the_counts_are_those_of_the_whole_tensor_and_not_of_a_chunk():
    terms, base = sparse((40, 25), 3)
    operands = Operands([Held(term) for term in terms], Held(base))
    operands.step = 96  # divides neither rows nor the whole
    settings = {"r": 1.0, "alpha": 10.0}
    piece = METHODS["ramplus_tl"].prepare(operands, METHODS["ramplus_tl"].settings(settings))
    found = torch.cat([piece(start, stop).clone() for start, stop in operands.chunks()])
    expected = plain("ramplus_tl", terms, base, settings)
    torch.testing.assert_close(found.view(base.shape), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_in_other_dtypes_it_is_rounded_once(method, dtype):
    terms, base = sparse((64, 48), 3)
    terms, base = [term.to(dtype) for term in terms], base.to(dtype)
    expected = plain(method, [term.double() for term in terms], base.double(), {})
    step = torch.finfo(dtype).eps
    slack = 0 if dtype == torch.float32 else step / 2  # half a step, and float32's own sums
    found = METHODS[method](terms, base, {}).double()
    torch.testing.assert_close(found, expected, rtol=slack + 4 * torch.finfo(torch.float32).eps, atol=1e-7)


@pytest.mark.parametrize("settings", [{"epsilon": 0.0}, {"epsilon": -1.0}, {}], ids=str)
def test_terms_that_changed_nothing_leave_the_base(settings):
    base = torch.randn(5, 9, generator=torch.Generator().manual_seed(1))
    for method in ("ram", "ramplus_tl"):
        assert torch.equal(METHODS[method]([base.clone(), base.clone()], base, settings), base)


@pytest.mark.parametrize("method", ["ram", "ramplus_tl"])
def test_what_is_not_finite_stays_visible(method):
    terms, base = sparse((4, 6), 2)
    terms[1][2, 3] = float("nan")
    assert METHODS[method](terms, base, {}).isnan().nonzero().tolist() == [[2, 3]]
