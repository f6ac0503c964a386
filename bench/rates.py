"""How near the kernels come to what the card can do: python bench/rates.py [name ...]

A line for each case, as soon as it is there: time on the device (median), its rate, the share of the limit (a bare GEMM
of the same size and precision, or a copy of as many bytes, measured beside it), and how many times faster it is than
torch's best plain expression. `call`: the same by the clock, for a caller who waits, where a call is short. Names are
those of the operations; none: all of them, the most important first. Imports `olmfast.kernels` and nothing else, so
that an older one can be measured by the same lines: PYTHONPATH=FOLDER.
"""

# ruff: noqa: B023 (what a loop defines is called in the same turn)

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from triton.testing import do_bench

from olmfast import kernels

DEVICE = torch.device("cuda")
SMALL, LARGE = (4864, 896), (11008, 4096)  # gate_proj of Qwen2.5-0.5B and of Llama-2-7B
OFFSPRING = 8
Call = Callable[[], object]


def random(*shape: int, dtype: torch.dtype = torch.float32, size: float = 1.0) -> Tensor:
    return (torch.randn(shape, device=DEVICE) * size).to(dtype)


def on_device(call: Call) -> float:
    """Milliseconds."""
    return float(do_bench(call, warmup=10, rep=50, return_mode="median"))


def by_the_clock(call: Call) -> float:
    """Milliseconds of a call and of waiting for it."""
    times = []
    for _ in range(23):
        torch.cuda.synchronize()
        began = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
    return statistics.median(times[3:]) * 1e3


