"""Buffers that take turns are filled in their order, none before it is free; a wait tells what went wrong."""

import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from safetensors.torch import save_file

from olmfast import _shards

N, N_GROUPS = 1 << 20, 12  # values of a group: two pieces for the threads


@pytest.fixture
def path(tmp_path):
    save_file({f"{i:02d}": torch.full((N,), i, dtype=torch.int16) for i in range(N_GROUPS)}, tmp_path / "m")
    return tmp_path / "m"


def into(shard: _shards.Shard, target: torch.Tensor, which: int) -> _shards.Transfer:
    _, dtype, shape, offset, n_bytes = shard.tensors[which]
    return _shards.Transfer(shard, offset, dtype, shape, target.data_ptr(), n_bytes, dtype, target.stride())


def is_of(buffer: torch.Tensor, group: int) -> bool:
    return bool((buffer == group).all())


@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("n_buffers", [1, 3, 20])
def test_groups_come_in_their_order(path, threads, n_buffers):
    shard, before = _shards.Shard(path), _shards.threads()
    buffers = torch.full((n_buffers, N), -1, dtype=torch.int16)
    _shards.set_threads(threads)
    try:
        filling = _shards.Filling(n_buffers)
        for i in range(N_GROUPS):
            filling.add([into(shard, buffers[i % n_buffers], i)])
        for i in range(N_GROUPS):
            filling.wait()
            assert is_of(buffers[i % n_buffers], i)
            filling.release()
    finally:
        _shards.set_threads(before)


def test_no_buffer_is_overwritten_before_it_is_released(path):
    shard, buffer = _shards.Shard(path), torch.full((N,), -1, dtype=torch.int16)
    filling = _shards.Filling(1)
    for i in range(3):
        filling.add([into(shard, buffer, i)])
    for i in range(3):
        filling.wait()
        time.sleep(0.02)
        assert is_of(buffer, i)
        filling.release()


def test_a_group_may_hold_several_tensors_or_none(path):
    shard, buffers = _shards.Shard(path), torch.full((4, N), -1, dtype=torch.int16)
    filling = _shards.Filling(2)
    filling.add([into(shard, buffers[i], i) for i in range(4)])
    filling.add([])
    filling.wait()
    assert all(is_of(buffers[i], i) for i in range(4))
    filling.wait()


def test_waiting_for_what_cannot_come_is_refused(path):
    shard, buffer = _shards.Shard(path), torch.empty(N, dtype=torch.int16)
    filling = _shards.Filling(1)
    with pytest.raises(RuntimeError, match="no group is left"):
        filling.wait()
    filling.add([into(shard, buffer, 0)])
    filling.add([into(shard, buffer, 1)])
    filling.wait()
    with pytest.raises(RuntimeError, match="has not been released"):
        filling.wait()
    filling.release()
    filling.wait()
    assert is_of(buffer, 1)
    with pytest.raises(ValueError, match="at least one buffer"):
        _shards.Filling(0)


def test_a_file_that_shrinks_is_named_by_the_group_that_needed_it(path):
    shard, buffers = _shards.Shard(path), torch.zeros(2, N, dtype=torch.int16)
    filling = _shards.Filling(2)
    filling.add([into(shard, buffers[0], 0)])
    filling.wait()
    os.truncate(path, 1 << 20)
    filling.add([into(shard, buffers[1], N_GROUPS - 1)])
    with pytest.raises(OSError, match=f"{N_GROUPS - 1}: shrank") as error:
        filling.wait()
    assert error.value.filename == str(path)


def test_what_is_not_begun_is_left_out_when_nobody_wants_it(path):
    shard, buffer = _shards.Shard(path), torch.full((N,), -1, dtype=torch.int16)
    filling = _shards.Filling(1)
    for i in range(N_GROUPS):
        filling.add([into(shard, buffer, i)])
    filling.wait()
    filling.close()  # waits for the threads, which wait for the buffer
    assert is_of(buffer, 0)
    filling.release()
    with pytest.raises(RuntimeError, match="closed"):
        filling.wait()


def test_others_may_copy_while_a_buffer_is_waited_for(path):
    shard, buffers = _shards.Shard(path), torch.full((2, N), -1, dtype=torch.int16)
    filling = _shards.Filling(1)
    for i in range(2):
        filling.add([into(shard, buffers[0], i)])
    filling.wait()
    _shards.copy([into(shard, buffers[1], 5)])
    assert is_of(buffers[0], 0)
    assert is_of(buffers[1], 5)
    filling.release()
    filling.wait()
    assert is_of(buffers[0], 1)


def test_where_no_thread_can_be_started_the_caller_does_the_work(path):
    """No stack fits into what is left of the address space."""
    code = """
        import ctypes, resource, sys
        from olmfast import _shards
        shard = _shards.Shard(sys.argv[1])
        groups = shard.tensors[:3]
        buffers = [ctypes.create_string_buffer(group[4]) for group in groups]
        pages = int(open("/proc/self/statm").read().split()[0])
        before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 20), before[1]))
        filling = _shards.Filling(2)
        resource.setrlimit(resource.RLIMIT_AS, before)
        threads = len(__import__("os").listdir("/proc/self/task"))
        for (_, dtype, shape, offset, n_bytes), buffer in zip(groups, buffers):
            address = ctypes.addressof(buffer)
            filling.add([_shards.Transfer(shard, offset, dtype, shape, address, n_bytes, dtype, [1])])
        for i, buffer in enumerate(buffers):
            filling.wait()
            assert buffer.raw[: groups[i][4]] == i.to_bytes(2, "little") * (groups[i][4] // 2), i
            filling.release()
        print(threads)
    """
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), str(path)], capture_output=True, text=True, env=env, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "1"
