import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from olmfast.kernels import scores as scores_file
from olmfast.kernels import token_scores
from olmfast.kernels._dispatch import Tile

# Tokens, vocabulary, width: aligned, ragged, ragged in everything and wider than one share of the vocabulary.
SHAPES = [(128, 256, 64), (129, 257, 65), (3, 1000, 31), (1, 1, 1)]


def problem(tokens, vocabulary, width, dtype, device, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, width, generator=generator).to(dtype)
    head = (torch.randn(vocabulary, width, generator=generator) * width**-0.5 * 3).to(dtype)
    labels = torch.randint(0, vocabulary, (tokens,), generator=generator)
    return hidden.to(device), head.to(device), labels.to(device)


def logits_of(hidden, head, bias=None, softcap=None, scale=None, dtype=torch.float64):
    logits = hidden.cpu().to(dtype) @ head.cpu().to(dtype).mT
    if bias is not None:
        logits = logits + bias.cpu().to(dtype)
    if scale is not None:
        logits = logits * scale
    return softcap * (logits / softcap).tanh() if softcap is not None else logits


def check(scores, logits, labels, exact_dtype_logits=None):
    """No worse than twice torch's own error in float32 arithmetic, and an argmax that is one."""
    labels = labels.cpu()[:, None]
    plain = exact_dtype_logits if exact_dtype_logits is not None else logits.float()
    truth = (logits.amax(1), logits.logsumexp(1), logits.gather(1, labels)[:, 0])
    torch_own = (plain.amax(1), plain.logsumexp(1), plain.gather(1, labels)[:, 0])
    for name, expected, rival in zip(("max_logit", "logsumexp", "label_logit"), truth, torch_own, strict=True):
        error = (getattr(scores, name).cpu().double() - expected).abs()
        allowed = 2 * (rival.double() - expected).abs().amax() + 4e-6 * expected.abs().amax() + 1e-7
        assert error.amax() <= allowed, f"{name}: error {error.amax():.3g}, allowed {allowed:.3g}"
    chosen = logits.gather(1, scores.argmax.cpu()[:, None])[:, 0]
    assert ((truth[0] - chosen) <= 1e-5 * (1 + truth[0].abs())).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_equals_materialised_logits(shape, dtype, impl, device):
    hidden, head, labels = problem(*shape, dtype, device)
    scores = token_scores(hidden, head, labels, impl=impl)
    check(scores, logits_of(hidden, head), labels, logits_of(hidden, head, dtype=torch.float32))
    assert all(field.shape == labels.shape for field in scores)


@pytest.mark.parametrize("options", [{"softcap": 5.0}, {"scale": 0.0625}, {"scale": 2.0, "softcap": 30.0}, {}])
@pytest.mark.parametrize("biased", [False, True])
def test_bias_scale_and_softcap(options, biased, impl, device):
    hidden, head, labels = problem(40, 300, 48, torch.bfloat16, device)
    bias = torch.linspace(-2, 2, 300, device=device).bfloat16() if biased else None
    scores = token_scores(hidden, head, labels, bias=bias, impl=impl, **options)
    check(scores, logits_of(hidden, head, bias, **options), labels)


@pytest.mark.parametrize("precision", ["ieee", "tf32x3"])
def test_float32_products_are_as_exact_as_float32(precision, impl, device):
    hidden, head, labels = problem(70, 300, 96, torch.float32, device)
    scores = token_scores(hidden, head, labels, precision=precision, impl=impl)
    check(scores, logits_of(hidden, head), labels, logits_of(hidden, head, dtype=torch.float32))


def test_a_precision_that_is_none_is_refused(device):
    hidden, head, labels = problem(2, 3, 4, torch.float32, device)
    with pytest.raises(ValueError, match="token_scores: precision is 'fp8'; use 'ieee', 'tf32' or 'tf32x3'"):
        token_scores(hidden, head, labels, precision="fp8")


