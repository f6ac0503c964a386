"""A path folded into a plain model: every hop a block of its own, its factors in the weights that write d before it.

`A_t d + b_t` at hop t changes only what block t - 1 adds last, so it goes into the modules that write it: `A W` for
their weights, `A c + b` for their biases. At the first hop it goes into the embedding, `A e + b`, which is untied for
it. docs/data-flow.md lists what each family allows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from olmfast.dataflow.hops import Hop, width_of
from olmfast.errors import InputError
from olmfast.weights.affine import Affine, Given
from olmfast.weights.architecture import Architecture
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.expressions import Copy
from olmfast.weights.pool import LANGUAGE_MODELS, Pool
from olmfast.weights.recipe import Recipe
from olmfast.weights.skeletons import Skeletons
from olmfast.weights.sources import Expression, Sources

SCORE = "score.weight"  # the head of a sequence classifier
# What says whose head a model has; the result has the output model's.
OF_HEADS = ("architectures", "num_labels", "id2label", "label2id", "problem_type")

Factor = float | Expression | None


def fold(
    hops: Sequence[Hop],
    pool: Pool,
    input_model: str,
    output_model: str,
    skeletons: Skeletons,
    *,
    classification: bool = False,
    dtype: torch.dtype | None = None,
) -> Recipe:
    """The plain model that does what the path does, as a recipe on the input model.

    It is computed in float32 (in float64 where the donors are) and rounded once to `dtype`, or to the donors' dtype.
    Raises InputError with everything that this family cannot say, naming the hop and its factor.
    """
    return _Folding(hops, pool, pool[input_model], pool[output_model], classification, dtype).recipe(skeletons)


def unlike_blocks(hops: Sequence[Hop], pool: Pool, input_model: str) -> Iterator[str]:
    """A line for every block in use that is not shaped as the first hop's, or not as wide as the embedding."""
    first, width = hops[0], width_of(pool, input_model)
    wanted = _shapes(pool, first)
    for donor, block in dict.fromkeys((hop.donor, hop.block) for hop in hops):
        found = _shapes(pool, Hop(donor, block))
        where = f"{donor}: layer {block}"
        if not found:
            yield f"{where}: none of its tensors is there"
        elif found != wanted:
            name = next(name for name in {**wanted, **found} if found.get(name) != wanted.get(name))
            got, want = (str(list(shapes[name])) if name in shapes else "none" for shapes in (found, wanted))
            yield (
                f"{where}: {name}: has shape {got}, layer {first.block} of {first.donor} has {want}; the blocks of a "
                "path must be alike"
            )
        elif _width(found, pool[donor].architecture) != width:
            yield f"{where}: is not {width} wide, as the embedding of {input_model} is"


def _shapes(pool: Pool, hop: Hop) -> dict[str, tuple[int, ...]]:
    """The shapes of a block's tensors, but for biases that a key of the config gives: left out, these are 0."""
    donor = pool[hop.donor]
    given = {f"{module}.bias" for module in donor.architecture.family.flow.biased}
    inside = _inside(pool, hop).items()
    return {inner: donor.tensors[name].shape for inner, name in inside if inner not in given}


def _width(shapes: Mapping[str, tuple[int, ...]], architecture: Architecture) -> int | None:
    """D of a block's tensors: the features that what writes d gives."""
    written = (n for n in shapes if _is_of(n, architecture.writers[-1]) and n.endswith("weight"))
    return next((shapes[name][architecture.row_axis(name)] for name in written), None)


def _inside(pool: Pool, hop: Hop) -> dict[str, str]:
    """The tensors of a hop's block: the name within the block -> the donor's name."""
    donor = pool[hop.donor]
    prefix = f"{donor.architecture.family.blocks}.{hop.block}."
    names = [n for n in donor.tensors if n.startswith(prefix) and not donor.architecture.is_ignored(n)]
    return {name.removeprefix(prefix): name for name in names}


