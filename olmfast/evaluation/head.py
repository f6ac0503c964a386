"""What follows the last block: from the activations that leave it to the scores of tokens.

Most families have a final norm, a weight, perhaps a bias and a cap. Some have more (Granite and Cohere scale their
logits). No family is known here: whether a module's head is the usual one is seen by computing a few logits both ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch

from olmfast import kernels
from olmfast.evaluation.forwards import replaced

COMPARED = (2, 4)  # inputs and tokens of the batch that a head is tried with
# The largest difference that is rounding: root mean square, as a share of the logits' own.
TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 3e-2}
LOGIT_BYTES = 64 << 20  # of logits in float32 that a module's own head gives at a time


class Head(Protocol):
    """What leaves the last block -> what evaluation has to know of the logits."""

    def token_scores(self, hidden: torch.Tensor, labels: torch.Tensor) -> kernels.TokenScores:
        """Scores of labels (tokens,), for activations (tokens, hidden); label -100 stands for none."""
        ...

    def logits(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits of a few `tokens` (n,): (rows, n) for activations (rows, hidden)."""
        ...

    def all_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """The logits of the whole vocabulary, (rows, vocabulary), through which gradients can flow."""
        ...


class LinearHead:
    """Final norm, weight, bias and cap. The logits never exist as a whole."""

    def __init__(self, module: Any, final_norm: Any) -> None:
        self.final_norm, self.output = final_norm, module.get_output_embeddings()
        self.softcap: float | None = getattr(module.config, "final_logit_softcapping", None)

    def token_scores(self, hidden: torch.Tensor, labels: torch.Tensor) -> kernels.TokenScores:
        """See `Head.token_scores`."""
        return kernels.token_scores(
            self.final_norm(hidden),
            self.output.weight,
            labels,
            bias=getattr(self.output, "bias", None),
            softcap=self.softcap,
            check=False,
        )

    def logits(self, hidden: torch.Tensor, tokens: torch.Tensor | slice) -> torch.Tensor:
        """See `Head.logits`."""
        bias = getattr(self.output, "bias", None)
        rows = torch.nn.functional.linear(
            self.final_norm(hidden), self.output.weight[tokens], bias[tokens] if bias is not None else None
        )
        rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
        return rows if self.softcap is None else torch.tanh(rows / self.softcap) * self.softcap

    def all_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Head.all_logits`; any leading dimensions."""
        return self.logits(hidden, slice(None))


class ModuleHead:
    """Whatever the module's own forward does after its last block: it is called with blocks that compute nothing.

    `leaving` is what a block was seen to return. The logits of as many positions exist at a time as are worth
    `LOGIT_BYTES`.
    """

    def __init__(self, module: Any, blocks: Sequence[Any], leaving: Any) -> None:
        self.module, self.blocks = module, blocks
        self._n_outputs = len(leaving) if isinstance(leaving, tuple) else None
        self._n_rows = max(1, LOGIT_BYTES // (4 * len(module.get_output_embeddings().weight)))

    def token_scores(self, hidden: torch.Tensor, labels: torch.Tensor) -> kernels.TokenScores:
        """See `Head.token_scores`."""
        parts = []
        for rows, own in zip(*(torch.split(part, self._n_rows) for part in (hidden, labels)), strict=True):
            logits = self.all_logits(rows)
            max_logit, argmax = logits.max(dim=1)
            label_logit = logits.gather(1, own.clamp(min=0)[:, None])[:, 0].masked_fill(own < 0, torch.nan)
            parts.append(kernels.TokenScores(max_logit, argmax, torch.logsumexp(logits, dim=1), label_logit))
        return kernels.TokenScores(*(torch.cat(field) for field in zip(*parts, strict=True)))

    def logits(self, hidden: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """See `Head.logits`."""
        return torch.cat([self.all_logits(rows)[:, tokens] for rows in torch.split(hidden, self._n_rows)])

    def all_logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """See `Head.all_logits`: every row as an input of one token, which any family takes."""
        given: Any = hidden[:, None]
        if self._n_outputs is not None:
            given = (given, *[None] * (self._n_outputs - 1))
        ids = torch.zeros(len(hidden), 1, dtype=torch.long, device=hidden.device)
        with replaced(dict.fromkeys(self.blocks, lambda *_, **__: given)):
            logits: torch.Tensor = self.module(input_ids=ids, use_cache=False).logits[:, 0]
        return logits.to(torch.promote_types(logits.dtype, torch.float32))


@torch.inference_mode()
def head_of(module: Any, blocks: Sequence[Any], final_norm: Any) -> Head:
    """The linear head where it gives the logits of the module's own forward, but for rounding; else the module's own.

    Both are given what leaves the last block in that forward, so that rounding inside the blocks does not count.
    """
    weight = module.get_output_embeddings().weight
    n_inputs, n_tokens = COMPARED
    ids = torch.linspace(0, len(weight) - 1, n_inputs * n_tokens, device=weight.device).long().view(COMPARED)
    leaving: list[Any] = []
    hook = blocks[-1].register_forward_hook(lambda _, __, out: leaving.append(out))
    try:
        expected = module(input_ids=ids, use_cache=False).logits
    finally:
        hook.remove()
    (out,) = leaving
    linear = LinearHead(module, final_norm)
    logits = linear.all_logits(out[0] if isinstance(out, tuple) else out)
    if _agree(logits, expected.to(logits.dtype), TOLERANCES[weight.dtype]):
        return linear
    return ModuleHead(module, blocks, out)


def _agree(logits: torch.Tensor, expected: torch.Tensor, tolerance: float) -> bool:
    """Whether they differ by rounding. Where one is no number neither may be the other, and nothing else is known."""
    finite = expected.isfinite()
    if not torch.equal(logits.isfinite(), finite):
        return False
    difference = torch.where(finite, logits - expected, 0).square().mean().sqrt()
    size = torch.where(finite, expected, 0).square().mean().sqrt()
    return bool(difference <= tolerance * size)
