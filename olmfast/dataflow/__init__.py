"""Data-flow space: paths through the blocks of several models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from olmfast.dataflow.execution import dfs_excute_from_config, execute

__all__ = ["dfs_excute_from_config", "execute"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'olmfast.dataflow' has no attribute {name!r}")
    return getattr(import_module("olmfast.dataflow.execution"), name)
