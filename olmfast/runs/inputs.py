"""Everything a run reads, opened and checked before anything is written."""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch

from olmfast import __version__
from olmfast.config.run import RunConfig
from olmfast.errors import InputError
from olmfast.evaluation.conversations import load_conversations
from olmfast.evaluation.encoding import Dataset, load_datasets
from olmfast.evaluation.model import pick_device, pick_dtype
from olmfast.observer import Observer
from olmfast.output.folder import check_space
from olmfast.weights.checkpoint import Checkpoint, read_json
from olmfast.weights.digests import DIGESTS, DigestCache
from olmfast.weights.pool import Pool


@dataclass(frozen=True)
class Inputs:
    """Everything a run reads, opened and checked; nothing has been written yet."""

    config: RunConfig
    pool: Pool
    tokenizer: Any
    datasets: Mapping[str, Dataset]
    holdout: Mapping[str, Dataset]
    stop_tokens: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    @classmethod
    def open(cls, config: RunConfig, observer: Observer, download: bool = True, weights: bool = True) -> Inputs:
        """Open donors (downloaded where needed and allowed) and datasets; with `weights`, look through these for NaN.

        Raises InputError with a line for everything that is unusable, as far as one fault does not hide another.
        """
        faults: list[str] = []
        pool = None
        with _noted(faults):
            device = pick_device(config.device)
            dtype = pick_dtype(config.dtype, device)
        names = [config.base_name, *(name for name in config.models if name != config.base_name)]
        digests = DigestCache()
        digests.load([config.output_dir.with_name(f"{config.output_dir.name}.partial") / DIGESTS])
        with _noted(faults):
            pool = Pool.open(names, config.models_dir, config.config_dir, digests=digests, download=download)
        if pool is None:  # without a tokenizer, what can be said of the datasets
            for name, entry in {**config.dataset, **config.holdout}.items():
                with _noted(faults):
                    load_conversations(config.dataset_dir / name, entry.mode, entry.samples)
            raise InputError("\n".join(faults))
        for warning in pool.warnings:
            observer.note(warning)
        context = pool.architecture.context
        datasets: dict[str, Dataset] = {}
        with _noted(faults):
            tokenizer, stop_tokens = load_tokenizer(pool[config.base_name])
            for name, entry in {**config.dataset, **config.holdout}.items():
                with _noted(faults):
                    datasets |= load_datasets(config.dataset_dir, {name: entry}, tokenizer, context)
        for name, dataset in datasets.items():
            if dataset.left_out:
                observer.note(f"{name}: {dataset.left_out} samples longer than {context} tokens are left out")
        for check in (check_output, check_units):
            with _noted(faults):
                check(config, pool)
        with _noted(faults):
            check_space(config.output_dir, max(donor.n_bytes for donor in pool))
        if faults:
            raise InputError("\n".join(faults))
        if weights:
            pool.check_finite()
        judged, held_out = ({name: datasets[name] for name in part} for part in (config.dataset, config.holdout))
        if config.metric_dir is not None:
            observer.note("metric_dir: accepted for compatibility and ignored; metrics lie in the output folder")
        return cls(config, pool, tokenizer, judged, held_out, stop_tokens, device, dtype)

    def header(self) -> dict[str, Any]:
        """What identifies the run: a resumed run must have the same config, donors and datasets."""
        every = {**self.datasets, **self.holdout}
        return {
            "version": 1,
            "config": self.config.decisive(),
            "donors": {donor.name: donor.fingerprint() for donor in self.pool},
            "datasets": {name: dataset.digest for name, dataset in every.items()},
            "samples": {name: len(dataset.samples) for name, dataset in every.items()},
            "left_out": {name: dataset.left_out for name, dataset in every.items() if dataset.left_out},
            "environment": environment(self.device, self.dtype),
        }


def load_tokenizer(donor: Checkpoint) -> tuple[Any, tuple[int, ...]]:
    """The donor's tokenizer and the tokens that end a generation. Raises InputError if there is none."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(donor.folder, trust_remote_code=False)
    except Exception as error:  # many types, depending on the tokenizer's class
        reason = " ".join(str(error).split()) or type(error).__name__
        raise InputError(f"{donor.folder}: the tokenizer cannot be loaded: {reason}") from None
    generation = donor.folder / "generation_config.json"
    ends = read_json(generation).get("eos_token_id") if generation.is_file() else None
    listed = ends if isinstance(ends, list) else [ends]
    stops = {token for token in (*listed, tokenizer.eos_token_id) if isinstance(token, int)}
    return tokenizer, tuple(sorted(stops))


def check_output(config: RunConfig, pool: Pool) -> None:
    """Raise InputError when replacing the output folder would delete what the run reads."""
    output = config.output_dir.resolve()
    read = {f"the donor {donor.name}": donor.folder for donor in pool}
    read |= {f"the dataset {name}": config.dataset_dir / name for name in (*config.dataset, *config.holdout)}
    for what, path in {**read, "the config": config.config_dir}.items():
        if output in (path.resolve(), *path.resolve().parents):
            raise InputError(f"output_dir: {config.output_dir} holds {what}; name a folder for the result alone")


def check_units(config: RunConfig, pool: Pool) -> None:
    """Raise InputError when a pattern of `units` matches nothing, as a misspelt one does."""
    units = pool.architecture.module_units(pool.tensors)
    names = [name for unit in units for name in (unit.name, *unit.tensors)]
    for pattern in config.units:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise InputError(
                f"units: {pattern!r} matches no module inside the blocks; they are named such as {units[0].name}"
            )


@contextmanager
def _noted(faults: list[str]) -> Iterator[None]:
    """An InputError of what stands inside is one fault more, and what stands behind goes on."""
    try:
        yield
    except InputError as error:
        faults.append(str(error))


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """What the result's bytes depend on beside config, donors and datasets."""
    import transformers

    return {
        "olmfast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
    }
