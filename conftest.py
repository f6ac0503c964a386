"""Keep the repository root off `sys.path`: its folder kernels/ would hide Hugging Face's package `kernels`."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parent)
sys.path[:] = [entry for entry in sys.path if entry not in ("", ROOT)]