class _Folding:
    def __init__(
        self,
        hops: Sequence[Hop],
        pool: Pool,
        entry: Checkpoint,
        out: Checkpoint,
        classification: bool,
        dtype: torch.dtype | None,
    ) -> None:
        self.hops, self.pool, self.entry, self.out = hops, pool, entry, out
        self.classification, self.dtype = classification, dtype
        self.architecture = entry.architecture
        self.family, self.flow = entry.architecture.family, entry.architecture.family.flow
        self.faults: list[str] = []

    def recipe(self, skeletons: Skeletons) -> Recipe:
        """See `fold`."""
        self.faults += unlike_blocks(self.hops, self.pool, self.entry.name)
        if self.faults:
            raise InputError("\n".join(self.faults))
        tensors = self._embedding() | self._end()
        self.biased = self._needs_biases()
        for place in range(len(self.hops)):
            tensors |= self._block(place)
        if self.faults:
            raise InputError("\n".join(self.faults))
        return Recipe(self.entry.name, tensors, self._edits(tensors, skeletons))

    def _embedding(self) -> dict[str, Expression]:
        """What comes before the first block, with the first hop's factors; of several tables b is in one."""
        first = self.hops[0]
        scale = self.architecture.embedding_scale(self.dtype or self._stored(self.family.embedding))
        tensors = {self.family.embedding: self._mapped(self.family.embedding, first.scale, _divided(first.bias, scale))}
        if self.flow.positions:
            tensors[self.flow.positions] = self._mapped(self.flow.positions, first.scale, None)
        return tensors

    def _mapped(self, name: str, scale: Factor, bias: Factor) -> Expression:
        return self._affine(Copy(self.entry.name, name), scale, bias, -1)

    def _end(self) -> dict[str, Expression]:
        """Final norm and head of the output model; a head that is the result's embedding is left out."""
        donor, family = self.out, self.family
        norms = [n for n in family.other_boundary if n not in (self.flow.positions, "lm_head.bias")]
        heads = [SCORE] if self.classification else [n for n in family.other_boundary if n == "lm_head.bias"]
        for name in (*norms, *heads):
            if name not in donor.tensors:
                self.faults.append(f"{donor.name}: has no tensor {name}, and it is the output model")
        if not self.classification and family.head not in donor.tensors and not donor.architecture.tied_in_config:
            self.faults.append(f"{donor.name}: has no tensor {family.head}, and it is the output model")
        tensors: dict[str, Expression] = {name: Copy(donor.name, name) for name in (*norms, *heads)}
        if not self.classification and not self._is_tied():
            tensors[family.head] = Copy(donor.name, self._head())
        return tensors

    def _head(self) -> str:
        """The output model's tensor that is its head."""
        return self.family.head if self.family.head in self.out.tensors else self.family.embedding

    def _is_tied(self) -> bool:
        """Whether the result's head is its embedding: the input model ties them, and both stay the same bytes."""
        if self.hops[0].changes or not self.architecture.tied_in_config:
            return False
        if self.out is self.entry:
            return self.entry.is_tied
        return self.out.digest(self._head()) == self.entry.digest(self.family.embedding)

    def _block(self, place: int) -> dict[str, Expression]:
        """The tensors of one block of the result, with the factors of the hop behind it."""
        hop = self.hops[place]
        behind = self.hops[place + 1] if place + 1 < len(self.hops) else None
        tensors: dict[str, Expression] = {}
        inside = _inside(self.pool, hop)
        for inner, name in inside.items():
            tensors[inner] = Copy(hop.donor, name)
        for module in self.flow.biased if self.biased else ():
            if f"{module}.bias" not in inside:
                weight = self.pool[hop.donor].tensors[inside[f"{module}.weight"]]
                dtype = str(self.dtype or weight.dtype).removeprefix("torch.")
                tensors[f"{module}.bias"] = Given((0.0,), weight.shape[:1], dtype)
        if behind is not None and behind.changes:
            self._put_in(tensors, behind)
        return {f"{self.family.blocks}.{place}.{inner}": tensor for inner, tensor in tensors.items()}

    def _put_in(self, tensors: dict[str, Expression], hop: Hop) -> None:
        """Change what a block writes last by the factors of the hop behind it."""
        if self.flow.norm:
            self._put_in_norm(tensors, hop)
            return
        written = [n for pattern in self.architecture.writers for n in tensors if _is_of(n, pattern)]
        biases = [name for name in written if name.endswith(".bias")]
        bias = _divided(hop.bias, self.architecture.block_scale)
        for name in written:
            added = bias if biases and name == biases[-1] else None
            axis = -1 if name.endswith(".bias") or self.architecture.row_axis(name) else 0
            tensors[name] = self._affine(tensors[name], hop.scale, added, axis)

    def _put_in_norm(self, tensors: dict[str, Expression], hop: Hop) -> None:
        """A norm multiplies by `1 + w`, so that a diagonal goes into it and nothing else does: w becomes
        `s (1 + w) - 1`."""
        kind = self.architecture.model_type
        if _adds(hop.bias):
            self.faults.append(f"bias_factors{hop.where}: {kind} has no bias behind its MLP that it could go into")
        if isinstance(hop.scale, Expression) and self._is_matrix(hop.scale):
            self.faults.append(
                f"scaling_factors{hop.where}: {kind} has a norm behind its MLP, into which a number or D of them "
                "can go, and no D x D"
            )
        scale = 1.0 if hop.scale is None else hop.scale
        less = Affine(scale, bias=-1.0, dtype="float64") if isinstance(scale, Expression) else scale - 1.0
        name = f"{self.flow.norm}.weight"
        tensors[name] = self._affine(tensors[name], scale, less, -1)

    def _is_matrix(self, factor: Expression) -> bool:
        """Whether a factor is D x D, not a diagonal."""
        return len(factor.open(Sources(self.pool, Path())).shape) == 2

    def _needs_biases(self) -> bool:
        """Whether the family's modules get a bias by a key of the config: some blocks have one, or a hop behind the
        first adds one.

        A hop that adds one where there is neither a place nor a key for it is a fault.
        """
        inside = {name for hop in self.hops for name in _inside(self.pool, hop)}
        adding = [hop for hop in self.hops[1:] if _adds(hop.bias)]
        if self.flow.bias_key:
            some = any(f"{module}.bias" in inside for module in self.flow.biased)
            return some or bool(adding or self.entry.config.get(self.flow.bias_key))
        places = (name for name in inside if name.endswith(".bias"))
        if not self.flow.norm and not any(_is_of(name, p) for name in places for p in self.architecture.writers):
            kind = self.architecture.model_type
            self.faults += [
                f"bias_factors{hop.where}: {kind} has no bias in what writes d that it could go into" for hop in adding
            ]
        return False

    def _affine(self, tensor: Expression, scale: Factor, bias: Factor, axis: int) -> Expression:
        if scale in (None, 1.0) and not _adds(bias):
            return tensor
        dtype = None if self.dtype is None else str(self.dtype).removeprefix("torch.")
        return Affine(tensor, scale, bias, axis, dtype)

    def _stored(self, name: str) -> torch.dtype:
        return self.entry.tensors[name].dtype

    def _of_head(self) -> dict[str, Any]:
        """The keys that say whose head a model has: of a classifier the output model's, else a language model's class.

        A model that is stored without its head does not name that class; another one may.
        """
        config = self.out.config
        if self.classification:
            return {key: config[key] for key in OF_HEADS if key in config}
        named = (model.config.get("architectures") for model in (self.out, self.entry, *self.pool))
        return {"architectures": next((names for names in named if _name_language_models(names)), None)}

    def _edits(self, tensors: Mapping[str, Expression], skeletons: Skeletons) -> dict[str, Any]:
        """The keys of the input model's config that the result changes: depth, kinds of layers, head, biases, cache."""
        config = {**self.entry.config, **self._of_head()}
        layers = [[(hop.donor, hop.block)] for hop in self.hops]
        used = {hop.donor for hop in self.hops}
        answer = skeletons.stack(config, {name: self.pool[name].config for name in sorted(used)}, layers)
        if "config" not in answer:
            raise InputError(f"layer_mask: {answer.get('fault') or answer['unknown']}")
        config = dict(answer["config"])
        if self.biased:
            config[self.flow.bias_key] = True
        if self.family.head in tensors and self.architecture.tied_in_config:
            config["tie_word_embeddings"] = False
        if config.get("use_cache") is False:
            config["use_cache"] = True
        return {key: value for key, value in config.items() if self.entry.config.get(key) != value}


def _name_language_models(names: Any) -> bool:
    return bool(names) and str(names[0]).endswith(LANGUAGE_MODELS)


def _is_of(tensor: str, module: str) -> bool:
    return re.fullmatch(rf"{module}\.(weight|bias)", tensor) is not None


def _adds(bias: Factor) -> bool:
    return bias is not None and bias != 0.0


def _divided(bias: Factor, scale: float) -> Factor:
    """b / scale, for what the model multiplies by `scale` before it is added."""
    if bias is None or scale == 1.0:
        return bias
    return Affine(bias, 1 / scale, dtype="float64") if isinstance(bias, Expression) else bias / scale
