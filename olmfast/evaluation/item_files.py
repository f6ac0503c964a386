"""What a dataset file lists: JSON, JSON Lines and tables, compressed or not, in the shapes that other tools write.

Parquet and Arrow files are read by the package pyarrow, an extra, imported when the first of them is asked for.
"""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import zlib
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from olmfast.errors import InputError, show, told
from olmfast.evaluation.items import ANSWERS, CONTENTS, LATER
from olmfast.evaluation.turns import has_parts, text_of
from olmfast.weights.files import read_bytes

# First bytes of a compressed file -> what unpacks it.
_PACKED = {b"\x1f\x8b": gzip, b"BZh": bz2, b"\xfd7zXZ": lzma}
# First bytes of what is not read -> what it is.
_OTHERS = {b"PK\x03\x04": "a zip archive", b"\x28\xb5\x2f\xfd": "compressed by zstd"}
PARQUET, ARROW, ARROW_STREAM = b"PAR1", b"ARROW1", b"\xff\xff\xff\xff"  # first bytes; the last is what datasets saves
# Lists of an item that are the items themselves: Natural Instructions, Self-Instruct, SQuAD, whose questions lie two
# lists deep.
_NESTED, _DEEP = ("Instances", "instances", "paragraphs", "qas"), 2
_SEPARATORS = {".csv": ",", ".tsv": "\t"}


def is_table(path: Path) -> bool:
    """Whether a file is a table by its name: .csv or .tsv, compressed or not."""
    return _suffix(path) in _SEPARATORS


def items_in(path: Path, keys: Collection[str], *, named: bool = False) -> list[Any]:
    """The items of a file; `keys` are those by which one is known, `named` by the user: then they are read as they are,
    with nothing from around them. Raises InputError for a file that lists none."""
    if not os.path.lexists(path):
        raise InputError(f"{path}: no such dataset file")
    content = _unpacked(path)
    if content.startswith((PARQUET, ARROW, ARROW_STREAM)):
        return _columnar(path, content)
    text = _text(path, content)
    if is_table(path):
        return _rows(path, text)
    if not text.strip():
        raise InputError(f"{path}: is empty")
    try:
        data = json.loads(text)
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or a number without end
        data = _json_lines(path, text, error)
    if isinstance(data, dict) and _suffix(path) == ".jsonl":
        data = [data]  # the only line
    if isinstance(data, dict):
        data = _listed(path, data, keys, named)
    if not isinstance(data, list) or not data:
        what = "an empty list" if data == [] else show(data)
        raise InputError(f"{path}: expected a list of conversations, got {what}")
    return data if named else [item for outer in data for item in _unnested(outer, keys)]


def _suffix(path: Path) -> str:
    return Path(path.stem).suffix if path.suffix in (".gz", ".bz2", ".xz") else path.suffix


def _unpacked(path: Path) -> bytes:
    content = read_bytes(path)
    for begin, how in _PACKED.items():
        if content.startswith(begin):
            try:
                unpacked: bytes = how.decompress(content)
            except (OSError, EOFError, ValueError, zlib.error, lzma.LZMAError) as error:
                raise InputError(f"{path}: not readable as {how.__name__}: {told(error)}") from error
            return unpacked
    return content


def _text(path: Path, content: bytes) -> str:
    for begin, what in _OTHERS.items():
        if content.startswith(begin):
            raise InputError(f"{path}: is {what}, which is not read; unpack it")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: cannot be read: not UTF-8 text") from error


def _columnar(path: Path, content: bytes) -> list[Any]:
    """The rows of a parquet or an Arrow file by the names of its columns, values as JSON would have them."""
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError as error:
        what = "a parquet file" if content.startswith(PARQUET) else "an Arrow file"
        raise InputError(f"{path}: is {what}, which needs pyarrow; pip install 'olmfast[parquet]'") from error
    try:
        memory = pyarrow.BufferReader(content)
        if content.startswith(PARQUET):
            table = pyarrow.parquet.read_table(memory)
        elif content.startswith(ARROW):
            table = pyarrow.ipc.open_file(memory).read_all()
        else:
            table = pyarrow.ipc.open_stream(memory).read_all()
        rows: list[Any] = table.to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise InputError(f"{path}: not readable by pyarrow: {told(error)}") from error
    if not rows:
        raise InputError(f"{path}: holds no rows")
    return rows


def cells_in(path: Path, text: str, delimiter: str = ",") -> Iterator[tuple[int, list[str]]]:
    """The lines of a table that hold anything, with the number of the one each ends in. Raises InputError for what is
    none."""
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
    try:
        for row in reader:
            if row:
                yield reader.line_num, row
    except csv.Error as error:
        raise InputError(f"{path}: not CSV in UTF-8: {told(error)}") from error


def _rows(path: Path, text: str) -> list[Any]:
    """The rows of a table by the names in its first line."""
    delimiter = _SEPARATORS[_suffix(path)]
    (_, header), *rows = [*cells_in(path, text, delimiter)] or [(1, [])]
    if not rows:
        raise InputError(f"{path}: holds no rows")
    for number, row in rows:
        if len(row) > len(header):
            raise InputError(
                f"{path}:{number}: has {len(row)} cells, and the first line names {len(header)}; quote a cell that "
                f"holds {show(delimiter)}"
            )
    return [dict(zip(header, row, strict=False)) for _, row in rows]