def test_scale_of_zero_gives_equal_logits(impl, device):
    hidden, head, labels = problem(5, 300, 8, torch.float32, device)
    scores = token_scores(hidden, head, labels, scale=0.0, impl=impl)
    assert (scores.max_logit == 0).all()
    assert (scores.argmax == 0).all()
    torch.testing.assert_close(scores.logsumexp, torch.full_like(scores.logsumexp, 300.0).log())


def test_ties_go_to_the_lowest_index(dtype, impl, device):
    hidden, head, labels = problem(20, 3000, 16, dtype, device)
    hidden, head = hidden.round(), head.round()  # sums of whole numbers are exact in any order: equals stay equal
    for token, places in ((0, (2999, 17)), (1, (300, 299)), (2, (2500, 255, 256)), (3, (0, 1, 2998))):
        head[list(places)] = hidden[token] * 8
    scores = token_scores(hidden, head, labels, impl=impl)
    assert scores.argmax[:4].tolist() == [17, 299, 255, 0]
    assert torch.equal(scores.argmax.cpu(), logits_of(hidden, head, dtype=torch.float32).argmax(1))


def test_a_vocabulary_of_151936(impl, device, monkeypatch):
    if device.type == "cpu":
        # The interpreter's time goes by tiles: fewer rows, more columns.
        monkeypatch.setattr(scores_file, "TILES", [Tile(16, 1024, 16, 1, 4)])
    hidden, head, labels = problem(3, 151_936, 8, torch.bfloat16, device)
    hidden[0] = hidden[0].round()  # else equal rows might get logits that are rounded apart
    head[[7, 151_935]] = (hidden[0] * 9).clone()
    labels[0] = 151_935
    scores = token_scores(hidden, head, labels, impl=impl)
    check(scores, logits_of(hidden, head), labels)
    assert scores.argmax[0] == 7
    assert scores.label_logit[0] == scores.max_logit[0]


def test_extreme_but_finite_logits(impl, device):
    hidden = torch.tensor([[1e4], [-1e4], [0.0]], device=device)
    head = torch.linspace(-1e4, 1e4, 700, device=device)[:, None]
    labels = torch.tensor([0, 699, 5], device=device)
    scores = token_scores(hidden, head, labels, impl=impl)
    check(scores, logits_of(hidden, head), labels)
    assert scores.logsumexp.isfinite().all()


@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("options", [{}, {"softcap": 10.0}])
def test_logits_that_are_not_finite_are_refused(value, options, impl, device):
    hidden, head, labels = problem(6, 500, 4, torch.float32, device)
    bias = torch.zeros(500, device=device)
    bias[400] = value
    with pytest.raises(FloatingPointError, match="token_scores: the logits of 6 of 6 tokens are not finite"):
        token_scores(hidden, head, labels, bias=bias, check=True, impl=impl, **options)
    unchecked = token_scores(hidden, head, labels, bias=bias, check=False, impl=impl, **options)
    assert unchecked.logsumexp.isnan().all()
    hidden[2, 1] = value
    scores = token_scores(hidden, head, labels, check=False, impl=impl, **options)
    assert scores.logsumexp.isnan().nonzero().tolist() == [[2]]


def test_labels_outside_the_vocabulary(impl, device):
    hidden, head, labels = problem(4, 50, 4, torch.float32, device)
    labels[1] = -100
    scores = token_scores(hidden, head, labels, impl=impl, check=True)
    assert scores.label_logit.isnan().tolist() == [False, True, False, False]
    labels[2] = 50
    with pytest.raises(ValueError, match="token_scores: label 50 is outside the vocabulary of 50"):
        token_scores(hidden, head, labels, impl=impl, check=True)
    assert token_scores(hidden, head, labels, impl=impl, check=False).label_logit[2].isnan()


