"""What kernels compute in a module's place is what the module computes, and nothing else is taken for it."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers.models.llama import modeling_llama

from olmfast.evaluation.fusing import fuse, own_forwards, unfused
from olmfast.evaluation.model import WorkingModel
from olmfast.testing import FAMILIES, tiny_model
from olmfast.weights.expressions import whole
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Sources

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# What is taken of each family; the others have other norms, MLPs or rotations, or none.
KINDS = ("RMSNorm", "MLP", "Attention")
TAKEN = {
    **dict.fromkeys(["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "granite"], KINDS),
    **dict.fromkeys(["mixtral", "olmoe", "qwen3_moe"], ("RMSNorm", "Attention")),
    **dict.fromkeys(["phi", "gpt_neox"], ("Attention",)),
    "cohere": ("MLP",),
}
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def module_of(folder, family, dtype, device=DEVICE, **config):
    tiny_model(folder / "d0", family, num_hidden_layers=2, n_layer=2, **config)
    pool = Pool.open(["d0"], folder, folder)
    return WorkingModel(whole("d0", pool.tensors), Sources(pool, folder), device, dtype).module


def fused_parts(module):
    return [part for part in module.modules() if hasattr(type(part), "plain")]


def assert_near(ours, expected):
    """The same but for rounding."""
    assert (ours - expected).float().norm() <= TOLERANCES[expected.dtype] * expected.float().norm()


def logits(module, width=13):
    ids = (torch.arange(3 * width) * 7 % 100 + 5).view(3, width).to(DEVICE)
    return module(ids).logits


@pytest.mark.skipif(DEVICE.type != "cpu", reason="there the modules are fused already")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("family", list(FAMILIES))
@torch.inference_mode()
def test_in_every_family_the_formulas_give_the_same_bits(family, dtype, tmp_path):
    module = module_of(tmp_path, family, dtype)
    expected = logits(module)
    assert not fused_parts(module)  # on a CPU nothing is gained
    fuse(module, "torch")
    kinds = {name for part in fused_parts(module) for name in KINDS if name in type(part).__name__}
    assert kinds == set(TAKEN.get(family, ()))
    assert torch.equal(logits(module), expected)


@pytest.mark.parametrize("dtype", list(TOLERANCES), ids=str)
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3", "phi3"])
@torch.inference_mode()
def test_the_kernels_give_the_same_but_for_rounding(family, dtype, tmp_path):
    module = module_of(tmp_path, family, dtype)
    fuse(module, "auto" if DEVICE.type == "cuda" else "triton")
    assert fused_parts(module)
    with own_forwards(module):
        assert not fused_parts(module)
        expected = logits(module)
    assert_near(logits(module), expected)


def test_a_part_computes_with_the_weights_that_it_is_called_with(tmp_path):
    module = module_of(tmp_path, "llama", torch.float32)
    norm, x = module.model.norm, torch.randn(2, 5, 32, device=DEVICE)
    before = copy.copy(norm)
    fuse(module, "torch")
    weights = {"weight": torch.randn(32, device=DEVICE)}
    with torch.no_grad():
        expected = torch.func.functional_call(unfused(norm), weights, (x,))
        for part in (norm, copy.copy(norm)):
            assert_near(torch.func.functional_call(part, weights, (x,)), expected)
        assert_near(norm(x), before(x))
    assert type(unfused(norm)) is modeling_llama.LlamaRMSNorm
    assert unfused(norm).weight is norm.weight


def test_gradients_pass_through_the_own_forwards(tmp_path):
    module = module_of(tmp_path, "llama", torch.float32).requires_grad_(True)
    logits(module).square().mean().backward()
    expected = {name: parameter.grad.clone() for name, parameter in module.named_parameters()}
    module.zero_grad()
    fuse(module, "torch")
    logits(module).square().mean().backward()
    for name, parameter in module.named_parameters():
        assert_near(parameter.grad, expected[name])


def centred(self, x):
    return self.weight * (x - x.mean(-1, keepdim=True))


def swapped(self, x):
    return self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x)))


def scaled(self, x):
    return 2 * self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def with_more_entering(self, x):
    x = 3 * x
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


def of_tokens_alone(self, x):
    """What a forward asks of its input that the one it is tried with does not have."""
    assert x.shape[1] == 13
    return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="there the modules are fused already")
@pytest.mark.parametrize(
    ("kind", "forward"),
    [
        ("LlamaRMSNorm", centred),
        ("LlamaMLP", swapped),
        ("LlamaMLP", scaled),
        ("LlamaMLP", with_more_entering),
        ("LlamaMLP", of_tokens_alone),
    ],
    ids=["norm", "swapped", "scaled", "entering", "refusing"],
)
@torch.inference_mode()
def test_what_computes_otherwise_is_left_alone(kind, forward, tmp_path, monkeypatch):
    monkeypatch.setattr(getattr(modeling_llama, kind), "forward", forward)
    module = module_of(tmp_path, "llama", torch.float32)
    expected = logits(module)
    fuse(module, "torch")
    assert fused_parts(module)
    assert kind not in {type(part).__name__ for part in fused_parts(module)}
    assert torch.equal(logits(module), expected)


class Gated(modeling_llama.LlamaRMSNorm):
    """A norm that may be given a gate, as Mamba's are."""

    def forward(self, hidden_states, gate=None):
        return super().forward(hidden_states if gate is None else hidden_states * gate)


@torch.inference_mode()
def test_a_part_that_is_called_in_another_way_than_it_was_tried_computes_by_its_own_forward():
    norm, x, gate = Gated(32).to(DEVICE), torch.randn(2, 5, 32, device=DEVICE), torch.randn(32, device=DEVICE)
    plain = copy.deepcopy(norm)
    fuse(torch.nn.ModuleList([norm]), "torch")
    assert type(norm) is not Gated
    assert torch.equal(norm(x), plain(x))
    assert torch.equal(norm(x, gate), plain(x, gate))
    assert torch.equal(norm(hidden_states=x, gate=gate), plain(x, gate))
    assert torch.equal(norm(x.bfloat16()), plain(x.bfloat16()))


@pytest.mark.skipif(DEVICE.type != "cpu", reason="there the modules are fused already")
@torch.inference_mode()
def test_a_rotation_of_another_kind_is_left_alone(tmp_path, monkeypatch):
    def exchanged(q, k, cos, sin):
        return tuple(x * sin[:, None] + modeling_llama.rotate_half(x) * cos[:, None] for x in (q, k))

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", exchanged)
    module = module_of(tmp_path, "llama", torch.float32)
    expected = logits(module)
    fuse(module, "torch")
    assert {type(part).__name__ for part in fused_parts(module)} == {"LlamaRMSNorm", "LlamaMLP"}
    assert torch.equal(logits(module), expected)


@torch.inference_mode()
def test_norms_of_ones_still_tell_their_formulas_apart(tmp_path):
    """Of a fresh model all norms' weights are ones, with which several formulas agree."""
    module = module_of(tmp_path, "llama", torch.bfloat16)
    for part in module.modules():
        if type(part).__name__ == "LlamaRMSNorm":
            part.weight.fill_(1)
    fuse(module, "torch")
    for part in module.modules():
        if type(part).__name__ == "LlamaRMSNorm":
            part.weight.copy_(torch.linspace(-2, 3, 32))
    fused = logits(module)
    with own_forwards(module):
        expected = logits(module)
    assert_near(fused, expected)
    assert DEVICE.type == "cuda" or torch.equal(fused, expected)
