"""What Transformers makes of a config.json: the module of it on the meta device, without memory and without weights.

Nothing else of a static merge imports Transformers, and this file imports it only where it is asked, which is in a
process of its own (`olmfast.weights.skeletons` starts it and says what the answers mean). No code of a model is run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch


class Unknown(Exception):
    """Transformers cannot build this model: it does not know the type, or the config is not one of its own."""


def read_config(data: Mapping[str, Any]) -> Any:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kind = data.get("model_type")
    if not isinstance(kind, str) or kind not in CONFIG_MAPPING:
        raise Unknown(f"Transformers has no model type {kind!r}")
    try:
        config = CONFIG_MAPPING[kind].from_dict(_with_floats(dict(data)))
        config._attn_implementation = "eager"
    except Exception as error:  # a config class may raise anything
        raise Unknown(f"Transformers cannot read this config: {error}") from error
    return config


def _with_floats(value: Any) -> Any:
    """A copy in which `{"__float__": "Infinity"}` is the number, as Transformers writes it since version 5."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _with_floats(inner) for key, inner in value.items()}
    return [_with_floats(inner) for inner in value] if isinstance(value, list) else value


def _model_class(config: Any) -> Any:
    """The class that config.json names, else the one that an AutoModel would take."""
    import transformers
    from transformers.models.auto import modeling_auto

    for name in config.architectures or ():
        found = getattr(transformers, name, None) if isinstance(name, str) else None
        if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
            return found
    for tasks in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT", "SEQ_TO_SEQ_CAUSAL_LM", "MASKED_LM", "SPEECH_SEQ_2_SEQ", ""):
        mapping = getattr(modeling_auto, f"MODEL_FOR_{tasks}_MAPPING" if tasks else "MODEL_MAPPING")
        if type(config) in mapping:
            found = mapping[type(config)]
            return found[0] if isinstance(found, tuple) else found
    raise Unknown(f"Transformers has no model for the config {type(config).__name__}")


def build(config: Any) -> Any:
    import transformers
    from transformers.initialization import no_init_weights

    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.logging.disable_progress_bar()
    try:
        with torch.device("meta"), no_init_weights():
            module = _model_class(config)(config)
        module.tie_weights()  # part of the initialisation that was just left out
    except Unknown:
        raise
    except Exception as error:  # a model class may raise anything
        raise Unknown(f"Transformers cannot build this model: {error}") from error
    return module.eval()


def examined(data: Mapping[str, Any], shapes: Mapping[str, Sequence[int]], parts: Sequence[str]) -> dict[str, Any]:
    module = build(read_config(data))
    naming = _Naming(module)
    places = {name: naming(name) for name in shapes}
    found: dict[str, Any] = {
        "modules": {name: target for name, (target, _) in places.items() if target in naming.expected},
        "converted": [name for name, (_, converted) in places.items() if converted],
        "tied": dict(getattr(module, "all_tied_weights_keys", None) or {}),
    }
    if "stack" in parts:
        found |= _layout(module, naming, found["modules"])
    if "vocabulary" in parts:
        found |= _vocabulary(data, module, found["modules"])
    if "load" in parts:  # last: it fills the module
        found |= _loaded(module, naming, shapes)
    return found


class _Naming:
    """Name in the file -> name in the module, and whether values are converted on the way."""

    def __init__(self, module: Any) -> None:
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import WeightConverter, WeightRenaming

        self.transforms = get_model_conversion_mapping(module)
        self.renamings = [entry for entry in self.transforms if isinstance(entry, WeightRenaming)]
        self.converters = [entry for entry in self.transforms if isinstance(entry, WeightConverter)]
        self.expected: dict[str, torch.Tensor] = module.state_dict()
        self.prefix = module.base_model_prefix

    def __call__(self, name: str) -> tuple[str, bool]:
        from transformers.core_model_loading import rename_source_key

        target, pattern = rename_source_key(name, self.renamings, self.converters, self.prefix, self.expected)
        if target not in self.expected and name in self.expected:
            target, pattern = rename_source_key(name, [], [], self.prefix, self.expected)
        return target, pattern is not None


