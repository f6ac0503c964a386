"""Faults planted in the kernels' source must be found by the very checks the other tests use."""

import importlib.util
import sys

import pytest
import torch

from olmfast.kernels import dare, fused, noise, scaling, scores, summing, ties


@pytest.fixture
def planted(tmp_path, request):
    """The module with `old` replaced by `new` in its source, once."""
    if torch.cuda.is_available():
        pytest.skip("planted faults may write out of bounds: interpreter only")

    def plant(module, old, new):
        with open(module.__file__) as file:
            source = file.read()
        assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {module.__file__}"
        path = tmp_path / f"faulty_{module.__name__.rsplit('.', 1)[1]}.py"
        path.write_text(source.replace(old, new))
        spec = importlib.util.spec_from_file_location(path.stem, path)
        faulty = importlib.util.module_from_spec(spec)
        sys.modules[path.stem] = faulty
        request.addfinalizer(lambda: sys.modules.pop(path.stem, None))
        spec.loader.exec_module(faulty)
        return faulty

    return plant


@pytest.fixture
def impl():
    pytest.importorskip("triton")
    return "triton"


def test_a_mask_one_too_wide_writes_past_the_rows(planted, impl):
    faulty = planted(scaling, "= offs_r < rows, offs_c < cols", "= offs_r < rows, offs_c <= cols")
    whole = torch.full((2, 5, 20), 7.0)
    faulty.row_scale(torch.ones(5, 10), torch.zeros(2, 5), out=whole[..., 5:15], impl=impl)
    assert not (whole[..., 15:] == 7.0).all()


def test_a_mask_one_too_narrow_leaves_elements_unwritten(planted, impl):
    faulty = planted(noise, "= offs_m < rows, offs_n < cols", "= offs_m < rows, offs_n < cols - 1")
    out = torch.full((1, 5, 10), float("nan"))
    faulty.svd_noise(torch.ones(5, 10), torch.ones(5, 1), torch.ones(1, 10), torch.ones(1, 1), out=out, impl=impl)
    assert out.isnan().any()


def test_a_sum_rounded_at_every_step_is_not_rounded_once(planted, impl, check_rounded_once):
    tensors = [torch.randn(3000, generator=torch.Generator().manual_seed(i)).abs().half() for i in range(5)]
    truth = sum(tensor.double() for tensor in tensors) / 5
    check_rounded_once(summing.weighted_sum(tensors, [0.2] * 5, impl=impl), truth, impl, slack=1e-5)
    old = "total += x * weights[i]"
    faulty = planted(summing, old, f"total = ({old.removeprefix('total += ')} + total).to(tl.float16).to(tl.float32)")
    with pytest.raises(AssertionError, match="elements are off"):
        check_rounded_once(faulty.weighted_sum(tensors, [0.2] * 5, impl=impl), truth, impl, slack=1e-5)


def test_products_in_half_precision_are_found(planted, impl, check_rounded_once):
    generator = torch.Generator().manual_seed(0)
    weight, u, vh, c = (torch.randn(*shape, generator=generator) for shape in ((9, 8), (9, 30), (30, 8), (2, 30)))
    truth = weight.double() * ((u.double() * c.double()[:, None]) @ (vh / 9).double()).exp().clamp(0, 100)
    arguments = (weight, u, vh / 9, c)
    check_rounded_once(noise.svd_noise(*arguments, clamp=50.0, precision="ieee", impl=impl), truth, impl, slack=2e-5)
    faulty = planted(noise, "a, b = a.to(tl.float32), b.to(tl.float32)", "a, b = a.to(tl.float16), b.to(tl.float16)")
    result = faulty.svd_noise(*arguments, clamp=50.0, precision="ieee", impl=impl)
    with pytest.raises(AssertionError, match="elements are off"):
        check_rounded_once(result, truth, impl, slack=2e-5)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (
            "arg = tl.min(tl.where(share_best == best[None, :],",
            "arg = tl.max(tl.where(share_best != best[None, :] + 1,",
        ),
        ("arg = tl.where(block_best > best,", "arg = tl.where(block_best >= best,"),
    ],
)
def test_ties_that_go_to_a_later_index_are_found(old, new, planted, impl):
    # One share holds several blocks only where the vocabulary has more than MAX_SHARES of them.
    hidden, head, labels = torch.ones(1, 2), torch.zeros(600, 2), torch.zeros(1, dtype=torch.long)
    faulty = planted(scores, old, new)
    faulty.MAX_SHARES = 2
    assert scores.token_scores(hidden, head, labels, impl=impl).argmax == 0
    assert faulty.token_scores(hidden, head, labels, impl=impl).argmax != 0


def test_a_padded_vocabulary_that_counts_is_found(planted, impl):
    faulty = planted(scores, 'logits = tl.where(mask_n[None, :], logits, float("-inf"))', "logits = logits + 0.0")
    hidden, head, labels = torch.ones(1, 2), torch.zeros(100, 2), torch.zeros(1, dtype=torch.long)
    expected = torch.tensor([100.0]).log()
    torch.testing.assert_close(scores.token_scores(hidden, head, labels, impl=impl).logsumexp, expected)
    assert (faulty.token_scores(hidden, head, labels, impl=impl).logsumexp - expected).abs() > 0.1


def test_one_equal_too_few_is_found(planted, impl):
    faulty = planted(ties, "equal & (rank <= quota)", "equal & (rank < quota)")
    delta = torch.ones(2000)
    assert int(ties.ties_merge([delta], [1.0], 0.5, impl=impl).count_nonzero()) == 1000
    assert int(faulty.ties_merge([delta], [1.0], 0.5, impl=impl).count_nonzero()) != 1000


def test_products_that_are_not_rounded_are_found(planted, impl):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 3, 4, 64, generator=generator).half()
    cos, sin = torch.randn(2, 1, 4, 64, generator=generator).half()
    expected = fused.rotate_ref(x, cos, sin)
    assert torch.equal(fused.rotate(x, x, cos, sin, impl=impl)[0], expected)
    old = "left, right = (first * cos.to(tl.float32)).to(cos.dtype), "
    faulty = planted(fused, old, "left, right = first * cos.to(tl.float32), ")
    assert not torch.equal(faulty.rotate(x, x, cos, sin, impl=impl)[0], expected)
    weight = torch.randn(64, generator=generator).half()
    expected = fused.rms_norm_ref(x, weight, 1e-6, 0.0, True)
    faulty = planted(fused, "weight * normed.to(out_ptr.dtype.element_ty).to(tl.float32)", "weight * normed")
    differ = [(one.rms_norm(x, weight, 1e-6, impl=impl) != expected).float().mean() for one in (fused, faulty)]
    assert differ[0] < 0.01 < 0.1 < differ[1]


def test_another_multiplier_in_the_mask_is_found(planted, impl):
    faulty = planted(dare, "x *= 0x846CA68B", "x *= 0x846CA689")
    expected = dare.dare_mask((500,), 0.5, 1, impl="torch")
    assert torch.equal(dare.dare_mask((500,), 0.5, 1, impl=impl), expected)
    assert not torch.equal(faulty.dare_mask((500,), 0.5, 1, impl=impl), expected)