def copy_of(n_bytes: float) -> Call:
    source = torch.ones(int(n_bytes) // 2, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    return lambda: target.copy_(source)


def show(case: str, ours: Call, limit: Call, rival: Call | None, n_flop: float = 0.0, n_bytes: float = 0.0) -> None:
    ours()
    own, least = on_device(ours), on_device(limit)
    rate = f"{n_flop / own / 1e9:7.1f} TFLOP/s" if n_flop else f"{n_bytes / own / 1e6:7.0f} GB/s   "
    parts = [f"{own:9.3f} ms", rate, f"{least / own:6.1%} of a {'GEMM' if n_flop else 'copy'}"]
    if rival is not None:
        rival()
        other = on_device(rival)
        parts.append(f"{other / own:6.2f}x torch")
        if own < 1.0:
            own, other = by_the_clock(ours), by_the_clock(rival)
            parts.append(
                f"call {own * 1e3:.0f} us, {other / own:.2f}x torch, a copy {by_the_clock(limit) * 1e3:.0f} us"
            )
    print(f"{case:<46}" + " | ".join(parts), flush=True)


def svd_noise() -> None:
    for rows, cols in (LARGE, (4096, 4096), SMALL):
        k = min(rows, cols)
        weight, c = random(rows, cols, dtype=torch.bfloat16), random(OFFSPRING, k)
        u, vh = random(rows, k, size=k**-0.5), random(k, cols, size=k**-0.5)
        out = torch.empty(OFFSPRING, rows, cols, dtype=weight.dtype, device=DEVICE)
        for precision in ("tf32", "bf16", "ieee"):
            if precision == "ieee" and rows != 4096:
                continue
            torch.backends.cuda.matmul.allow_tf32 = precision == "tf32"
            dtype = torch.bfloat16 if precision == "bf16" else torch.float32
            a, b = u.to(dtype), vh.to(dtype)

            def rival(a: Tensor = u, b: Tensor = b, dtype: torch.dtype = dtype) -> None:
                for j in range(OFFSPRING):
                    noise = torch.mm((a * c[j]).to(dtype), b).clamp_(-3, 3).exp_()
                    out[j].copy_(noise.mul_(weight))

            show(
                f"svd_noise {precision} {rows}x{cols} x{OFFSPRING}",
                lambda p=precision: kernels.svd_noise(weight, u, vh, c, precision=p, out=out),  # type: ignore[misc]
                lambda a=a, b=b: [torch.mm(a, b) for _ in range(OFFSPRING)],  # type: ignore[misc]
                rival,
                n_flop=2.0 * OFFSPRING * rows * cols * k,
            )
            torch.backends.cuda.matmul.allow_tf32 = False


def token_scores() -> None:
    for dtype in (torch.bfloat16, torch.float32):
        for n_tokens in (2048, 8192, 512, 64) if dtype == torch.bfloat16 else (2048,):
            for vocabulary, width in ((32_000, 4096), (152_064, 3584)):
                hidden = random(n_tokens, width, dtype=dtype)
                head = random(vocabulary, width, dtype=dtype, size=width**-0.5)
                labels = torch.randint(0, vocabulary, (n_tokens,), device=DEVICE)

                def rival(hidden: Tensor = hidden, head: Tensor = head, labels: Tensor = labels) -> object:
                    # In float32, as ours; as the product's own result, logits of bfloat16 would be another one.
                    logits = (hidden @ head.T).float()
                    return logits.max(dim=1), logits.logsumexp(dim=1), logits.gather(1, labels[:, None])

                show(
                    f"token_scores {str(dtype)[6:]} {n_tokens}x{vocabulary}x{width}",
                    lambda: kernels.token_scores(hidden, head, labels),
                    lambda: hidden @ head.T,
                    rival,
                    n_flop=2.0 * n_tokens * vocabulary * width,
                )


def weighted_sum() -> None:
    weights = [0.5, 0.3, 0.2]
    for shape in (LARGE, SMALL):
        for dtype in (torch.bfloat16, torch.float32):
            tensors = [random(*shape, dtype=dtype) for _ in range(3)]

            def rival(tensors: list[Tensor] = tensors, dtype: torch.dtype = dtype) -> Tensor:
                total = tensors[0].float() * weights[0]
                for tensor, weight in zip(tensors[1:], weights[1:], strict=True):
                    total.add_(tensor, alpha=weight)
                return total.to(dtype)

            n_bytes = 4 * tensors[0].nbytes
            show(
                f"weighted_sum {str(dtype)[6:]} {shape[0]}x{shape[1]} of 3",
                lambda: kernels.weighted_sum(tensors, weights),
                copy_of(n_bytes), rival, n_bytes=n_bytes,
            )  # fmt: skip


def slerp() -> None:
    for shape in (LARGE, SMALL):
        a, b = random(*shape, dtype=torch.bfloat16), random(*shape, dtype=torch.bfloat16)

        def rival(a: Tensor = a, b: Tensor = b) -> Tensor:
            x, y = a.float().view(-1), b.float().view(-1)
            theta = torch.arccos(torch.dot(x, y) / (x.norm() * y.norm()))
            x.mul_(torch.sin(0.7 * theta) / torch.sin(theta))
            return x.add_(y.mul_(torch.sin(0.3 * theta) / torch.sin(theta))).view(a.shape).to(a.dtype)

        show(
            f"slerp bfloat16 {shape[0]}x{shape[1]}", lambda: kernels.slerp(a, b, 0.3),
            copy_of(5 * a.nbytes), rival, n_bytes=5 * a.nbytes,
        )  # fmt: skip


def ties_merge() -> None:
    for shape in (LARGE, SMALL):
        base = random(*shape)
        tensors = [base + random(*shape, size=0.1) for _ in range(3)]
        for dtype in (torch.float32, torch.bfloat16):
            own, under = [tensor.to(dtype) for tensor in tensors], base.to(dtype)
            n_bytes = 3 * 4 * under.nbytes
            show(
                f"ties_merge {str(dtype)[6:]} {shape[0]}x{shape[1]} of 3",
                lambda: kernels.ties_merge(own, [0.5, 0.3, 0.4], 0.3, base=under),
                copy_of(n_bytes), None, n_bytes=n_bytes,
            )  # fmt: skip


def dare_mask() -> None:
    for shape in (LARGE, SMALL):
        n_bytes = shape[0] * shape[1]
        filled = torch.empty(shape, dtype=torch.bool, device=DEVICE)
        show(
            f"dare_mask {shape[0]}x{shape[1]}", lambda: kernels.dare_mask(shape, 0.3, 1, device=DEVICE),
            copy_of(n_bytes), lambda: torch.rand(shape, device=DEVICE) < 0.3, n_bytes=n_bytes,
        )  # fmt: skip
        print(f"    a fill of as many bytes: {on_device(lambda: filled.fill_(True)):.3f} ms", flush=True)


def row_scale() -> None:
    for shape in (LARGE, SMALL):
        weight, scale = random(*shape, dtype=torch.bfloat16), random(20, shape[0], size=0.01)
        n_bytes = 21 * weight.nbytes
        show(
            f"row_scale {shape[0]}x{shape[1]} x20", lambda: kernels.row_scale(weight, scale),
            copy_of(n_bytes), lambda: (weight.float() * scale.exp()[:, :, None]).to(weight.dtype),
            n_bytes=n_bytes,
        )  # fmt: skip


def rms_norm() -> None:
    for shape in ((4096, 4096), (4096, 896), (4096 * 14, 64)):
        x, weight = random(*shape, dtype=torch.bfloat16), random(shape[1], dtype=torch.bfloat16)

        def rival(x: Tensor = x, weight: Tensor = weight) -> Tensor:
            wide = x.float()
            return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)

        show(
            f"rms_norm bfloat16 {shape[0]}x{shape[1]}", lambda: kernels.rms_norm(x, weight, 1e-6),
            copy_of(2 * x.nbytes), rival, n_bytes=2 * x.nbytes,
        )  # fmt: skip


