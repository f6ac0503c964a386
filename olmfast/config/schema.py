"""The JSON schema of a run's config: what an editor completes and checks while it is written."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from olmfast.config.candidates import BLENDS
from olmfast.config.originals import FIRST_MODES, IGNORED, RENAMED
from olmfast.config.run import PLACES, RunConfig

NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
WHOLE = r"^\s*[+-]?\d+(\.0+)?\s*$"
SIZE = r"^\s*\d+(\.\d+)?\s*[KMGTkmgt]?[iI]?[bB]?\s*$"
TIME = r"^\s*\d+(\.\d+)?\s*[smhd]\s*$"
# How YAML 1.1, which configs are read as, also spells true and false; an editor may take them for text.
SWITCH = r"^([Yy]es|YES|[Nn]o|NO|[Oo]n|ON|[Oo]ff|OFF)$"

# Key -> what it may also be, beside what it becomes.
SPELLINGS: dict[str, list[dict[str, Any]]] = {
    "budget": [{"type": "integer", "minimum": 1}, {"type": "string", "pattern": f"{TIME}|{WHOLE}"}],
    "racing": [{"type": "boolean"}],
    "selection": [{"enum": ["ranks", "borda"]}],
    "markov": [{"type": ["integer", "string"], "pattern": WHOLE, "minimum": 0}],
    "improve_all": [{"const": False}],
    "max_ram": [{"type": "string", "pattern": SIZE}],
    "max_vram": [{"type": "string", "pattern": SIZE}],
    "shard_size": [{"type": "string", "pattern": SIZE}],
}
# What `Blend.is_allowed` says of a number, in a schema's words.
BLEND_BOUNDS: dict[str, dict[str, Any]] = {
    "linear": {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "slerp": {"exclusiveMinimum": 0, "exclusiveMaximum": 1},
    "ties": {"exclusiveMinimum": 0, "maximum": 1},
    "task_arithmetic": {"not": {"const": 0}},
}


class _Schema(GenerateJsonSchema):
    """pydantic's schema, and that a number may be written as text (`1e-5`) and a switch as a word."""

    def int_schema(self, schema: core_schema.IntSchema) -> JsonSchemaValue:
        return {**super().int_schema(schema), "type": ["integer", "string"], "pattern": WHOLE}

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        return {**super().float_schema(schema), "type": ["number", "string"], "pattern": NUMBER}

    def bool_schema(self, schema: core_schema.BoolSchema) -> JsonSchemaValue:
        return {**super().bool_schema(schema), "type": ["boolean", "string"], "pattern": SWITCH}

    def field_title_should_be_set(self, schema: Any) -> bool:  # noqa: ARG002
        return False  # they would repeat the keys


def run_schema() -> dict[str, Any]:
    """The schema (draft 2020-12) of the file that `olmfast run` reads.

    It says what each key may hold; what keys ask of each other (a base that is one of the models) is checked when the
    file is read.
    """
    schema = RunConfig.model_json_schema(schema_generator=_Schema)
    left = [key for key in schema.pop("required") if key not in (*PLACES, "dataset", "models")]
    genome = {"required": ["evolve"], "properties": {"evolve": {"required": ["models"]}}}
    asked = [{"required": ["dataset"]}, {"required": ["prune"]}]
    schema |= {"required": left, "allOf": [{"anyOf": asked}, {"anyOf": [{"required": ["models"]}, genome]}]}
    keys = schema["properties"]
    task = {"$ref": "#/$defs/DatasetConfig", "required": ["lm_eval"]}
    for key in ("dataset", "holdout"):
        keys[key] = {
            "anyOf": [{word: keys[key].pop(word) for word in tuple(keys[key]) if word != "default"}, task]
        } | keys[key]
    named = {"anyOf": [{"type": "string"}, {"type": "object"}]}  # of mergekit-evolve's genome
    schema["$defs"]["Evolve"]["properties"] |= {"base_model": named, "models": {"type": "array", "items": named}}
    for key, forms in SPELLINGS.items():
        kept = {word: keys[key].pop(word) for word in ("default",) if word in keys[key]}
        keys[key] = {"anyOf": [*keys[key].get("anyOf", [keys[key]]), *forms], **kept}
    keys["candidates"] = {"type": "array", "minItems": 1, "items": {"anyOf": [*_candidates()]}, "default": ["swap"]}
    schema["$defs"].pop("CandidateKind")
    datasets = schema["$defs"]["DatasetConfig"]
    datasets["properties"]["mode"]["enum"] += FIRST_MODES
    for key in keys.keys() - schema["required"]:
        _allow_blank(keys, key)
    for key in datasets["properties"].keys() - datasets["required"]:
        _allow_blank(datasets["properties"], key)
    keys |= {key: {"description": f"a key of the original: {why}"} for key, why in IGNORED.items()}
    keys |= {old: {"description": f"the original's word for {new}"} for old, new in RENAMED.items()}
    description = "The config of olmfast run; docs/config.md describes the keys"
    return {"$schema": GenerateJsonSchema.schema_dialect, **schema, "description": description}


def _allow_blank(keys: dict[str, Any], key: str) -> None:
    """A key without a value has its default."""
    kept = {word: keys[key].pop(word) for word in ("default",) if word in keys[key]}
    keys[key] = {"anyOf": [*keys[key].get("anyOf", [keys[key]]), {"type": "null"}], **kept}


def _candidates() -> Iterator[dict[str, Any]]:
    """The forms of an entry of `candidates`."""
    yield {"enum": ["swap", *BLENDS]}
    for name in BLENDS:
        number = {"type": ["number", "string"], "pattern": NUMBER, **BLEND_BOUNDS[name]}
        numbers = {"anyOf": [number, {"type": "array", "items": number, "minItems": 1, "uniqueItems": True}]}
        yield {"type": "object", "properties": {name: numbers}, "required": [name], "additionalProperties": False}
