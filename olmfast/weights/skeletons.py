"""What Transformers will make of a checkpoint, asked of a process that imports it: names, layers, vocabulary.

`Skeletons` starts that process when it is first asked something, and not at all where this one has imported
Transformers already. `Skeleton.faults` says why a config.json and tensors of given names and shapes do not fit
together.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from olmfast.errors import OlmfastError

_COMMAND = "import sys; sys.path[:] = sys.argv[1:]; from olmfast.weights.answers import serve; serve()"


@dataclass(frozen=True)
class Skeleton:
    """The module of a config.json, and where the tensors of a checkpoint land in it. Names are the checkpoint's.

    `unknown` says why Transformers cannot build it; then the rest is empty. `modules` are the parameters and buffers
    that tensors fill, `converted` the tensors whose values are rearranged on the way, `tied` the parameters that are
    others' (parameter -> the other). After loading: `missing` parameters, `unexpected` tensors, `ignored` ones (of
    which Transformers says nothing), `mismatched` shapes (parameter -> [got, wanted]).

    `blocks` are the tensors of the stack: the name before and after the block's number, and that number. `regions` says
    of the others whether they act `before` or `after` the stack, `aside` (another tower) or are of what is `around` it.

    `rows` are the tensors with a row per token, `columns` those that grow with the vocabulary in another way;
    `vocabulary_keys` is where config.json states its size.
    """

    unknown: str = ""
    modules: Mapping[str, str] = field(default_factory=dict)
    converted: Sequence[str] = ()
    tied: Mapping[str, str] = field(default_factory=dict)
    missing: Sequence[str] = ()
    unexpected: Sequence[str] = ()
    ignored: Sequence[str] = ()
    mismatched: Mapping[str, Sequence[Sequence[int]]] = field(default_factory=dict)
    failed: Sequence[str] = ()
    stack: str = ""
    stack_fault: str = ""
    n_blocks: int = 0
    blocks: Mapping[str, tuple[str, str, int]] = field(default_factory=dict)
    regions: Mapping[str, str] = field(default_factory=dict)
    rows: Sequence[str] = ()
    columns: Sequence[str] = ()
    vocabulary_keys: Sequence[Sequence[str]] = ()
    vocabulary_fault: str = ""
    embedding_module: str = ""
    other_vocabularies: Sequence[str] = ()

    @property
    def faults(self) -> list[str]:
        """Why Transformers would not load these tensors as they are, a line each."""
        if self.unknown:
            return [self.unknown]
        found = [f"{len(names)} {what}, the first {names[0]}" for names, what in self._lists() if names]
        return found + list(self.failed[:3])

    def _lists(self) -> Iterable[tuple[list[str], str]]:
        shapes = [f"{name} {got} instead of {wanted}" for name, (got, wanted) in self.mismatched.items()]
        yield list(self.missing), "parameters that nothing fills"
        yield list(self.unexpected), "tensors that fill nothing"
        yield shapes, "tensors of another shape"


class Skeletons:
    """Asks Transformers about configs and names. Answers are kept; use it as a context."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[str] | None = None
        self._known: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> Skeletons:
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def examine(self, config: Mapping[str, Any], tensors: Mapping[str, Sequence[int]], *parts: str) -> Skeleton:
        """The module of `config` and where tensors (name -> shape) land in it.

        `parts` are what is looked into: `load`, `stack`, `vocabulary`.
        """
        shapes = {name: list(shape) for name, shape in tensors.items()}
        return Skeleton(**self._ask({"ask": "module", "config": config, "tensors": shapes, "parts": parts}))

    def stack(
        self,
        base: Mapping[str, Any],
        models: Mapping[str, Mapping[str, Any]],
        layers: Sequence[Sequence[tuple[str, int]]],
    ) -> dict[str, Any]:
        """`config`: the base's config.json for layers one after another, each of the kind it had; a layer is one of a
        model (name, index), or several that are merged.

        Or `fault`: what cannot follow, naming keys; or `unknown`: why Transformers cannot tell.
        """
        return self._ask({"ask": "stack", "base": base, "models": models, "layers": layers})

    def settings(self, configs: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]] | None:
        """Each config with its defaults filled in, its parts' keys spelled `part.key`; None if one is unknown."""
        return self._ask({"ask": "settings", "configs": configs}).get("settings")

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        text = json.dumps(request)
        if text not in self._known:
            self._known[text] = self._asked(text)
        return self._known[text]

    def _asked(self, text: str) -> dict[str, Any]:
        if "transformers" in sys.modules:
            from olmfast.weights.answers import answer_text

            return dict(json.loads(answer_text(text)))
        if self._process is None:
            self._process = _started()
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(text + "\n")
            self._process.stdin.flush()
            line = self._process.stdout.readline()
        except OSError:
            line = ""
        if not line:
            raise OlmfastError("the process that asks Transformers ended; try: python -c 'import transformers'")
        return dict(json.loads(line))


def _started() -> subprocess.Popen[str]:
    # The same places as here, but not the working directory, whose folders could hide packages.
    places = [place for place in sys.path if place]
    offline = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "critical"}
    return subprocess.Popen(
        [sys.executable, "-c", _COMMAND, *places],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
        env={**os.environ, **offline},
    )
