"""Files that are written: the right bytes by every way of copying, and errors that name the file at fault."""

import os
import resource

import pytest
from safetensors.numpy import save_file

from olmfast import _shards

np = pytest.importorskip("numpy")


@pytest.fixture
def shard(tmp_path):
    save_file({"x": np.random.default_rng(0).integers(0, 255, 3_000_001, dtype=np.uint8)}, tmp_path / "source")
    return _shards.Shard(tmp_path / "source")


@pytest.mark.parametrize(("first", "used"), [(0, None), (1, "sendfile"), (2, "buffer")])
@pytest.mark.parametrize(("offset", "skip"), [(0, 0), (4096, 8192), (13, 77)])
def test_copies_the_same_bytes_by_every_way(tmp_path, shard, first, used, offset, skip):
    raw = (tmp_path / "source").read_bytes()
    output = _shards.Output(tmp_path / "out", offset + len(raw) - skip + 4)
    output._first_method = first
    way = output.copy(offset, shard, skip, len(raw) - skip)
    assert way == used or (used is None and way in ("copy_file_range", "sendfile", "buffer"))
    output.write(offset + len(raw) - skip, b"last")
    output.finish()
    assert (tmp_path / "out").read_bytes() == bytes(offset) + raw[skip:] + b"last"


@pytest.fixture(params=[True, False], ids=["past the page cache", "through it"])
def output_of(request, tmp_path):
    def made(n_bytes):
        output = _shards.Output(tmp_path / "out", n_bytes)
        output._direct = request.param
        return output

    return made


@pytest.mark.parametrize("seed", range(4))
def test_what_is_written_in_pieces_is_where_it_belongs(tmp_path, shard, output_of, seed):
    """Pieces of any length, in and out of order, some of them copied: all that a shard of a merge can be made of."""
    dice = np.random.default_rng(seed)
    raw, n_bytes = (tmp_path / "source").read_bytes(), 14_000_000 + int(dice.integers(10_000))
    expected, output, at = bytearray(n_bytes), output_of(n_bytes), 0
    pieces = []
    while at < n_bytes:
        n = min(n_bytes - at, int(dice.choice([1, 8, 700, 4096, 70_001, 2_999_000, 4 << 20])))
        pieces.append((at, n))
        at += n
    if seed % 2:
        dice.shuffle(pieces)
    for at, n in pieces:
        way = dice.integers(3) if n <= len(raw) else 0
        if way == 2:
            output.copy(at, shard, 0, n)
            expected[at : at + n] = raw[:n]
            continue
        values = dice.integers(256, size=n, dtype=np.uint8)
        if way == 1:
            output.write(at, values)
        else:
            room = np.frombuffer(output.room(at, n), dtype=np.uint8)
            assert room.ctypes.data % 4096 == at % 4096
            room[:] = values
        expected[at : at + n] = values.tobytes()
    output.finish()
    assert (tmp_path / "out").read_bytes() == expected


def test_a_disk_that_fails_later_is_named_by_a_later_call(tmp_path, output_of):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    output = output_of(20 << 20)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9 << 20, hard))
    try:
        output.write(0, bytes(9 << 20))
        with pytest.raises(OSError, match="cannot be written: File too large") as error:
            output.write(9 << 20, bytes(11 << 20))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(tmp_path / "out")


def test_room_outlives_its_output(tmp_path, output_of):
    output = output_of(100)
    room = output.room(0, 100)
    del output
    room[:] = bytes(100)
    with pytest.raises(IndexError, match="no room for so many bytes"):
        _shards.Output(tmp_path / "out", 9 << 20).room(0, _shards.ROOM_BYTES + 1)


def test_copies_from_several_files_in_turn(tmp_path, shard):
    save_file({"y": np.arange(1000)}, tmp_path / "second")
    second = _shards.Shard(tmp_path / "second")
    output = _shards.Output(tmp_path / "out", 300)
    for i, source in enumerate((shard, second, shard)):
        output.copy(100 * i, source, 50, 100)
    output.finish()
    raws = [(tmp_path / name).read_bytes()[50:150] for name in ("source", "second", "source")]
    assert (tmp_path / "out").read_bytes() == b"".join(raws)


@pytest.mark.parametrize("first", [0, 1, 2])
def test_a_source_that_shrank_is_named(tmp_path, shard, first):
    output = _shards.Output(tmp_path / "out", shard.size)
    output._first_method = first
    output.copy(0, shard, 0, 10)
    os.truncate(tmp_path / "source", 1_000_000)
    with pytest.raises(OSError, match="shrank") as error:
        output.copy(0, shard, 0, shard.size)
    assert error.value.filename == str(tmp_path / "source")


def test_a_source_that_changed_before_is_named(tmp_path, shard):
    os.utime(tmp_path / "source", ns=(5, 5))
    with pytest.raises(OSError, match="was changed while in use") as error:
        _shards.Output(tmp_path / "out", 10).copy(0, shard, 0, 10)
    assert error.value.filename == str(tmp_path / "source")


def test_writing_outside_is_refused(tmp_path, shard):
    output = _shards.Output(tmp_path / "out", 100)
    for offset, n in ((0, 101), (100, 1), (2**64 - 1, 1), (50, 51)):
        with pytest.raises(IndexError, match="lie outside the file of 100"):
            output.write(offset, bytes(n))
        with pytest.raises(IndexError, match="lie outside the file of 100"):
            output.room(offset, n)
        with pytest.raises(IndexError, match="lie outside the file of 100"):
            output.copy(offset, shard, 0, n)
    with pytest.raises(IndexError, match="lie outside the file"):
        output.copy(0, shard, shard.size - 1, 2)


def test_no_room_is_said_at_once_and_names_the_output(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, hard))
    try:
        with pytest.raises(OSError, match="cannot reserve 2097152 bytes") as error:
            _shards.Output(tmp_path / "out", 2 << 20)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert error.value.filename == str(tmp_path / "out")


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(OSError, match="cannot be opened") as error:
        _shards.Output(tmp_path / "no" / "out", 1)
    assert error.value.filename == str(tmp_path / "no" / "out")
    _shards.sync_folder(tmp_path)
    with pytest.raises(OSError, match="cannot be opened"):
        _shards.sync_folder(tmp_path / "no")


def test_file_names_need_not_be_utf8(tmp_path):
    name = os.fsencode(tmp_path) + b"/\xff.safetensors"
    output = _shards.Output(name, 3)
    output.write(0, b"abc")
    output.finish()
    with pytest.raises(_shards.FormatError, match="3 bytes are too few"):
        _shards.Shard(name)
