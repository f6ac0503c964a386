"""Every operation of `olmfast.kernels` against torch's best plain expression, on the machine at hand.

    pytest bench/test_kernels.py --benchmark-only

Shapes are those of Llama-2-7B, Llama-3-8B, Qwen2.5-7B and Qwen2.5-0.5B. A GPU runs all of them; a CPU those of
Qwen2.5-0.5B (OLMFAST_BENCH_ALL=1: all of them). Both sides run in turn, in one process; every result is checked after
it is timed. The limit of a case is measured in the same session: a bare GEMM of the same size and precision, or a copy
of as many bytes. `memory`: peak of ours over torch's, results included.
"""

from __future__ import annotations

import ctypes
import gc
import os
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from figures import GPU, TINY, Figure, Figures, sized
from torch import Tensor

from olmfast import kernels

DEVICE = torch.device("cuda" if GPU else "cpu")
N_ROUNDS = sized(1, 20 if GPU else 5, 20 if GPU else 5)
# A GPU's time is its median; on a CPU other work only adds, so the least is the nearest to the truth.
summary = statistics.median if GPU else min
# One thread's processor time does not see the machine's other work at all (OMP_NUM_THREADS=1).
SINGLE = not GPU and torch.get_num_threads() == 1
clock = time.process_time if SINGLE else time.perf_counter
LAMBDA = 20 if GPU else 4
TOKENS = sized(16, 4096 if GPU else 256, 4096 if GPU else 256)

# (rows, cols) of gate_proj, and (vocabulary, width) of the head.
EVERY_MODEL = {
    "Qwen2.5-0.5B": ((4864, 896), (151_936, 896)),
    "Qwen2.5-7B": ((18_944, 3584), (152_064, 3584)),
    "Llama-2-7B": ((11_008, 4096), (32_000, 4096)),
    "Llama-3-8B": ((14_336, 4096), (128_256, 4096)),
}
SMALL_MODEL = {"Qwen2.5-0.5B": EVERY_MODEL["Qwen2.5-0.5B"]}
MODELS = sized({"tiny": ((64, 48), (96, 48))}, EVERY_MODEL if GPU else SMALL_MODEL, EVERY_MODEL)
each_model = pytest.mark.parametrize("model", MODELS)
RATIOS: dict[str, float] = {}  # case -> torch's time over ours


def random(*shape: int, dtype: torch.dtype = torch.bfloat16, size: float = 1.0) -> Tensor:
    generator = torch.Generator(DEVICE).manual_seed(sum(shape))
    return (torch.randn(shape, generator=generator, device=DEVICE) * size).to(dtype)