def test_a_token_does_not_depend_on_its_batch(dtype, impl, device):
    hidden, head, labels = problem(200, 700, 40, dtype, device)
    whole = token_scores(hidden, head, labels, impl=impl)
    again = token_scores(hidden, head, labels, impl=impl)
    for first, second in zip(whole, again, strict=True):
        assert torch.equal(first, second)
    if impl == "triton":
        part = token_scores(hidden[130:150], head, labels[130:150], impl=impl)
        for first, second in zip(whole, part, strict=True):
            if device.type == "cuda":
                assert torch.equal(first[130:150], second)
            else:  # the interpreter's products are NumPy's, which round a row by its place in the tile
                torch.testing.assert_close(first[130:150], second, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shared", [True, False])
def test_stacked_heads(shared, impl, device):
    problems = [problem(9, 300, 20, torch.bfloat16, device, seed) for seed in range(3)]
    heads, biases = torch.stack([head for _, head, _ in problems]), torch.randn(3, 300, device=device)
    hidden = problems[0][0] if shared else torch.stack([hidden for hidden, _, _ in problems])
    labels = problems[0][2] if shared else torch.stack([labels for _, _, labels in problems])
    scores = token_scores(hidden, heads, labels, bias=biases, impl=impl)
    for i in range(3):
        own_hidden, own_labels = (hidden, labels) if shared else (hidden[i], labels[i])
        single = token_scores(own_hidden, heads[i], own_labels, bias=biases[i], impl=impl)
        for stacked, alone in zip(scores, single, strict=True):
            assert torch.equal(stacked[i], alone)


def test_any_strides(impl, device):
    hidden, head, labels = problem(33, 300, 40, torch.float32, device)
    scores = token_scores(hidden.T.contiguous().T, head.T.contiguous().T[::2], labels // 2, impl=impl)
    check(scores, logits_of(hidden, head[::2]), labels // 2)


def test_no_tokens(impl, device):
    hidden, head, labels = problem(1, 30, 4, torch.float32, device)
    assert all(field.shape == (0,) for field in token_scores(hidden[:0], head, labels[:0], impl=impl))


def test_float64_inputs_run_in_float64(device):
    hidden, head, labels = problem(9, 5000, 12, torch.float64, device)
    scores, logits = token_scores(hidden, head, labels), logits_of(hidden, head)
    torch.testing.assert_close(scores.logsumexp.cpu(), logits.logsumexp(1), rtol=1e-13, atol=0)
    assert torch.equal(scores.argmax.cpu(), logits.argmax(1))


@settings(max_examples=25)
@given(
    tokens=st.integers(1, 20),
    vocabulary=st.integers(1, 5000),
    width=st.integers(1, 8),
    size=st.floats(0.01, 100),
    seed=st.integers(0, 1 << 30),
)
def test_gives_log_softmax(tokens, vocabulary, width, size, seed):
    hidden, head, labels = problem(tokens, vocabulary, width, torch.float32, "cpu", seed)
    scores = token_scores(hidden * size, head, labels)
    expected = (hidden * size @ head.T).double().log_softmax(1)
    actual = (scores.label_logit - scores.logsumexp).double()
    slack = 1e-5 * (1 + float((hidden * size @ head.T).abs().max()))
    torch.testing.assert_close(actual, expected.gather(1, labels[:, None])[:, 0], rtol=0, atol=slack)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"hidden": torch.ones(3, 5)}, ValueError, r"hidden has shape \(3, 5\), head_weight \(7, 4\)"),
        ({"hidden": torch.ones(2, 3, 4)}, ValueError, "hidden has shape"),
        ({"head_weight": torch.ones(7, 4).half()}, TypeError, "hidden has dtype float32, head_weight float16"),
        ({"head_weight": torch.ones(0, 4)}, ValueError, "head_weight has no rows"),
        ({"labels": torch.ones(3)}, TypeError, "labels have dtype float32"),
        ({"labels": torch.ones(4, dtype=torch.long)}, ValueError, r"labels has shape \(4,\), not \(3,\)"),
        ({"bias": torch.ones(6)}, ValueError, r"bias has shape \(6,\), not \(7,\)"),
        ({"softcap": 0.0}, ValueError, "softcap is 0.0"),
    ],
)
def test_errors_say_what_is_wrong(change, error, message):
    arguments = {
        "hidden": torch.ones(3, 4),
        "head_weight": torch.ones(7, 4),
        "labels": torch.zeros(3, dtype=torch.long),
    }
    with pytest.raises(error, match=message):
        token_scores(**{**arguments, **change})
