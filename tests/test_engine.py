"""What the shard engine carries: donors into the live model, recipes onto the disk, digests from run to run."""

import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from olmfast.errors import OlmfastError
from olmfast.evaluation.upload import Uploader
from olmfast.output.writer import PAGE_BYTES, content_of, write_folder
from olmfast.testing import tiny_model, tiny_run
from olmfast.weights.checkpoint import Checkpoint, copy_tensors, read_header
from olmfast.weights.digests import DIGESTS, DigestCache
from olmfast.weights.expressions import Copy, merge, whole
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Sources


@pytest.fixture
def donors(tmp_path) -> Pool:
    for seed, name in enumerate(("one", "two")):
        tiny_model(tmp_path / name, seed=seed, dtype=torch.bfloat16)
    return Pool.open(["one", "two"], tmp_path, tmp_path)


def recipe_of(pool: Pool) -> Recipe:
    """Half of the tensors from each donor, one of them computed."""
    names = list(pool.tensors)
    tensors = {name: Copy("one" if i % 2 else "two", name) for i, name in enumerate(names)}
    tensors[names[3]] = merge("linear", [Copy("one", names[3]), Copy("two", names[3])])
    return Recipe("one", tensors)


@pytest.mark.parametrize("shard_size", [10**9, 20_000], ids=["one file", "shards"])
def test_written_tensors_are_what_the_recipe_says(donors, tmp_path, shard_size):
    recipe, sources = recipe_of(donors), Sources(donors, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    write_folder(content_of(recipe, sources, donors["one"]), sources, out, shard_size)
    written: dict[str, torch.Tensor] = {}
    for path in sorted(out.glob("model*.safetensors")):
        written |= load_file(path)
    assert set(written) == set(recipe.tensors)
    for name, expression in recipe.tensors.items():
        assert torch.equal(written[name], sources.value(expression).to(written[name].dtype)), name
    assert Checkpoint(out).n_bytes == donors["one"].n_bytes


@pytest.mark.usefixtures("donors")
def test_a_plain_copy_keeps_every_byte_in_its_place_within_a_page(tmp_path):
    source = tmp_path / "one" / "model.safetensors"
    tensors = load_file(source)
    save_file(tensors, source, metadata={"format": "pt", "note": "x" * 5000})  # a header of another length
    pool = Pool.open(["one", "two"], tmp_path, tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    sources = Sources(pool, tmp_path)
    write_folder(content_of(whole("one", pool.tensors), sources, pool["one"]), sources, out, 10**9)
    for name, info in Checkpoint(out).tensors.items():
        assert (info.offset - pool["one"].tensors[name].offset) % PAGE_BYTES == 0
    raw = (out / "model.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    assert json.loads(raw[8 : 8 + length])["__metadata__"] == {"format": "pt"}


def test_a_donor_that_shrinks_while_the_result_is_written_is_named(donors, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    os.truncate(tmp_path / "two" / "model.safetensors", 5000)
    sources = Sources(donors, tmp_path)
    with pytest.raises(OlmfastError, match=r"two.model\.safetensors: .*shrank from \d+ to 5000 bytes while in use"):
        write_folder(content_of(recipe_of(donors), sources, donors["one"]), sources, out, 10**9)


LAYOUTS = {
    "whole": lambda parameter: parameter[:40],
    "slice of a fused parameter": lambda parameter: parameter[20:60],
    "transposed": lambda parameter: parameter.view(30, 80)[:, 10:50].t(),
}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("buffer_bytes", [64, 1000, 1 << 20], ids=["row too large", "several", "one"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_upload_in_pieces_fills_the_parameter(tmp_path, layout, buffer_bytes, dtype):
    stored = torch.randn(40, 30).bfloat16()
    save_file({"w": stored, "scalar": torch.tensor(3.0), "none": torch.zeros(0, 4)}, tmp_path / "model.safetensors")
    infos = {info.name: info for info in read_header(tmp_path / "model.safetensors")}
    parameter = torch.zeros(80, 30, dtype=dtype)
    expected = parameter.clone()
    LAYOUTS[layout](expected).copy_(stored)
    scalar = torch.zeros(())
    pairs = [(infos["w"], LAYOUTS[layout](parameter)), (infos["scalar"], scalar), (infos["none"], torch.zeros(0, 4))]
    Uploader(torch.device("cpu"), buffer_bytes).upload(pairs)
    assert torch.equal(parameter, expected)
    assert scalar == 3.0


def test_a_tensor_does_not_fit_another_shape(donors):
    info = donors["one"].tensors[donors.tensors[0]]
    with pytest.raises(OlmfastError, match="cannot be copied into"):
        copy_tensors([info.into(torch.zeros(3, 3))])
    with pytest.raises(OlmfastError, match="cannot be copied into"):
        Uploader(torch.device("cpu")).send([(info, torch.zeros(3, 3))], None)
    with pytest.raises(OlmfastError, match="cannot be copied into"):
        Uploader(torch.device("cpu"), 64, 64).upload([(info, torch.zeros(info.shape[0] + 3, *info.shape[1:]))])
    with pytest.raises(OlmfastError, match="not to meta"):
        info.into(torch.zeros(info.shape, device="meta"))


def test_digests_are_read_back_only_for_an_unchanged_file(tmp_path):
    folder = tiny_model(tmp_path / "one")
    first = Checkpoint(folder)
    name = next(iter(first.tensors))
    first.digests.keep_in(tmp_path / DIGESTS)
    expected = first.digest(name)
    with (tmp_path / DIGESTS).open("a") as file:
        file.write('["torn li')
    cache = DigestCache()
    cache.load([tmp_path / "absent", tmp_path / DIGESTS])
    again = Checkpoint(folder, digests=cache)
    shard = again.tensors[name].shard
    assert again.digest(name) == expected
    assert not shard.is_mapped  # nothing was read for it
    os.utime(folder / "model.safetensors", ns=(7, 7))
    changed = Checkpoint(folder, digests=cache)
    assert changed.digest(name) == expected
    assert changed.tensors[name].shard.is_mapped


def test_thirty_large_donors_open_in_well_under_a_second_and_hold_no_weights(tmp_path):
    """15 GB each, in three shards with a real model's number of tensors; sparse files, so no disk is used."""
    n_blocks, side = 32, 8704
    names = [f"model.layers.{i}.{m}.weight" for i in range(n_blocks) for m in ("q", "k", "v")]
    folder = tmp_path / "first"
    folder.mkdir()
    weight_map = {}
    for part in range(3):
        held, position, header = names[part::3], 0, {}
        for name in held:
            end = position + side * side * 2
            header[name] = {"dtype": "BF16", "shape": [side, side], "data_offsets": [position, end]}
            weight_map[name] = f"model-{part + 1}.safetensors"
            position = end
        text = json.dumps(header).encode()
        with (folder / f"model-{part + 1}.safetensors").open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            file.truncate(8 + len(text) + position)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "num_hidden_layers": n_blocks}))
    others = [folder]
    for i in range(29):
        others.append(tmp_path / str(i))
        others[-1].mkdir()
        for path in folder.iterdir():
            os.link(path, others[-1] / path.name)
    began = time.perf_counter()
    pool = [Checkpoint(path) for path in others]
    elapsed_s = time.perf_counter() - began
    assert sum(donor.n_bytes for donor in pool) > 30 * 14e9
    assert not any(info.shard.is_mapped for donor in pool for info in donor.tensors.values())
    assert elapsed_s < 1.0


def olmfast(config: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "olmfast.cli", "run", str(config), "-q", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_truncating_a_mapped_donor_stops_the_run_and_resume_works_once_it_is_back(tmp_path):
    config = tiny_run(tmp_path, boundary_select=True, layer_swap=True)
    output = tmp_path / "out"
    for path in (output, tmp_path / "out.partial"):
        assert not path.exists()
    donor = sorted(tmp_path.glob("**/model.safetensors"))[-1]
    shutil.copy2(donor, tmp_path / "kept")
    process = olmfast(config)
    report = tmp_path / "out.partial" / "merge_report.json"

    def truncate_when_the_search_has_begun() -> None:
        while not report.exists() and process.poll() is None:
            time.sleep(0.01)
        os.truncate(donor, 4096)

    saboteur = threading.Thread(target=truncate_when_the_search_has_begun)
    saboteur.start()
    _, errors = process.communicate(timeout=120)
    saboteur.join()
    assert process.returncode == 1, errors
    assert str(donor) in errors
    assert "to 4096 bytes while in use; put the file back as it was and use --resume" in errors
    assert "Traceback" not in errors
    json.loads(report.read_text())
    shutil.copy2(tmp_path / "kept", donor)
    resumed = olmfast(config, "--resume")
    _, errors = resumed.communicate(timeout=240)
    assert resumed.returncode == 0, errors
    assert Checkpoint(output).n_bytes > 0