def timed(call: Callable[[], object]) -> float:
    if GPU:
        torch.cuda.synchronize()
    start = clock()
    call()
    if GPU:
        torch.cuda.synchronize()
    return clock() - start


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(call: Callable[[], object]) -> int:
    """Memory a call adds at its peak; on a CPU resident memory, read every millisecond."""
    gc.collect()
    if GPU:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    if not Path("/proc/self/statm").exists():
        return 0
    # Free memory the allocator keeps would hide what the call takes.
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
    before = peak = resident_bytes()
    done = threading.Event()

    def watch() -> None:
        nonlocal peak
        while not done.wait(0.001):
            peak = max(peak, resident_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    call()
    peak = max(peak, resident_bytes())
    done.set()
    thread.join()
    return peak - before


Compare = Callable[..., None]


@pytest.fixture
def compare(benchmark: Any, report: Callable[..., None]) -> Compare:
    """Times the three in turn, verifies what came out, and reports it."""

    def compared(
        case: str,
        ours: Callable[[], object],
        rival: Callable[[], object],
        limit: Callable[[], object],
        *,
        n_flop: float = 0.0,
        n_bytes: float = 0.0,
        verify: Callable[[Any, Any], None],
    ) -> None:
        calls = (ours, rival, limit)
        for call in calls:
            call()
        times = [[timed(call) for call in calls] for _ in range(N_ROUNDS)]
        result = benchmark.pedantic(ours, rounds=1, iterations=1)
        ours_s, rival_s, limit_s = (summary(column) for column in zip(*times, strict=True))
        verify(result, rival())
        del result
        ours_bytes, rival_bytes = peak_bytes(ours), peak_bytes(rival)
        # Below a few pages the figure says nothing.
        memory = f"{max(ours_bytes, 1 << 20) / rival_bytes:.2f}" if rival_bytes > 8 << 20 else "-"
        rate = f"{n_flop / ours_s / 1e9:.0f} GFLOP/s" if n_flop else f"{n_bytes / ours_s / 1e9:.1f} GB/s"
        RATIOS[case] = rival_s / ours_s
        report(
            case, f"{ours_s * 1e3:.1f} ms", f"torch {rival_s * 1e3:.1f} ms", RATIOS[case],
            f"{limit_s / ours_s:.0%} of a {'GEMM' if n_flop else 'copy'}", rate=rate, memory=memory,
        )  # fmt: skip

    return compared


def copy_of(n_bytes: float) -> Callable[[], object]:
    """A plain copy that reads and writes `n_bytes` together."""
    source = torch.ones(int(n_bytes) // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def close(relative: float) -> Callable[[object, object], None]:
    def verify(ours: object, rival: object) -> None:
        assert isinstance(ours, Tensor)
        assert isinstance(rival, Tensor)
        for mine, other in zip(ours, rival, strict=True):
            error = (mine.float() - other.float()).norm() / other.float().norm()
            assert error < relative, f"relative difference {error:.3g}"

    return verify


@pytest.fixture(scope="module", autouse=True)
def all_of_them(figures: Figures) -> Iterator[None]:
    """One row for all cases."""
    yield
    if RATIOS:
        worst = min(RATIOS, key=lambda case: RATIOS[case])
        mean = statistics.geometric_mean(RATIOS.values())
        figures.add(
            Figure(f"kernels, geometric mean of {len(RATIOS)} cases", "-", "torch", mean),
            worst=f"{RATIOS[worst]:.2f}x in {worst}",
            times=f"{'median' if GPU else 'best'} of {N_ROUNDS} rounds{', processor time' if SINGLE else ''}",
        )


@each_model
def test_svd_noise(compare: Compare, model: str) -> None:
    rows, cols = MODELS[model][0]
    k = min(rows, cols)
    weight, coefficients = random(rows, cols), random(LAMBDA, k, dtype=torch.float32)
    u = random(rows, k, dtype=torch.float32, size=k**-0.5)
    vh = random(k, cols, dtype=torch.float32, size=k**-0.5)

    def rival() -> Tensor:
        out = torch.empty(LAMBDA, rows, cols, dtype=weight.dtype, device=DEVICE)
        for j in range(LAMBDA):
            noise = torch.mm(u * coefficients[j], vh).clamp_(-3, 3).exp_()
            out[j].copy_(noise.mul_(weight))
        return out

    scaled = [u * row for row in coefficients[:2]]
    torch.backends.cuda.matmul.allow_tf32 = True
    compare(
        f"svd_noise {model} {rows}x{cols} x{LAMBDA}",
        lambda: kernels.svd_noise(weight, u, vh, coefficients),
        rival,
        lambda: [torch.mm(scaled[j % 2], vh) for j in range(LAMBDA)],
        n_flop=2.0 * LAMBDA * rows * cols * k,
        verify=close(5e-3),
    )
    torch.backends.cuda.matmul.allow_tf32 = False


@each_model
def test_row_scale(compare: Compare, model: str) -> None:
    rows, cols = MODELS[model][0]
    weight, log_scale = random(rows, cols), random(LAMBDA, rows, dtype=torch.float32, size=0.01)
    n_bytes = (LAMBDA + 1) * weight.numel() * 2

    def rival() -> Tensor:
        return (weight.float() * log_scale.exp()[:, :, None]).to(weight.dtype)

    compare(
        f"row_scale {model} {rows}x{cols} x{LAMBDA}",
        lambda: kernels.row_scale(weight, log_scale),
        rival,
        copy_of(n_bytes),
        n_bytes=n_bytes,
        verify=close(1e-3),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_model
def test_token_scores(compare: Compare, model: str, dtype: torch.dtype) -> None:
    vocabulary, width = MODELS[model][1]
    hidden, head = random(TOKENS, width, dtype=dtype), random(vocabulary, width, dtype=dtype, size=width**-0.5)
    labels = torch.arange(TOKENS, device=DEVICE) * 7 % vocabulary

    def rival() -> tuple[Tensor, ...]:
        # The product of bfloat16 inputs in float32, as ours; its logits in bfloat16 would be another result.
        logits = hidden.float() @ head.float().T
        best, argmax = logits.max(dim=1)
        return best, argmax, logits.logsumexp(dim=1), logits.gather(1, labels[:, None])[:, 0]

    def verify(ours: object, other: object) -> None:
        for mine, theirs in zip(ours, other, strict=True):  # type: ignore[call-overload]
            if not mine.is_floating_point():
                assert (mine == theirs).float().mean() > 0.99
                continue
            torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)

    if GPU:
        limit = lambda: hidden @ head.T  # noqa: E731
    else:
        wide_hidden, wide_head = hidden.float(), head.float()
        limit = lambda: wide_hidden @ wide_head.T  # noqa: E731
    compare(
        f"token_scores {model} {TOKENS}x{vocabulary} {'fp32' if dtype == torch.float32 else 'bf16'}",
        lambda: kernels.token_scores(hidden, head, labels),
        rival,
        limit,
        n_flop=2.0 * TOKENS * vocabulary * width,
        verify=verify,
    )


@each_model
def test_rms_norm(compare: Compare, model: str) -> None:
    width = MODELS[model][0][1]
    x, weight = random(TOKENS, width), random(width)

    def rival() -> Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

    compare(
        f"rms_norm {model} {TOKENS}x{width}", lambda: kernels.rms_norm(x, weight, 1e-6), rival,
        copy_of(2 * x.nbytes), n_bytes=2 * x.nbytes, verify=close(1e-3),
    )  # fmt: skip


@each_model
def test_gated(compare: Compare, model: str) -> None:
    width = MODELS[model][0][0]
    gate, up = random(TOKENS, width), random(TOKENS, width).roll(1)
    compare(
        f"gated {model} {TOKENS}x{width}",
        lambda: kernels.gated(gate, up, "silu"),
        lambda: torch.nn.functional.silu(gate) * up,
        copy_of(3 * gate.nbytes),
        n_bytes=3 * gate.nbytes,
        verify=close(1e-3),
    )


@each_model
def test_rotate(compare: Compare, model: str) -> None:
    width, size = MODELS[model][0][1], 16 if TINY else 64
    heads = random(1, TOKENS, width // size, size).transpose(1, 2)
    phase = random(1, TOKENS, size // 2, dtype=torch.float32).repeat(1, 1, 2)
    cos, sin = phase.cos().bfloat16(), phase.sin().bfloat16()

    def turned() -> Tensor:
        return torch.cat((-heads[..., size // 2 :], heads[..., : size // 2]), dim=-1)

    n_bytes = 4 * heads.nbytes + cos.nbytes + sin.nbytes
    compare(
        f"rotate {model} {TOKENS}x{width // size}x{size}",
        lambda: kernels.rotate(heads, heads, cos, sin),
        lambda: [heads * cos[:, None] + turned() * sin[:, None] for _ in range(2)],
        copy_of(n_bytes),
        n_bytes=n_bytes,
        verify=lambda ours, rival: close(1e-3)(torch.stack(ours), torch.stack(rival)),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_model
def test_weighted_sum(compare: Compare, model: str, dtype: torch.dtype) -> None:
    rows, cols = MODELS[model][0]
    tensors = [random(rows, cols, dtype=dtype) for _ in range(3)]
    weights = [0.5, 0.3, 0.2]

    def rival() -> Tensor:
        total = tensors[0].float() * weights[0]
        for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
            total.add_(tensor, alpha=weight)
        return total.to(dtype)

    n_bytes = 4 * tensors[0].nbytes
    compare(
        f"weighted_sum {model} {rows}x{cols} of 3 {'fp32' if dtype == torch.float32 else 'bf16'}",
        lambda: kernels.weighted_sum(tensors, weights),
        rival,
        copy_of(n_bytes),
        n_bytes=n_bytes,
        verify=close(1e-3),
    )


@each_model
def test_slerp(compare: Compare, model: str) -> None:
    a, b = random(*MODELS[model][0]), random(*MODELS[model][0]).roll(1)

    def rival() -> Tensor:
        x, y = a.float().view(-1), b.float().view(-1)
        theta = torch.arccos(torch.dot(x, y) / (x.norm() * y.norm()))
        x.mul_(torch.sin(0.7 * theta) / torch.sin(theta))
        return x.add_(y.mul_(torch.sin(0.3 * theta) / torch.sin(theta))).view(a.shape).to(a.dtype)

    n_bytes = 5 * a.nbytes
    compare(
        f"slerp {model} {a.shape[0]}x{a.shape[1]}", lambda: kernels.slerp(a, b, 0.3), rival,
        copy_of(n_bytes), n_bytes=n_bytes, verify=close(1e-3),
    )  # fmt: skip


@each_model
def test_ties_merge(compare: Compare, model: str) -> None:
    # Float32: in bfloat16 many magnitudes are equal at the threshold, where the rival keeps more than k.
    base = random(*MODELS[model][0], dtype=torch.float32)
    tensors = [base + random(*base.shape, dtype=torch.float32, size=0.1).roll(i) for i in range(3)]
    weights, k = [0.5, 0.3, 0.4], int(0.3 * base.numel())

    def rival() -> Tensor:
        total, parts = torch.zeros(base.shape, device=DEVICE), []
        for tensor, weight in zip(tensors, weights, strict=True):
            delta = tensor.float() - base.float()
            # The quickest exact threshold torch has; equal magnitudes are all kept.
            bound = delta.abs().view(-1).kthvalue(delta.numel() - k + 1).values
            part = delta.mul_(delta.abs() >= bound).mul_(weight)
            total.add_(part)
            parts.append(part)
        sign = torch.where(total >= 0, 1.0, -1.0)
        merged, divisor = torch.zeros_like(total), torch.zeros_like(total)
        for part, weight in zip(parts, weights, strict=True):
            agree = part * sign > 0
            merged.add_(part * agree)
            divisor.add_(agree, alpha=weight)
        return (base + merged.div_(divisor.masked_fill_(divisor.abs() < 1e-8, 1.0))).to(base.dtype)

    n_bytes = 3 * 4 * base.nbytes
    compare(
        f"ties_merge {model} {base.shape[0]}x{base.shape[1]} of 3",
        lambda: kernels.ties_merge(tensors, weights, 0.3, base=base), rival,
        copy_of(n_bytes), n_bytes=n_bytes, verify=close(2e-2),
    )  # fmt: skip


@each_model
def test_dare_mask(compare: Compare, model: str) -> None:
    shape = MODELS[model][0]

    def verify(ours: Tensor, rival: Tensor) -> None:
        difference = abs(float(ours.float().mean()) - float(rival.float().mean()))
        assert difference < (0.1 if TINY else 1e-3)  # of 3,072 values, or of millions

    n_bytes = shape[0] * shape[1]
    compare(
        f"dare_mask {model} {shape[0]}x{shape[1]}",
        lambda: kernels.dare_mask(shape, 0.3, 1, device=DEVICE), lambda: torch.rand(shape, device=DEVICE) < 0.3,
        copy_of(n_bytes), n_bytes=n_bytes, verify=verify,
    )  # fmt: skip


@each_model
def test_stacked_linear(compare: Compare, model: str) -> None:
    rows, cols = MODELS[model][0]
    x, weights = random(TOKENS, cols, dtype=torch.float32), random(4, rows, cols, dtype=torch.float32)
    flat = weights.view(-1, cols)
    compare(
        f"stacked_linear {model} {TOKENS}x{rows}x{cols} x4",
        lambda: kernels.stacked_linear(x, weights),
        lambda: torch.matmul(x, weights.mT),
        lambda: x @ flat.T,
        n_flop=2.0 * 4 * TOKENS * rows * cols,
        verify=close(1e-4),
    )


@pytest.mark.parametrize("size", sized([48], [1024 if GPU else 896], [4096, 1024] if GPU else [896]))
def test_svd_factors(compare: Compare, size: int) -> None:
    weight = random(size, size, dtype=torch.float32)

    def rival() -> Tensor:
        u, s, vh = torch.linalg.svd(weight, full_matrices=False)
        product: Tensor = (u * s) @ vh
        return product

    def ours() -> Tensor:
        u, s, vh = kernels.svd_factors(weight)
        return (u * (s * weight.abs().amax())) @ vh

    compare(
        f"svd_factors {size}x{size}", ours, rival, lambda: weight @ weight,
        n_flop=2.0 * size**3, verify=close(1e-4),
    )  # fmt: skip
