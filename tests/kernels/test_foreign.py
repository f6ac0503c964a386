"""What other people's loops bring: parameters, overlapping memory, wrong types, NaN, stacked experts."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from olmfast.kernels import (
    dare_mask,
    gated,
    offspring_count,
    rms_norm,
    rotate,
    row_scale,
    slerp,
    stacked_linear,
    svd_coefficients,
    svd_factors,
    svd_noise,
    ties_merge,
    token_scores,
    weighted_sum,
)

NAN = float("nan")


def inputs(**changed):
    """Small inputs of every kernel, by name; `changed` replaces some."""
    made = {"weight": torch.randn(6, 5), "u": torch.randn(6, 3), "vh": torch.randn(3, 5), "c": torch.randn(2, 3) / 10}
    made |= {"scale": torch.randn(2, 6) / 10, "a": torch.randn(6, 5), "b": torch.randn(6, 5)}
    made |= {"hidden": torch.randn(4, 5), "head": torch.randn(9, 5), "bias": torch.randn(9)}
    made |= {"x": torch.randn(4, 5), "stack": torch.randn(2, 3, 5), "shift": torch.randn(2, 3), "s": torch.rand(3)}
    made |= {"q": torch.randn(1, 2, 4, 6), "cos": torch.randn(1, 4, 6), "sin": torch.randn(1, 4, 6)}
    return made | changed


LABELS = torch.tensor([0, 3, 8, -100])
CALLS = {
    "svd_noise": lambda i: svd_noise(i["weight"], i["u"], i["vh"], i["c"], clamp=i.get("clamp", 3.0)),
    "row_scale": lambda i: row_scale(i["weight"], i["scale"], axis=i.get("axis", 0)),
    "token_scores": lambda i: token_scores(
        i["hidden"], i["head"], i.get("labels", LABELS), bias=i["bias"], softcap=i.get("softcap"), scale=i.get("by")
    ).logsumexp,
    "weighted_sum": lambda i: weighted_sum(i.get("tensors", [i["a"], i["b"]]), i.get("weights", [0.5, 2.0])),
    "slerp": lambda i: slerp(i["a"], i["b"], i.get("t", 0.3)),
    "ties_merge": lambda i: ties_merge(
        i.get("tensors", [i["a"], i["b"]]), i.get("weights", [1.0, 2.0]), i.get("density", 0.5), base=i["weight"],
        scale=i.get("by", 1.0),
    ),
    "rms_norm": lambda i: rms_norm(i["x"], i["b"][0], i.get("eps", 1e-6), offset=i.get("by", 0.0), rounded_first=False),
    "gated": lambda i: gated(i["a"], i["b"], i.get("activation", "silu")),
    "rotate": lambda i: torch.cat(rotate(i["q"], i["q"], i["cos"], i["sin"])),
    "stacked_linear": lambda i: stacked_linear(i["x"], i["stack"], i["shift"]),
    "svd_factors": lambda i: svd_factors(i["weight"]).vh,
    "svd_coefficients": lambda i: svd_coefficients(i["s"], i.get("sigma", 0.1), i.get("draws", torch.ones(2, 3))),
    "dare_mask": lambda i: dare_mask(
        i.get("shape", (4, 5)), i.get("density", 0.5), i.get("seed", 1),
        stream=i.get("stream", 0), start=i.get("start", 0),
    ),
    "offspring_count": lambda i: torch.tensor(offspring_count(i.get("dimensions", 9))),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_parameters_and_tensors_that_require_grad_are_computed_without(name):
    plain = inputs()
    asking = {key: torch.nn.Parameter(value.clone()) for key, value in plain.items()}
    found = CALLS[name](asking)
    assert not found.requires_grad
    assert torch.equal(found, CALLS[name](plain))


def test_an_out_that_requires_grad_can_be_written():
    given = inputs()
    out = torch.zeros(6, 5, requires_grad=True)
    assert torch.equal(weighted_sum([given["a"], given["b"]], [1, 2], out=out), given["a"] + 2 * given["b"])


@pytest.mark.parametrize(
    ("name", "changed", "argument"),
    [
        ("dare_mask", {"shape": 100}, "shape"),
        ("dare_mask", {"shape": (4.0,)}, "shape[0]"),
        ("dare_mask", {"density": "half"}, "density"),
        ("dare_mask", {"seed": 1.5}, "seed"),
        ("dare_mask", {"stream": "name"}, "stream"),
        ("dare_mask", {"start": None}, "start"),
        ("slerp", {"t": "0.5"}, "t"),
        ("slerp", {"t": None}, "t"),
        ("slerp", {"b": [1.0]}, "b"),
        ("weighted_sum", {"weights": None}, "weights"),
        ("weighted_sum", {"weights": 0.5}, "weights"),
        ("weighted_sum", {"weights": ["a", 1]}, "weights[0]"),
        ("weighted_sum", {"tensors": None}, "tensors"),
        ("weighted_sum", {"tensors": [1.0]}, "tensors[0]"),
        ("ties_merge", {"density": "0.5"}, "density"),
        ("ties_merge", {"density": [0.5, None]}, "density[1]"),
        ("ties_merge", {"weights": "ab"}, "weights"),
        ("ties_merge", {"by": None}, "scale"),
        ("ties_merge", {"weight": 3}, "base"),
        ("svd_noise", {"weight": None}, "weight"),
        ("svd_noise", {"u": [1]}, "u"),
        ("svd_noise", {"clamp": "3"}, "clamp"),
        ("row_scale", {"weight": 1}, "weight"),
        ("row_scale", {"axis": "rows"}, "axis"),
        ("token_scores", {"labels": [0, 1, 2, 3]}, "labels"),
        ("token_scores", {"bias": 0.5}, "bias"),
        ("token_scores", {"softcap": "30"}, "softcap"),
        ("token_scores", {"by": "2"}, "scale"),
        ("rms_norm", {"x": None}, "x"),
        ("rms_norm", {"eps": "small"}, "eps"),
        ("rms_norm", {"by": None}, "offset"),
        ("gated", {"b": 1.0}, "up"),
        ("gated", {"activation": None}, "activation"),
        ("rotate", {"q": [1.0]}, "q"),
        ("rotate", {"sin": 0.5}, "sin"),
        ("stacked_linear", {"x": None}, "x"),
        ("stacked_linear", {"shift": 1.0}, "bias"),
        ("svd_factors", {"weight": None}, "weight"),
        ("svd_coefficients", {"sigma": None}, "sigma"),
        ("offspring_count", {"dimensions": 4.0}, "dimensions"),
    ],
)
def test_a_wrong_type_is_named_with_its_argument(name, changed, argument):
    with pytest.raises(TypeError, match=rf"^{name}: {re.escape(argument)} is of type \w+, not a"):
        CALLS[name](inputs(**changed))


@pytest.mark.parametrize("number", [NAN, float("inf")])
@pytest.mark.parametrize(
    ("name", "key", "argument"),
    [
        ("slerp", "t", "t"),
        ("weighted_sum", "weights", "weights[1]"),
        ("ties_merge", "weights", "weights[1]"),
        ("ties_merge", "by", "scale"),
        ("rms_norm", "eps", "eps"),
        ("rms_norm", "by", "offset"),
        ("dare_mask", "density", "density"),
        ("svd_coefficients", "sigma", "sigma"),
    ],
)
def test_a_number_that_is_not_finite_is_refused(name, key, argument, number):
    with pytest.raises(ValueError, match=rf"^{name}: {re.escape(argument)} is (nan|inf), not a finite number"):
        CALLS[name](inputs(**{key: [1.0, number] if key == "weights" else number}))


def test_numbers_may_be_tensors_and_numpy_scalars():
    given = inputs()
    expected = slerp(given["a"], given["b"], 0.25)
    for t in (torch.tensor(0.25), np.float32(0.25), torch.nn.Parameter(torch.tensor([0.25]))):
        assert torch.equal(slerp(given["a"], given["b"], t), expected)


# Memory


def test_an_out_that_overlaps_an_input_is_refused_with_both_names():
    given, memory = inputs(), torch.randn(200)
    weight, over = memory[:30].view(6, 5), memory[20:80].view(2, 6, 5)
    with pytest.raises(ValueError, match="svd_noise: out and weight overlap in memory"):
        svd_noise(weight, given["u"], given["vh"], given["c"], out=over)
    with pytest.raises(ValueError, match="row_scale: out and log_scale overlap in memory"):
        row_scale(given["weight"], memory[:12].view(2, 6), out=memory[4:64].view(2, 6, 5))
    shifted = memory[1:31].view(6, 5)
    for name, call in (
        (r"tensors\[1\]", lambda: weighted_sum([given["a"], weight], [1, 2], out=shifted)),
        ("b", lambda: slerp(given["a"], weight, 0.5, out=shifted)),
        ("base", lambda: ties_merge([given["a"]], [1], 0.5, base=weight, out=shifted)),
    ):
        with pytest.raises(ValueError, match=f"out and {name} overlap in memory; give out memory of its own"):
            call()
    with pytest.raises(ValueError, match="stacked_linear: out and x overlap in memory"):
        stacked_linear(memory[:20].view(4, 5), given["stack"], out=memory[:24].view(2, 4, 3))
    with pytest.raises(ValueError, match="out and a overlap"):
        slerp(memory[:25].view(5, 5), given["b"][:5], 0.5, out=memory[:25].view(5, 5).T)


def test_an_out_that_is_an_input_or_lies_between_its_rows_is_right():
    given = inputs()
    a = given["a"].clone()
    assert torch.equal(slerp(a, given["b"], 0.5, out=a), slerp(given["a"], given["b"], 0.5))
    memory = torch.zeros(6, 12)
    weight, out = memory[:, :5], memory[:, 6:11]  # ranges of addresses that cross, and no byte in common
    weight.copy_(given["weight"])
    assert torch.equal(weighted_sum([weight, given["a"]], [1, 1], out=out), given["weight"] + given["a"])
    assert torch.equal(weight, given["weight"])


# Batches of matrices


def test_three_dimensions_are_a_batch_of_matrices(impl, device):
    n = 3
    weight, base = torch.randn(n, 6, 5, device=device), torch.randn(n, 6, 5, device=device)
    u, vh = torch.randn(n, 6, 2, device=device), torch.randn(n, 2, 5, device=device)
    each, shared = torch.randn(4, n, 2, device=device) / 10, torch.randn(4, 2, device=device) / 10
    for coefficients in (each, shared):
        found = svd_noise(weight, u, vh, coefficients, impl=impl)
        assert found.shape == (4, n, 6, 5)
        for i in range(n):
            own = coefficients if coefficients.dim() == 2 else coefficients[:, i].contiguous()
            assert torch.equal(found[:, i], svd_noise(weight[i], u[i], vh[i], own, impl=impl))
    for axis, length in ((0, 6), (1, 5)):
        scale = torch.randn(4, n, length, device=device) / 10
        found = row_scale(weight, scale, axis=axis, impl=impl)
        for i in range(n):
            assert torch.equal(found[:, i], row_scale(weight[i], scale[:, i], axis=axis, impl=impl))
    other = torch.randn(n, 6, 5, device=device) * torch.tensor([0.1, 1, 10], device=device)[:, None, None]
    found = {
        "sum": weighted_sum([weight, other], [0.5, 2], impl=impl),
        "slerp": slerp(weight, other, 0.3, impl=impl),
        "ties": ties_merge([weight, other], [1, 1], 0.4, base=base, impl=impl),
    }
    for i in range(n):
        assert torch.equal(found["sum"][i], weighted_sum([weight[i], other[i]], [0.5, 2], impl=impl))
        assert torch.equal(found["slerp"][i], slerp(weight[i], other[i], 0.3, impl=impl))
        assert torch.equal(found["ties"][i], ties_merge([weight[i], other[i]], [1, 1], 0.4, base=base[i], impl=impl))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: svd_noise(w, torch.ones(2, 6, 1), torch.ones(3, 1, 5), torch.ones(1, 1)), "u has shape"),
        (lambda w: svd_noise(w, torch.ones(3, 6, 1), torch.ones(3, 1, 5), torch.ones(1, 2, 1)), "coefficients has"),
        (lambda w: row_scale(w, torch.ones(1, 2, 6)), "weight has 3 matrices of 6 entries along axis 0"),
    ],
)
def test_a_batch_that_does_not_fit_is_named(call, message):
    with pytest.raises(ValueError, match=message):
        call(torch.ones(3, 6, 5))


# The loop of the documentation


def test_coefficients_are_what_their_formula_says():
    s, draws = torch.tensor([4.0, 1.0]), torch.tensor([[1.0, 1.0], [-2.0, 0.0]])
    spread, damping = 3 / 2**0.5, torch.tensor([1.0, 2.0], dtype=torch.float64)
    expected = draws.double() * 0.1 * spread * damping / 1.5
    torch.testing.assert_close(svd_coefficients(s, 0.1, draws), expected, rtol=1e-9, atol=0)
    assert [offspring_count(n) for n in (1, 2, 32, 4096)] == [4, 6, 14, 28]
    with pytest.raises(ValueError, match="dimensions is 0, not a number above 0"):
        offspring_count(0)
    with pytest.raises(ValueError, match=r"draws has shape \(2, 3\), s \(2,\)"):
        svd_coefficients(s, 0.1, torch.ones(2, 3))


def test_the_loop_of_the_documentation_evolves_a_weight():
    text = (Path(__file__).parents[2] / "docs" / "kernels.md").read_text(encoding="utf-8")
    (loop,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "def evolve" in block]
    assert len(loop.split("def evolve")[1].splitlines()) <= 20
    names: dict = {}
    exec(loop, names)
    weight = torch.randn(16, 8).bfloat16()
    target = (weight.float() * torch.rand(16, 1).add(0.7)).bfloat16()

    def score(one):
        return float((one.float() - target.float()).square().mean())

    evolved = names["evolve"](weight, score, generations=12)
    assert evolved.dtype == torch.bfloat16
    assert score(evolved) < score(weight)
    assert torch.equal(names["evolve"](weight, lambda _: 0.0), weight)  # nothing improves: not a bit changes


PACKED = {
    "sparse_coo": torch.Tensor.to_sparse,
    "mkldnn": torch.Tensor.to_mkldnn,
    "nested": lambda tensor: torch.nested.nested_tensor([tensor.flatten(), tensor.flatten()[:1]], layout=torch.jagged),
}


@pytest.mark.parametrize("kind", PACKED)
@pytest.mark.parametrize("name", [name for name in CALLS if name not in ("dare_mask", "offspring_count")])
def test_tensors_that_are_sparse_packed_or_nested_are_refused_as_what_they_are(name, kind):
    given = {key: PACKED[kind](value) for key, value in inputs().items()}
    if name == "rms_norm":
        given["b"] = [given["b"]]  # of which the first is taken
    told = rf"^{name}: [\w\[\]]+ is (of layout _?)?{kind}, not a plain tensor; use to_dense"
    with pytest.raises(TypeError, match=told):
        CALLS[name](given)


OF_VALUES = ("svd_noise", "row_scale", "token_scores", "weighted_sum", "slerp", "ties_merge", "svd_factors")


@pytest.mark.parametrize("name", [*OF_VALUES, "svd_coefficients"])
def test_tensors_without_values_are_refused_where_values_count(name):
    given = {key: value.to("meta") for key, value in inputs().items()}
    with pytest.raises(ValueError, match=f"^{name}: .* on meta, where "):
        CALLS[name](given | {"labels": LABELS.to("meta"), "draws": torch.ones(2, 3, device="meta")})


OUTS = {
    "row_scale": ((2, 6, 5), lambda i, out: row_scale(i["weight"], i["scale"], out=out)),
    "svd_noise": ((2, 6, 5), lambda i, out: svd_noise(i["weight"], i["u"], i["vh"], i["c"], out=out)),
    "slerp": ((6, 5), lambda i, out: slerp(i["a"], i["b"], 0.5, out=out)),
    "weighted_sum": ((6, 5), lambda i, out: weighted_sum([i["a"], i["b"]], [1, 2], out=out)),
    "ties_merge": ((6, 5), lambda i, out: ties_merge([i["a"], i["b"]], [1, 2], 0.5, out=out)),
    "stacked_linear": ((2, 4, 3), lambda i, out: stacked_linear(i["x"], i["stack"], i["shift"], out=out)),
}


@pytest.mark.parametrize("name", OUTS)
def test_an_out_whose_entries_share_memory_is_refused_and_one_whose_strides_mesh_is_written(name):
    shape, call = OUTS[name]
    given, memory = inputs(), torch.zeros(4096)
    for strides in ([0] * len(shape), [1] * len(shape), [2] * len(shape)):
        with pytest.raises(ValueError, match=f"^{name}: out has several entries in one place"):
            call(given, memory.as_strided(shape, strides))
    odd = [2 * shape[-1] + 1, 2] if shape[-1] % 2 else [2 * shape[-1] + 3, 2]  # between the entries of a row, others
    meshed = memory.as_strided(shape, [1024, *odd][-len(shape) :])
    call(given, meshed)
    assert torch.equal(meshed, call(given, None))
    with pytest.raises(TypeError, match=f"^{name}: out is of layout sparse_coo, not a plain tensor"):
        call(given, torch.zeros(shape).to_sparse())


@pytest.mark.parametrize(
    ("name", "changed", "message"),
    [
        ("slerp", {"t": 10**400}, "t is beyond what 64 bits hold"),
        ("svd_noise", {"clamp": -(10**400)}, "clamp is beyond what 64 bits hold"),
        ("weighted_sum", {"weights": [1, 1e39]}, r"weights\[1\] is 1e\+39, beyond float32"),
        ("weighted_sum", {"weights": torch.tensor([1, 1j])}, "weights has dtype complex64, not real numbers"),
        ("weighted_sum", {"weights": torch.ones(2, device="meta")}, "weights is on meta"),
        ("ties_merge", {"density": np.array(0.5)}, "density is of type ndarray, not a sequence"),
        ("ties_merge", {"by": torch.tensor(1.0, device="meta")}, "scale is on meta"),
        ("dare_mask", {"shape": (2**40, 2**40)}, "indices have no more than 63 bits"),
    ],
)
def test_numbers_that_cannot_be_computed_with_are_named(name, changed, message):
    with pytest.raises((TypeError, ValueError), match=f"^{name}: .*{message}"):
        CALLS[name](inputs(**changed))


def test_a_bound_of_any_size_bounds_nothing():
    given = inputs()
    for clamp in (1e308, float("inf"), 10**30):
        assert torch.equal(CALLS["svd_noise"](given | {"clamp": clamp}), CALLS["svd_noise"](given | {"clamp": 1e9}))


@pytest.mark.parametrize("device", ["cuda:99", "nowhere", "meta"])
def test_a_mask_on_a_device_that_is_not_there_names_it(device):
    with pytest.raises(ValueError, match=r"^dare_mask: .*(which torch does not have here|on meta)"):
        dare_mask((2, 3), 0.5, 1, device=device)


@pytest.mark.parametrize("odd", [None, 1, torch.ones(2), "yes"])
def test_a_switch_is_true_or_false(odd):
    with pytest.raises(TypeError, match=r"^weighted_sum: normalize is of type .*, not true or false"):
        weighted_sum([torch.ones(2)], [1.0], normalize=odd)
    with pytest.raises(TypeError, match=r"^svd_factors: drop is of type .*, not true or false"):
        svd_factors(torch.ones(2, 2), drop=odd)