def _loaded(module: Any, naming: _Naming, shapes: Mapping[str, Sequence[int]]) -> dict[str, Any]:
    """What Transformers' loader says of tensors of these names and shapes."""
    from transformers.core_model_loading import convert_and_load_state_dict_in_model
    from transformers.modeling_utils import LoadStateDictConfig

    places = {name: naming(name) for name in shapes}
    wanted = {name: list(tensor.shape) for name, tensor in naming.expected.items()}
    tensors = {name: torch.empty(list(shape), device="meta") for name, shape in shapes.items()}
    how = LoadStateDictConfig(
        device_map={"": "meta"}, dtype=torch.float32, dtype_plan={}, weight_mapping=naming.transforms
    )
    try:
        info, _ = convert_and_load_state_dict_in_model(module, tensors, how)
        module.mark_tied_weights_as_initialized(info)
        module.tie_weights(missing_keys=info.missing_keys, recompute_mapping=False)
        left = {name for name, (target, _) in places.items() if target in info.unexpected_keys}
        module._adjust_missing_and_unexpected_keys(info)
    except Exception as error:  # the loader may raise anything for shapes that do not fit
        raise Unknown(f"Transformers' loader fails: {error}") from error
    unexpected = {name for name in left if places[name][0] in info.unexpected_keys}
    mismatched = {key: [list(got), list(want)] for key, got, want in info.mismatched_keys}
    for name, (target, converted) in places.items():
        if not converted and target in wanted and list(shapes[name]) != wanted[target]:
            mismatched.setdefault(target, [list(shapes[name]), wanted[target]])
    return {
        "missing": sorted(info.missing_keys),
        "unexpected": sorted(unexpected),
        "ignored": sorted(left - unexpected),
        "mismatched": mismatched,
        "failed": sorted(f"{key}: {why}" for key, why in info.conversion_errors.items()),
    }


def text_config(config: Any) -> Any:
    """The config of the part that reads text (of several decoders, the one that generates it)."""
    return config.get_text_config(decoder=True)


def text_path(config: Any) -> list[str]:
    """The keys in config.json under which the text model's part is."""
    text = text_config(config)
    if text is config:
        return []
    for key in type(config).sub_configs or ():
        inner = getattr(config, key, None)
        if inner is text:
            return [key]
        if inner is not None and getattr(inner, "sub_configs", None):
            below = text_path(inner)
            if below or text_config(inner) is text:
                return [key, *below]
    return []


def _stacks(module: Any) -> list[str]:
    """The lists of blocks that have as many entries as the text model has layers."""
    text = text_config(module.config)
    n_blocks = getattr(text, "num_hidden_layers", None)
    modules = dict(module.named_modules())
    found: list[str] = []
    for name, part in modules.items():
        if (
            not isinstance(part, torch.nn.ModuleList)
            or len(part) != n_blocks
            or not any(True for _ in part.parameters())
        ):
            continue
        if not any(name.startswith(f"{other}.") for other in found) and _belongs(modules, name, text):
            found.append(name)
    return found


def _belongs(modules: Mapping[str, Any], name: str, text: Any) -> bool:
    """Whether a part lies in the text model: the nearest config around it is the text model's."""
    while name:
        name = name.rpartition(".")[0]
        config = getattr(modules[name], "config", None)
        if config is not None:
            return config is text or (type(config) is type(text) and config.to_dict() == text.to_dict())
    return False


def stack_name(module: Any) -> tuple[str, str]:
    """The list of blocks that slices cut, and why there is none."""
    config = module.config
    if getattr(config, "is_encoder_decoder", False) and "encoder" in {n for n, _ in _children(module)}:
        lists = [name for name, part in module.named_modules() if isinstance(part, torch.nn.ModuleList)]
        outer = [name for name in lists if not re.search(r"\.\d+\.", name)]
        return "", f"has an encoder and a decoder ({', '.join(outer)})"
    stacks = _stacks(module)
    if len(stacks) == 1:
        return stacks[0], ""
    if stacks:
        return "", f"has several lists of blocks ({', '.join(stacks)})"
    return "", "has no list with a block for every layer that its config states"


def _children(module: Any) -> Iterator[tuple[str, Any]]:
    for name, part in module.named_modules():
        yield name.rpartition(".")[2], part


def _layout(module: Any, naming: _Naming, names: Mapping[str, str]) -> dict[str, Any]:
    """The stack of blocks, and for every tensor its block, or whether it acts before or after the blocks or aside."""
    stack, fault = stack_name(module)
    if fault:
        return {"stack_fault": fault}
    depth = len(module.get_submodule(stack))
    region = _Regions(module, stack)
    blocks, regions = {}, {}
    for name, target in names.items():
        inside = re.fullmatch(rf"{re.escape(stack)}\.(\d+)\.(.+)", target)
        if inside is None:
            regions[name] = region(target)
            continue
        place = _number_of(naming, stack, depth, name, int(inside[1]))
        if place is None:
            return {"stack_fault": f"numbers the layer of {name} in a way that cannot be told"}
        blocks[name] = [*place, int(inside[1])]
    return {"stack": stack, "n_blocks": depth, "blocks": blocks, "regions": regions}


