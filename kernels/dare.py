"""The random mask of DARE, from counters: element i of stream (seed, stream) is the same on every device,
in any order and from any starting point.

    keep[i] = hash(i, seed, stream) < density * 2^32        two keyed rounds of a 32-bit integer hash

Shapes: any -> bool of that shape; i is the flat index. Bytes: one per element: bound by arithmetic.
Source: Yu et al., "Language models are super Mario", arXiv 2311.03099 (DARE); the round is the `lowbias32`
function of C. Wellons' hash prospector.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from olmfast.kernels._dispatch import (
    LazyKernel,
    ceil_div,
    integer,
    integers,
    launch,
    number,
    on_device,
    prepare_out,
    use_triton,
)

if TYPE_CHECKING:
    import triton.language as tl

MASK32, MULTIPLY_A, MULTIPLY_B = 0xFFFFFFFF, 0x7FEB352D, 0x846CA68B
BLOCK, N_WARPS = 4096, 4  # sixteen bytes at a time
N_CHUNK = 1 << 17
# Elements that share a pair of keys: the counter within them has 32 bits.
PAGE = 1 << 32


def _mix(x: int) -> int:
    x ^= x >> 16
    x = x * MULTIPLY_A & MASK32
    x ^= x >> 15
    x = x * MULTIPLY_B & MASK32
    return x ^ x >> 16


def _keys(seed: int, stream: int, page: int) -> tuple[int, int]:
    """The keys of the two rounds, from all 64 bits of each of the three numbers."""
    words = [number >> shift & MASK32 for number in (seed, stream, page) for shift in (0, 32)]
    first, second = 0x9E3779B9, 0x85EBCA6B
    for word in words:
        first, second = _mix(first ^ word), _mix((second ^ word) + 0xC2B2AE35 & MASK32)
    return first, second


def _signed(x: int) -> int:
    """The int32 with the bits of the unsigned 32-bit number."""
    return x - (1 << 32) if x >> 31 else x


def _round_ref(x: Tensor, scratch: Tensor) -> None:
    """`_mix` in place on int32; torch's >> copies the sign, which the mask takes away again."""
    for shift, multiplier in ((16, MULTIPLY_A), (15, MULTIPLY_B), (16, None)):
        torch.bitwise_right_shift(x, shift, out=scratch)
        x.bitwise_xor_(scratch.bitwise_and_(MASK32 >> shift))
        if multiplier is not None:
            x.mul_(_signed(multiplier))


def _hash_ref(count: Tensor, first_index: int, keys: tuple[int, int], x: Tensor, scratch: Tensor) -> None:
    """The hash of `first_index + count` into `x`: 32 bits without a sign, in an int32."""
    torch.add(count, _signed(first_index & MASK32), out=x)
    for key in keys:
        x.bitwise_xor_(_signed(key))
        _round_ref(x, scratch)


def uniform(n_values: int, seed: int, stream: int, start: int, device: torch.device) -> Tensor:
    """(n_values,) float32 in 0..1: what `dare_mask` compares with the density, for the indices from `start` on."""
    out = torch.empty(n_values, dtype=torch.float32, device=device)
    done = 0
    while done < n_values:
        page, first_index = divmod(start + done, PAGE)
        n = min(N_CHUNK, n_values - done, PAGE - first_index)
        count = torch.arange(n, dtype=torch.int32, device=device)
        x = torch.empty_like(count)
        _hash_ref(count, first_index, _keys(seed, stream, page), x, torch.empty_like(count))
        out[done : done + n] = (x.bitwise_xor_(-(1 << 31)).to(torch.float64) + (1 << 31)) / (1 << 32)
        done += n
    return out


def dare_mask_ref(first_index: int, keys: tuple[int, int], limit: int, out: Tensor) -> None:
    """keep for the counters first_index.. of one page, into the flat bool `out`, a chunk at a time."""
    count = torch.arange(min(N_CHUNK, out.numel()), dtype=torch.int32, device=out.device)
    buffer, scratch = torch.empty_like(count), torch.empty_like(count)
    for start in range(0, out.numel(), N_CHUNK):
        target = out[start : start + N_CHUNK]
        x, y = buffer[: target.numel()], scratch[: target.numel()]
        _hash_ref(count[: target.numel()], first_index + start, keys, x, y)
        # Unsigned comparison: both sides with the top bit turned.
        torch.lt(x.bitwise_xor_(-(1 << 31)), limit - (1 << 31), out=target)


