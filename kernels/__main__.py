"""`python -m olmfast.kernels`: every kernel on this machine, against float64; exit code 1 if one is off."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from time import perf_counter
from typing import NamedTuple

import torch
from torch import Tensor

from olmfast.kernels._dispatch import interpreted
from olmfast.kernels.dare import dare_mask
from olmfast.kernels.evolution import offspring_count, svd_coefficients
from olmfast.kernels.factors import svd_factors
from olmfast.kernels.fused import gated, rms_norm, rotate
from olmfast.kernels.noise import svd_noise
from olmfast.kernels.scaling import row_scale
from olmfast.kernels.scores import token_scores
from olmfast.kernels.spherical import slerp
from olmfast.kernels.stacked import stacked_linear
from olmfast.kernels.summing import weighted_sum
from olmfast.kernels.ties import ties_merge


class Case(NamedTuple):
    """One operation: how to run it by an implementation, the float64 truth, the relative error allowed."""

    name: str
    run: Callable[[str], Tensor]
    truth: Tensor
    allowed: float
    has_kernel: bool = True


def _cases(device: torch.device) -> Iterator[Case]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(device)

    weight, u, vh, c = random(300, 200), random(300, 40), random(40, 200) / 6, random(3, 40)
    exponent = ((u.double() * c.double()[:, None]) @ vh.double()).clamp(-3, 3)
    yield Case("svd_noise", lambda impl: svd_noise(weight, u, vh, c, impl=impl), weight.double() * exponent.exp(), 2e-3)
    scale = random(3, 300) / 10
    truth = weight.double() * scale.double().exp()[:, :, None]
    yield Case("row_scale", lambda impl: row_scale(weight, scale, impl=impl), truth, 1e-6)

    hidden, head = random(50, 64).bfloat16(), (random(1000, 64) / 4).bfloat16()
    labels = torch.randint(0, 1000, (50,), generator=generator).to(device)
    logits = hidden.double() @ head.double().T
    chosen = logits.gather(1, labels[:, None])[:, 0]
    fields = (logits.amax(1), logits.amax(1), logits.logsumexp(1), chosen)

    def scores(impl: str) -> Tensor:
        best, argmax, logsumexp, own = token_scores(hidden, head, labels, impl=impl)
        at_argmax = logits.gather(1, argmax[:, None])[:, 0]
        return torch.stack((best.double(), at_argmax, logsumexp.double(), own.double()))

    yield Case("token_scores", scores, torch.stack(fields), 1e-5)

    a, b = random(300, 200), random(300, 200)
    total = 0.3 * weight.double() + 0.5 * a.double() + 0.2 * b.double()
    yield Case("weighted_sum", lambda impl: weighted_sum([weight, a, b], [0.3, 0.5, 0.2], impl=impl), total, 1e-6)
    x, y = a.double().flatten(), b.double().flatten()
    theta = torch.arccos(x @ y / (x.norm() * y.norm()))
    arc = (torch.sin(0.7 * theta) * a.double() + torch.sin(0.3 * theta) * b.double()) / torch.sin(theta)
    yield Case("slerp", lambda impl: slerp(a, b, 0.3, impl=impl), arc, 1e-5)

    gain, x, y = random(200), a.double(), b.double()
    normed = x * (x.square().mean(1, keepdim=True) + 1e-6).rsqrt() * gain.double()
    yield Case("rms_norm", lambda impl: rms_norm(a, gain, 1e-6, impl=impl), normed, 1e-6)
    yield Case("gated", lambda impl: gated(a, b, "silu", impl=impl), x * x.sigmoid() * y, 1e-6)
    heads, phase = a.view(2, 30, 10, 100).transpose(1, 2), random(1, 30, 50).repeat(1, 1, 2)
    turned = torch.view_as_complex(torch.stack(heads.double().chunk(2, dim=-1), -1).contiguous())
    turned = torch.view_as_real(turned * torch.polar(torch.ones(()).to(phase).double(), phase[..., :50].double()))

    def rotated(impl: str) -> Tensor:
        return torch.cat(rotate(heads, heads[:, :2], phase.cos(), phase.sin(), impl=impl), dim=1)

    both = torch.cat((turned, turned[:, :2]), dim=1)
    yield Case("rotate", rotated, torch.cat((both[..., 0], both[..., 1]), dim=-1), 1e-6)

    delta = (a - weight).flatten()
    kept = delta.abs().sort(descending=True, stable=True).indices[: delta.numel() // 5]
    merged = weight.double().flatten().index_add(0, kept, delta[kept].double()).view_as(weight)
    yield Case("ties_merge", lambda impl: ties_merge([a], [1.0], 0.2, base=weight, impl=impl), merged, 1e-6)
    mask = dare_mask((300, 200), 0.3, 1, impl="torch").to(device).double()
    yield Case("dare_mask", lambda impl: dare_mask((300, 200), 0.3, 1, device=device, impl=impl).double(), mask, 0.0)

    heads = torch.stack((a, b))
    linear = random(20, 200)
    yield Case(
        "stacked_linear",
        lambda impl: stacked_linear(linear, heads, impl=impl),
        linear.double() @ heads.double().mT,
        1e-3 if torch.backends.cuda.matmul.allow_tf32 else 1e-5,
        has_kernel=False,
    )

    def rebuilt(_impl: str) -> Tensor:
        factors = svd_factors(weight)
        return (factors.u.double() * factors.s.double()) @ factors.vh.double()

    yield Case("svd_factors", rebuilt, weight.double() / weight.double().abs().max(), 5e-6, has_kernel=False)

    s, draws = random(40).abs(), random(3, 40)
    damped = (s.double().max() / (s.double() + 1e-10)).sqrt()
    truth = 0.1 * s.double().std() * draws.double() * damped / damped.mean()
    yield Case("svd_coefficients", lambda _: svd_coefficients(s, 0.1, draws), truth, 1e-12, has_kernel=False)
    dimensions = torch.tensor([1, 2, 40, 4096])
    counts = (4 + 3 * dimensions.double().log()).int().double()  # none of them is on the edge of a whole number
    counted = torch.tensor([offspring_count(n) for n in dimensions.tolist()]).double()
    yield Case("offspring_count", lambda _: counted, counts, 0.0, has_kernel=False)


def _check(case: Case, impl: str, backend: str) -> bool:
    start = perf_counter()
    try:
        result = case.run(impl)
        error = float((result.double() - case.truth).norm() / case.truth.norm())
    except Exception as reason:
        print(f"{case.name:<18}{backend:<22}FAILED    {type(reason).__name__}: {reason}")
        return False
    passed = error <= case.allowed
    elapsed_ms = (perf_counter() - start) * 1e3
    verdict = "ok" if passed else "WRONG"
    print(f"{case.name:<18}{backend:<22}{error:<10.1e}{case.allowed:<10.0e}{elapsed_ms:<11.0f}{verdict}")
    return passed


def _triton_version() -> str:
    try:
        return str(import_module("triton").__version__)
    except ImportError:
        return "not installed"


def main() -> int:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    print(f"torch {torch.__version__}, triton {_triton_version()}, device: {name}")
    with_triton = _triton_version() != "not installed" and (device.type == "cuda" or interpreted())
    if not with_triton:
        print("Triton kernels: not run (no GPU; TRITON_INTERPRET=1 runs them in Triton's interpreter)")
    print(f"{'operation':<18}{'backend':<22}{'error':<10}{'allowed':<10}{'first, ms':<11}")
    passed = True
    for case in _cases(device):
        passed &= _check(case, "torch", f"torch on {device.type}")
        if with_triton and case.has_kernel:
            passed &= _check(case, "triton", "triton" if device.type == "cuda" else "triton (interpreter)")
    print("all within bounds" if passed else "NOT all within bounds")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
