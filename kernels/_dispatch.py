"""Which implementation runs, and on what: one rule for every operation.

`impl="auto"` takes Triton where it can run (tensors on a GPU, triton installed, a dtype the kernel knows) and
plain torch elsewhere, quietly. `impl="triton"` and `impl="torch"` are orders: they run or raise with the
reason. Under Triton's interpreter (TRITON_INTERPRET=1, for tests) `impl="triton"` runs on CPU tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from math import isfinite
from numbers import Integral, Real
from os import environ
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
FLOAT_DTYPES = (*KERNEL_DTYPES, torch.float64)


def use_triton(
    where: str,
    impl: str,
    tensors: Iterable[Tensor],
    dtypes: Sequence[torch.dtype] = KERNEL_DTYPES,
    *,
    mixed: bool = True,
) -> bool:
    """True for the Triton kernel, False for plain torch.

    `tensors`: all whose device and dtype matter; `dtypes`: those the kernel knows, () where there is no kernel;
    `mixed`: whether the tensors may differ in dtype.
    """
    if impl not in ("auto", "triton", "torch"):
        raise ValueError(f"{where}: impl is {impl!r}; use 'auto', 'triton' or 'torch'")
    tensors = list(tensors)
    devices = {tensor.device for tensor in tensors}
    if len(devices) > 1:
        raise ValueError(f"{where}: the tensors are on different devices: {', '.join(sorted(map(str, devices)))}")
    if impl == "torch":
        return False
    reason = _obstacle(tensors[0].device, tensors, dtypes, mixed)
    if impl == "triton" and reason:
        raise ValueError(f"{where}: impl='triton' cannot run: {reason}; use impl='auto'")
    return reason is None and (impl == "triton" or tensors[0].device.type != "cpu")


def runs_triton(tensor: Tensor) -> bool:
    """Whether `impl="auto"` takes Triton kernels for tensors of this one's device and dtype; TypeError for none."""
    check_strided("runs_triton", "tensor", tensor)
    return tensor.device.type != "cpu" and _obstacle(tensor.device, [tensor], KERNEL_DTYPES, True) is None


def _obstacle(
    device: torch.device, tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype], mixed: bool
) -> str | None:
    """Why the Triton kernel cannot run on these tensors; None if it can."""
    if not dtypes:
        return "the operation has no Triton kernel"
    if any(tensor.is_neg() for tensor in tensors):
        return "a tensor is a view that negates"
    if device.type != "cuda" and not (device.type == "cpu" and interpreted()):
        return f"the tensors are on {device.type}"
    unknown = next((tensor.dtype for tensor in tensors if tensor.dtype not in dtypes), None)
    if unknown is not None:
        return f"the kernel does not know dtype {dtype_name(unknown)}"
    if not mixed and len({tensor.dtype for tensor in tensors}) > 1:
        return "the tensors differ in dtype"
    if not _triton_installed():
        return "triton is not installed"
    if device.type == "cuda" and torch.version.hip is None and _capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    return None


def interpreted() -> bool:
    """Whether Triton code runs in Triton's interpreter (triton reads the variable when it is first imported)."""
    return environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "on", "yes", "y")


@lru_cache(maxsize=1)
def _triton_installed() -> bool:
    return find_spec("triton") is not None


@lru_cache(maxsize=64)
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


@lru_cache(maxsize=64)
def _shared_memory(device: torch.device) -> int:
    """Bytes of shared memory one block may use; 64 KB where it is not known."""
    if device.type != "cuda":
        return 101_376
    properties = torch.cuda.get_device_properties(device)
    return int(getattr(properties, "shared_memory_per_block_optin", 65_536))


class Tile(NamedTuple):
    """One launch configuration of a tiled product, and the shared memory its pipeline needs."""

    block_m: int
    block_n: int
    block_k: int
    n_stages: int
    n_warps: int

    def n_bytes(self, element_size: int) -> int:
        return (self.block_m + self.block_n) * self.block_k * element_size * self.n_stages


def fitting(tiles: Sequence[Tile], device: torch.device, element_size: int) -> Tile:
    """The first tile, best first, whose pipeline fits the device's shared memory; the last one otherwise."""
    limit = _shared_memory(device)
    return next((tile for tile in tiles if tile.n_bytes(element_size) <= limit), tiles[-1])


