"""Parts of a module that one kernel computes where their own forward queues many: norms, gated MLPs, rotary embeddings.

No family is known here. A part is taken where what it computes is seen to be, bit for bit, what the kernel's formula
says, on random numbers and in the module's dtype. It then computes by a subclass of its own class, so that copies of it
and calls with other weights do as well. Where gradients are wanted, its own forward computes.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FunctionType
from typing import Any

import torch

from olmfast import kernels
from olmfast.evaluation.forwards import replaced
from olmfast.kernels._dispatch import runs_triton

ROTARY = "apply_rotary_pos_emb"
ROUNDINGS = ((0.0, True), (0.0, False), (1.0, False))  # offset and `rounded_first`: Llama's, OLMo 2's, Gemma's
ACTIVATIONS = ("silu", "gelu_tanh", "gelu")
DRAWS = 4  # rows of random numbers that a formula is tried with


def fuse(module: Any, impl: str = "auto") -> None:
    """Let the parts of a module compute by kernels, on a GPU that they run on; elsewhere it stays as it is.

    `impl` is that of the kernels: 'torch' and 'triton' are meant for tests, on any device.
    """
    weight = next(module.parameters())
    if impl == "auto" and not runs_triton(weight):
        return
    with torch.inference_mode():
        for part in module.modules():
            kind: Any = type(part)
            found = (
                _norm(kind, _formula_of(part), impl)
                or _gated(kind, _gates_of(part), impl)
                or _rotating(kind, _rotation_of(kind), weight.dtype, weight.device, impl)
            )
            if found is not None:
                part.__class__ = found


def unfused(module: Any) -> Any:
    """A copy of a part that shares its weights and computes by its own forward."""
    plain = copy.copy(module)
    plain.__class__ = getattr(type(module), "plain", type(module))
    return plain


@contextmanager
def own_forwards(module: Any) -> Iterator[None]:
    """Let the parts of a module compute by their own forwards until the block ends."""
    fused = [(part, type(part)) for part in module.modules() if hasattr(type(part), "plain")]
    try:
        for part, kind in fused:
            part.__class__ = kind.plain
        yield
    finally:
        for part, kind in fused:
            part.__class__ = kind


def _subclass(kind: Any, forward: Callable[..., Any]) -> type:
    """It looks like its class from outside: some code goes by the name."""
    names = {"forward": forward, "plain": kind, "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind.__name__, (kind,), names)


# RMS norms


def _formula_of(part: Any) -> tuple[str, float, bool] | None:
    """Of an RMS norm: the attribute that holds its epsilon, its offset, and whether it rounds before the weight."""
    name = next((name for name in ("variance_epsilon", "eps") if isinstance(getattr(part, name, None), float)), None)
    parameters = dict(part.named_parameters())
    if name is None or list(parameters) != ["weight"] or parameters["weight"].dim() != 1 or hasattr(part, "plain"):
        return None
    like = parameters["weight"]
    x, weight = _random(like, 1, DRAWS, len(like)), _random(like, len(like))
    try:
        expected = torch.func.functional_call(part, {"weight": weight}, (x,))
    except Exception:  # it is called in another way, and is left alone
        return None
    for offset, rounded_first in ROUNDINGS:
        ours = kernels.rms_norm(
            x, weight, getattr(part, name), offset=offset, rounded_first=rounded_first, impl="torch"
        )
        if _same(ours, expected):
            return name, offset, rounded_first
    return None


@functools.cache
def _norm(kind: Any, formula: tuple[str, float, bool] | None, impl: str) -> type | None:
    if formula is None:
        return None
    epsilon, offset, rounded_first = formula
    own = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_plain(args, kwargs, self.weight.dtype):
            return own(self, *args, **kwargs)
        return kernels.rms_norm(
            args[0], self.weight, getattr(self, epsilon), offset=offset, rounded_first=rounded_first, impl=impl
        )

    return _subclass(kind, forward)


# Gated MLPs


def _gates_of(part: Any) -> tuple[str, bool] | None:
    """The activation of an MLP that is `down(activation(gate(x)) * up(x))`, and whether one Linear, `gate_up_proj`,
    gives both; None for whatever is not."""
    together = getattr(part, "gate_up_proj", None)
    linears: list[Any] = (
        [together] if together is not None else [getattr(part, name, None) for name in ("gate_proj", "up_proj")]
    )
    down: Any = getattr(part, "down_proj", None)
    if not all(type(linear) is torch.nn.Linear for linear in [*linears, down]) or hasattr(part, "plain"):
        return None
    n = down.in_features
    if any(linear.out_features != (n if together is None else 2 * n) for linear in linears):
        return None
    x, leaving = (
        _random(down.weight, 1, DRAWS, linears[0].in_features),
        _random(down.weight, 1, DRAWS, down.out_features),
    )
    both = _random(down.weight, 1, DRAWS, 2 * n)
    gate, up = both.chunk(2, dim=-1)
    shown = [gate, up] if together is None else [both]
    given: dict[Any, list[torch.Tensor]] = {linear: [] for linear in [*linears, down]}

    def shows(linear: Any, out: torch.Tensor) -> Callable[..., torch.Tensor]:
        def forward(entering: torch.Tensor) -> torch.Tensor:
            given[linear].append(entering)
            return out

        return forward

    forwards = {linear: shows(linear, out) for linear, out in zip([*linears, down], [*shown, leaving], strict=True)}
    with replaced(forwards):
        try:
            out = part(x)
        except Exception:  # it is called in another way, and is left alone
            return None
    once = all(len(entering) == 1 for entering in given.values())
    if not once or out is not leaving or not all(_same(given[linear][0], x) for linear in linears):
        return None
    (entering,) = given[down]
    for activation in ACTIVATIONS:
        if _same(kernels.gated(gate, up, activation, impl="torch"), entering):
            return activation, together is not None
    return None


@functools.cache
def _gated(kind: Any, gates: tuple[str, bool] | None, impl: str) -> type | None:
    if gates is None:
        return None
    activation, together = gates
    own = kind.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not _is_plain(args, kwargs, self.down_proj.weight.dtype):
            return own(self, *args, **kwargs)
        (x,) = args
        if together:
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        else:
            gate, up = self.gate_proj(x), self.up_proj(x)
        return self.down_proj(kernels.gated(gate, up, activation, impl=impl))

    return _subclass(kind, forward)


# Rotary embeddings


def _rotation_of(kind: Any) -> Callable[..., Any] | None:
    """The function that the class's forward calls by the usual name."""
    own = kind.forward
    if not isinstance(own, FunctionType) or ROTARY not in own.__code__.co_names or hasattr(kind, "plain"):
        return None
    return own.__globals__.get(ROTARY)


