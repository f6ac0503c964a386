"""The one place that puts together what evaluation needs: tokenizer, datasets, sources, live model, scorers."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from olmfast import __version__
from olmfast.config.datasets import DatasetConfig
from olmfast.errors import InputError, told
from olmfast.evaluation.batched import BatchedScorer
from olmfast.evaluation.blueprint import Blueprint, draw_up
from olmfast.evaluation.encoding import Dataset, load_datasets
from olmfast.evaluation.memory import Memory
from olmfast.evaluation.model import WorkingModel
from olmfast.evaluation.rendering import silenced
from olmfast.evaluation.replies import replies
from olmfast.evaluation.scorer import Candidate, Scorer
from olmfast.evaluation.sequential import SequentialScorer
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.devices import pick_device, pick_dtype
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Sources
from olmfast.weights.tokenizer_files import end_tokens

TRIED_TEXT = "What is 2 + 2?\n"
KEPT_BYTES = 1 << 30  # of what blends are worth, so that going back after a trial does not compute them again


@dataclass(frozen=True)
class Settings:
    """How candidates are evaluated; see the keys of the same names in docs/config.md. Limits are in bytes."""

    device: torch.device
    dtype: torch.dtype
    batch_tokens: int = 8192
    max_ram: int | None = None
    max_vram: int | None = None
    scorer: str = "batched"
    parts: int = 1  # the most that the questions of a call are divided into, each computed on its own: `division.py`

    @classmethod
    def of(cls, device: str, dtype: str, where: str = "device", **limits: Any) -> Settings:
        """The settings that a config or a command line names, the device by the option `where`.

        Raises InputError for a device that is not there.
        """
        chosen = pick_device(device, where)
        return cls(chosen, pick_dtype(dtype, chosen), **limits)

    def memory(self) -> Memory:
        """The memory of the device, within the limits."""
        return Memory(self.device, self.max_ram, self.max_vram)


@dataclass(frozen=True)
class Questions:
    """Datasets as a tokenizer encodes them; `stop_tokens` end a generation."""

    tokenizer: Any
    stop_tokens: tuple[int, ...]
    datasets: Mapping[str, Dataset]

    @classmethod
    def load(cls, donor: Checkpoint, folder: Path, entries: Mapping[str, DatasetConfig]) -> Questions:
        """Read datasets (file name in `folder` -> how it is scored) with a donor's tokenizer.

        Raises InputError that names each dataset that is unusable, or the tokenizer.
        """
        tokenizer, stop_tokens = load_tokenizer(donor)
        datasets: dict[str, Dataset] = {}
        faults: list[str] = []
        for name, entry in entries.items():
            try:
                loaded = load_datasets(folder, {name: entry}, tokenizer, donor.architecture.context)
                _check_ids(donor, loaded[name])
                datasets |= loaded
            except InputError as error:
                faults.append(str(error))
        if faults:
            raise InputError("\n".join(faults))
        return cls(tokenizer, stop_tokens, datasets)

    @property
    def notes(self) -> list[str]:
        """What is left out of the datasets, and why."""
        counts = ((name, n, why) for name, dataset in self.datasets.items() for why, n in dataset.reasons.items())
        return [f"{name}: {n} samples {why} are left out" for name, n, why in counts]

    def only(self, names: Iterable[str]) -> Questions:
        """Some of the datasets."""
        return Questions(self.tokenizer, self.stop_tokens, {name: self.datasets[name] for name in names})

    def part(self, indices: Mapping[str, Sequence[int]]) -> Questions:
        """Some of the questions of some datasets."""
        chosen = {
            name: replace(dataset, samples=tuple(dataset.samples[i] for i in indices[name]))
            for name, dataset in self.datasets.items()
            if indices.get(name)
        }
        return Questions(self.tokenizer, self.stop_tokens, chosen)


def _check_ids(donor: Checkpoint, dataset: Dataset) -> None:
    """Raise InputError for tokens that the embedding has no row of."""
    embedding = donor.tensors.get(donor.architecture.family.embedding)
    largest = max(max(*sample.prompt, *sample.response, *sample.options) for sample in dataset.samples)
    if embedding is not None and embedding.shape and largest >= embedding.shape[0]:
        raise InputError(
            f"{donor.folder}: the tokenizer gives the id {largest} to a token of {dataset.name}, and the embedding has "
            f"{embedding.shape[0]} rows"
        )


def load_tokenizer(donor: Checkpoint) -> tuple[Any, tuple[int, ...]]:
    """The donor's tokenizer and the tokens that end a generation. Raises InputError if there is none."""
    from transformers import AutoTokenizer

    try:
        with silenced():
            tokenizer = AutoTokenizer.from_pretrained(donor.tokenizer_folder, trust_remote_code=False)
            tokenizer.decode(tokenizer(TRIED_TEXT)["input_ids"], skip_special_tokens=True)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # many types, depending on the tokenizer's class; a panic is no Exception
        raise InputError(f"{donor.tokenizer_folder}: the tokenizer cannot be loaded: {told(error)}") from error
    stops = {token for token in (*end_tokens(donor.folder), tokenizer.eos_token_id) if isinstance(token, int)}
    return tokenizer, tuple(sorted(stops))


