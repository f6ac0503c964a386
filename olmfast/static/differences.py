"""Models whose config.json give the same weights another meaning: what differs is told, what spoils a blend refused.

Two heads of 64 are not four of 32, and query and key of another rotary base point elsewhere. Equal shapes hide that.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from olmfast.errors import did_you_mean, show
from olmfast.weights.checkpoint import Checkpoint
from olmfast.weights.pool import Pool, vocabulary_differences
from olmfast.weights.skeletons import Skeletons

# Say nothing of what weights mean (training, bookkeeping), or are compared elsewhere (sizes, vocabulary, ties).
IGNORED = re.compile(
    r"_?name_or_path|transformers_version|(torch_)?dtype|architectures|auto_map|use_cache|.*drop(out)?(_\w+)?|\w*pdrop"
    r"|initializer_\w+|init_\w+|output_\w+|return_dict\w*|gradient_checkpointing|router_aux_loss_coef|pretraining_tp"
    r"|_\w+|problem_type|finetuning_task|task_specific_params|tokenizer_class|id2label|label2id|num_labels|vocab_size"
    r"|tie_word_embeddings|\w*token_(id|index)|\w*_tokens?_ids?|max_length|model_type|transformers\.js_config|unsloth\w*"
    r"|num_hidden_layers|n_layers?|num_layers|is_decoder|chunk_size_feed_forward|forced_\w+|suppress_tokens|\w*_loss\w*"
)
# Under another value of these the same weights compute something else altogether.
DECISIVE = re.compile(
    r"\w*num_(attention|key_value|kv|query|decoder|encoder)?_?heads|n_heads?|num_heads|\w*attention_heads|head_dim"
    r"|\w*_head_dim|multi_query|new_decoder_architecture|parallel_attn|\w*act(ivation)?(_fn|_function)?|activation\w*"
    r"|rope_\w+|partial_rotary_factor|rotary_\w+|alibi|position_embedding_type|mrope_section|\w*multiplier"
    r"|\w*scaling(_factor)?|\w*scale(s|_\w+)?|\w*softcap\w*|query_pre_attn_scalar|num_experts_per_tok|norm_topk_prob"
    r"|scoring_func|topk_method|use_parallel_residual|use_qk_norm|qk_layernorm|logits?_scale|attn_scale"
)
# Left out, they follow from others; that shapes are equal says what they are.
DERIVED = ("head_dim", "num_key_value_heads", "n_inner", "intermediate_size")
CLASSIFIER = re.compile(r"For\w*Classification")


def find_differences(
    pool: Pool,
    base: Checkpoint,
    skeletons: Skeletons,
    allowed: Collection[str],
    tokens_are_aligned: bool,
    blocks_only: bool = False,
) -> tuple[list[str], list[str]]:
    """A line for each difference from the base's config that changes what weights mean: what to tell, what to refuse.

    Refused is what makes a merge mean nothing; `allowed` are keys that may differ nevertheless. With `blocks_only`, the
    others give blocks alone, and what rows of their embeddings and heads mean is not compared.
    """
    notes, faults, seen = [], [], set[str]()
    for other, key, ours, theirs in _differences(pool, base, skeletons):
        line = f"{other.name}: {key} is {show(theirs)}, {base.name} has {show(ours)}"
        names = {key, *key.split(".")}
        seen |= names
        if DECISIVE.fullmatch(key.rpartition(".")[2]) and not names & set(allowed):
            faults.append(f"{line}: the same weights mean something else; --allow-mismatch {key} merges them anyway")
        else:
            notes.append(f"{line}; the result has the base's")
    for other in () if blocks_only else pool:
        for key, line in _other_meanings(base, other, tokens_are_aligned):
            seen.add(key)
            if key in allowed:
                notes.append(line)
            else:
                advice = "; use tokenizer_source: base or union" if key == "tokenizer" else ""
                faults.append(f"{line}{advice}, or --allow-mismatch {key} to merge by number")
    unknown = [key for key in allowed if key not in seen and not _is_in(key, base.config)]
    if unknown and unknown[0] not in ("tokenizer", "id2label"):
        meant = did_you_mean(unknown[0], sorted({*seen, *base.config}))
        faults.append(f"--allow-mismatch {unknown[0]}: no such key in {base.name}'s config{meant}")
    return notes, faults


def _is_in(key: str, config: Mapping[str, Any]) -> bool:
    return (
        key in config or any(_is_in(key, value) for value in config.values() if isinstance(value, dict)) or "." in key
    )


def _differences(pool: Pool, base: Checkpoint, skeletons: Skeletons) -> Iterable[tuple[Checkpoint, str, Any, Any]]:
    """(model, key, base's value, its value); defaults are filled in by Transformers, if anything differs at all."""
    donors = [donor for donor in pool if donor is not base]
    plain = {donor.name: dict(_told(donor.config)) for donor in pool}
    if all(plain[donor.name] == plain[base.name] for donor in donors):
        return
    alike = len({str(donor.config.get("model_type")) for donor in pool}) == 1
    filled = skeletons.settings([donor.config for donor in pool]) if alike else None
    if filled is not None:
        plain = {donor.name: dict(_told(settings)) for donor, settings in zip(pool, filled, strict=True)}
    ours = plain[base.name]
    for donor in donors:
        theirs = plain[donor.name]
        for key in {**ours, **theirs}:
            # Without the defaults, a key that one does not state may well have the same value.
            stated = filled is not None or (key in ours and key in theirs)
            both = (ours.get(key), theirs.get(key))
            derived = None in both and key.rpartition(".")[2] in DERIVED
            if stated and both[0] != both[1] and not derived:
                yield donor, key, *both


def _told(config: Mapping[str, Any], prefix: str = "") -> Iterable[tuple[str, Any]]:
    """The keys that say what weights mean, those of parts as `part.key`."""
    for key, value in config.items():
        if IGNORED.fullmatch(key.rpartition(".")[2]) or re.search(r"(^|\.)(id2label|label2id)\.", f"{key}."):
            continue
        if isinstance(value, Mapping):
            yield from _told(value, f"{prefix}{key}.")
        elif not (isinstance(value, list) and re.search(r"layer|block|types", key)):  # of layers: held apart in slices
            yield f"{prefix}{key}", value


def _other_meanings(base: Checkpoint, other: Checkpoint, tokens_are_aligned: bool) -> Iterable[tuple[str, str]]:
    """Rows that are another token's or another label's."""
    if other is base:
        return
    if not tokens_are_aligned and not _same_file(base, other, "tokenizer.json"):
        for line in vocabulary_differences(base, other):
            yield "tokenizer", f"{other.name}: {line}"
    ours, theirs = base.config.get("id2label"), other.config.get("id2label")
    classifies = any(CLASSIFIER.search(str(name)) for name in base.config.get("architectures") or ())
    if classifies and isinstance(ours, dict) and isinstance(theirs, dict) and _differ(ours, theirs):
        yield "id2label", f"{other.name}: id2label is {show(theirs)}, {base.name} has {show(ours)}"


def _differ(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> bool:
    """Whether labels have other numbers; the names that stand for none (LABEL_0) tell nothing."""
    named = [all(not str(v).startswith("LABEL_") for v in labels.values()) for labels in (ours, theirs)]
    return ours != theirs and all(named)


def _same_file(base: Checkpoint, other: Checkpoint, name: str) -> bool:
    paths: Sequence[Any] = [model.tokenizer_folder / name for model in (base, other)]
    if not all(path.is_file() for path in paths):
        return True
    return bool(paths[0].read_bytes() == paths[1].read_bytes())
