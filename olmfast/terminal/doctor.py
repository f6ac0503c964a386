"""What olmfast finds on a machine."""

from __future__ import annotations

import os
import platform
from importlib import metadata, util

from olmfast import __version__


def examine() -> dict[str, str]:
    """Versions, GPU, kernels and extension, each in a phrase."""
    import torch

    found = {"olmfast": __version__, "python": platform.python_version()}
    for package in ("torch", "triton", "transformers", "huggingface_hub", "safetensors", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["cpu"] = f"{platform.machine()}, {os.cpu_count()} cores, {torch.get_num_threads()} torch threads"
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(0)
        found["gpu"] = f"{properties.name}, {properties.total_memory / 1e9:.0f} GB"
        found["kernels"] = "triton" if util.find_spec("triton") else "torch (install triton for speed)"
    else:
        found["gpu"] = "none found; everything runs on the CPU"
        found["kernels"] = "torch"
    found["extension"] = "olmfast._shards is built" if util.find_spec("olmfast._shards") else "not built"
    return found
