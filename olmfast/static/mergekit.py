"""From a merge file to a plan: what every tensor of the result is made of. Reads headers, configs and tokenizers.

Any other description of a merge makes a `Plan` of its own, which is written the same way.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from olmfast.config.groups import Group, idle_entries
from olmfast.config.mergekit import MergeConfig
from olmfast.config.parameters import settings_of
from olmfast.errors import InputError
from olmfast.output.beside import auto_maps, files_beside, texts_without_code
from olmfast.output.writer import TIED, Content, OutputTensor, in_order
from olmfast.static.differences import find_differences
from olmfast.static.loading import DTYPE_KEYS, check_loads
from olmfast.static.plan import Plan, check_copied
from olmfast.static.spelling import Spelling, align_names
from olmfast.static.stacking import Stack, stack_of, stacked_config
from olmfast.static.vocabularies import TokenTensors, chat_template_texts, plan_tokens, with_vocabulary
from olmfast.weights.architecture import numbered, stated_blocks
from olmfast.weights.checkpoint import FLOATS, Checkpoint, Tensor
from olmfast.weights.chunks import Held, Operands, Setting
from olmfast.weights.expressions import Copy, Rows, merge
from olmfast.weights.methods import METHODS
from olmfast.weights.pool import Pool
from olmfast.weights.skeletons import Skeletons
from olmfast.weights.sources import Expression
from olmfast.weights.ties import untied
from olmfast.weights.vocabulary import Vocabulary, tokenizer_texts

# Methods that draw random numbers: their masks depend on the seed and the tensor's name.
RANDOM = ("dare_linear", "dare_ties", "della", "della_linear")


def plan_merge(
    config: MergeConfig,
    *,
    seed: int = 0,
    allow_mismatch: Collection[str] = (),
    remote_code_files: bool = True,
    made: Mapping[str, Path] | None = None,
) -> Plan:
    """Open the models a merge file names and say for every tensor of the result what it is made of.

    Reads headers, configs and tokenizers, no weights (but those of a tensor that is stored twice). Of a result that is
    not shaped as the base is, the module that Transformers makes of its config.json is held against its tensors.
    `allow_mismatch` are keys of config.json that may differ, although the weights then mean something else. Python
    files that a model brings are copied, unless `remote_code_files` is False; nothing of them is run. `made` are models
    that have no other name than that of a document before this one: name -> folder.
    Raises InputError that lists everything that does not fit.
    """
    pool = Pool.open(config.model_names, config.folder, config.folder, alike=False, download=False, places=made)
    _check_families(pool)
    base = pool[config.base_model or config.groups()[0].sources[0].model]
    with Skeletons() as skeletons:
        spelling = align_names(pool, base, skeletons)
        notes, faults = find_differences(pool, base, skeletons, allow_mismatch, config.vocabulary is not None)
        notes = [*config.notes(), *notes]
        vocabulary, tokens = plan_tokens(config, pool, base, skeletons)
        planner = _Planner(config, pool, base, seed, skeletons, spelling, vocabulary, tokens)
        planner.faults += faults
        tensors = planner.plan()
        written = planner.model_config()
        notes += idle_entries(config.merge_method, planner.groups, config.parameters, planner.merged)
        notes += check_loads(base, written, tensors, skeletons)
    tokenizer = vocabulary.source if vocabulary else base.name
    texts = tokenizer_texts(vocabulary, pool[tokenizer].tokenizer_folder) if vocabulary else {}
    if config.chat_template is not None:
        texts |= chat_template_texts(config, pool, tokenizer, texts)
    notes += _code_notes(base, pool[tokenizer], remote_code_files)
    if not remote_code_files:
        written.pop("auto_map", None)
        texts |= texts_without_code(base, pool[tokenizer], texts)
    content = Content(tensors, base, written, pool[tokenizer], texts, planner.left_out, remote_code_files)
    check_copied(content)
    return Plan(
        config.merge_method,
        pool,
        content,
        config.text,
        "mergekit_config.yml",
        planner.buffers,
        vocabulary=vocabulary,
        token_rows=[planner.spelled(name) for name in tokens.rows],
        warnings=[*pool.warnings, *notes, *(vocabulary.notes() if vocabulary else [])],
        read={} if config.file is None else {"the merge file": [config.file]},
    )


def _code_notes(base: Checkpoint, tokenizer: Checkpoint, copied: bool) -> list[str]:
    """What becomes of a model's own Python files."""
    if not (auto_maps(base) or auto_maps(tokenizer)):
        return []
    files = [name for name in files_beside(base) if name.endswith(".py")]
    listed = ", ".join(files) or "none there"
    if not copied:
        return [f"{base.name}: its Python files ({listed}) and the auto_map that names them are left out"]
    return [
        f"{base.name}: its Python files ({listed}) are copied, as auto_map names them; they were not run, and are run "
        "only by who trusts remote code; --no-remote-code-files leaves both out"
    ]


