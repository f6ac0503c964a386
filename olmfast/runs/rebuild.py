"""The model that a merge report describes, made again from the donors, bit for bit; nothing is evaluated."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from olmfast.config.run import PLACES, RunConfig
from olmfast.errors import FileChanged, InputError
from olmfast.observer import Observer
from olmfast.output.card import front_matter
from olmfast.output.folder import OutputFolder, check_space
from olmfast.output.ownership import LOCK, Claim
from olmfast.output.writer import WEIGHTS, Content, content_of, faults_of, write_folder, write_text, writing
from olmfast.runs.original import Choices, read_report
from olmfast.search.log import STEPS
from olmfast.search.record import REPORT, SNAPSHOT, Record
from olmfast.weights.expressions import Copy, Stored
from olmfast.weights.pool import Pool
from olmfast.weights.recipe import Recipe
from olmfast.weights.sources import Sources, leaves

SHARD_SIZE: int = RunConfig.model_fields["shard_size"].default
REBUILDING = ".rebuilding"  # in a result's folder, while its files are written again


@dataclass(frozen=True)
class Rebuilt:
    """A result that is on the disk: where, and the line that accounts for its tensors."""

    output_dir: Path
    account: str
    recipe_digest: str

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"output_dir": str(self.output_dir), "account": self.account, "recipe_digest": self.recipe_digest}


@dataclass(frozen=True)
class _Report:
    """What a report says of a model. `donors` maps names to fingerprints (None: not known), the tokenizer's first."""

    path: Path
    donors: Mapping[str, str | None]
    places: Mapping[str, str]
    shard_size: int
    recipe: Recipe | None
    choices: Choices | None

    @classmethod
    def read(cls, path: Path, layers: int | None = None) -> _Report:
        """A report, or the folder of one; `layers`: of the model of so many layers on the front of a joint pruning.

        Where a run's log lies beside it, the log is read: it is never behind.

               Raises InputError for what is no report, or for one that says nothing of a model yet.
        """
        path = path / REPORT if path.is_dir() else path
        if path.name == REPORT and (path.parent / STEPS).is_file():
            record = Record.load(path.parent)
            found = record.validated or record.recipe
            return cls._ours(path, record.header, found if layers is None else _on_front(path, record.values, layers))
        data = read_report(path)
        if "olmfast" not in data:
            choices = Choices.read(data)
            if not choices.donors:
                raise InputError(f"{path}: names no model")
            names = [choices.base or choices.donors[0], *choices.donors]
            return cls(path, dict.fromkeys(names), {}, SHARD_SIZE, None, choices)
        own = data["olmfast"]
        try:
            if layers is not None:
                return cls._ours(path, own, _on_front(path, own, layers))
            chosen = own.get("validation", {}).get("result")
            recipe = own.get("recipe") if chosen is None else own[SNAPSHOT + chosen]
            return cls._ours(path, own, None if recipe is None else Recipe.from_json(recipe))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            reason = f"has no {error}" if isinstance(error, KeyError) else error
            raise InputError(f"{path}: is damaged: {reason}") from error

    @classmethod
    def _ours(cls, path: Path, header: Mapping[str, Any], recipe: Recipe | None) -> _Report:
        if recipe is None or not header.get("donors"):
            raise InputError(f"{path}: the run had chosen nothing yet, so there is no model to rebuild")
        shard_size = int(header.get("config", {}).get("shard_size", SHARD_SIZE))
        return cls(path, dict(header["donors"]), dict(header.get("places", {})), shard_size, recipe, None)

    def pool(self, models_dir: Path | None) -> Pool:
        """The donors that the model is made of. Raises InputError for one whose bytes are others than the run's."""
        names, folder = list(self.donors), self.path.parent
        if self.recipe is not None:
            used = {leaf.donor for e in self.recipe.tensors.values() for leaf in leaves(e) if isinstance(leaf, Copy)}
            names = [name for name in names if name in {names[0], self.recipe.base, *used}]
            if strange := sorted({self.recipe.base, *used} - set(names)):
                raise InputError(f"{self.path}: its recipe uses {strange[0]}, which is not among its donors")
        told = self.places.get("models_dir")
        place = models_dir or (folder / told if told else Path(PLACES["models_dir"]))
        base = folder / self.places["config_dir"] if "config_dir" in self.places else Path()
        result = self.recipe.tensors if self.recipe is not None else ()
        pool = Pool.open(names, Path(os.path.abspath(place)), Path(os.path.abspath(base)), result=result)
        for donor in pool:
            expected = self.donors[donor.name]
            if expected is not None and donor.fingerprint() != expected:
                raise InputError(
                    f"{donor.folder}: is not the {donor.name} that {self.path} was made of: its weights or its config "
                    "have changed; put them back, or name where they are with --models-dir"
                )
        return pool