@functools.cache
def _rotating(
    kind: Any, rotary: Callable[..., Any] | None, dtype: torch.dtype, device: torch.device, impl: str
) -> type | None:
    """A class whose forward is the same code, but for the rotation that it calls."""
    if rotary is None:
        return None
    own: FunctionType = kind.forward
    like = torch.empty(0, dtype=dtype, device=device)
    q, k = (_random(like, 2, 3, heads, 8).transpose(1, 2) for heads in (4, 2))
    cos, sin = _random(like, 2, 1, 3, 8)
    try:
        if list(inspect.signature(rotary).parameters)[:4] != ["q", "k", "cos", "sin"]:
            return None
        expected = rotary(q, k, cos, sin)
        if not all(map(_same, kernels.rotate(q, k, cos, sin, impl="torch"), expected)):
            return None
    except Exception:  # it is called in another way, and is left alone
        return None

    def rotate(q: Any, k: Any, cos: Any, sin: Any, *args: Any, **kwargs: Any) -> Any:
        alike = cos.dtype == q.dtype == k.dtype and cos.shape[1:] == q.shape[2:] == k.shape[2:]
        if args or kwargs or torch.is_grad_enabled() or not alike or cos.shape[0] not in (1, len(q)):
            return rotary(q, k, cos, sin, *args, **kwargs)
        return kernels.rotate(q, k, cos, sin, impl=impl)

    forward = FunctionType(
        own.__code__, {**own.__globals__, ROTARY: rotate}, own.__name__, own.__defaults__, own.__closure__
    )
    forward.__kwdefaults__ = own.__kwdefaults__
    return _subclass(kind, forward)


def _is_plain(args: Sequence[Any], kwargs: Mapping[str, Any], dtype: torch.dtype) -> bool:
    """Whether a forward is called as it was tried: with one tensor of the weights' dtype, and without gradients."""
    return len(args) == 1 and not kwargs and not torch.is_grad_enabled() and args[0].dtype == dtype


def _random(like: torch.Tensor, *size: int) -> torch.Tensor:
    """Draws in another's dtype and on its device, the same on every machine and for every tensor of this size."""
    generator = torch.Generator().manual_seed(sum(size))
    return torch.randn(*size, generator=generator).to(like)


def _same(ours: torch.Tensor, expected: Any) -> bool:
    return isinstance(expected, torch.Tensor) and ours.dtype == expected.dtype and torch.equal(ours, expected)
