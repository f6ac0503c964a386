"""olmfast: the best merge a pool of fine-tuned language models holds, found by evaluation on one GPU."""

__version__ = "0.1.0"

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from olmfast.config.run import RunConfig, load_config
    from olmfast.dataflow.check import check
    from olmfast.dataflow.session import run
    from olmfast.errors import InputError, OlmfastError
    from olmfast.runs.scoreboard import evaluate
    from olmfast.runs.session import Result
    from olmfast.static.linear import linear
    from olmfast.static.write import merge

_MODULES = {
    "run": "dataflow.session",
    "evaluate": "runs.scoreboard",
    "merge": "static.write",
    "linear": "static.linear",
    "check": "dataflow.check",
    "load_config": "config.run",
    "RunConfig": "config.run",
    "Result": "runs.session",
    "OlmfastError": "errors",
    "InputError": "errors",
}
__all__ = [
    "InputError",
    "OlmfastError",
    "Result",
    "RunConfig",
    "__version__",
    "check",
    "evaluate",
    "linear",
    "load_config",
    "merge",
    "run",
]


def __getattr__(name: str) -> Any:
    # Lazy: `import olmfast.kernels` from another tool must not load Transformers.
    if name == "dataflow":  # a room with a door of its own
        return import_module("olmfast.dataflow")
    if name not in _MODULES:
        raise AttributeError(f"module 'olmfast' has no attribute {name!r}")
    return getattr(import_module(f"olmfast.{_MODULES[name]}"), name)


def __dir__() -> list[str]:
    return __all__
