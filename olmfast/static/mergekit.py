"""From a merge file to a plan: what every tensor of the result is made of. Reads headers, configs and tokenizers.

Any other description of a merge makes a `Plan` of its own, which is written the same way.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch

from olmfast.config.mergekit import Group, MergeConfig, TokenSource, settings_of
from olmfast.errors import InputError, did_you_mean
from olmfast.output.writer import TIED, Content, OutputTensor, in_order
from olmfast.static.plan import Plan
from olmfast.weights import chat_templates
from olmfast.weights.architecture import numbered
from olmfast.weights.checkpoint import FLOATS, Checkpoint, TensorInfo
from olmfast.weights.chunks import Held, Operands, Setting
from olmfast.weights.expressions import Copy, Rows, merge
from olmfast.weights.methods import METHODS
from olmfast.weights.pool import Pool
from olmfast.weights.sources import Expression
from olmfast.weights.vocabulary import Given, Origin, Vocabulary, plan_vocabulary, row_of, tokenizer_texts

# Methods that draw random numbers: their masks depend on the seed and the tensor's name.
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def plan_merge(config: MergeConfig, *, seed: int = 0) -> Plan:
    """Open the models a merge file names and say for every tensor of the result what it is made of.

    Reads headers, configs and tokenizers, no weights. Raises InputError that lists everything that does not fit.
    """
    pool = Pool.open(config.model_names, config.folder, config.folder, alike=False, download=False)
    _check_families(pool)
    base = config.base_model or config.groups()[0].sources[0].model
    vocabulary = _vocabulary(config, pool, base)
    planner = _Planner(config, pool, base, vocabulary, seed)
    tensors = planner.plan()
    tokenizer = vocabulary.source if vocabulary else base
    texts = tokenizer_texts(vocabulary, pool[tokenizer].folder) if vocabulary else {}
    if config.chat_template is not None:
        texts |= _chat_template(config, pool, tokenizer, texts)
    content = Content(tensors, pool[base], planner.model_config(), pool[tokenizer], texts, planner.left_out)
    return Plan(
        config.merge_method,
        pool,
        content,
        config.text,
        "mergekit_config.yml",
        planner.buffers,
        planner.notes,
        vocabulary,
    )


def _check_families(pool: Pool) -> None:
    types = {str(donor.config.get("model_type")): donor.name for donor in pool}
    if len(types) > 1:
        listed = ", ".join(f"{name} is {kind}" for kind, name in types.items())
        raise InputError(f"models of different architectures cannot be merged: {listed}")


class _Planner:
    """Walks the tensors of the result; what does not fit is collected and raised at once."""

    def __init__(self, config: MergeConfig, pool: Pool, base: str, vocabulary: Vocabulary | None, seed: int) -> None:
        self.config, self.pool, self.base, self.vocabulary, self.seed = config, pool, pool[base], vocabulary, seed
        self.groups = config.groups()
        self.blocks = self.base.architecture.family.blocks
        self.faults: list[str] = []
        self.faulty: dict[str, list[str]] = {}
        self.tried: dict[Hashable, str | None] = {}
        self.left_out: dict[str, str] = {}
        self.buffers: list[list[tuple[str, str]]] = []
        self.notes: list[str] = []
        self.head_written = False
        self.dtypes: Counter[torch.dtype] = Counter()

    def plan(self) -> list[OutputTensor]:
        """Every tensor of the result, in the order of writing. Raises InputError with everything that is wrong."""
        if self.config.slices is not None:
            tensors = [tensor for planned in self._stacked() if (tensor := planned) is not None]
        else:
            tensors = [tensor for tensor in self._side_by_side() if tensor is not None]
        for what, names in self.faulty.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.faults.append(f"{names[0]}{more}: {what}")
        if self.faults:
            raise InputError("\n".join(dict.fromkeys(self.faults)))
        return in_order(tensors)

    def model_config(self) -> dict[str, Any]:
        """The base's config.json with what the merge changes: layers, vocabulary, dtype, tied head."""
        config = dict(self.base.config)
        if self.config.slices is not None:
            config = _stacked_config(config, self.groups, self.pool)
        if self.vocabulary is not None:
            config = _with_vocabulary(config, self.vocabulary, self.pool)
        if self.head_written and self.base.architecture.tied_in_config:
            config["tie_word_embeddings"] = False
        dtype = self.dtypes.most_common(1)[0][0] if self.dtypes else None
        keys = [key for key in ("dtype", "torch_dtype") if key in config] or ["dtype"]
        if (self.config.dtype or self.config.out_dtype) and dtype is not None:
            for key in keys:
                config[key] = str(dtype).removeprefix("torch.")
        return config

    def _side_by_side(self) -> Iterator[OutputTensor | None]:
        """All layers of the models, merged layer by layer."""
        (group,) = self.groups
        depths = self._depths(self.pool[group.sources[0].model])
        counts = {source.model: self.pool[source.model].architecture.n_blocks for source in group.sources}
        if len(set(counts.values())) > 1:
            listed = ", ".join(f"{model} has {n}" for model, n in counts.items())
            self.faults.append(f"the models have different numbers of layers: {listed}; use slices")
            return
        for name in self._names(group):
            place = numbered(name)
            last = depths.get(place[0], 0) if place else 0
            depth = 0.0 if place is None else place[1] / last if last else 1.0
            yield self._tensor(group, name, [name] * len(group.sources), depth)

    def _stacked(self) -> Iterator[OutputTensor | None]:
        """Layers of slices one after another, renumbered; the rest from the first slice and from the last."""
        first, last = self.groups[0], self.groups[-1]
        for group in self.groups:
            for source in group.sources:
                n_blocks = self.pool[source.model].architecture.n_blocks
                if source.layer_range is not None and source.layer_range[1] > n_blocks:
                    self.faults.append(
                        f"{group.name}: layer_range {list(source.layer_range)} of {source.model}, which has {n_blocks} "
                        f"layers (0 to {n_blocks - 1})"
                    )
        if self.faults:
            return
        for name in self._names(first):
            if self._block(name) is None and not self._is_behind(name):
                yield self._tensor(first, name, [name] * len(first.sources), 0.0)
        for name in self._names(last):
            if self._block(name) is None and self._is_behind(name):
                yield self._tensor(last, name, [name] * len(last.sources), 0.0)
        written = 0
        for group in self.groups:
            ranges = [source.layer_range or (0, 0) for source in group.sources]
            n_layers = ranges[0][1] - ranges[0][0]
            for offset in range(n_layers):
                depth = offset / (n_layers - 1) if n_layers > 1 else 1.0
                parts: dict[str, None] = {}
                for source, (begin, _) in zip(group.sources, ranges, strict=True):
                    prefix = f"{self.blocks}.{begin + offset}."
                    held = self.pool[source.model].tensors
                    parts |= {name[len(prefix) :]: None for name in held if name.startswith(prefix)}
                for part in parts:
                    names = [f"{self.blocks}.{begin + offset}.{part}" for begin, _ in ranges]
                    yield self._tensor(group, f"{self.blocks}.{written}.{part}", names, depth)
                written += 1

    def _names(self, group: Group) -> list[str]:
        """The tensors that any of the group's models has, those of the base first."""
        models = sorted((source.model for source in group.sources), key=lambda model: model != self.base.name)
        return list(dict.fromkeys(name for model in models for name in self.pool[model].tensors))

    def _depths(self, model: Checkpoint) -> dict[str, int]:
        """The last number of each numbered prefix."""
        last: dict[str, int] = {}
        for prefix, index, _ in filter(None, map(numbered, model.tensors)):
            last[prefix] = max(last.get(prefix, 0), index)
        return last

    def _block(self, name: str) -> int | None:
        place = numbered(name)
        return place[1] if place and place[0] == self.blocks else None

    def _is_behind(self, name: str) -> bool:
        """Whether a tensor outside the blocks comes after them: the final norm and the head."""
        architecture = self.base.architecture
        module, head = name.rpartition(".")[0], architecture.family.head.rpartition(".")[0]
        return module == head or architecture.is_norm(module) or module.endswith("ln_f")

    def _tensor(self, group: Group, output: str, names: Sequence[str], depth: float) -> OutputTensor | None:
        """One tensor of the result; `names` are what the group's models call it. None if the result has none."""
        donors = [self.pool[source.model] for source in group.sources]
        family = self.base.architecture.family
        if output == family.head:
            names = [_head_name(donor, name) for donor, name in zip(donors, names, strict=True)]
            if all(_is_tied(donor) for donor in donors):
                self.left_out[output] = TIED
                return None
            self.head_written = True
        held = {d.name: (d, n) for d, n in zip(donors, names, strict=True) if n in d.tensors}
        if len(held) < len(donors):
            if not self.base.architecture.is_ignored(output):
                lacking = [donor.name for donor in donors if donor.name not in held]
                self._refused(output, f"in {', '.join(held)}, but not in {', '.join(lacking)}")
                return None
            donor, name = next(iter(held.values()))
            return self._copied(output, donor, name)
        infos = {model: donor.tensors[name] for model, (donor, name) in held.items()}
        if any(info.dtype not in FLOATS for info in infos.values()):
            self.buffers.append([(model, name) for model, (_, name) in held.items()])
            donor, name = next(iter(held.values()))
            return self._copied(output, donor, name)
        return self._merged(group, output, dict(zip(held, names, strict=True)), infos, depth)

    def _copied(self, output: str, donor: Checkpoint, name: str) -> OutputTensor:
        info = donor.tensors[name]
        return OutputTensor(self._spelled(output), info.dtype, info.shape, Copy(donor.name, name))

    def _merged(
        self, group: Group, output: str, names: dict[str, str], infos: dict[str, TensorInfo], depth: float
    ) -> OutputTensor | None:
        config, method = self.config, METHODS[self.config.merge_method]
        shapes = {model: info.shape for model, info in infos.items()}
        if self._is_vocabulary(output) and self.vocabulary is not None:
            shapes = {model: (self.vocabulary.n_rows, *shape[1:]) for model, shape in shapes.items()}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"{model} {list(shape)}" for model, shape in shapes.items())
            advice = "; use tokenizer_source: base or union" if self._is_vocabulary(output) else ""
            self._refused(output, f"shapes differ: {listed}{advice}")
            return None
        terms = group.terms(method)
        try:
            settings = settings_of(config, group, terms, [names[term.model] for term in terms], output, depth)
        except InputError as error:
            self._refused(output, str(error).removeprefix(f"{output}: "))
            return None
        has_base = method.base in ("required", "optional") and group.base is not None
        what = self._try(settings, len(terms), has_base)
        if what is not None:
            self._refused(output, what)
            return None
        dtype = getattr(torch, config.dtype) if config.dtype else _promoted(infos.values())
        out_dtype = getattr(torch, config.out_dtype) if config.out_dtype else dtype
        self.dtypes[out_dtype] += 1
        expressions = {model: self._source(output, model, names, infos) for model in infos}
        if config.merge_method == "passthrough" and not self._scales(settings):
            only = expressions[terms[0].model]
            if isinstance(only, Rows) or config.dtype is None or infos[terms[0].model].dtype == dtype:
                return OutputTensor(self._spelled(output), out_dtype, shapes[terms[0].model], only)
        if config.merge_method in RANDOM:
            settings |= {"seed": self.seed, "stream": output}
        if config.dtype is not None:
            settings["dtype"] = config.dtype
        base = expressions[group.base] if has_base and group.base is not None else None
        expression = merge(config.merge_method, [expressions[term.model] for term in terms], base, **settings)
        return OutputTensor(self._spelled(output), out_dtype, next(iter(shapes.values())), expression)

    def _refused(self, output: str, what: str) -> None:
        """Note what is wrong with a tensor; a fault that several share is reported once."""
        self.faulty.setdefault(what, []).append(output)

    def _try(self, settings: Mapping[str, Setting], n_terms: int, has_base: bool) -> str | None:
        """Why the method refuses these settings, if it does; found by merging four values, once for equal settings."""
        key = (tuple(sorted(settings.items())), n_terms, has_base)
        if key not in self.tried:
            method, values = METHODS[self.config.merge_method], torch.tensor([[1.0, 2.0], [3.0, 5.0]])
            terms = [Held(values * (i + 2)) for i in range(n_terms)]
            operands = Operands(terms, Held(values) if has_base else None, torch.device("cpu"))
            try:
                method.prepare(operands, method.settings(settings))(0, values.numel())
                self.tried[key] = None
            except (TypeError, ValueError) as error:
                self.tried[key] = str(error)
        return self.tried[key]

    def _scales(self, settings: Mapping[str, Any]) -> bool:
        return any(scale != 1.0 for scale in settings.get("scale", ()))

    def _source(self, output: str, model: str, names: dict[str, str], infos: dict[str, TensorInfo]) -> Expression:
        if self.vocabulary is None or not self._is_vocabulary(output):
            return Copy(model, names[model])
        return self.vocabulary.rows(model, list(infos), self.config.base_model, lambda name: Copy(name, names[name]))

    def _is_vocabulary(self, output: str) -> bool:
        """Whether a tensor has a row per token: embedding, head, and the head's bias."""
        family = self.base.architecture.family
        if output in (family.embedding, family.head):
            return True
        bias = f"{family.head.rpartition('.')[0]}.bias"
        return output == bias

    def _spelled(self, output: str) -> str:
        """A canonical name in the spelling of the base's files."""
        base = self.base
        if output in base.file_names:
            return base.file_names[output]
        prefix = base.architecture.family.optional_prefix
        bare = bool(prefix) and not any(name.startswith(prefix) for name in base.file_names.values())
        return output.removeprefix(prefix) if bare else output


