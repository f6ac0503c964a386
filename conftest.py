"""Keep the repository root off `sys.path`: its folder kernels/ would hide Hugging Face's package `kernels`.

And where there is no GPU, run Triton code in its interpreter: it has to be told before anything imports triton.
"""

import os
import sys
from pathlib import Path

if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

ROOT = str(Path(__file__).parent)
sys.path[:] = [entry for entry in sys.path if entry not in ("", ROOT)]
