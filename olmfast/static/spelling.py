"""Models that are the same but for how their files spell it: tensors renamed as the base has them.

A model saved from another class, or by another version of Transformers, has other names for the same parameters, stores
a shared one twice, or buffers that are computed anyway. What is what, Transformers says (`weights.skeletons`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from olmfast.output.writer import COMPUTED, TIED
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.pool import Pool
from olmfast.weights.skeletons import Skeleton, Skeletons
from olmfast.weights.ties import tied_groups


@dataclass
class Spelling:
    """What became of tensors that not all models had: why some are left out, and which buffers only some have.

    `untied`: some model has a head of its own that others tie to their embedding.
    """

    left_out: dict[str, str] = field(default_factory=dict)
    buffers: set[str] = field(default_factory=set)
    untied: bool = False


def align_names(pool: Pool, base: Checkpoint, skeletons: Skeletons) -> Spelling:
    """Give the tensors of all models the names that the base has for them; asks nothing if all are alike already.

    What Transformers cannot tell keeps its name.
    """
    done = Spelling()
    if not any(_odd(base, donor) for donor in pool):
        return done
    known = {donor.name: skeletons.examine(donor.config, shapes_of(donor), "load") for donor in pool}
    if any(skeleton.unknown for skeleton in known.values()):
        return done
    _drop_buffers(pool, base, known, done)
    _rename(pool, base, known)
    _align_ties(pool, base, known, done)
    return done


def shapes_of(model: Checkpoint) -> dict[str, tuple[int, ...]]:
    """Name -> shape of a model's tensors."""
    return {name: info.shape for name, info in model.tensors.items()}


def _odd(base: Checkpoint, donor: Checkpoint) -> set[str]:
    """Names that only one of two models has, beyond those that every merge knows how to treat."""
    odd = set(base.tensors) ^ set(donor.tensors)
    head = {base.architecture.family.head} if base.architecture.family.embedding in base.tensors else set()
    return {name for name in odd - head if not base.architecture.is_ignored(name) and not _is_block(base, donor, name)}


def _is_block(base: Checkpoint, donor: Checkpoint, name: str) -> bool:
    """Whether a name is only that of a block more, of a deeper model."""
    block = base.architecture.block_of(name)
    depth = min(base.architecture.n_blocks, donor.architecture.n_blocks)
    return block is not None and block >= depth and base.architecture.family == donor.architecture.family


def _drop_buffers(pool: Pool, base: Checkpoint, known: Mapping[str, Skeleton], done: Spelling) -> None:
    """Tensors that Transformers computes itself stay only as the base has them."""
    done.buffers |= {name for skeleton in known.values() for name in skeleton.ignored}
    for donor in pool:
        if donor is not base:
            for name in done.buffers & set(donor.tensors) - set(base.tensors):
                del donor.tensors[name]
                done.left_out.setdefault(name, COMPUTED)


def _rename(pool: Pool, base: Checkpoint, known: Mapping[str, Skeleton]) -> None:
    own = known[base.name]
    names = {target: name for name, target in own.modules.items() if name not in own.converted}
    for donor in pool:
        theirs = known[donor.name]
        for name in [name for name in donor.tensors if name not in base.tensors]:
            wanted = names.get(theirs.modules.get(name, ""))
            if wanted and name not in theirs.converted and wanted not in donor.tensors:
                donor.tensors[wanted] = donor.tensors.pop(name)


def _align_ties(pool: Pool, base: Checkpoint, known: Mapping[str, Skeleton], done: Spelling) -> None:
    """A parameter that is another's is stored once where it is the same, and by all models where it is not."""
    for group in tied_groups(skeleton.tied for skeleton in known.values()):
        stored = {donor.name: _stored(donor, base, known, group) for donor in pool}
        if len({tuple(sorted(names)) for names in stored.values()}) == 1:
            continue
        for donor in pool:
            for name in _doubles(donor, stored[donor.name]):
                del donor.tensors[name]
                stored[donor.name].remove(name)
                done.left_out.setdefault(name, TIED)
        wanted = list(dict.fromkeys(name for donor in (base, *pool) for name in stored[donor.name]))
        if all(len(names) == 1 for names in stored.values()):
            for donor in pool:
                (name,) = stored[donor.name]
                donor.tensors[wanted[0]] = donor.tensors.pop(name)
            continue
        for donor in pool:
            for name in wanted:
                if name not in donor.tensors and stored[donor.name]:
                    donor.tensors[name] = donor.tensors[stored[donor.name][0]]
                    done.untied = True


def _stored(donor: Checkpoint, base: Checkpoint, known: Mapping[str, Skeleton], group: list[str]) -> list[str]:
    """What a model calls the parameters of a group that it stores (renamed ones as the base calls them)."""
    modules = {**known[base.name].modules, **known[donor.name].modules}
    return [name for target in group for name in donor.tensors if modules.get(name) == target]


def _doubles(donor: Checkpoint, names: list[str]) -> list[str]:
    """Those whose bytes are those of the first."""
    if len(names) < 2:
        return []
    first = donor.digest(names[0])
    return [name for name in names[1:] if donor.digest(name) == first]