def _number_of(naming: _Naming, stack: str, depth: int, name: str, index: int) -> tuple[str, str] | None:
    """The name in the file before and after its block's number: the number that moves the tensor to another block."""
    other = index + 1 if index + 1 < depth else index - 1
    places = [found for found in re.finditer(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)", name) if int(found[0]) == index]
    for found in places:
        before, after = name[: found.start()], name[found.end() :]
        if len(places) == 1 or naming(f"{before}{other}{after}")[0].startswith(f"{stack}.{other}."):
            return before, after
    return None


def _called(module: Any, stack: str) -> dict[str, str]:
    """Which modules run before and which after the blocks, where the text model runs on the meta device."""
    found: dict[str, str] = {}
    state = {"now": "before"}
    last = f"{stack}.{len(module.get_submodule(stack)) - 1}"
    hooks = []
    for name, part in module.named_modules():
        if name == stack or name.startswith(f"{stack}."):
            if name == last:
                hooks.append(part.register_forward_hook(lambda *_: state.update(now="after")))
            continue
        hooks.append(
            part.register_forward_pre_hook(lambda *_, name=name: found.setdefault(name, state["now"]) and None)
        )
    ids = torch.zeros(1, 4, dtype=torch.long, device="meta")
    try:
        with torch.no_grad(), torch.device("meta"):
            module(input_ids=ids, attention_mask=torch.ones_like(ids))
    except Exception:  # kinds of attention and routing that need values; the order of the declaration is taken instead
        found.clear()
    finally:
        for hook in hooks:
            hook.remove()
    return found if state["now"] == "after" else {}


class _Regions:
    """Whether a tensor acts `before` or `after` the blocks, `aside` (in another tower), or is of what is `around` them.

    Where the model cannot be run on the meta device, the order in which it declares its parts decides.
    """

    def __init__(self, module: Any, stack: str) -> None:
        self.module, self.stack = module, stack
        self.called = _called(module, stack)
        self.modules = dict(module.named_modules())
        self.declared = {name: place for place, name in enumerate(self.modules)}
        self.text = text_config(module.config)
        self.head = module.get_output_embeddings() if hasattr(module, "get_output_embeddings") else None

    def __call__(self, target: str) -> str:
        owner = target.rpartition(".")[0]
        if not owner or self.stack.startswith(f"{owner}."):
            return "around" if self.text is self.module.config or _belongs(self.modules, target, self.text) else "aside"
        if self.called:
            return next((self.called[up] for up in _above(owner, self.stack) if up in self.called), "aside")
        if self.head is not None and self.modules.get(owner) is self.head:
            return "after"
        if self.text is not self.module.config and not _belongs(self.modules, target, self.text):
            return "aside"
        return "before" if self.declared[owner] < self.declared[self.stack] else "after"


def _above(owner: str, stack: str) -> list[str]:
    """A module and those around it that do not hold the stack."""
    found = []
    while owner and not stack.startswith(f"{owner}."):
        found.append(owner)
        owner = owner.rpartition(".")[0]
    return found


def _vocabulary(data: Mapping[str, Any], module: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """The tensors that have a row per token: those that grow with the vocabulary, and the keys that make them grow."""
    try:
        embedding = module.get_input_embeddings()
    except NotImplementedError:
        embedding = None
    weight = getattr(embedding, "weight", None)
    if weight is None or weight.dim() != 2:
        return {"vocabulary_fault": "has no embedding of tokens"}
    n_rows = int(weight.shape[0])
    paths = [path for path in _paths(module.config, "vocab_size") if value_at(module.config, path) == n_rows]
    if not paths:
        return {"vocabulary_fault": f"has an embedding of {n_rows} rows, a number that is not the config's vocab_size"}
    grown = read_config(data)
    for path in paths:
        owner = grown
        for key in path[:-1]:
            owner = getattr(owner, key)
        setattr(owner, path[-1], n_rows + 64)
    now, larger = module.state_dict(), build(grown).state_dict()
    rows: list[str] = []
    others: list[str] = []
    for name, target in names.items():
        before, after = list(now[target].shape), list(larger[target].shape)
        if before != after:
            (rows if after == [n_rows + 64, *before[1:]] else others).append(name)
    return {
        "rows": rows,
        "columns": others,
        "vocabulary_keys": paths,
        "embedding_module": next((n for n, p in module.named_parameters(remove_duplicate=False) if p is weight), ""),
        "other_vocabularies": _other_vocabularies(module.config, set(map(tuple, paths))),
    }


def _paths(config: Any, key: str) -> list[list[str]]:
    """Where a key is in a config and in its parts."""
    found = [[key]] if key in config.to_dict() else []
    for name in type(config).sub_configs or ():
        inner = getattr(config, name, None)
        if inner is not None and hasattr(inner, "to_dict"):
            found += [[name, *path] for path in _paths(inner, key)]
    return found


def value_at(config: Any, path: Sequence[str]) -> Any:
    for key in path:
        config = getattr(config, key, None)
    return config


def _other_vocabularies(config: Any, known: set[tuple[str, ...]]) -> list[str]:
    """Keys of the text model that speak of another vocabulary by token, such as embeddings of every layer."""
    text = text_config(config).to_dict()
    return [key for key in text if key.startswith("vocab_size_") and isinstance(text[key], int) and (key,) not in known]


def settings(data: Mapping[str, Any]) -> dict[str, Any]:
    """A config with every default filled in, flat."""
    return dict(_flat(read_config(data).to_dict()))


def _flat(data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in data.items():
        if isinstance(value, Mapping) and value and not prefix.endswith("id2label."):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
