"""What a terminal shows of a static merge: its plan, its progress, its closing line. Light: no session, no models."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from olmfast.observer import Observer
from olmfast.output.folder import OutputFolder, free_bytes
from olmfast.output.writer import OutputTensor
from olmfast.static.extract import Extracted
from olmfast.static.plan import Plan, memory_bytes
from olmfast.static.sensitivity import Ranked
from olmfast.static.write import Written, copy_rate

MOST_LISTED = 10  # tensors that are left out for one reason and named one by one


def print_plan(plan: Plan, out: Path, as_json: bool) -> None:
    """Tables of what moves where, or the same as JSON; the time is estimated from a copy of a few bytes.

    Raises InputError for an `out` that no folder can replace.
    """
    is_taken = OutputFolder(out, overwrite=True).is_taken
    rate, free = copy_rate(plan, out), free_bytes(out)
    seconds = (plan.n_bytes_read + plan.n_bytes) / rate
    if as_json:
        measured = {"copy_bytes_per_s": rate, "estimated_s": seconds, "free_bytes": free}
        print(json.dumps({**plan.to_json(), "output_dir": str(out), **measured}, indent=2))
        return
    print(f"{plan.title} of {len(plan.pool)} models; config and other files from {plan.content.base.name}")
    for donor in plan.pool:
        kinds = Counter(str(info.dtype).removeprefix("torch.") for info in donor.tensors.values())
        dtypes = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        adapted = sum(tensor.in_file is None for tensor in donor.tensors.values())
        how = f", {adapted} of them computed from {' and '.join(donor.made_of)}" if adapted else ""
        print(f"  {donor.name}: {len(donor.tensors)} tensors ({dtypes}), {decimal(donor.n_bytes)}{how}")
    print(plan.account().replace("tensors written", "tensors"))
    for why, n in Counter(plan.content.left_out.values()).items():
        names = [name for name, own in plan.content.left_out.items() if own == why]
        for name in names if n <= MOST_LISTED else names[:1]:
            print(f"  {name}: {why}" if n <= MOST_LISTED else f"  {name} and {n - 1} more: {why}")
    content = plan.content
    changed = [key for key, value in content.config.items() if content.base.config.get(key) != value]
    if changed:
        print("config.json: " + ", ".join(f"{key} becomes {content.config[key]!r}" for key in changed))
    how = f"changed: {', '.join(content.texts)}" if content.texts else "unchanged"
    print(f"tokenizer: {content.tokenizer.name}'s, {how}")
    if plan.vocabulary is not None:
        vocabulary = plan.vocabulary
        print(
            f"vocabulary: {vocabulary.n_rows} rows, {len(vocabulary.ids)} tokens, {len(vocabulary.added)} of them added"
        )
        for model in plan.pool.names:
            counts = vocabulary.counts(model, plan.pool.names, content.base.name)
            print(f"  {model}: " + ", ".join(f"{n} rows {what}" for what, n in counts.items() if n))
    for note in (*plan.warnings, *plan.notes):
        print(note)
    print(
        f"reads {decimal(plan.n_bytes_read)}, writes {decimal(plan.n_bytes)}; at most {decimal(memory_bytes(plan))} of "
        f"memory besides Python and torch; about {seconds:.1f} s at the {decimal(round(rate))}/s that a trial copy "
        "reached (an estimate)"
    )
    there = " (exists: --overwrite will be needed)" if is_taken else ""
    little = ", which is too little" if free < plan.n_bytes else ""
    print(f"result: {out}{there}; {decimal(free)} free there{little}; nothing has been written")


class Watcher(Observer):
    """Silence where the result is printed as JSON or there is no terminal; else a bar while tensors are written."""

    def __init__(self, as_json: bool) -> None:
        self.as_json = as_json
        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
        shown = sys.stderr.isatty() and not as_json
        self.progress = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True), disable=not shown)

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.stop()

    def note(self, text: str) -> None:
        """What the user should know, beside the result."""
        print(f"note: {text}", file=sys.stderr)

    def ranked(self, layers: Sequence[Ranked], n_merged: int) -> None:
        """The layers by what merging each alone does to the score; nothing with JSON."""
        if self.as_json:
            return
        print("layer  score alone  change (below 0 is better)")
        for place, one in enumerate(layers):
            print(f"{one.layer:>5}  {one.score:>11.4f}  {one.change:>+7.4f}{'  merged' if place < n_merged else ''}")

    def merging(self, method: str, n_bytes: int) -> None:
        """The bar begins."""
        self.task = self.progress.add_task(method, total=n_bytes)
        self.progress.start()

    def written(self, tensor: OutputTensor) -> None:
        """The bar moves on."""
        self.progress.update(self.task, advance=tensor.n_bytes)


def print_extracted(done: Extracted, as_json: bool) -> None:
    """What an adapter holds and what it leaves out, or JSON."""
    if as_json:
        print(json.dumps(done.to_json(), indent=2))
        return
    for line in done.account():
        print(line)
    print(f"{os.path.relpath(done.output_dir)}: {decimal(done.n_bytes)} in {done.elapsed_s:.1f} s")


def print_written(done: Written, as_json: bool) -> None:
    """The closing line, or JSON."""
    if as_json:
        print(json.dumps(done.to_json(), indent=2))
        return
    shown = os.path.relpath(done.output_dir)
    rate = decimal(round(done.n_bytes / max(done.elapsed_s, 1e-9)))
    print(f"{done.account}")
    print(f"{shown}: {decimal(done.n_bytes)} in {done.elapsed_s:.1f} s ({rate}/s)")
