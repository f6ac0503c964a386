"""The soak (`make soak`), a little of it: a few kills, full disks and changed models."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path


def test_a_few_of_each_disturbance_leave_nothing_wrong():
    options = ["--kills", "4", "--every", "90", "--changes", "3", "--seed", "1"]
    program = [sys.executable, str(Path(__file__).with_name("soak.py")), *options]
    done = subprocess.run(program, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = {kind: tuple(map(int, counts)) for kind, *counts in re.findall(ROW, done.stdout, re.MULTILINE)}
    assert rows.keys() == {"kills", "full disks", "changed models"}
    for tried, equal, wrong in rows.values():
        assert tried == equal > 2
        assert wrong == 0


ROW = r"^(\w[\w ]*?) +(\d+) +(\d+) +(\d+)\b"
