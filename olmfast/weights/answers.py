"""The process that imports Transformers and answers `weights.skeletons`: a question and an answer a line, in JSON."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from typing import Any

from olmfast.weights.examination import Unknown, examined, settings
from olmfast.weights.layers import stacked


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to one request, in plain JSON values; `unknown` says why Transformers has none."""
    try:
        if request["ask"] == "stack":
            return stacked(request["base"], request["models"], request["layers"])
        if request["ask"] == "settings":
            return {"settings": [settings(config) for config in request["configs"]]}
        return examined(request["config"], request["tensors"], request["parts"])
    except Unknown as error:
        return {"unknown": " ".join(str(error).split())}


def answer_text(line: str) -> str:
    """A question's JSON -> the answer's, in one line."""
    return json.dumps(answer(json.loads(line)), default=str)


def serve() -> None:
    """Answer requests, one JSON object a line, until the input ends."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints is no answer
    for line in sys.stdin:
        print(answer_text(line), file=out, flush=True)
