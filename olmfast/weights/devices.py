"""The device and the dtype that a user names."""

from __future__ import annotations

from contextlib import suppress

import torch

from olmfast.errors import InputError, show


def pick_device(name: str, where: str) -> torch.device:
    """The device by name: `cpu`, `cuda`, `cuda:1`; `auto` is the GPU if there is one.

    `where` is what the user calls the option, `device` in a file or `--device`. Raises InputError for a device that
    this machine does not have.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device: torch.device | None = None
    with suppress(RuntimeError):
        device = torch.device(name)
    if device is None or device.type not in ("cpu", "cuda"):
        raise InputError(f"{where}: {show(name)} cannot be used here: expected cpu, cuda, cuda:1 or auto")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0].rstrip(".")
        raise InputError(f"{where}: {show(name)} cannot be used here: {reason}; use cpu or auto") from error
    return device


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`: bfloat16 on a GPU, float32 on a CPU, whatever the checkpoints' own dtype is."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    dtype: torch.dtype = getattr(torch, name)
    return dtype
