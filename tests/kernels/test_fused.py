"""Norms, gated activations and rotary embeddings: the reference has Transformers' bits, the kernels the reference's."""

from importlib import import_module
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from torch.nn import functional

from olmfast.kernels import fused, gated, rms_norm, rotate

F16, BF16, F32, F64 = torch.float16, torch.bfloat16, torch.float32, torch.float64
EVERY_DTYPE = pytest.mark.parametrize("wide", [F32, BF16, F16, F64], ids=["fp32", "bf16", "fp16", "fp64"])
# family, class, offset, rounded_first
NORMS = [
    ("llama", "LlamaRMSNorm", 0.0, True),
    ("mistral", "MistralRMSNorm", 0.0, True),
    ("qwen2", "Qwen2RMSNorm", 0.0, True),
    ("qwen3", "Qwen3RMSNorm", 0.0, True),
    ("phi3", "Phi3RMSNorm", 0.0, True),
    ("olmo2", "Olmo2RMSNorm", 0.0, False),
    ("olmo3", "Olmo3RMSNorm", 0.0, False),
    ("gemma", "GemmaRMSNorm", 1.0, False),
    ("gemma2", "Gemma2RMSNorm", 1.0, False),
    ("gemma3", "Gemma3RMSNorm", 1.0, False),
]
KINDS = pytest.mark.parametrize(("offset", "rounded_first"), [(0.0, True), (0.0, False), (1.0, False)])


@pytest.fixture(autouse=True)
def _interpreter_rounds(monkeypatch, device):
    """Float32 to bfloat16 as a card does it: Triton's interpreter cuts off."""
    if device.type == "cuda" or find_spec("triton") is None:
        return
    interpreter = import_module("triton.runtime.interpreter")
    convert = interpreter._convert_float

    def rounded(data, source, target, mode):
        if (source.name, target.name) != ("fp32", "bf16"):
            return convert(data, source, target, mode)
        flat = torch.from_numpy(np.ascontiguousarray(data).reshape(-1))
        return flat.to(BF16).view(torch.uint16).numpy().reshape(data.shape)

    monkeypatch.setattr(interpreter, "_convert_float", rounded)


def bits(tensor):
    return tensor.contiguous().view({2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()])


def assert_bits(found, expected):
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    assert torch.equal(bits(found), bits(expected))


def assert_near(found, expected, impl, ulps=1, some=0.02, least=0.0):
    """The same but for some values, which may be off by `ulps` (of 16 bits; float32: by a few ulps anywhere).

    `least`: what any value may be off by.
    """
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    if found.numel() == 0 or impl == "torch":
        assert_bits(found, expected)
        return
    info = torch.finfo(found.dtype)
    allowed = (4 if found.dtype == F32 else ulps) * info.eps
    off = (found.double() - expected.double()).abs()
    assert (off <= allowed * expected.double().abs() + info.tiny + least).all(), f"off by {off.max():.3g}"
    if found.dtype != F32:
        differing = (found != expected).float().mean()
        assert differing <= max(some, 1 / found.numel()), f"{differing:.1%} of the values differ"


def heads_of(batch, heads, width, size, dtype, device, scale=2.0):
    """As attention has them: a transposed view of a product's result."""
    return (torch.randn(batch, width, heads, size) * scale).to(dtype).to(device).transpose(1, 2)