def _head_name(donor: Checkpoint, name: str) -> str:
    """A model without a head of its own offers its embedding."""
    embedding = donor.architecture.family.embedding
    return embedding if name not in donor.tensors and embedding in donor.tensors else name


def _is_tied(donor: Checkpoint) -> bool:
    return bool(donor.architecture.family.embedding) and donor.is_tied


def _promoted(infos: Sequence[TensorInfo] | Any) -> torch.dtype:
    dtypes = [info.dtype for info in infos]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def _stacked_config(config: dict[str, Any], groups: Sequence[Group], pool: Pool) -> dict[str, Any]:
    """The number of layers, and every list that has an entry per layer, as the slices make them."""
    ranges = [(pool[g.sources[0].model], g.sources[0].layer_range or (0, 0)) for g in groups]
    n_layers = sum(end - begin for _, (begin, end) in ranges)
    parts = [config, config["text_config"]] if isinstance(config.get("text_config"), dict) else [config]
    changed = []
    for part, inside in zip(parts, (None, "text_config"), strict=False):
        part = dict(part)
        for key, value in part.items():
            if key in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") and isinstance(value, int):
                part[key] = n_layers
            elif isinstance(value, list) and "layer" in key:
                rebuilt: list[Any] = []
                for model, (begin, end) in ranges:
                    own = model.config if inside is None else model.config.get(inside, {})
                    listed = own.get(key)
                    if isinstance(listed, list) and len(listed) == model.architecture.n_blocks:
                        rebuilt += listed[begin:end]
                if len(rebuilt) == n_layers:
                    part[key] = rebuilt
        changed.append(part)
    return {**changed[0], "text_config": changed[1]} if len(changed) > 1 else changed[0]


