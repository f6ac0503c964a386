"""Fixtures of more than one test file."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest

from olmfast import cli


@pytest.fixture
def olmfast(monkeypatch, capsys) -> Callable[..., tuple[int, str, str]]:
    """Runs the command line in this process; returns exit code, standard output and standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["olmfast", *map(str, arguments)])
        with pytest.raises(SystemExit) as caught:
            cli.main()
        return (caught.value.code or 0, *capsys.readouterr())

    return call