def angles(batch, width, size, dtype, device):
    phase = torch.randn(batch, width, size // 2).mul(30).repeat(1, 1, 2)
    return phase.cos().to(dtype).to(device), phase.sin().to(dtype).to(device)


# The reference: Transformers, bit for bit


@EVERY_DTYPE
@pytest.mark.parametrize(("family", "name", "offset", "rounded_first"), NORMS, ids=[norm[0] for norm in NORMS])
def test_a_norm_has_the_bits_of_transformers(family, name, offset, rounded_first, wide):
    norm = getattr(import_module(f"transformers.models.{family}.modeling_{family}"), name)(60, eps=1e-5).to(wide)
    with torch.no_grad():
        norm.weight.copy_(torch.randn(60))
        x = (torch.randn(3, 7, 60) * 5).to(wide)
        expected = norm(x)
        found = rms_norm(x, norm.weight, 1e-5, offset=offset, rounded_first=rounded_first)
        assert_bits(found, expected)
        assert not found.requires_grad


@EVERY_DTYPE
@pytest.mark.parametrize(
    ("name", "activation"), [("silu", "silu"), ("gelu_pytorch_tanh", "gelu_tanh"), ("gelu", "gelu")]
)
def test_a_gated_activation_has_the_bits_of_transformers(name, activation, wide):
    from transformers.activations import ACT2FN

    gate, up = (torch.randn(2, 5, 66) * 3).to(wide).chunk(2, dim=-1)
    assert_bits(gated(gate, up, activation), ACT2FN[name](gate) * up)


@EVERY_DTYPE
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "olmo2"])
def test_a_rotary_embedding_has_the_bits_of_transformers(family, wide):
    theirs = import_module(f"transformers.models.{family}.modeling_{family}").apply_rotary_pos_emb
    q, k = heads_of(2, 6, 5, 16, wide, "cpu"), heads_of(2, 3, 5, 16, wide, "cpu")
    for n in (1, 2):
        cos, sin = angles(n, 5, 16, F32 if family == "olmo2" else wide, "cpu")
        for found, expected in zip(rotate(q, k, cos, sin), theirs(q, k, cos, sin), strict=True):
            assert_bits(found, expected)
            assert found.stride() == expected.stride()


# The kernels: the reference


@KINDS
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 896), (5, 77), (1, 1), (2, 3, 2, 128), (7,), (3, 5000)])
def test_a_norm_is_that_of_the_reference(shape, offset, rounded_first, dtype, impl, device):
    x, weight = (torch.randn(shape) * 4).to(dtype).to(device), torch.randn(shape[-1]).to(dtype).to(device)
    found = rms_norm(x, weight, 1e-6, offset=offset, rounded_first=rounded_first, impl=impl)
    assert_near(found, fused.rms_norm_ref(x, weight, 1e-6, offset, rounded_first), impl, ulps=2)
    assert found.stride() == x.stride()


def test_a_norm_of_strided_rows(dtype, impl, device):
    whole, weight = torch.randn(4, 3, 6, 48).to(dtype).to(device), torch.randn(32).to(dtype).to(device)
    for x in (
        whole[..., :32],
        whole[:, :, 1, 8:40],
        whole[:, 0, :, 3:35],
        whole[..., :32].transpose(1, 2),
        whole[:, -1:, -1, :32],
        whole[..., :32].contiguous().transpose(1, 2),
        whole[:1, :1, :1, :32],
        whole[0, 0, :, :32].T.contiguous().T,
        whole[0, 0, 0, :32].expand(5, 32),
        whole[..., ::2][..., :24],
    ):
        own = weight[: x.shape[-1]]
        assert_near(rms_norm(x, own, 1e-5, impl=impl), fused.rms_norm_ref(x, own, 1e-5, 0.0, True), impl, ulps=2)
    dense = whole[..., :32].contiguous().transpose(1, 2)
    assert rms_norm(dense, weight, 1e-5, impl=impl).stride() == dense.stride()
    twice = torch.stack((weight, weight), 1)[:, 0]
    assert_near(rms_norm(dense, twice, 1e-5, impl=impl), fused.rms_norm_ref(dense, weight, 1e-5, 0.0, True), impl, 2)


def test_a_row_of_zeros_and_values_that_are_not_finite(impl, device):
    x, weight = torch.randn(4, 40, device=device), torch.randn(40, device=device)
    x[0], x[1, 3], x[2, 5] = 0, float("nan"), float("inf")
    found = rms_norm(x, weight, 1e-6, impl=impl)
    assert (found[0] == 0).all()
    assert found[1].isnan().all()
    assert found[2, 5].isnan()
    assert not found[3].isnan().any()