def order_of_tensors(recipe: Recipe, pool: Pool, settings: Settings) -> tuple[str, ...]:
    """The recipe's tensors in the order in which its module declares its parameters; no memory is taken.

    Raises InputError for what would fail once the model is built: a config that Transformers refuses, a checkpoint
    that its module does not match, a limit of memory below what the model needs even when its blocks are streamed.
    """
    blueprint = draw_up(recipe, pool, settings.dtype)
    is_streamed(blueprint, settings)
    return blueprint.tensors


def is_streamed(blueprint: Blueprint, settings: Settings) -> bool:
    """Whether a model's blocks would be streamed. Raises InputError where its limit of memory is too small for that."""
    streamed = settings.memory().streams(blueprint.n_bytes, blueprint.outside_bytes, blueprint.block_bytes)
    if streamed and settings.scorer == "sequential":
        raise InputError(
            "scorer: sequential evaluates whole models, and this one does not fit its limit of memory: its blocks have "
            "to be streamed, which batched does"
        )
    return streamed


def environment(settings: Settings) -> dict[str, Any]:
    """What the result's bytes depend on besides config, donors and datasets."""
    import transformers

    device = settings.device
    return {
        "olmfast": __version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "dtype": str(settings.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        **({"parts": settings.parts} if settings.parts > 1 else {}),
    }


class Evaluation:
    """A live model, and the scorers that evaluate candidates on it."""

    def __init__(self, recipe: Recipe, pool: Pool, settings: Settings, folder: Path = Path()) -> None:
        """Build the recipe's model; `folder` is where tensors that the recipe stores lie.

        Raises InputError if the model cannot be built, or its limit of memory does not even hold two blocks of it.
        """
        self.settings = settings
        streamed = is_streamed(draw_up(recipe, pool, settings.dtype), settings)
        kept = min(KEPT_BYTES, settings.max_ram // 8) if settings.max_ram else KEPT_BYTES
        if streamed:  # what is computed for a block lies in a file, and what little is left is needed elsewhere
            kept = 0
        self.sources = Sources(pool, folder, kept, evolve_on=settings.device)
        self.model = WorkingModel(recipe, self.sources, settings.device, settings.dtype, streamed)
        # Checked once: the scorers that come later find what the first one keeps.
        self.memory = settings.memory()

    @property
    def recipe(self) -> Recipe:
        """What the live model is."""
        return self.model.recipe

    def close(self) -> None:
        """Nothing will be evaluated any more."""

    def replies(
        self, candidate: Candidate, questions: Questions, chosen: Mapping[str, Sequence[int]]
    ) -> dict[str, list[str]]:
        """Dataset -> what a candidate says to some of its questions (indices); see `evaluation/replies.py`."""
        tokenizer, stop_tokens = questions.tokenizer, questions.stop_tokens
        with self.model.trial(candidate):
            return {
                name: replies(self.model, questions.datasets[name], indices, tokenizer, stop_tokens)
                for name, indices in chosen.items()
            }

    def scorer(
        self,
        questions: Questions,
        progress: Callable[[str], None] = lambda _: None,
        note: Callable[[str], None] = lambda _: None,
    ) -> Scorer:
        """A scorer of these questions.

        `progress` is told the label of each candidate that has been evaluated, `note` what a user should know.
        """
        batch_tokens = self.settings.batch_tokens
        told = (questions.datasets, questions.tokenizer, questions.stop_tokens, batch_tokens, progress)
        if self.settings.scorer == "sequential":
            return SequentialScorer(self.model, *told)
        return BatchedScorer(self.model, *told, self.memory, note, self.settings.parts)