def _check_families(pool: Pool) -> None:
    types = {str(donor.config.get("model_type")): donor.name for donor in pool}
    if len(types) > 1:
        listed = ", ".join(f"{name} is {kind}" for kind, name in types.items())
        raise InputError(f"models of different architectures cannot be merged: {listed}")


class _Planner:
    """Walks the tensors of the result; what does not fit is collected and raised at once."""

    def __init__(
        self,
        config: MergeConfig,
        pool: Pool,
        base: Checkpoint,
        seed: int,
        skeletons: Skeletons,
        spelling: Spelling,
        vocabulary: Vocabulary | None,
        tokens: TokenTensors,
    ) -> None:
        self.config, self.pool, self.base, self.seed, self.skeletons = config, pool, base, seed, skeletons
        self.spelling, self.vocabulary, self.tokens = spelling, vocabulary, tokens
        self.groups = config.groups()
        self.faults: list[str] = []
        self.faulty: dict[str, list[str]] = {}
        self.tried: dict[Hashable, str | None] = {}
        self.left_out: dict[str, str] = dict(spelling.left_out)
        self.buffers: list[list[tuple[str, str]]] = []
        self.merged: list[tuple[Group, str, list[str]]] = []  # the group, the name, and what its terms call it
        self.head_written = False
        self.dtypes: Counter[torch.dtype] = Counter()

    def plan(self) -> list[OutputTensor]:
        """Every tensor of the result, in the order of writing. Raises InputError with everything that is wrong."""
        found = self._side_by_side() if self._is_whole else self._stacked()
        tensors = [tensor for tensor in found if tensor is not None]
        for what, names in self.faulty.items():
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self.faults.append(f"{names[0]}{more}: {what}")
        if self.faults:
            raise InputError("\n".join(dict.fromkeys(self.faults)))
        return in_order(tensors)

    def model_config(self) -> dict[str, Any]:
        """The base's config.json with what the merge changes: layers, vocabulary, dtype, tied head."""
        config = dict(self.base.config)
        if not self._is_whole:
            config = stacked_config(self.base, self.groups, self.pool, self.skeletons)
        if self.vocabulary is not None:
            config = with_vocabulary(config, self.vocabulary, self.tokens.keys, self.pool, self.base)
        if self.spelling.untied or (self.head_written and self.base.architecture.tied_in_config):
            config = untied(config)
        dtype = self.dtypes.most_common(1)[0][0] if self.dtypes else None
        keys = [key for key in DTYPE_KEYS if key in config] or ["dtype"]
        if (self.config.dtype or self.config.out_dtype) and dtype is not None:
            for key in keys:
                config[key] = str(dtype).removeprefix("torch.")
        return config

    @property
    def _is_whole(self) -> bool:
        """Whether all layers of the models are merged in their places."""
        return self.config.slices is None or (len(self.groups) == 1 and self._is_all_of(self.groups[0]))

    def _is_all_of(self, group: Group) -> bool:
        depths = [(source.layer_range, self.pool[source.model].architecture.n_blocks) for source in group.sources]
        stated = [stated_blocks(self.pool[source.model].config) for source in group.sources]
        return all(given == (0, n) for given, n in depths) and all(n in (None, depths[0][1]) for n in stated)

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
        """Layers of slices one after another, renumbered; what comes before them from the first slice, what follows
        from the last, and other towers from the base."""
        stacks = {model: stack_of(self.pool[model], self.skeletons) for g in self.groups for model in g.models}
        stacks[self.base.name] = stack_of(self.base, self.skeletons)
        outside = list(_range_faults(self.groups, stacks))
        self.faults += outside
        if outside:
            return
        first, last = self.groups[0], self.groups[-1]
        for region, group in (("before", first), ("after", last)):
            for name in self._names(group):
                if any(stacks[model].regions.get(name) == region for model in group.models):
                    yield self._tensor(group, name, [name] * len(group.sources), 0.0)
        for name, region in stacks[self.base.name].regions.items():
            if region == "aside" or (region == "around" and first.models == last.models == [self.base.name]):
                yield self._copied(name, self.base, name)
            elif region == "around" and first.models == last.models:
                yield self._tensor(first, name, [name] * len(first.sources), 0.0)
            elif region == "around":
                self._refused(name, "whether it is the first slice's or the last's cannot be told; use models")
        written = 0
        for group in self.groups:
            begins = {source.model: (source.layer_range or (0, 0))[0] for source in group.sources}
            for offset in range(group.n_layers):
                depth = offset / (group.n_layers - 1) if group.n_layers > 1 else 1.0
                parts = {part: None for model, begin in begins.items() for part in stacks[model].parts(begin + offset)}
                for before, after in parts:
                    names = [f"{before}{begin + offset}{after}" for begin in begins.values()]
                    yield self._tensor(group, f"{before}{written}{after}", names, depth)
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
            if output not in self.spelling.buffers and not self.base.architecture.is_ignored(output):
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
        return OutputTensor(self.spelled(output), info.dtype, info.shape, Copy(donor.name, name))

    def _merged(
        self, group: Group, output: str, names: dict[str, str], infos: dict[str, Tensor], depth: float
    ) -> OutputTensor | None:
        config, terms = self.config, group.terms(METHODS[self.config.merge_method])
        name = config.merge_method if terms else "passthrough"  # a base alone: nothing is added to it
        method, terms = METHODS[name], terms or group.sources
        shapes = {model: info.shape for model, info in infos.items()}
        if self._has_token_rows(output) and self.vocabulary is not None:
            odd = [m for m, shape in shapes.items() if shape[0] != self.vocabulary.model_rows[m]]
            if odd:
                rows = self.vocabulary.model_rows[odd[0]]
                self._refused(output, f"{shapes[odd[0]][0]} rows in {odd[0]}, whose embedding has {rows}")
                return None
            shapes = {model: (self.vocabulary.n_rows, *shape[1:]) for model, shape in shapes.items()}
        if len(set(shapes.values())) > 1:
            listed = ", ".join(f"{model} {list(shape)}" for model, shape in shapes.items())
            advice = "; use tokenizer_source: base or union" if self._is_of_tokens(output) else ""
            self._refused(output, f"shapes differ: {listed}{advice}")
            return None
        try:
            outer, own = (group.parameters, config.parameters), [term.parameters for term in terms]
            called = [names[term.model] for term in terms]
            settings = settings_of(method, outer, own, called, output, depth)
        except InputError as error:
            self._refused(output, str(error).removeprefix(f"{output}: "))
            return None
        if name == config.merge_method:
            self.merged.append((group, output, called))
        has_base = method.base in ("required", "optional") and group.base is not None
        what = self._try(name, settings, len(terms), has_base)
        if what is not None:
            self._refused(output, what)
            return None
        dtype = getattr(torch, config.dtype) if config.dtype else _promoted(infos.values())
        out_dtype = getattr(torch, config.out_dtype) if config.out_dtype else dtype
        self.dtypes[out_dtype] += 1
        expressions = {model: self._source(output, model, names, infos) for model in infos}
        if name == "passthrough" and not self._scales(settings):
            only = expressions[terms[0].model]
            if isinstance(only, Rows) or config.dtype is None or infos[terms[0].model].dtype == dtype:
                return OutputTensor(self.spelled(output), out_dtype, shapes[terms[0].model], only)
        if name in RANDOM:
            settings |= {"seed": self.seed, "stream": output}
        if config.dtype is not None:
            settings["dtype"] = config.dtype
        base = expressions[group.base] if has_base and group.base is not None else None
        expression = merge(name, [expressions[term.model] for term in terms], base, **settings)
        return OutputTensor(self.spelled(output), out_dtype, next(iter(shapes.values())), expression)

    def _refused(self, output: str, what: str) -> None:
        """Note what is wrong with a tensor; a fault that several share is reported once."""
        self.faulty.setdefault(what, []).append(output)

    def _try(self, name: str, settings: Mapping[str, Setting], n_terms: int, has_base: bool) -> str | None:
        """Why the method refuses these settings, if it does; found by merging four values, once for equal settings."""
        key = (name, tuple(sorted(settings.items())), n_terms, has_base)
        if key not in self.tried:
            method, values = METHODS[name], torch.tensor([[1.0, 2.0], [3.0, 5.0]])
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

    def _source(self, output: str, model: str, names: dict[str, str], infos: dict[str, Tensor]) -> Expression:
        if self.vocabulary is None or not self._has_token_rows(output):
            return Copy(model, names[model])
        width = infos[model].shape[1:]
        others = {d.name: _head_name(d, output) for d in self.pool if d.name not in names}
        others = {
            m: n for m, n in others.items() if n in self.pool[m].tensors and self.pool[m].tensors[n].shape[1:] == width
        }
        places = {**others, **names}
        return self.vocabulary.rows(
            model, list(infos), self.config.base_model, lambda name: Copy(name, places[name]), list(others)
        )

    def _has_token_rows(self, output: str) -> bool:
        """Whether a tensor has a row per token of a vocabulary that changes."""
        return output in self.tokens.rows

    def _is_of_tokens(self, output: str) -> bool:
        family = self.base.architecture.family
        return output in (family.embedding, family.head)

    def spelled(self, output: str) -> str:
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


def _promoted(infos: Sequence[Tensor] | Any) -> torch.dtype:
    dtypes = [info.dtype for info in infos]
    dtype = dtypes[0]
    for other in dtypes[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


def _range_faults(groups: Sequence[Group], stacks: Mapping[str, Stack]) -> Iterator[str]:
    for group in groups:
        for source in group.sources:
            n_blocks = stacks[source.model].n_blocks
            if source.layer_range is not None and source.layer_range[1] > n_blocks:
                yield (
                    f"{group.name}: layer_range {list(source.layer_range)} of {source.model}, which has {n_blocks} "
                    f"layers (0 to {n_blocks - 1})"
                )
