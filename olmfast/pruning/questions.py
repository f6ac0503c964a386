"""The questions of a search of alphas: those that decide, and those held out, which nothing is chosen by."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from olmfast.config.datasets import DatasetConfig
from olmfast.config.pruning import PER_SUBJECT, Pruning
from olmfast.config.run import RunConfig
from olmfast.errors import InputError
from olmfast.evaluation.mmlu import subjects_in
from olmfast.evaluation.open import Questions
from olmfast.search.halves import Indices, set_aside
from olmfast.weights.checkpoint import Checkpoint


def with_objective(config: RunConfig) -> RunConfig:
    """The config with the datasets that its objective stands for, where it is one of MMLU's.

    Raises InputError where there is nothing to search by.
    """
    pruning = config.prune
    assert pruning is not None
    entries = dict(config.dataset)
    if pruning.data_dir is not None and (pruning.objective is not None or not entries):
        entries |= _of_mmlu(pruning)
    elif pruning.objective is not None:
        raise InputError("objective: says what of MMLU is searched by, and data_dir, its folder, is missing")
    if not entries:
        raise InputError(f"method {pruning.way}: nothing to search by: expected --data_dir DIR or --dataset FILE:MODE")
    return config.model_copy(update={"dataset": entries})


def _of_mmlu(pruning: Pruning) -> dict[str, DatasetConfig]:
    found = {}
    for term in pruning.terms:
        subjects = list(term.subjects) if term.subjects else subjects_in(pruning.data_dir)[: pruning.num_tasks]  # type: ignore[arg-type]
        found[f"MMLU {term.name}"] = DatasetConfig(
            mode=term.mode,  # type: ignore[arg-type]
            weight=term.weight,
            file=str(pruning.data_dir),
            subjects=subjects,
            shots=pruning.ntrain,
            samples=pruning.num_samples or PER_SUBJECT,
            of_question=term.of_question,
        )
    return found


@dataclass(frozen=True)
class Divided:
    """Questions that decide, and the same datasets' questions that are held out, or others."""

    selection: Questions
    holdout: Questions

    @classmethod
    def load(cls, config: RunConfig, base: Checkpoint) -> Divided:
        """Read the datasets; where the config names none that are held out, a share of each dataset's questions is.

        Raises InputError that names what is unusable.
        """
        pruning = config.prune
        assert pruning is not None
        every = Questions.load(base, config.dataset_dir, config.questions)
        selection = every.only(config.dataset)
        if config.holdout:
            return cls(selection, every.only(config.holdout))
        kept, aside = _set_aside(config, pruning.holdout, selection)
        return cls(selection.part(kept), selection.part(aside))

    def sizes(self) -> dict[str, tuple[int, int]]:
        """Dataset -> how many questions decide, and how many are held out."""
        names = dict.fromkeys([*self.selection.datasets, *self.holdout.datasets])
        parts = (self.selection.datasets, self.holdout.datasets)
        return {name: tuple(len(part[name].samples) if name in part else 0 for part in parts) for name in names}  # type: ignore[misc]


def _set_aside(config: RunConfig, share: float, questions: Questions) -> tuple[Indices, Indices]:
    """The questions that decide, and those held out: the same ones of a file that is scored in two ways."""
    sizes: dict[str, int] = {}
    files = {
        name: entry.source(name) if entry.lm_eval else str(entry.path(config.dataset_dir, name))
        for name, entry in config.dataset.items()
    }
    for name, dataset in questions.datasets.items():
        n = len(dataset.samples)
        if sizes.setdefault(files[name], n) != n:
            raise InputError(
                f"{name}: has {n} questions of {files[name]}, of which another part of the objective has "
                f"{sizes[files[name]]}: which of them to hold out cannot be told; name --holdout FILE:MODE"
            )
    kept, aside = set_aside(sizes, share, config.seed)
    return _by_name(kept, files), _by_name(aside, files)


def _by_name(indices: Mapping[str, list[int]], files: Mapping[str, str]) -> Indices:
    return {name: indices[file] for name, file in files.items() if file in indices}