def _with_vocabulary(config: dict[str, Any], vocabulary: Vocabulary, pool: Pool) -> dict[str, Any]:
    """The size of the vocabulary, and the special tokens of the model whose tokenizer is taken."""
    part = config["text_config"] if "vocab_size" not in config and "text_config" in config else config
    changed = {**part, "vocab_size": vocabulary.n_rows}
    theirs = pool[vocabulary.source].config
    for key in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        if key in theirs:
            changed[key] = theirs[key]
    return changed if part is config else {**config, "text_config": changed}


def _vocabulary(config: MergeConfig, pool: Pool, base: str) -> Vocabulary | None:
    wanted = config.vocabulary
    if wanted is None:
        return None
    rows = {}
    for donor in pool:
        embedding = donor.architecture.family.embedding
        if embedding not in donor.tensors:
            raise InputError(f"{donor.name}: no embedding was found among its tensors, so its vocabulary is unknown")
        rows[donor.name] = donor.tensors[embedding].shape[0]
    tokens = {
        token: Given(_token_origin(entry.source, token, pool), entry.force) for token, entry in wanted.tokens.items()
    }
    return plan_vocabulary(pool, pool.names, base, wanted.source, tokens, wanted.pad_to_multiple_of, rows)


def _token_origin(source: TokenSource | None, token: str, pool: Pool) -> Origin | None:
    where = f"tokenizer.tokens.{token}"
    if source is None:
        return None
    if source.kind == "zero":
        return ()
    model = str(source.model)
    if model not in pool.donors:
        raise InputError(f"{where}: {model!r} is not one of the models{did_you_mean(model, pool.names)}")
    if source.token_id is not None:
        return ((model, source.token_id),)
    return ((model, row_of(pool, model, source.token or token, where)),)


def _chat_template(config: MergeConfig, pool: Pool, tokenizer: str, texts: Mapping[str, str]) -> dict[str, str]:
    """chat_template.jinja, and tokenizer_config.json without a template of its own."""
    folder = pool[tokenizer].folder
    merged = list(dict.fromkeys(source.model for group in config.groups() for source in group.sources))
    text = chat_templates.choose(str(config.chat_template), {name: pool[name].folder for name in merged})
    if text is None:
        return {}
    changed = {"chat_template.jinja": text}
    path = folder / "tokenizer_config.json"
    if "tokenizer_config.json" in texts or path.is_file():
        own = json.loads(texts.get("tokenizer_config.json") or path.read_text(encoding="utf-8"))
        if own.pop("chat_template", None) is not None:
            changed["tokenizer_config.json"] = json.dumps(own, ensure_ascii=False, indent=2) + "\n"
    return changed