@pytest.mark.parametrize("shape", [(0, 8), (3, 0), (2, 0, 4)])
def test_nothing_gives_nothing(shape, impl, device):
    x = torch.ones(shape, device=device)
    assert rms_norm(x, torch.ones(shape[-1], device=device), 1e-6, impl=impl).shape == shape
    assert gated(x, x, "silu", impl=impl).shape == shape
    q, k = torch.ones(2, 4, 0, 8, device=device), torch.ones(2, 0, 3, 8, device=device)
    assert rotate(q, q, *angles(1, 0, 8, F32, device), impl=impl)[0].shape == q.shape
    assert rotate(k, k, *angles(1, 3, 8, F32, device), impl=impl)[1].shape == k.shape


def test_rows_that_one_program_does_not_hold_are_torchs(device):
    x, weight = torch.randn(2, 16_385, device=device), torch.randn(16_385, device=device)
    assert_bits(rms_norm(x, weight, 1e-6), fused.rms_norm_ref(x, weight, 1e-6, 0.0, True))
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="rms_norm: impl='triton' cannot run: rows of 16385 values, more than 16384"):
        rms_norm(x, weight, 1e-6, impl="triton")
    x, weight = x[:, 1:], weight[1:]
    assert_near(rms_norm(x, weight, 1e-6, impl="triton"), fused.rms_norm_ref(x, weight, 1e-6, 0.0, True), "triton")


@pytest.mark.parametrize("activation", fused.ACTIVATIONS)
@pytest.mark.parametrize("shape", [(3, 64), (2, 3, 100), (5, 77), (1, 1), (), (3, 5000)])
def test_a_gated_activation_is_that_of_the_reference(shape, activation, dtype, impl, device):
    gate, up = (torch.randn(shape) * 3).to(dtype).to(device), torch.randn(shape).to(dtype).to(device)
    found = gated(gate, up, activation, impl=impl)
    # Below zero 1 + tanh cancels, in torch as in the kernel: a few ulps of float32 at the size of the gate.
    size = 4 * torch.finfo(F32).eps * (gate.double() * up.double()).abs()
    assert_near(found, fused.gated_ref(gate, up, activation), impl, ulps=2, some=0.1, least=size)


def test_every_number_of_16_bits_is_activated(impl, device):
    gate = torch.arange(-(1 << 15), 1 << 15, dtype=torch.int16).view(F16).to(device)
    up = torch.ones_like(gate)
    for activation in fused.ACTIVATIONS:
        found, expected = gated(gate, up, activation, impl=impl), fused.gated_ref(gate, up, activation)
        torch.testing.assert_close(found, expected, rtol=2e-3, atol=1e-6, equal_nan=True)


def test_parts_of_one_product_are_gated(dtype, impl, device):
    whole = (torch.randn(2, 3, 70) * 2).to(dtype).to(device)
    for gate, up in (
        whole.chunk(2, dim=-1),
        (whole[..., 1:34], whole[..., 36:69]),
        whole[:, 1].chunk(2, dim=-1),
        (whole[..., :35], whole[..., 35:].contiguous()),
        (whole.transpose(0, 1), whole.transpose(0, 1).flip(0)),
        (whole[..., ::2], whole[..., 1::2]),
        (whole[0, 0].expand(4, 70), whole[1, 0].expand(4, 70)),
    ):
        found = gated(gate, up, "silu", impl=impl)
        assert_near(found, functional.silu(gate) * up, impl, ulps=2)


@pytest.mark.parametrize("size", [64, 80, 96, 128, 256, 2, 6])
@pytest.mark.parametrize("n", [1, 2])
def test_a_rotary_embedding_is_that_of_the_reference(size, n, dtype, impl, device):
    q, k = heads_of(2, 5, 7, size, dtype, device), heads_of(2, 1, 7, size, dtype, device)
    cos, sin = angles(n, 7, size, dtype, device)
    for found, x in zip(rotate(q, k, cos, sin, impl=impl), (q, k), strict=True):
        expected = fused.rotate_ref(x, cos, sin)
        assert (found.stride(0), found.stride(2)) == (expected.stride(0), expected.stride(2))
        assert_bits(found, expected)