@LazyKernel
def _dare_round(x):
    x ^= x >> 16
    x *= 0x7FEB352D
    x ^= x >> 15
    x *= 0x846CA68B
    x ^= x >> 16
    return x


# Everything that varies per call comes as a plain int32: one compiled kernel serves all seeds.
@partial(LazyKernel, plain=("first_index", "key_a", "key_b", "limit"))
def _dare_mask_kernel(out_ptr, n_values, first_index, key_a, key_b, limit, BLOCK: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK
    offs = tl.arange(0, BLOCK)
    # Counters have 32 bits: they are added to in 32.
    x = offs.to(tl.uint32) + (start + first_index).to(tl.uint32)
    x = _dare_round((x ^ key_a).to(tl.uint32))
    x = _dare_round((x ^ key_b).to(tl.uint32))
    # Unsigned comparison: both sides with the top bit turned.
    kept = (x ^ 0x80000000).to(tl.int32, bitcast=True) < limit
    tl.store(out_ptr + start + offs, kept.to(tl.int8), mask=offs < n_values - start)


def _place(device: object) -> torch.device:
    """The device of that name; TypeError or ValueError where there is none."""
    if not isinstance(device, (str, int, torch.device)) or isinstance(device, bool):
        raise TypeError(f"dare_mask: device is of type {type(device).__name__}, not a device or its name")
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, ImportError) as error:  # which of them, is the backend's own to say
        raise ValueError(f"dare_mask: device is {str(device)!r}, which torch does not have here") from error


@torch.no_grad()
def dare_mask(
    shape: Sequence[int],
    density: float,
    seed: int,
    *,
    stream: int = 0,
    start: int = 0,
    device: torch.device | str = "cpu",
    out: Tensor | None = None,
    impl: str = "auto",
) -> Tensor:
    """True with probability `density`, decided for each flat index on its own: the mask of DARE.

    The mask depends on (seed, stream, index) alone: the same on a CPU and a GPU, whole or in pieces. DARE
    keeps `delta * mask / density`.

    Args:
        shape: of the mask. density: 0 (nothing kept) to 1 (everything).
        seed, stream: integers of 64 bits; give each tensor of a merge a stream of its own.
        start: the flat index of the first element, for a piece of a larger tensor.
        device: where the mask is made; `out`'s where that is given.
        out: bool, contiguous, of `shape`.
        impl: 'auto', 'triton' or 'torch'.

    Raises:
        TypeError, ValueError: density outside 0..1, negative start, unfit `out`, impl that cannot run.
    """
    shape, density = integers("dare_mask", "shape", shape), number("dare_mask", "density", density)
    seed, stream = integer("dare_mask", "seed", seed), integer("dare_mask", "stream", stream)
    start = integer("dare_mask", "start", start)
    if any(size < 0 for size in shape):
        raise ValueError(f"dare_mask: shape is {shape}, which has a negative size")
    if not 0.0 <= density <= 1.0:
        raise ValueError(f"dare_mask: density is {density}, not in 0..1")
    if start < 0:
        raise ValueError(f"dare_mask: start is {start}, not an index")
    if start + prod(shape) >= 1 << 63:
        raise ValueError(f"dare_mask: shape is {shape} and start {start}: indices have no more than 63 bits")
    place = out.device if isinstance(out, Tensor) else _place(device)
    out = prepare_out("dare_mask", out, shape, torch.bool, place)
    if not out.is_contiguous():
        raise ValueError("dare_mask: out is not contiguous")
    triton = use_triton("dare_mask", impl, (out,), (torch.bool,))
    limit = round(density * (1 << 32))
    if limit in (0, 1 << 32):
        return out.fill_(limit > 0)
    flat, done, n_values = out.view(-1), 0, prod(shape)
    while done < n_values:
        page, first_index = divmod(start + done, PAGE)
        piece = flat[done : done + PAGE - first_index]
        keys = _keys(seed, stream, page)
        if triton:
            plain = [_signed(number) for number in (first_index, *keys)]
            with on_device(out):
                launch(
                    _dare_mask_kernel, (ceil_div(piece.numel(), BLOCK),),
                    piece.view(torch.int8), piece.numel(), *plain, limit - (1 << 31), BLOCK=BLOCK, num_warps=N_WARPS,
                )  # fmt: skip
        else:
            dare_mask_ref(first_index, keys, limit, piece)
        done += piece.numel()
    return out