def _json_lines(path: Path, text: str, error: Exception) -> list[Any]:
    lines: list[Any] = []
    # Not splitlines(): a JSON string may hold U+2028 and other ends of line as they are.
    for number, line in enumerate(text.split("\n"), 1):
        try:
            lines += [json.loads(line)] if line.strip() else []
        except (ValueError, RecursionError) as fault:
            if not lines:
                break
            raise InputError(f"{path}:{number}: not JSON: {told(fault)}") from fault
    if not lines:
        raise InputError(f"{path}: neither JSON nor JSON Lines: {told(error)}") from error
    return lines


def _listed(path: Path, data: dict[str, Any], keys: Collection[str], named: bool) -> list[Any]:
    """The items of an object: itself, or the list in it, or its columns."""
    known = _known(data, keys)
    if not named and any(map(has_parts, [data.get(CONTENTS), *_lists(data.get(CONTENTS))])):
        known.append(CONTENTS)
    if any(_is_column(data[key]) for key in known):
        return _transposed(path, data)
    if known or (not named and _nested_in(data, keys) is not None):
        return [data]
    names, rows = data.get("columns"), data.get("data")  # pandas, orient="split"
    if isinstance(names, list) and isinstance(rows, list) and all(isinstance(row, list) for row in rows):
        return [dict(zip(map(str, names), row, strict=False)) for row in rows]
    lists = {key: value for key, value in data.items() if _are_objects(value)}
    if len(lists) > 1:
        raise InputError(f"{path}: holds several lists, {show(', '.join(lists))}; write the one to be used as a file")
    for name, found in lists.items():  # the Hub's viewer has a row and its number
        rows = [item["row"] if isinstance(item.get("row"), dict) else item for item in found]
        before = text_of(data.get("task_prefix")) if name == "examples" and not named else ""  # BIG-bench
        return [_asked_after(before, item, keys) for item in rows]
    if data and all(key.isdecimal() and isinstance(value, dict) for key, value in data.items()):
        return list(data.values())
    return [data]


def _known(item: dict[str, Any], keys: Collection[str]) -> list[str]:
    return [key for key in item if key in keys or key.lower() in keys]


def _unnested(item: Any, keys: Collection[str]) -> list[Any]:
    """An item, or those in a list of it, each with what is said once for all of them."""
    key = _nested_in(item, keys) if isinstance(item, dict) else None
    if key is None:
        return [item]
    inner = [_surrounded(item, key, one, keys) for one in item[key] if not _is_empty(one, keys)]
    return [found for one in inner for found in _unnested(one, keys)]


def _nested_in(item: dict[str, Any], keys: Collection[str], deep: int = _DEEP) -> str | None:
    """The key of an item's list of items; None where it asks something itself, or what is listed asks nothing."""
    key = next((key for key in _NESTED if _are_objects(item.get(key))), None)
    if key is None or not deep:
        return None
    # Self-Instruct has an instruction for all of the inputs, and an answer to each.
    is_seed = key == "instances" and _known(item, keys) == ["instruction"] and not {*ANSWERS, *LATER} & item.keys()
    if _known(item, keys) and not (is_seed and all({"input", "output"} <= one.keys() for one in item[key])):
        return None
    asked = [one for one in item[key] if not _is_empty(one, keys)]
    ask = [bool(_known(one, keys)) or _nested_in(one, keys, deep - 1) is not None for one in asked]
    return key if ask and all(ask) else None


def _is_empty(item: dict[str, Any], keys: Collection[str]) -> bool:
    """Whether an item only has a list of items without any: a paragraph without questions."""
    return not _known(item, keys) and any(item.get(key) == [] for key in _NESTED)


def _surrounded(outer: dict[str, Any], key: str, item: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """An item out of the list under a key of another, with what that one says for all of them."""
    if key == "qas" and (context := text_of(outer.get("context"))):
        return {"context": context, **item}
    if key not in ("Instances", "instances"):
        return item
    if "instruction" in outer:
        return {"instruction": outer["instruction"], **item}
    definition = text_of(outer.get("Definition")) or text_of(outer.get("definition"))
    if definition and isinstance(item.get("output"), list):  # of which each is right: as the Hub has them
        item = {"targets" if name == "output" else name: value for name, value in item.items()}
    return _asked_after(definition, item, keys)


def _asked_after(before: str, item: dict[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """An item whose question is its `input`, with a text that comes before it, unless it quotes that."""
    asked = item.get("input")
    if not before or _known(item, keys) != ["input"] or not isinstance(asked, str) or before in asked:
        return item
    return {**item, "input": f"{before}\n\n{asked}"}


def _lists(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_column(value: Any) -> bool:
    """Whether a known key holds its values for all items: texts or lists, one after another or by number."""
    if isinstance(value, dict):
        return bool(value) and all(key.isdecimal() for key in value)
    return (
        isinstance(value, list)
        and bool(value)
        and (all(isinstance(one, str) for one in value) or all(_are_objects(one) for one in value))
    )


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, dict) for one in value)


def _transposed(path: Path, data: dict[str, Any]) -> list[Any]:
    """Columns (key -> values) as items."""
    columns = {key: list(value.values()) if isinstance(value, dict) else value for key, value in data.items()}
    lengths = {len(column) if isinstance(column, list) else 0 for column in columns.values()}
    if len(lengths) > 1:
        raise InputError(f"{path}: has columns of different lengths, or beside them what is none")
    return [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