@pytest.mark.parametrize("given", [F16, BF16, F32])
def test_cosines_in_float32_leave_one_rounding(given, impl, device):
    q, k = heads_of(2, 4, 7, 16, given, device), heads_of(2, 2, 7, 16, given, device)
    cos, sin = angles(1, 7, 16, F32, device)
    for found, x in zip(rotate(q, k, cos, sin, impl=impl), (q, k), strict=True):
        assert_bits(found, fused.rotate_ref(x, cos, sin))


def test_zeros_keep_their_signs(impl, device):
    zeros = torch.tensor([0.0, -0.0, 1.0, -1.0], device=device)
    q = torch.cartesian_prod(zeros, zeros)[None, None]
    for cos, sin in torch.cartesian_prod(zeros, zeros):
        cos, sin = cos.expand(1, 16, 2), sin.expand(1, 16, 2)
        assert_bits(rotate(q, q, cos, sin, impl=impl)[0], fused.rotate_ref(q, cos, sin))
    for activation in fused.ACTIVATIONS:
        found = gated(zeros[:2], torch.ones(2, device=device), activation, impl=impl)
        assert_bits(found, fused.gated_ref(zeros[:2], torch.ones(2, device=device), activation))


def test_heads_that_lie_anywhere_are_rotated(impl, device):
    whole = torch.randn(2, 7, 9, 24, device=device)
    wide = torch.randn(2, 7, 48, device=device)
    cos, sin = wide[..., :16], wide[..., 16:32]
    for q, k in (
        (whole[:, :, :4, :16].transpose(1, 2), whole[:, :, 4:6, :16].transpose(1, 2)),
        (whole[:, :, :4, 8:].transpose(1, 2).contiguous(), whole[:, :, 4:6, 3:19].transpose(1, 2)),
        (whole[..., 0, :16][:, None].expand(2, 5, 7, 16), whole[:, :, 4:6, :16].transpose(1, 2)),
        (whole[:, :, :4, :16].transpose(1, 2), whole[:, :, :2, :16].permute(0, 2, 3, 1).contiguous().mT),
    ):
        for found, x in zip(rotate(q, k, cos, sin, impl=impl), (q, k), strict=True):
            assert_bits(found, fused.rotate_ref(x, cos, sin))
    q, k = whole[:, :, :4, :16].transpose(1, 2), whole[:, :, 4:6, :16].transpose(1, 2)
    spread = wide.repeat_interleave(2, -1)
    for found, x in zip(rotate(q, k, spread[..., :32:2], spread[..., 32:64:2], impl=impl), (q, k), strict=True):
        assert_bits(found, fused.rotate_ref(x, cos, sin))
    one = cos[:1].expand(2, 7, 16)
    assert_bits(rotate(q, k, one, one, impl=impl)[0], fused.rotate_ref(q, one, one))


ONES = {"x": torch.ones(4, 6), "weight": torch.ones(6), "eps": 1e-6}
PAIR = {"gate": torch.ones(4, 6), "up": torch.ones(4, 6), "activation": "silu"}
TURN = {"q": torch.ones(2, 3, 4, 6), "k": torch.ones(2, 1, 4, 6)} | dict.fromkeys(("cos", "sin"), torch.ones(1, 4, 6))


