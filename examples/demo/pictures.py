"""The pictures of docs/report.md: a report in Chromium, light and dark, wide and narrow.

    python examples/demo/pictures.py runs/demo/report.html docs/report

writes docs/report-light.png and so on, of the report that `olmfast run examples/demo/merge.yaml` leaves. Chromium is
what OLMFAST_CHROMIUM names, or what is installed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from olmfast.testing import find_chromium, photograph

SIZES = {"": (1280, 2900), "-narrow": (400, 2400)}  # pixels


def main() -> None:
    """Take them."""
    chromium, (page, name) = find_chromium(), map(Path, sys.argv[1:])
    if chromium is None:
        raise SystemExit("no Chromium found: install one, or name it in OLMFAST_CHROMIUM")
    for ending, size in SIZES.items():
        for dark, scheme in ((False, "light"), (True, "dark")):
            photograph(chromium, page, name.with_name(f"{name.name}{ending}-{scheme}.png"), *size, dark)


if __name__ == "__main__":
    main()
