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