@pytest.mark.parametrize(
    ("call", "change", "error", "message"),
    [
        (rms_norm, {"x": 1}, TypeError, "rms_norm: x is of type int, not a tensor"),
        (rms_norm, {"x": torch.ones(4, 6, dtype=torch.long)}, TypeError, "rms_norm: x has dtype int64"),
        (rms_norm, {"x": torch.tensor(1.0)}, ValueError, r"rms_norm: weight has shape \(6,\), x has \(\)"),
        (rms_norm, {"weight": torch.ones(5)}, ValueError, r"rms_norm: weight has shape \(5,\), x has \(4, 6\)"),
        (rms_norm, {"weight": torch.ones(1, 6)}, ValueError, "rms_norm: weight has shape .1, 6., not 1 dimensions"),
        (rms_norm, {"weight": torch.ones(6).half()}, TypeError, "rms_norm: weight has dtype float16, x has float32"),
        (rms_norm, {"eps": None}, TypeError, "rms_norm: eps is of type NoneType, not a number"),
        (rms_norm, {"eps": float("nan")}, ValueError, "rms_norm: eps is nan, not a finite number"),
        (rms_norm, {"offset": "1", "rounded_first": False}, TypeError, "rms_norm: offset is of type str, not a number"),
        (rms_norm, {"offset": 1.0}, ValueError, "rms_norm: offset is 1.0 and rounded_first is set"),
        (rms_norm, {"impl": "cuda"}, ValueError, "rms_norm: impl is 'cuda'"),
        (rms_norm, {"weight": torch.ones(6, device="meta")}, ValueError, "rms_norm: the tensors are on different dev"),
        (gated, {"up": None}, TypeError, "gated: up is of type NoneType, not a tensor"),
        (gated, {"up": torch.ones(6)}, ValueError, r"gated: up has shape \(6,\), gate has \(4, 6\)"),
        (gated, {"up": torch.ones(4, 6).half()}, TypeError, "gated: up has dtype float16, gate has float32"),
        (gated, {"activation": "relu"}, ValueError, "gated: activation is 'relu'; use 'silu', 'gelu_tanh', 'gelu'"),
        (gated, {"activation": []}, TypeError, "gated: activation is of type list, not a string"),
        (rotate, {"q": torch.ones(3, 4, 6)}, ValueError, r"rotate: q has shape \(3, 4, 6\), not 4 dimensions"),
        (rotate, {"q": torch.ones(2, 3, 4, 5)}, ValueError, "rotate: q has shape .2, 3, 4, 5.; its last dimension"),
        (rotate, {"k": torch.ones(2, 1, 5, 6)}, ValueError, "rotate: k has shape .2, 1, 5, 6., q has .2, 3, 4, 6."),
        (rotate, {"k": torch.ones(2, 1, 4, 6).half()}, TypeError, "rotate: k has dtype float16, q has float32"),
        (rotate, {"cos": torch.ones(3, 4, 6)}, ValueError, "rotate: cos has shape .3, 4, 6., q has"),
        (rotate, {"cos": torch.ones(1, 4, 3)}, ValueError, "rotate: cos has shape .1, 4, 3., q has"),
        (rotate, {"cos": torch.ones(1, 4, 6).half()}, TypeError, "rotate: cos has dtype float16, q has float32"),
        (rotate, {"sin": torch.ones(2, 4, 6)}, ValueError, "rotate: sin has shape .2, 4, 6., cos has"),
        (rotate, {"sin": torch.ones(1, 4, 6).double()}, TypeError, "rotate: sin has dtype float64, cos has float32"),
    ],
)
def test_errors_say_what_is_wrong(call, change, error, message):
    given = {rms_norm: ONES, gated: PAIR, rotate: TURN}[call]
    with pytest.raises(error, match=message):
        call(**{**given, **change})


def test_a_batch_that_one_launch_does_not_take_is_torchs(device):
    q = torch.randn(fused.MAX_BATCH + 1, 1, 1, 2, device=device)
    cos, sin = angles(1, 1, 2, F32, device)
    assert_bits(rotate(q, q, cos, sin)[1], fused.rotate_ref(q, cos, sin))
    pytest.importorskip("triton")
    with pytest.raises(ValueError, match="rotate: impl='triton' cannot run: a batch of 65536, more than 65535"):
        rotate(q, q, cos, sin, impl="triton")
