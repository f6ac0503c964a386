"""Names of parameters as wrappers spell them, and their own: torch.compile, DDP, FSDP and checkpointed activations."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from olmfast.errors import InputError

# Attributes in which a wrapper keeps the module; no model calls a part of its own so.
PRIVATE = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
Module = Literal["never", "front", "anywhere"]  # where a part of a name that is `module` is one of these
MODULE = "module"  # that of DataParallel and DDP, a word that a model may use itself


def own_names(names: Iterable[str], where: str, module: Module) -> dict[str, str]:
    """Name in the file -> the parameter's own, without the parts that wrappers put into it.

    A part `module` is one of these at the front of a name, if every name begins with it, or anywhere, or never. Raises
    InputError if two names become one.
    """
    found = {name: [part for part in name.split(".") if part not in PRIVATE] for name in names}
    while module != "never" and found and all(parts[0] == MODULE and len(parts) > 1 for parts in found.values()):
        found = {name: parts[1:] for name, parts in found.items()}
    if module == "anywhere":
        found = {name: [part for part in parts if part != MODULE] for name, parts in found.items()}
    known: dict[str, str] = {}
    for name, parts in found.items():
        first = known.setdefault(".".join(parts), name)
        if first != name:
            raise InputError(
                f"{where}: {first} and {name} are one parameter, once wrapped by torch.compile or DDP and once not; "
                "which of them is the model's? Save it again"
            )
    return {name: ".".join(parts) for name, parts in found.items()}