def on_device(tensor: Tensor) -> AbstractContextManager[Any]:
    """Triton launches on the current device: make it the tensor's own."""
    if tensor.device.type != "cuda" or tensor.device.index == torch.cuda.current_device():
        return nullcontext()
    return torch.cuda.device(tensor.device)


def takes_descriptors(device: torch.device, *tensors: Tensor) -> bool:
    """Whether Hopper's tensor copies can read these: rows in one piece, all of them on sixteen bytes."""
    if device.type != "cuda" or torch.version.hip is not None or _capability(device)[0] != 9 or _descriptor() is None:
        return False
    return all(
        tensor.numel() > 0
        and tensor.stride(-1) == 1
        and tensor.data_ptr() % 16 == 0
        and tensor.stride(-2) * tensor.element_size() % 16 == 0
        for tensor in tensors
    )


@lru_cache(maxsize=1)
def _descriptor() -> Any:
    """Triton's class of tensor descriptors; None where this triton has none."""
    try:
        return import_module("triton.tools.tensor_descriptor").TensorDescriptor
    except ImportError:
        return None


def descriptor(tensor: Tensor, block: Sequence[int]) -> Any:
    """How a kernel reads blocks of a tensor (rows, columns) by tensor copies."""
    return _descriptor().from_tensor(tensor, list(block))


class LazyKernel:
    """A `@triton.jit` function that imports triton only when it is first launched.

    All LazyKernels of a module are compiled then, in the module's own namespace (where `tl` is put as well),
    so that kernels can call each other as usual. `plain`: integer arguments whose values must not lead to
    compiled variants (divisible by 16, equal to 1).
    """

    def __init__(self, function: Callable[..., Any], plain: Sequence[str] = ()) -> None:
        self.function = function
        self.plain = tuple(plain)

    def __getitem__(self, grid: Any) -> Callable[..., Any]:
        namespace = self.function.__globals__
        triton = import_module("triton")
        namespace["tl"] = import_module("triton.language")
        for name, value in list(namespace.items()):
            if isinstance(value, LazyKernel):
                namespace[name] = triton.jit(value.function, do_not_specialize=value.plain)
        launcher: Callable[..., Any] = namespace[self.function.__name__][grid]
        return launcher

    def __call__(self, *_args: Any) -> Any:
        """For type checkers: kernels call each other, but only inside Triton."""
        raise TypeError(f"{self.function.__name__} is a Triton function; launch it with [grid]")


# Loaded kernels, by everything that Triton chooses a kernel by.
_LOADED: dict[tuple[Any, ...], tuple[Any, ...]] = {}
# The versions of Triton whose loaded kernels are known to be run as `launch` does it.
KNOWN = ("3.6.", "3.7.")


def _trait(argument: Any) -> Any:
    """What Triton chooses a kernel by, of one argument."""
    kind = type(argument)
    if kind is int:
        # 1, multiples of 16, and the others, of 32 bits or of more.
        return (argument == 1) + 2 * (argument % 16 == 0) + 4 * (-(1 << 31) <= argument < 1 << 31)
    if kind is float:
        return float
    if isinstance(argument, Tensor):
        return argument.dtype, argument.data_ptr() % 16 == 0
    if kind is tuple:
        return tuple(map(_trait, argument))
    return argument.base.dtype, *argument.block_shape


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """`kernel[grid](*arguments, **constants)` without Triton's search for the kernel, slower than many a kernel.

    `arguments` are all that the kernel takes but its constants, which come last, in its order and in capitals; what is
    not in capitals is an option of the compiler.
    """
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else -1  # type: ignore[no-untyped-call]
    key = (id(kernel), device, *map(_trait, arguments), *constants.values())
    loaded = _LOADED.get(key)
    if loaded is None:
        compiled = kernel[grid](*arguments, **constants)
        known = device >= 0 and torch.version.hip is None and import_module("triton").__version__.startswith(KNOWN)
        if known and not isinstance(kernel, LazyKernel):
            values = tuple(value for name, value in constants.items() if name.isupper())
            _LOADED[key] = (compiled.run, compiled.function, compiled.packed_metadata, values, kernel)
        return
    run, function, metadata, values, _ = loaded
    stream = torch._C._cuda_getCurrentRawStream(device)
    x, y, z = (*grid, 1, 1)[:3]
    run(x, y, z, stream, function, metadata, None, None, None, *arguments, *values)


