"""The life of an output folder: begun beside its final name, locked, resumed, and renamed when complete."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from olmfast.errors import InputError
from olmfast.output.folder import OutputFolder
from olmfast.runs.original import original_choices
from olmfast.search.record import LEDGER, REFINED, REPORT, Outcome, Report
from olmfast.weights.digests import DIGESTS
from olmfast.weights.expressions import Copy, whole
from olmfast.weights.pool import Pool


class RunFolder(OutputFolder):
    """`OUT.partial` while a run goes on, `OUT` once it is complete.

    Raises InputError at once when `OUT` or `OUT.partial` is there and neither `resume` nor `overwrite` is asked.
    """

    def __init__(self, output: Path, *, resume: bool, overwrite: bool) -> None:
        super().__init__(output, overwrite=overwrite)
        self.resume = resume and not overwrite
        if resume or overwrite:
            if self.resume and self._is_foreign():
                raise InputError(
                    f"{output}: exists and holds no {REPORT}, so there is nothing to resume; use --overwrite"
                )
            return
        if self.partial.exists():
            raise InputError(f"{self.partial}: an unfinished run; --resume continues it, --overwrite starts anew")
        if output.exists() and any(output.iterdir()):
            raise InputError(f"{output}: exists; use --overwrite to replace it or --resume to continue its run")

    @contextmanager
    def locked(self, header: dict[str, Any], pool: Pool) -> Iterator[Report]:
        """The run's report, begun or loaded and checked against `header`; one process at a time."""
        if self.resume and not self.partial.exists() and (self.output / REPORT).is_file():
            report = Report.load(self.output)
            if report.status == "finished":
                _check_same(self.output, report, header)
                yield report
                return
        with self.lock(empty=self.overwrite):
            try:
                report = self._open(header, pool)
            except InputError:
                self.forget_if_empty()
                raise
            if report.folder == self.output:
                shutil.rmtree(self.partial)
            else:
                pool.digests.keep_in(self.partial / DIGESTS)
            yield report

    def publish(self, report: Report) -> None:
        """Rename the complete `OUT.partial` to `OUT`; what was there is removed after, or kept if not ours.

        Nothing to do for a run that had been published before.
        """
        if report.folder != self.output:
            (self.partial / DIGESTS).unlink(missing_ok=True)
            self.rename(keep=self._is_of_the_original())

    def _is_of_the_original(self) -> bool:
        try:
            return (self.output / REPORT).is_file() and Report.load(self.output).status == "original"
        except InputError:  # damaged; only --overwrite comes this far
            return False

    def _is_foreign(self) -> bool:
        begun = self.partial.exists() or (self.output / REPORT).is_file()
        return self.output.exists() and any(self.output.iterdir()) and not begun

    def _open(self, header: dict[str, Any], pool: Pool) -> Report:
        if self.resume and not (self.partial / REPORT).is_file() and (self.output / REPORT).is_file():
            before = Report.load(self.output)
            if before.status == "original":
                return self._import_original(before, header, pool)
            _check_same(self.output, before, header)
            if before.status == "finished":
                return before  # what lies in OUT.partial is of a run that was killed before it began
            self._take_over()
        if self.resume and (self.partial / REPORT).is_file():
            report = Report.load(self.partial)
            _check_same(self.partial, report, header)
            report.discard_unrecorded()
            return report
        return Report.create(self.partial, header)

    def _take_over(self) -> None:
        """Go on from a run that stopped at its budget: its state is copied, the result stays until replaced."""
        shutil.copytree(self.output / REFINED, self.partial / REFINED, dirs_exist_ok=True)
        shutil.copyfile(self.output / LEDGER, self.partial / LEDGER)
        # Last and in one step: with a report in it, the folder counts as taken over.
        copied = shutil.copyfile(self.output / REPORT, self.partial / f"{REPORT}.tmp")
        copied.replace(self.partial / REPORT)

    def _import_original(self, before: Report, header: dict[str, Any], pool: Pool) -> Report:
        """Begin from the decisions of the original tool's report; they count as steps taken."""
        choices = original_choices(before.data, list(pool.tensors), pool.names)
        base = choices["base"] or pool.names[0]
        recipe = whole(base, pool.tensors)
        architecture = pool.architecture
        taken: list[tuple[str, str, str, str, tuple[str, ...]]] = []
        if choices["boundary"]:
            unit = architecture.boundary_unit(pool.tensors)
            taken.append(("boundary", "boundary", "boundary", choices["boundary"], unit.tensors))
        for block, donor in choices["layers"].items():
            unit = architecture.window_unit(pool.tensors, [block])
            if not unit.tensors:
                raise InputError(f"{REPORT}: names block {block}; the models have 0 to {architecture.n_blocks - 1}")
            taken.append((f"layers/{block}", "layers", str(block), donor, unit.tensors))
        for name, donor in choices["tensors"].items():
            tensors = tuple(t for t in pool.tensors if t.startswith(f"{name}."))
            taken.append((f"tensors/{name}", "tensors", name, donor, tensors))
        outcomes = {}
        for key, stage, unit_name, donor, tensors in taken:
            recipe = recipe.with_values({t: Copy(donor, t) for t in tensors})
            outcomes[key] = Outcome(stage, unit_name, donor, changed=donor != base, metrics={})
        decided = bool(choices["base"] or taken)
        return Report.create(self.partial, {**header, "imported_base": base if decided else None}, outcomes, recipe)


def _check_same(folder: Path, report: Report, header: dict[str, Any]) -> None:
    """Raise InputError naming every config key, donor and dataset that differs from the report's."""
    changed = []
    for part, label in (("config", "config key"), ("donors", "donor"), ("datasets", "dataset")):
        before, now = report.own.get(part, {}), header[part]
        names = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        changed += [f"{label} {name}" for name in names]
    if changed:
        raise InputError(
            f"{folder}: cannot be resumed, changed since it was begun: {', '.join(changed)}; "
            "undo the change, or use --overwrite to start anew"
        )
