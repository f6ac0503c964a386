"""olmfast: the best merge a pool of fine-tuned language models holds, found by evaluation on one GPU."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from olmfast.config.run import RunConfig, load_config
    from olmfast.runs.session import Result, run

__all__ = ["Result", "RunConfig", "__version__", "load_config", "run"]

_FILE = {"Result": "runs.session", "RunConfig": "config.run", "load_config": "config.run", "run": "runs.session"}


def __getattr__(name: str) -> Any:
    # Lazy: `import olmfast.kernels` from another tool must not load Transformers.
    if name not in _FILE:
        raise AttributeError(f"module 'olmfast' has no attribute {name!r}")
    return getattr(import_module(f"olmfast.{_FILE[name]}"), name)
