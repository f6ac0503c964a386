"""Good input, made bad: seeded mutations of plain data, of texts and of the file that holds them."""

from __future__ import annotations

import json
import os
import random
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import yaml

DIGITS = 400  # of numbers that fit in no float
VALUES: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 64, 1000, 2**31, 2**63, 2**64, 10**12, -(2**63), int("9" * DIGITS),
    0.0, 0.5, -0.5, 1.5, 1e-300, 1e308, float("nan"), float("inf"), float("-inf"),
    "", " ", "0", "1e-5", "inf", "\0", "\ud800", "\u2028", "\u0663", "\u00b2", "a" * 300, "../..", "/", ".",
    "~nobody/x", "donor0",
    "donor1", "auto", "union", "base", "{{ 1/0 }}", "{% for", "(a+", "[/bold]", "%s%n", "\N{SNOWMAN}",
    [], [[]], [None], [1, 2, 3], ["a", "a"], {}, {"a": {}}, {"": None}, {"name": 1}, [{"a": 1}], [0.5] * 40,
]  # fmt: skip
SPLICES = [
    b"\xff", b"\0", b"\xef\xbb\xbf", b"\xed\xa0\x80", b"\\ud800", b"9" * DIGITS, b"-", b"{", b"}", b"[", b"]" * 9,
    b"[" * 2000, b'"', b"'", b": ", b"\n", b"\r", b"\t", b"\\", b"!!python/object/apply:os.system [id]", b"!x y",
    b"!!binary x", b"!!set {a}", b"!!int x", b"!!float x", b"!!timestamp 2001-13-40", b"&a [*a, *a]", b"*nobody",
    b"<<: [1]", b"<<: {a: 1}", b"? [a]\n: b\n", b"0o9", b"0x", b"1_000", b"1e999", b"NaN", b"null", b"true", b"--- 1\n",
    b"%YAML 9.9\n", b"\xe2\x80\xa8", b"\xf0\x9f\x98\x80", b"#",
]  # fmt: skip


def value(rng: random.Random) -> Any:
    """One of the values that are seldom expected."""
    return deepcopy(rng.choice(VALUES))


def spoil(rng: random.Random, data: Any, times: int | None = None) -> Any:
    """A copy of plain data with one to three changes of its structure."""
    data = deepcopy(data)
    for _ in range(times or rng.choice((1, 1, 1, 2, 3))):
        data = _spoil_once(rng, data)
    return data


def _spoil_once(rng: random.Random, data: Any) -> Any:
    places = list(_places(data))
    if not places or rng.random() < 0.02:
        return value(rng)
    holder, key = rng.choice(places)
    old = holder[key]
    how = rng.randrange(11)
    if how == 0:
        del holder[key]
    elif how == 1:
        holder[key] = [old]
    elif how == 2:
        holder[key] = str(old)
    elif how == 3 and isinstance(holder, dict):
        holder[_renamed(rng, str(key))] = holder.pop(key)
    elif how == 4 and isinstance(old, (int, float)) and not isinstance(old, bool):
        small = max(-1e300, min(old, 1e300))  # what a float can hold
        holder[key] = rng.choice((old + 1, old - 1, -old, old * 2, small // 2, float(small), small / 3))
    elif how == 5 and isinstance(holder, list):
        holder.append(deepcopy(rng.choice(holder)))
    elif how == 6:
        other, its = rng.choice(places)
        holder[key] = deepcopy(other[its])
    elif how == 7 and isinstance(holder, dict):
        holder[_renamed(rng, str(rng.choice(list(holder))))] = value(rng)
    elif how == 8 and isinstance(old, str) and old:
        cut = rng.randrange(len(old))
        holder[key] = old[:cut] + str(rng.choice(("\0", "\ud800", "x", "{{", " ", ""))) + old[cut + rng.randrange(2) :]
    else:
        alike = [one for one in VALUES if type(one) is type(old)]
        holder[key] = deepcopy(rng.choice(alike)) if alike and rng.random() < 0.4 else value(rng)
    return data


def _places(data: Any) -> Any:
    """Every (container, key) of nested plain data."""
    stack = [data] if isinstance(data, (dict, list)) else []
    while stack:
        held = stack.pop()
        for key, one in list(held.items() if isinstance(held, dict) else enumerate(held)):
            yield held, key
            if isinstance(one, (dict, list)):
                stack.append(one)


def _renamed(rng: random.Random, key: str) -> str:
    cut = rng.randrange(len(key) + 1)
    return rng.choice((key + "s", key[:cut] + key[cut + 1 :], key.upper(), "", "\ud800", "text_config", "x" * 300))


def spoil_bytes(rng: random.Random, content: bytes) -> bytes:
    """The content with one to three changes of its bytes."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        at = rng.randrange(len(content) + 1)
        end = min(len(content), at + rng.choice((1, 1, 2, 8, 64)))
        how = rng.randrange(6)
        if how == 0:
            content = content[:at]
        elif how == 1:
            content = content[:at] + content[end:]
        elif how == 2:
            content = content[:end] + content[at:]
        elif how == 3:
            content = content[:at] + bytes(rng.randrange(256) for _ in range(end - at)) + content[end:]
        else:
            content = content[:at] + rng.choice(SPLICES) + content[at if rng.random() < 0.5 else end :]
    return content


def as_text(rng: random.Random, data: Any) -> bytes:
    """Plain data as JSON, which is YAML too: with escapes, or with what they stand for. What holds itself is YAML."""
    try:
        text = json.dumps(data, ensure_ascii=rng.random() < 0.7, indent=rng.choice((None, 1)))
    except ValueError:
        text = yaml.safe_dump(data)
    return text.encode("utf-8", "surrogatepass")


def a_fifo(path: Path) -> None:
    """A pipe, which nobody writes to."""
    os.mkfifo(path)


ODD_FILES: list[Callable[[Path], None]] = [
    a_fifo,
    lambda path: path.mkdir(),
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("nowhere"),
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to("/dev/null"),
    lambda path: path.touch(),
]


def spoil_file(
    rng: random.Random, path: Path, structured: bool = True, make: Callable[[Any], bytes] | None = None
) -> None:
    """Replace a file by a changed one, or by something that is none. `structured`: it holds JSON."""
    content = path.read_bytes()
    if rng.random() < 0.04:
        path.unlink()
        if rng.random() < 0.9:
            rng.choice(ODD_FILES)(path)
    elif structured and rng.random() < 0.75:
        data = spoil(rng, json.loads(content))
        path.write_bytes(as_text(rng, data) if make is None else make(data))
    else:
        path.write_bytes(spoil_bytes(rng, content))