def _on_front(path: Path, values: Mapping[str, Any], layers: int) -> Recipe:
    """The model of so many layers that a joint pruning found. Raises InputError where it found none."""
    front = values.get("pruned", {}).get("front", {})
    if str(layers) not in front:
        told = f"it has {', '.join(front)}" if front else "it is not that of a joint pruning"
        raise InputError(f"{path}: no model of {layers} layers is on its front; {told}")
    return Recipe.from_json(front[str(layers)]["recipe"])


def rebuild(
    report: str | Path,
    output: str | Path,
    *,
    layers: int | None = None,
    models_dir: str | Path | None = None,
    overwrite: bool = False,
    observer: Observer | None = None,
) -> Rebuilt:
    """Make the model that a `merge_report.json` describes, olmfast's own or the original's, in the folder `output`.

    `report` may also be the folder it lies in, of a run in progress too; an `output` that is this folder has its files
    written again. `models_dir` is where donors are; by default where the run had them, for a report of the original's
    `models`.

    Raises InputError, before anything is written, for a report that says nothing of a model, a donor that is missing
    or has changed, a refined tensor that is missing, or an output that is there (unless `overwrite`).
    """
    found = _Report.read(Path(report), layers)
    pool = found.pool(Path(models_dir) if models_dir is not None else None)
    recipe = found.recipe or (found.choices.recipe(pool)[0] if found.choices is not None else None)
    assert recipe is not None
    sources = Sources(pool, found.path.parent)
    for leaf in (leaf for expression in recipe.tensors.values() for leaf in leaves(expression)):
        if isinstance(leaf, Stored):
            leaf.info(sources)  # there, and whole
    content = content_of(recipe, sources, pool[next(iter(found.donors))])
    target = Path(os.path.abspath(output))
    done = Rebuilt(target, content.account(), recipe.digest())
    if target == Path(os.path.abspath(found.path.parent)):
        restore(content, sources, target, found.shard_size, observer or Observer())
        return done
    folder = OutputFolder(target, overwrite=overwrite)
    folder.check({**{f"the donor {donor.name}": donor.paths for donor in pool}, "the report": [found.path]})
    check_space(target, content.n_bytes)
    with folder.lock(empty=True), writing(folder.partial, "the same command"):
        try:
            write_folder(content, sources, folder.partial, found.shard_size)
        except InputError:
            folder.discard()
            raise
        except FileChanged as error:
            raise error.with_advice("the same command") from error
        write_text(folder.partial / "README.md", _card(recipe, found, content, pool))
        folder.rename()
    return done


def restore(content: Content, sources: Sources, folder: Path, shard_size: int, observer: Observer) -> None:
    """Write the files of a result again that are missing or not whole; a folder that has them all stays as it is."""
    faults = faults_of(content, folder, shard_size)
    if not faults:
        return
    observer.note(f"{', '.join(faults)}: missing or not whole; the result is written again")
    check_space(folder / "model", content.n_bytes)
    fresh = folder / REBUILDING
    with writing(folder, "--resume"):
        if os.path.lexists(fresh):
            if Claim.read(fresh, folder.name) is None and (fresh.is_symlink() or any(fresh.iterdir())):
                raise InputError(f"{fresh}: is in the way and was not made by olmfast; move it away")
            shutil.rmtree(fresh)
        fresh.mkdir()
        (fresh / LOCK).write_bytes(Claim(folder.name, fresh.stat().st_ino, None).to_bytes())
        write_folder(content, sources, fresh, shard_size)
        written = sorted(path.name for path in fresh.iterdir() if path.name != LOCK)
        for stale in {path.name for name in WEIGHTS for path in folder.glob(name)} - set(written):
            (folder / stale).unlink()
        for name in written:
            (fresh / name).replace(folder / name)
        shutil.rmtree(fresh)


def _card(recipe: Recipe, report: _Report, content: Content, pool: Pool) -> str:
    names = [recipe.base, *(name for name in report.donors if name != recipe.base)]
    made_of = list(
        dict.fromkeys(part for name in names for part in (pool[name].made_of if name in pool.names else [name]))
    )
    made = f"Rebuilt by olmfast from a `{report.path.name}`; base: `{recipe.base}`."
    account = f"{content.account()}.\n\nRecipe {recipe.digest()}."
    return f"{front_matter(made_of)}\n# Merged model\n\n{made}\n\n{account}\n"