def gated() -> None:
    silu = torch.nn.functional.silu
    for rows, cols in ((4096, 11008), (4096, 4864)):
        both = random(rows, 2 * cols, dtype=torch.bfloat16)
        apart = [part.contiguous() for part in both.chunk(2, dim=-1)]
        for kind, (gate, up) in (("", apart), (" of one product", both.chunk(2, dim=-1))):
            n_bytes = both.nbytes * 3 // 2
            show(
                f"gated bfloat16 {rows}x{cols}{kind}", lambda: kernels.gated(gate, up, "silu"),
                copy_of(n_bytes), lambda: silu(gate) * up, n_bytes=n_bytes,
            )  # fmt: skip


def rotate() -> None:
    for q_heads, k_heads, size in ((32, 32, 128), (32, 8, 128), (14, 2, 64)):
        q, k = (random(1, 4096, n, size, dtype=torch.bfloat16).transpose(1, 2) for n in (q_heads, k_heads))
        cos, sin = random(1, 4096, size, dtype=torch.bfloat16), random(1, 4096, size, dtype=torch.bfloat16)

        def turned(x: Tensor) -> Tensor:
            half = x.shape[-1] // 2
            return torch.cat((-x[..., half:], x[..., :half]), dim=-1)

        n_bytes = 2 * (q.nbytes + k.nbytes) + cos.nbytes + sin.nbytes
        show(
            f"rotate bfloat16 4096x{q_heads}+{k_heads}x{size}", lambda: kernels.rotate(q, k, cos, sin),
            copy_of(n_bytes), lambda: [x * cos[:, None] + turned(x) * sin[:, None] for x in (q, k)], n_bytes=n_bytes,
        )  # fmt: skip


def host() -> None:
    """Microseconds that a caller spends on a call, whatever the device does."""
    x, scale = random(64, 64), torch.zeros(2, 64, device=DEVICE)
    hidden, labels = random(64, 64, dtype=torch.bfloat16), torch.zeros(64, dtype=torch.int64, device=DEVICE)
    heads = random(1, 64, 4, 64, dtype=torch.bfloat16).transpose(1, 2)
    calls: dict[str, Call] = {
        "weighted_sum": lambda: kernels.weighted_sum([x, x, x], [0.5, 0.3, 0.2]),
        "slerp": lambda: kernels.slerp(x, x, 0.3),
        "dare_mask": lambda: kernels.dare_mask((64, 64), 0.3, 1, device=DEVICE),
        "row_scale": lambda: kernels.row_scale(x, scale),
        "rms_norm": lambda: kernels.rms_norm(hidden, hidden[0], 1e-6),
        "gated": lambda: kernels.gated(hidden, hidden, "silu"),
        "rotate": lambda: kernels.rotate(heads, heads, hidden[None], hidden[None]),
        "ties_merge": lambda: kernels.ties_merge([x, x, x], [1, 1, 1], 0.3, base=x),
        "token_scores": lambda: kernels.token_scores(hidden, hidden, labels),
        "svd_noise": lambda: kernels.svd_noise(x, x, x, scale),
    }
    for name, call in calls.items():
        for _ in range(5):
            call()
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(100):
            call()
        spent = time.perf_counter() - began
        torch.cuda.synchronize()
        print(f"host {name:<41}{spent * 1e4:9.1f} us per call", flush=True)


def main() -> None:
    torch.manual_seed(0)
    x = random(8192, 8192, dtype=torch.bfloat16)
    ceilings = 2 * 8192**3 / on_device(lambda: x @ x) / 1e9, 2 * (1 << 30) / on_device(copy_of(2 << 30)) / 1e6
    print(f"{torch.cuda.get_device_name()}: GEMM {ceilings[0]:.0f} TFLOP/s, copy {ceilings[1]:.0f} GB/s")
    print(f"olmfast.kernels of {kernels.__file__}", flush=True)
    parts = (
        svd_noise, token_scores, rms_norm, gated, rotate, weighted_sum, slerp, ties_merge, row_scale, dare_mask, host,
    )  # fmt: skip
    unknown = set(sys.argv[1:]) - {part.__name__ for part in parts}
    if unknown:
        sys.exit(f"rates.py: {', '.join(sorted(unknown))}: not an operation")
    for part in parts:
        if part.__name__ in sys.argv[1:] or len(sys.argv) == 1:
            part()
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
