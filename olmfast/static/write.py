"""Static merges: a merge file or a plan -> a folder, streamed. No model is built and nothing is evaluated."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from olmfast import _shards
from olmfast.config.loading import read_size
from olmfast.config.mergekit import MergeConfig, load_merge_config
from olmfast.errors import FileChanged, InputError, Interrupted
from olmfast.observer import Observer
from olmfast.output.card import merge_card
from olmfast.output.folder import OutputFolder, check_space, parent_of
from olmfast.output.writer import write_folder, write_text, writing
from olmfast.static.documents import output_of, plan_documents
from olmfast.static.mergekit import plan_merge
from olmfast.static.plan import Plan, memory_bytes
from olmfast.static.vocabularies import check_written
from olmfast.weights.devices import pick_device
from olmfast.weights.sources import Sources

SHARD_SIZE = 5_000_000_000


@dataclass(frozen=True)
class Written:
    """A merge that is on the disk."""

    output_dir: Path
    account: str
    n_bytes: int
    elapsed_s: float

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "output_dir": str(self.output_dir),
            "account": self.account,
            "bytes": self.n_bytes,
            "elapsed_s": round(self.elapsed_s, 3),
        }


def merge(
    config: MergeConfig | Mapping[str, Any] | str | Path,
    output: str | Path,
    *,
    device: str = "cpu",
    shard_size: int | str = SHARD_SIZE,
    max_ram: int | str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    allow_mismatch: Collection[str] = (),
    remote_code_files: bool = True,
    observer: Observer | None = None,
) -> Written:
    """Merge models as a merge file in mergekit's form says, and write the result to the folder `output`.

    `config` is the file's path, what it holds (paths are then relative to the working directory), or a MergeConfig.
    Tensors are computed on `device` (`cpu`, `cuda`, `cuda:1`, `auto`); no file of weights is larger than `shard_size`,
    a number of bytes or `5GB`; `seed` is that of DARE and DELLA. `allow_mismatch` are keys of config.json that may
    differ although the same weights then mean something else, `tokenizer` and `id2label` among them. Python files that
    a model brings are copied, and never run; without `remote_code_files`, they and what names them are left out.

    Raises InputError, before anything is written, for a merge file or models that do not fit, an output that is there
    (unless `overwrite`), too little space, a merge that is estimated to need more memory than `max_ram`, and, unless
    `allow_nonfinite`, for NaN and infinity; Interrupted after Ctrl-C, OlmfastError when a model's file is changed
    meanwhile. Both leave no folder `output`.
    """
    if not isinstance(config, MergeConfig):
        config = load_merge_config(config)
    output = Path(output)
    options: dict[str, Any] = {
        "device": device,
        "shard_size": shard_size,
        "max_ram": max_ram,
        "overwrite": overwrite,
        "allow_nonfinite": allow_nonfinite,
        "observer": observer,
    }
    how: dict[str, Any] = {"seed": seed, "allow_mismatch": allow_mismatch, "remote_code_files": remote_code_files}
    plans, made = plan_documents(config, **how), dict[str, Path]()
    places = [output_of(document, output) for document in config.earlier]
    if places:
        limit = read_options(device, shard_size, max_ram)[2]
        _check_outputs(plans, [OutputFolder(place, overwrite=overwrite) for place in (*places, output)], limit)
    for document, place in zip(config.earlier, places, strict=True):
        write_merge(plan_merge(document, made=made, **how), place, **options)
        made[str(document.name)] = place
    return write_merge(plan_merge(config, made=made, **how) if made else plans[-1], output, **options)


def write_merge(
    plan: Plan,
    output: Path,
    *,
    device: str = "cpu",
    shard_size: int | str = SHARD_SIZE,
    max_ram: int | str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    observer: Observer | None = None,
) -> Written:
    """Write a plan to `output`: first to `output.partial`, renamed when all is on the disk.

    What a killed merge left in `output.partial` is replaced. Raises what `merge` raises.
    """
    started = time.monotonic()
    observer = observer or Observer()
    target, shard_bytes, limit = read_options(device, shard_size, max_ram)
    folder = OutputFolder(output, overwrite=overwrite)
    check_output(plan, folder, limit)
    check_buffers(plan)
    for warning in plan.warnings:
        observer.note(warning)
    observer.merging(plan.title, plan.n_bytes)
    with folder.lock(empty=True), writing(folder.partial, "the same command"), _one_thread(target):
        sources = Sources(plan.pool, folder.partial, device=target)
        try:
            write_folder(plan.content, sources, folder.partial, shard_bytes, not allow_nonfinite, observer.written)
            if plan.vocabulary is not None:
                check_written(plan.vocabulary, plan.token_rows, folder.partial)
            _write_recipe_and_card(plan, folder.partial)
            _shards.sync_folder(folder.partial)
        except InputError:
            folder.discard()  # it would be refused again
            raise
        except KeyboardInterrupt as error:
            folder.discard()
            raise Interrupted(f"{output}: stopped; nothing of it is left") from error
        except FileChanged as error:
            raise error.with_advice("the same command") from error
        folder.rename()
    return Written(output, plan.account(), plan.n_bytes, time.monotonic() - started)


def read_options(
    device: str, shard_size: int | str = SHARD_SIZE, max_ram: int | str | None = None
) -> tuple[torch.device, int, int | None]:
    """What these options of a merge mean: sizes are in bytes. Raises InputError for what they cannot be."""
    limit = None if max_ram is None else read_size(max_ram, "--max-ram")
    return pick_device(device, "--device"), read_size(shard_size, "--shard-size"), limit


@contextmanager
def _one_thread(device: torch.device) -> Iterator[None]:
    """On a CPU one thread of torch: chunks are small, and threads waiting for each other would cost what they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1 if device.type == "cpu" else before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def check_output(plan: Plan, folder: OutputFolder, max_ram: int | None) -> None:
    """Raise InputError for an output that must not be replaced, or does not fit on this machine.

    What a killed command left half-way on this output is put right first, as soon as the inputs have been checked.
    """
    folder.check(plan.paths)
    check_space(folder.output, plan.n_bytes)
    held = psutil.Process().memory_info().rss + memory_bytes(plan)
    if max_ram is not None and held > max_ram:
        raise InputError(f"--max-ram {max_ram}: the merge needs about {held} bytes; allow at least that")


