"""The house as docs/architecture.md draws it is the house as it stands."""

from __future__ import annotations

import re
from pathlib import Path

import olmfast

PACKAGE = Path(olmfast.__file__).parent
DOC = Path(__file__).parents[1] / "docs" / "architecture.md"


def drawn() -> dict[str, set[str]]:
    """Room -> its modules, from the tree in the document; those of olmfast/ itself under the empty name."""
    tree = DOC.read_text(encoding="utf-8").split("```")[1]
    rooms: dict[str, set[str]] = {"": set()}
    for line in tree.strip().splitlines():
        names, _, rest = line.partition("  ")
        if names.endswith("/"):
            rooms[names[:-1]] = set(rest.split())
        else:
            rooms[""] |= set(names.split())
    return rooms


def test_the_tree_is_true():
    tree = drawn()
    del tree["kernels"], tree["csrc"]  # beside the package; described, not listed
    assert "testing.py" in DOC.read_text(encoding="utf-8")
    folders = [path for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()]
    found = {folder.name: {path.stem for path in folder.glob("*.py")} - {"__init__"} for folder in folders}
    found[""] = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__", "testing"}
    found.pop("kernels", None)  # in an installed copy
    assert found == tree


def test_few_modules_stand_outside_the_rooms():
    assert len(list(PACKAGE.glob("*.py"))) <= 6


def test_every_file_that_the_document_names_is_there():
    text = DOC.read_text(encoding="utf-8")
    roots = [PACKAGE, *(path for path in PACKAGE.iterdir() if path.is_dir()), DOC.parents[1]]
    missing = [
        name
        for name in re.findall(r"`(?:olmfast/)?((?:[a-z_]+/)*[a-z_]+\.py)`", text)
        if not any((root / name).is_file() for root in roots)
    ]
    assert not missing
