"""What a merge file lists: models, slices and their sources, the vocabulary's tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from olmfast.config.naming import parse_model
from olmfast.config.parameters import Parameters
from olmfast.errors import show, shown

Model = Annotated[str, BeforeValidator(parse_model)]


def _check_range(value: object) -> object:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        raise ValueError(f"expected [first, end], got {shown(value)}")
    return value


class Strict(BaseModel):
    """Its keys are all that there are."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


# Keys that people give beside `model`, and what stands for them in its name.
PARTS_OF_NAMES = {"revision": "{model}@{value}", "lora": "{model}+{value}", "adapter": "{model}+{value}"}


class _OfModel(Strict):
    """What names a model."""

    model: Model
    parameters: Parameters = {}

    @model_validator(mode="before")
    @classmethod
    def _check_names(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError(f"expected {{model: {value}}}, got {show(value)}")
        if isinstance(value, dict) and isinstance(value.get("model"), str):
            for key, spelling in PARTS_OF_NAMES.items():
                if isinstance(value.get(key), str):
                    name = spelling.format(model=value["model"], value=value[key])
                    raise ValueError(f"{key}: is part of the model's name; write model: {name}")
        return value


class MergedModel(_OfModel):
    """An entry of `models`."""


class SliceSource(_OfModel):
    """A model's layers that go into a slice; `layer_range` is half-open."""

    layer_range: Annotated[tuple[int, int], BeforeValidator(_check_range)]

    @model_validator(mode="after")
    def _check(self) -> SliceSource:
        first, end = self.layer_range
        if not 0 <= first <= end:
            raise ValueError(
                f"layer_range: expected [first, end] with 0 <= first <= end, got [{first}, {end}]; the end is not "
                "included, and layers are not counted from the last"
            )
        return self


class Slice(Strict):
    """Consecutive layers of the result."""

    sources: list[SliceSource] = Field(min_length=1)
    base_model: Model | None = None
    parameters: Parameters = {}
    residual_weight: float | None = None
    merge_method: str | None = None

    @property
    def n_layers(self) -> int:
        """How many layers it makes."""
        first, end = self.sources[0].layer_range
        return end - first

    @model_validator(mode="after")
    def _check(self) -> Slice:
        lengths = [source.layer_range[1] - source.layer_range[0] for source in self.sources]
        if len(set(lengths)) > 1:
            raise ValueError(f"sources: layer ranges of different lengths, {lengths}")
        return self


class TokenSource(Strict):
    """Where a token's embedding comes from: a model, another model's token, or zeros."""

    kind: Literal["model", "model_token", "zero"] = "model"
    model: Model | None = None
    token: str | None = None
    token_id: int | None = None

    @model_validator(mode="after")
    def _check(self) -> TokenSource:
        if self.kind == "model_token" and (self.token is None) == (self.token_id is None):
            raise ValueError("expected either token or token_id")
        if self.kind != "zero" and self.model is None:
            raise ValueError("the key 'model' is missing")
        return self


def _parse_token_source(value: object) -> object:
    if isinstance(value, str) or (isinstance(value, dict) and "kind" not in value):
        return {"model": value}
    return value


class TokenConfig(Strict):
    """An entry of `tokenizer.tokens`; `force` takes its source even for models that have the token."""

    source: Annotated[TokenSource | None, BeforeValidator(_parse_token_source)] = None
    force: bool = False


class TokenizerConfig(Strict):
    """`tokenizer`: the vocabulary of the result. `source` is `union`, `base` or a model."""

    source: Model = "union"
    tokens: Annotated[dict[str, TokenConfig], BeforeValidator(lambda given: {} if given is None else given)] = {}
    pad_to_multiple_of: int | None = Field(default=None, ge=1, lt=2**31)

    @model_validator(mode="before")
    @classmethod
    def _check(cls, value: object) -> object:
        if isinstance(value, str):
            raise ValueError(f"expected {{source: {value}}}, got {show(value)}; or write tokenizer_source: {value}")
        return value
