"""Which implementation runs: one rule for every operation.

`impl="auto"` takes Triton where it can run (tensors on a GPU, triton installed, a dtype the kernel knows) and
plain torch elsewhere, quietly. `impl="triton"` or `impl="torch"` is an order: it runs or raises with the reason.
Under Triton's interpreter (TRITON_INTERPRET=1, for tests) an explicit `impl="triton"` runs on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from os import environ
from typing import Any, Literal

import torch
from torch import Tensor

Impl = Literal["auto", "triton", "torch"]
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)


def choose(where: str, impl: str, tensors: Iterable[Tensor], dtypes: tuple[torch.dtype, ...] = KERNEL_DTYPES) -> bool:
    """True for the Triton kernel, False for plain torch; `tensors` are those whose dtype the kernel must know."""
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"{where}: impl is {impl!r}; use 'auto', 'triton' or 'torch'")
    tensors = list(tensors)
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"{where}: the tensors are on different devices ({', '.join(sorted(map(str, devices)))})")
    if impl == "torch":
        return False
    reason = _obstacle(tensors, dtypes)
    if impl == "triton" and reason:
        raise ValueError(f"{where}: impl='triton' cannot run: {reason}; use impl='auto'")
    return reason is None and (impl == "triton" or tensors[0].device.type != "cpu")


def _obstacle(tensors: list[Tensor], dtypes: tuple[torch.dtype, ...]) -> str | None:
    """Why the Triton kernel cannot run on these tensors; None if it can."""
    device = tensors[0].device
    if device.type not in ("cuda", "xpu") and not (device.type == "cpu" and interpreted()):
        return f"the tensors are on {device.type}"
    unknown = next((tensor.dtype for tensor in tensors if tensor.dtype not in dtypes), None)
    if unknown is not None:
        return f"the kernel does not know dtype {str(unknown).removeprefix('torch.')}"
    if not _triton_installed():
        return "triton is not installed"
    if device.type == "cuda" and torch.version.hip is None and _capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def interpreted() -> bool:
    """Whether Triton code runs in Triton's interpreter in this process (read when triton is first imported)."""
    return environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on")


@lru_cache(maxsize=1)
def _triton_installed() -> bool:
    return find_spec("triton") is not None


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's own."""
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else nullcontext()


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class LazyKernel:
    """A `@triton.jit` function that imports triton only when it is first launched.

    Every LazyKernel of a module is compiled from the module's own namespace, into which `tl` is put then; kernels
    can therefore call each other as usual.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        namespace = self.function.__globals__
        triton = import_module("triton")
        namespace.setdefault("tl", import_module("triton.language"))
        for name, value in list(namespace.items()):
            if isinstance(value, LazyKernel):
                namespace[name] = triton.jit(value.function)
        launcher: Callable[..., Any] = namespace[self.function.__name__][grid]
        return launcher


def check_float(where: str, name: str, tensor: Tensor, n_dims: int | None = None) -> None:
    """A floating-point tensor, of `n_dims` dimensions where given; TypeError or ValueError otherwise."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: {name} is {type(tensor).__name__}, not a tensor")
    if tensor.dtype not in FLOAT_DTYPES:
        known = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOAT_DTYPES)
        raise TypeError(f"{where}: {name} has dtype {str(tensor.dtype).removeprefix('torch.')}, not one of {known}")
    if n_dims is not None and tensor.dim() != n_dims:
        raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, not {n_dims} dimensions")


def prepare_out(where: str, out: Tensor | None, shape: tuple[int, ...], like: Tensor) -> Tensor:
    """The tensor to write: a new one, or the caller's after a check of shape, dtype and device."""
    if out is None:
        return torch.empty(shape, dtype=like.dtype, device=like.device)
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"{where}: out has shape {tuple(out.shape)}, the result has {tuple(shape)}")
    if out.dtype != like.dtype:
        raise TypeError(f"{where}: out is {out.dtype}, the result is {like.dtype}")
    if out.device != like.device:
        raise ValueError(f"{where}: out is on {out.device}, the inputs are on {like.device}")
    return out
