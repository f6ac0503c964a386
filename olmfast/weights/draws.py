"""Random numbers that depend on their address alone: the same in any order, process and session."""

from __future__ import annotations

import numpy as np
import torch
import xxhash


def normal(n: int, *address: object) -> torch.Tensor:
    """n standard normal numbers, float64, a function of `address` alone (Philox, Salmon et al. 2011)."""
    key = xxhash.xxh3_128_intdigest("/".join(map(str, address)).encode())
    return torch.from_numpy(np.random.Generator(np.random.Philox(key=key)).standard_normal(n))