def _check_outputs(plans: Sequence[Plan], folders: Sequence[OutputFolder], max_ram: int | None) -> None:
    """The same of the results of several documents, none of which may replace what a later one reads."""
    for plan, folder in zip(plans, folders, strict=True):
        for other in plans:
            folder.check_apart(other.paths)
        check_output(plan, folder, max_ram)
    check_space(folders[-1].output, sum(plan.n_bytes for plan in plans))


def check_buffers(plan: Plan) -> None:
    """Raise InputError for an integer tensor that is not the same in all models: no method can merge it."""
    for copies in plan.buffers:
        digests = {plan.pool[model].digest(tensor) for model, tensor in copies}
        if len(digests) > 1:
            listed = ", ".join(model for model, _ in copies)
            raise InputError(f"{copies[0][1]}: holds integers and differs between {listed}; it cannot be merged")


def _write_recipe_and_card(plan: Plan, folder: Path) -> None:
    if plan.recipe_file:
        write_text(folder / plan.recipe_file, plan.recipe_text)
    base = plan.content.base.name
    names = [base, *(name for name in plan.pool.names if name != base)]
    notes = [*plan.warnings, *plan.notes]
    card = merge_card(names, plan.pool.made_of(names), plan.title, plan.recipe_text, plan.account(), notes)
    write_text(folder / "README.md", card)


def copy_rate(plan: Plan, near: Path, n_bytes: int = 32 << 20) -> float:
    """Bytes per second at which a model's weights are copied to the disk of `near`, measured by copying a few."""
    infos = (info for donor in plan.pool for tensor in donor.tensors.values() for info in tensor.places())
    info = max(infos, key=lambda info: info.n_bytes)
    n_bytes = min(n_bytes, info.n_bytes)
    started = time.monotonic()
    trial = None
    try:
        descriptor, name = tempfile.mkstemp(prefix=".olmfast-", dir=parent_of(near))
        os.close(descriptor)
        trial = Path(name)
        output = _shards.Output(trial, n_bytes)
        buffer = bytearray(n_bytes)
        info.shard.read_into(info.offset, buffer)
        output.write(0, buffer)
        output.finish()
        return n_bytes / max(time.monotonic() - started, 1e-6)
    except OSError as error:
        raise InputError(f"{near}: a trial copy failed: {error.filename}: {error.strerror}") from error
    finally:
        if trial is not None:
            trial.unlink(missing_ok=True)