def sent(numbers: Sequence[int], device: torch.device) -> Tensor:
    """They (n,) int64 on a device, without waiting for it."""
    on_cuda = device.type == "cuda"
    return torch.tensor(numbers, dtype=torch.int64, pin_memory=on_cuda).to(device, non_blocking=True)


def ceil_div(n: int, block: int) -> int:
    return -(-n // block)


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def dtype_name(dtype: torch.dtype | torch.layout) -> str:
    return str(dtype).removeprefix("torch.")


def check_strided(where: str, name: str, tensor: Tensor) -> None:
    """A tensor whose values lie in memory by strides, not sparse, nested or packed; TypeError otherwise."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: {name} is of type {type(tensor).__name__}, not a tensor")
    if tensor.layout != torch.strided or tensor.is_nested:
        layout = "nested" if tensor.is_nested else f"of layout {dtype_name(tensor.layout)}"
        raise TypeError(f"{where}: {name} is {layout}, not a plain tensor; use to_dense() or to_padded_tensor()")


def check_values(where: str, name: str, tensor: Tensor) -> None:
    """ValueError for a tensor on the meta device, which has a shape and no values."""
    if tensor.device.type == "meta":
        raise ValueError(f"{where}: {name} is on meta, where a tensor has no values")


def check_float(where: str, name: str, tensor: Tensor, n_dims: int | None = None) -> None:
    """A floating-point tensor, of `n_dims` dimensions where given; TypeError or ValueError otherwise."""
    check_strided(where, name, tensor)
    if tensor.dtype not in FLOAT_DTYPES:
        known = ", ".join(dtype_name(dtype) for dtype in FLOAT_DTYPES)
        raise TypeError(f"{where}: {name} has dtype {dtype_name(tensor.dtype)}; use one of {known}")
    if n_dims is not None and tensor.dim() != n_dims:
        raise ValueError(f"{where}: {name} has shape {tuple(tensor.shape)}, not {n_dims} dimensions")


def number(where: str, name: str, value: object) -> float:
    """A finite number, also of a tensor of one; TypeError or ValueError otherwise."""
    found = wide_number(where, name, value)
    if not isfinite(found):
        raise ValueError(f"{where}: {name} is {found}, not a finite number")
    return found


def wide_number(where: str, name: str, value: object) -> float:
    """A number that may be infinite or NaN, also of a tensor of one; TypeError or ValueError otherwise."""
    if isinstance(value, Tensor):
        check_strided(where, name, value)
        check_values(where, name, value)
        value = value.item() if value.numel() == 1 else value
    if isinstance(value, bool) or not isinstance(value, Real):
        raise TypeError(f"{where}: {name} is of type {type(value).__name__}, not a number")
    try:
        return float(value)
    except OverflowError as error:
        raise ValueError(f"{where}: {name} is beyond what 64 bits hold") from error


def numbers(where: str, name: str, values: object, dtype: torch.dtype = torch.float64) -> list[float]:
    """Numbers of a sequence or a tensor that are finite in `dtype`; TypeError or ValueError otherwise."""
    if isinstance(values, Tensor):
        check_strided(where, name, values)
        check_values(where, name, values)
        if values.is_complex():
            raise TypeError(f"{where}: {name} has dtype {dtype_name(values.dtype)}, not real numbers")
        values = values.double().flatten().tolist()
    found = [number(where, f"{name}[{i}]", value) for i, value in enumerate(_listed(where, name, values))]
    for i, value in enumerate(found):
        if abs(value) > torch.finfo(dtype).max:
            raise ValueError(f"{where}: {name}[{i}] is {value}, beyond {dtype_name(dtype)}")
    return found


def flag(where: str, name: str, value: object) -> bool:
    """True or false; TypeError otherwise."""
    if not isinstance(value, (bool, np.bool_)):
        raise TypeError(f"{where}: {name} is of type {type(value).__name__}, not true or false")
    return bool(value)


def integer(where: str, name: str, value: object) -> int:
    """A whole number; TypeError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise TypeError(f"{where}: {name} is of type {type(value).__name__}, not a whole number")
    return int(value)


def integers(where: str, name: str, values: object) -> tuple[int, ...]:
    """Whole numbers of a sequence; TypeError otherwise."""
    return tuple(integer(where, f"{name}[{i}]", value) for i, value in enumerate(_listed(where, name, values)))


def _listed(where: str, name: str, values: object) -> list[Any]:
    if isinstance(values, Tensor):
        check_strided(where, name, values)
    if isinstance(values, str) or not isinstance(values, Iterable) or getattr(values, "ndim", 1) == 0:
        raise TypeError(f"{where}: {name} is of type {type(values).__name__}, not a sequence")
    return list(values)


def check_alike(where: str, tensors: object) -> list[Tensor]:
    """At least one, floating point, all of one shape."""
    tensors = _listed(where, "tensors", tensors)
    if not tensors:
        raise ValueError(f"{where}: no tensors")
    for i, tensor in enumerate(tensors):
        check_float(where, f"tensors[{i}]", tensor)
        if tensor.shape != tensors[0].shape:
            raise ValueError(
                f"{where}: tensors[{i}] has shape {tuple(tensor.shape)}, tensors[0] {tuple(tensors[0].shape)}"
            )
    return tensors


def check_apart(where: str, out: Tensor | None, inputs: Mapping[str, Tensor | None], *, in_place: bool = False) -> None:
    """ValueError if `out` overlaps an input in memory; `in_place`: it may be one of them, as a whole."""
    if not isinstance(out, Tensor):
        return
    for name, tensor in inputs.items():
        if tensor is None or not _overlap(out, tensor):
            continue
        same = out.data_ptr() == tensor.data_ptr() and out.stride() == tensor.stride() and out.shape == tensor.shape
        if not (in_place and same and out.dtype == tensor.dtype):
            raise ValueError(f"{where}: out and {name} overlap in memory; give out memory of its own")


def _overlap(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors share a byte; where that is too hard to say, that they do."""
    (first_a, end_a), (first_b, end_b) = _range(a), _range(b)
    if a.device != b.device or end_a <= first_b or end_b <= first_a:
        return False
    shares_memory: Any = np.shares_memory
    try:
        return bool(shares_memory(_addresses(a), _addresses(b), max_work=10_000))
    except np.exceptions.TooHardError:
        return True


def _range(tensor: Tensor) -> tuple[int, int]:
    """The bytes from the first to the end of the last."""
    if not tensor.numel():
        return 0, 0
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + (last + 1) * tensor.element_size()


class _Layout:
    """Where a tensor's bytes lie, as NumPy is told it; they are not read."""

    def __init__(self, tensor: Tensor) -> None:
        size = tensor.element_size()
        self.__array_interface__ = {
            "version": 3,
            "shape": tuple(tensor.shape),
            "strides": tuple(stride * size for stride in tensor.stride()),
            "typestr": f"|V{size}",
            "data": (tensor.data_ptr(), True),
        }


def _addresses(tensor: Tensor) -> Any:
    return np.asarray(_Layout(tensor))


def prepare_out(
    where: str, out: Tensor | None, shape: Sequence[int], dtype: torch.dtype, device: torch.device
) -> Tensor:
    """The tensor to write: a new one, or the caller's after a check of type, shape, dtype, device and strides."""
    if device.type == "meta":
        raise ValueError(f"{where}: the tensors are on meta, where they have no values")
    if out is None:
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    check_strided(where, "out", out)
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"{where}: out has shape {tuple(out.shape)}, the result has {tuple(shape)}")
    if out.dtype != dtype:
        raise TypeError(f"{where}: out has dtype {dtype_name(out.dtype)}, the result has {dtype_name(dtype)}")
    if out.device != device:
        raise ValueError(f"{where}: out is on {out.device}, the inputs are on {device}")
    if out.is_neg():
        raise ValueError(f"{where}: out is a view that negates; give out memory of its own")
    if _repeats(out):
        raise ValueError(f"{where}: out has several entries in one place (strides {out.stride()})")
    return out


def _repeats(tensor: Tensor) -> bool:
    """Whether two entries of a tensor are one place in memory."""
    if not tensor.numel():
        return False
    extent, sure = 0, True
    sizes = sorted((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1)
    for stride, size in sizes:
        if stride == 0:
            return True
        sure &= stride > extent
        extent += stride * (size - 1)
    if sure:
        return False
    places = np.zeros((), dtype=np.int64)  # strides that mesh: all places are compared
    for stride, size in sizes:
        places = places[..., None] + stride * np.arange(size)
    return np.unique(places).size < tensor.numel()
