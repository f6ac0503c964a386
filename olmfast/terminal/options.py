"""Options that several commands share."""

from __future__ import annotations

from typing import Annotated

import typer

# Options that a run and its check share.
Overrides = Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a key.")]
Device = Annotated[str | None, typer.Option(help="cpu, cuda, cuda:1 or auto.")]
Dtype = Annotated[str | None, typer.Option(help="The dtype candidates are evaluated in.")]
Seed = Annotated[int | None, typer.Option(help="The random seed.")]

AllowMismatch = Annotated[
    list[str] | None,
    typer.Option("--allow-mismatch", metavar="KEY", help="Merge although models differ in this key of config.json."),
]
NoRemoteCodeFiles = Annotated[
    bool, typer.Option("--no-remote-code-files", help="Leave out a model's own Python files and the auto_map to them.")
]

ComputedOn = Annotated[str, typer.Option("--device", help="Where tensors are computed: cpu, cuda, cuda:1 or auto.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Continue even if weights are NaN or infinite.")
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Check everything and print the plan.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output folder.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
