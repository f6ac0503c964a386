"""Accept or refuse: the same verdict as the safetensors library on every file, and a message that helps."""

import json
import random
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from olmfast import _shards

BITS = {
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "BOOL": 8, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32,
    "F32": 32, "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
FOUR = b"1234"


def pack(header: str | bytes, data: bytes = b"") -> bytes:
    text = header.encode() if isinstance(header, str) else header
    return struct.pack("<Q", len(text)) + text + data


def one(dtype: object = '"F32"', shape: str = "[1]", offsets: str = "[0,4]", more: str = "") -> str:
    return f'{{"a":{{{more}"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'


def two(first: str = "[0,4]", second: str = "[4,8]", shapes: tuple[str, str] = ("[1]", "[1]")) -> str:
    entries = zip("ab", shapes, (first, second), strict=True)
    listed = (f'"{n}":{{"dtype":"F32","shape":{s},"data_offsets":{o}}}' for n, s, o in entries)
    return "{" + ",".join(listed) + "}"


def lengths_and_text() -> dict[str, bytes]:
    good = one()
    cases = {f"{n} bytes": bytes(n) for n in range(9)}
    for length in (0, 1, len(good) - 1, len(good) + 1, len(good) + 4, len(good) + 5, 10**8, 10**8 + 1, 2**32):
        cases[f"length {length}"] = struct.pack("<Q", length) + good.encode() + FOUR
    for length in (2**63 - 1, 2**63, 2**64 - 9, 2**64 - 8, 2**64 - 1):
        cases[f"length {length}"] = struct.pack("<Q", length) + good.encode() + FOUR
    for n in (0, 1, 3, 5, 8):
        cases[f"{n} bytes of data"] = pack(good, bytes(n))
    for blank in (" ", "\t", "\n", "\r", "\f", "\v", "\0", "\u00a0", "\ufeff", "//", "/**/", "x", ",", "}"):
        cases[f"{blank!r} first"] = pack(blank + good, FOUR)
        cases[f"{blank!r} last"] = pack(good + blank, FOUR)
        cases[f"{blank!r} inside"] = pack(good.replace(":", blank + ":" + blank), FOUR)
    for text in ("", "{}", "[]", "null", "1", '"a"', "true", "{", '{"a"', '{"a":', "{}{}", "[{}]", "{'a':1}", "{,}"):
        cases[f"text {text}"] = pack(text)
    return cases


def names_and_strings() -> dict[str, bytes]:
    names = {
        "empty": b"", "nul escape": rb"\u0000", "nul": b"\0", "newline": b"\n", "delete": b"\x7f", "unit": b"\x1f",
        "quote": rb"\"", "slash": rb"\/", "all escapes": rb"\b\f\n\r\t\\", "bad escape": rb"\x41", "cut": rb"\u12",
        "not hex": rb"\u12g4", "lone high": rb"\ud800", "lone low": rb"\udc00", "high, then text": rb"\ud800abcdef",
        "high, then high": rb"\ud800\ud800", "pair": rb"\ud83d\ude00", "upper case": rb"\uD83D\uDE00",
        "lone byte": b"\xff", "continuation": b"\x80", "overlong": b"\xc0\x80", "overlong 3": b"\xe0\x80\x80",
        "surrogate": b"\xed\xa0\x80", "last before": b"\xed\x9f\xbf", "first after": b"\xee\x80\x80",
        "overlong 4": b"\xf0\x80\x80\x80", "4 bytes": b"\xf0\x9f\x98\x80", "too large": b"\xf4\x90\x80\x80",
        "5 bytes": b"\xf8\x88\x80\x80\x80", "cut 2": b"\xc3", "cut 3": b"\xe2\x82", "cut 4": b"\xf0\x9f\x98",
        "text": "Grün 数".encode(), "dots": b"model.layers.0", "metadata-like": b"__metadata", "long": b"x" * 70000,
    }  # fmt: skip
    return {
        **{f"name {k}": pack(one().encode().replace(b'"a"', b'"' + v + b'"'), FOUR) for k, v in names.items()},
        **{f"value {k}": pack(b'{"__metadata__":{"k":"' + v + b'"}}') for k, v in names.items()},
    }


def fields() -> dict[str, bytes]:
    cases = {}
    numbers = ("1", "0", "-1", "-0", "01", "1.0", "1e0", "1E0", "1.", ".1", "+1", "0x1", "1_0", "true", "null", '"1"')
    huge = (str(2**63), str(2**64 - 1), str(2**64), "9" * 30, "9" * 400, "1e308", "1e309", "1e-999", "0e999", "NaN")
    for text in (*numbers, *huge, "[]", "{}", "Infinity", "-"):
        cases[f"size {text}"] = pack(one(shape=f"[{text}]"), FOUR)
        cases[f"begin {text}"] = pack(one(offsets=f"[{text},4]"), FOUR)
        cases[f"end {text}"] = pack(one(offsets=f"[0,{text}]"), FOUR)
        cases[f"unknown field {text}"] = pack(one(more=f'"x":{text},'), FOUR)
    for text in (
        "[]",
        "[0]",
        "[0,4,5]",
        "[4,0]",
        "[4,8]",
        "[1,5]",
        "{}",
        "null",
        "[0,4,]",
        "[,0,4]",
        "[0 4]",
        "[[0],4]",
    ):
        cases[f"offsets {text}"] = pack(one(offsets=text), FOUR)
    big = 2**32
    for text in ("[]", "[1,1,1]", "[2]", "[0]", "[1,0]", "null", "1", "{}", "[1,]", f"[{big},{big}]", f"[{2**62}]"):
        cases[f"shape {text}"] = pack(one(shape=text), FOUR)
    for text in (f"[{2**64 - 1},0]", f"[{2**64 - 1},2,0]", f"[0,{2**64 - 1},2]", "[0]", "[0,0]"):
        cases[f"empty tensor {text}"] = pack(one(shape=text, offsets="[0,0]"))
    for dtype in (*BITS, "F33", "f32", "", "C128", "U4", "F8", "F32 "):
        for n in (1, 2, 4, 8):
            cases[f"dtype {dtype} in {n}"] = pack(one(f'"{dtype}"', "[1]", f"[0,{n}]"), bytes(n))
        n_bytes = BITS.get(dtype, 8) * 4 // 8
        cases[f"four of {dtype}"] = pack(one(f'"{dtype}"', "[4]", f"[0,{n_bytes}]"), bytes(n_bytes))
    for value in ("null", "1", '["F32"]', "true"):
        cases[f"dtype is {value}"] = pack(one(value), FOUR)
    for value in ("null", "1", '"a"', "[]", "{}", "true", '["F32",[1]]'):
        cases[f"entry is {value}"] = pack(f'{{"a":{value}}}', FOUR)
    for key in ("dtype", "shape", "data_offsets"):
        cases[f"no {key}"] = pack(one().replace(f'"{key}"', '"other"'), FOUR)
        value = {"dtype": '"F32"', "shape": "[1]", "data_offsets": "[0,4]"}[key]
        cases[f"{key} twice"] = pack(one(more=f'"{key}":{value},'), FOUR)
    for depth in (1, 64, 124, 125, 126, 127, 128, 129, 5000, 100000):
        cases[f"lists {depth} deep"] = pack(one(more=f'"x":{"[" * depth}{"]" * depth},'), FOUR)
        cases[f"objects {depth} deep"] = pack(one(more=nest(depth)), FOUR)
    return cases


def nest(depth: int) -> str:
    """A field x whose value is objects nested `depth` deep, as text that `one` can put before the others."""
    return '"x":' + '{"y":' * depth + "1" + "}" * depth + ","


def layouts_and_metadata() -> dict[str, bytes]:
    eight = FOUR * 2
    cases = {
        "two": pack(two(), eight),
        "two, other order": pack(two("[4,8]", "[0,4]"), eight),
        "overlap": pack(two("[0,4]", "[0,4]"), FOUR),
        "partial overlap": pack(two("[0,4]", "[2,6]"), FOUR + b"56"),
        "hole": pack(two("[0,4]", "[8,12]"), eight + FOUR),
        "hole at the start": pack(two("[4,8]", "[8,12]"), eight + FOUR),
        "data left over": pack(two(), eight + b"x"),
        "data missing": pack(two(), eight[:-1]),
        "empty tensor first": pack(two("[0,0]", "[0,4]", ("[0]", "[1]")), FOUR),
        "empty tensor last": pack(two("[4,4]", "[0,4]", ("[0]", "[1]")), FOUR),
        "empty tensor inside another": pack(two("[2,2]", "[0,4]", ("[0]", "[1]")), FOUR),
        "empty tensor beyond": pack(two("[8,8]", "[0,4]", ("[0]", "[1]")), FOUR),
        "end before begin": pack(two("[4,0]", "[0,4]"), FOUR),
        "offset wraps": pack(two("[0,4]", f"[4,{2**64 - 1}]"), eight),
    }
    for value in ("null", "{}", '{"format":"pt"}', "1", "[]", '"a"', '{"a":1}', '{"a":null}', '{"a":{}}', '{"a":"b",}'):
        cases[f"metadata {value}"] = pack(f'{{"__metadata__":{value}}}')
        cases[f"metadata {value} behind"] = pack(one()[:-1] + f',"__metadata__":{value}}}', FOUR)
    cases["metadata twice"] = pack('{"__metadata__":{},"__metadata__":{}}')
    cases["metadata as a tensor"] = pack(one().replace('"a"', '"__metadata__"'), FOUR)
    return cases


def mutations() -> dict[str, bytes]:
    """A good file with bytes replaced, removed, doubled or swapped; the same ones every time."""
    good = pack(two()[:-1] + ',"__metadata__":{"format":"pt"}}', FOUR * 2)
    dice = random.Random(0)
    cases = {}
    for i in range(150):
        raw = bytearray(good)
        for _ in range(dice.choice((1, 1, 1, 2, 4))):
            at = dice.randrange(8, len(raw))
            match dice.randrange(4):
                case 0:
                    raw[at] = dice.choice(b'{}[]",:0149eE-.\\ \xff' + bytes([dice.randrange(256)]))
                case 1:
                    del raw[at]
                case 2:
                    raw[at:at] = raw[at : at + dice.randrange(1, 9)]
                case _:
                    other = dice.randrange(8, len(raw))
                    raw[at], raw[other] = raw[other], raw[at]
        if dice.random() < 0.5:  # else the stated length is wrong as well
            raw[:8] = struct.pack("<Q", max(0, len(raw) - 16))
        cases[f"mutation {i}"] = bytes(raw)
    return cases


CORPUS = {**lengths_and_text(), **names_and_strings(), **fields(), **layouts_and_metadata(), **mutations()}

# Accepted by the library, refused here: whoever reads such a file cannot know what its author meant.
STRICTER = {
    "one name twice": pack('{"a":' + one()[5:-1] + "," + one()[1:], FOUR),
    "one name twice, spelt differently": pack(one()[:-1] + "," + one().replace('"a"', r'"\u0061"')[1:], FOUR),
    "one metadata key twice": pack('{"__metadata__":{"a":"b","a":"c"}}'),
    "an entry as a list": pack('{"a":["F32",[1],[0,4]]}', FOUR),
    "a dtype as an object": pack(one('{"F32":null}'), FOUR),
}


def library_reads(path: Path) -> list[str] | None:
    try:
        with safe_open(path, "numpy") as file:
            return sorted(file.keys())
    except (SafetensorError, OSError):
        return None


def engine_reads(path: Path) -> list[str] | None:
    try:
        return sorted(entry[0] for entry in _shards.Shard(path).tensors)
    except _shards.FormatError:
        return None


def test_corpus_is_large_enough():
    assert len(CORPUS) >= 500


def test_same_verdict_as_the_library_on_the_corpus(tmp_path):
    path = tmp_path / "model.safetensors"
    different = {}
    accepted = 0
    for case, raw in CORPUS.items():
        path.write_bytes(raw)
        library, ours = library_reads(path), engine_reads(path)
        accepted += library is not None
        if library != ours:
            different[case] = (library, ours)
    assert not different
    assert 50 < accepted < len(CORPUS) - 200


@pytest.mark.parametrize("case", STRICTER)
def test_stricter_than_the_library(tmp_path, case):
    path = tmp_path / "model.safetensors"
    path.write_bytes(STRICTER[case])
    assert library_reads(path) is not None
    assert engine_reads(path) is None


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"1234567", "7 bytes are too few for a safetensors file; download it again"),
        (pack(one(shape="[2]"), FOUR), "a: F32 [2] needs 8 bytes, its offsets give 4"),
        (pack(two("[0,4]", "[2,6]"), FOUR + b"56"), "b: overlaps the tensor before it: bytes 2 to 6"),
        (pack(two("[0,4]", "[8,12]"), FOUR * 3), "b: leaves a hole before it"),
        (pack(one(), FOUR[:3]), "expected 4 bytes of data, got 3; the file is truncated: download it again"),
        (pack(one('"F33"'), FOUR), "a: unknown dtype 'F33'"),
        (pack(one(shape="[-1]"), FOUR), "a: expected a size in shape"),
        (pack(one(shape=f"[{2**32},{2**32}]"), FOUR), "is larger than any file"),
        (STRICTER["one name twice"], "a: stands twice"),
        (struct.pack("<Q", 2**63), "header of 9223372036854775808 bytes"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_message_names_file_and_tensor(tmp_path, raw, message):
    path = tmp_path / "model.safetensors"
    path.write_bytes(raw)
    with pytest.raises(_shards.FormatError) as error:
        _shards.Shard(path)
    assert str(error.value).startswith(f"{path}: ")
    assert message in str(error.value)


@st.composite
def headers(draw) -> bytes:
    """A file that is right, or wrong in one of its numbers."""
    entries, position = {}, 0
    for name in draw(st.lists(st.text(max_size=8), unique=True, max_size=5)):
        dtype = draw(st.sampled_from(sorted(BITS)))
        shape = draw(st.lists(st.integers(0, 5), max_size=4))
        n_bits = BITS[dtype]
        for size in shape:
            n_bits *= size
        end = position + n_bits // 8 + draw(st.sampled_from([0] * 12 + [1, -1]))
        entries[name] = {"dtype": dtype, "shape": shape, "data_offsets": [position, max(0, end)]}
        position = max(0, end)
    text = json.dumps(entries, ensure_ascii=draw(st.booleans()))
    return pack(text, bytes(max(0, position + draw(st.sampled_from([0] * 8 + [1, -1])))))


RELAXED = settings(max_examples=300, suppress_health_check=list(HealthCheck), database=None)


@RELAXED
@given(headers())
def test_same_verdict_on_written_headers(tmp_path_factory, raw):
    path = tmp_path_factory.getbasetemp() / "written.safetensors"
    path.write_bytes(raw)
    assert library_reads(path) == engine_reads(path)


@RELAXED
@given(st.binary(max_size=200), st.booleans())
def test_arbitrary_bytes_are_refused_as_the_library_does(tmp_path_factory, raw, framed):
    path = tmp_path_factory.getbasetemp() / "arbitrary.safetensors"
    path.write_bytes(pack(raw) if framed else raw)
    assert library_reads(path) == engine_reads(path)


@RELAXED
@given(st.integers(0, 10**6), st.integers(0, 7), st.integers(0, 255))
def test_one_damaged_byte_gets_the_same_verdict(tmp_path_factory, at, kind, value):
    good = bytearray(pack(two()[:-1] + r',"__metadata__":{"k":"\u00e9é"}}', FOUR * 2))
    at %= len(good)
    if kind == 0:
        del good[at]
    elif kind == 1:
        good.insert(at, value)
    else:
        good[at] = value
    path = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    path.write_bytes(good)
    library, ours = library_reads(path), engine_reads(path)
    assert library == ours or (ours is None and b'"a"' in good and good.count(b'"a"') > 1)


def test_entries_and_metadata_are_what_the_library_reads(tmp_path):
    path = tmp_path / "model.safetensors"
    path.write_bytes(pack(two()[:-1] + r',"__metadata__":{"format":"p\u0074"}}', b"abcdefgh"))
    shard = _shards.Shard(path)
    start = shard.data_start
    assert shard.tensors == [("a", "F32", (1,), start, 4), ("b", "F32", (1,), start + 4, 4)]
    assert shard.metadata == {"format": "pt"}
    assert (shard.path, shard.size) == (str(path), path.stat().st_size)


def test_what_cannot_be_opened_is_an_os_error_with_its_name(tmp_path):
    for path in (tmp_path / "absent.safetensors", tmp_path):
        with pytest.raises(OSError) as error:
            _shards.Shard(path)
        assert error.value.filename == str(path)
