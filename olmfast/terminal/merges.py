"""What a terminal shows of a static merge: its plan, its progress, its closing line. Light: no driver, no models."""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from olmfast.output.folder import free_bytes
from olmfast.output.writer import OutputTensor
from olmfast.static.plan import Plan, memory_bytes
from olmfast.static.sensitivity import Ranked
from olmfast.static.write import Written, copy_rate


def print_plan(plan: Plan, out: Path, as_json: bool) -> None:
    """Tables of what moves where, or the same as JSON; the time is estimated from a copy of a few bytes."""
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
        print(f"  {donor.name}: {len(donor.tensors)} tensors ({dtypes}), {decimal(donor.n_bytes)}")
    print(plan.content.account().replace("tensors written", "tensors"))
    for name, why in plan.content.left_out.items():
        print(f"  {name}: {why}")
    content = plan.content
    changed = [key for key, value in content.config.items() if content.base.config.get(key) != value]
    if changed:
        print("config.json: " + ", ".join(f"{key} becomes {content.config[key]!r}" for key in changed))
    how = f"changed: {', '.join(content.texts)}" if content.texts else "as it is"
    print(f"tokenizer: {content.tokenizer.name}'s, {how}")
    if plan.vocabulary is not None:
        vocabulary = plan.vocabulary
        print(
            f"vocabulary: {vocabulary.n_rows} rows, {len(vocabulary.ids)} tokens, {len(vocabulary.added)} of them added"
        )
        for model in plan.pool.names:
            counts = vocabulary.counts(model, plan.pool.names, content.base.name)
            print(f"  {model}: " + ", ".join(f"{n} rows {what}" for what, n in counts.items() if n))
    for note in plan.notes:
        print(note)
    print(
        f"reads {decimal(plan.n_bytes_read)}, writes {decimal(plan.n_bytes)}; at most {decimal(memory_bytes(plan))} of "
        f"memory beside Python and torch; about {seconds:.1f} s at the {decimal(round(rate))}/s that a trial copy "
        "reached (an estimate)"
    )
    there = " (exists: --overwrite will be needed)" if out.exists() and any(out.iterdir()) else ""
    little = ", which is too little" if free < plan.n_bytes else ""
    print(f"result: {out}{there}; {decimal(free)} free there{little}; nothing has been written")


@contextmanager
def watched(plan: Plan, quiet: bool) -> Iterator[Callable[[OutputTensor], None]]:
    """A bar on a terminal, silence elsewhere; gives what is to be told of each tensor."""
    if quiet or not sys.stderr.isatty():
        yield lambda _: None
        return
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(plan.title, total=plan.n_bytes)
        yield lambda tensor: progress.update(task, advance=tensor.n_bytes)


def print_written(done: Written, as_json: bool) -> None:
    """The closing line, or JSON."""
    if as_json:
        print(json.dumps(done.to_json(), indent=2))
        return
    shown = os.path.relpath(done.output_dir)
    rate = decimal(round(done.n_bytes / max(done.elapsed_s, 1e-9)))
    print(f"{done.account}")
    print(f"{shown}: {decimal(done.n_bytes)} in {done.elapsed_s:.1f} s ({rate}/s)")


def print_ranked(ranked: Sequence[Ranked], top: int, as_json: bool) -> None:
    """The layers by what merging each alone does to the score; nothing as JSON, where only the result counts."""
    if as_json:
        return
    print("layer  score alone  change (below 0 is better)")
    for place, one in enumerate(ranked):
        print(f"{one.layer:>5}  {one.score:>11.4f}  {one.change:>+7.4f}{'  merged' if place < top else ''}")
