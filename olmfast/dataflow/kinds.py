"""What Transformers makes of the layers of many paths, asked once for all that are alike."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from olmfast.weights.skeletons import Skeletons

Layer = tuple[str, int]  # of a model, by name


class LayerKinds(Skeletons):
    """Skeletons for paths: the config of a stack depends on its depth and on the kinds of its layers alone.

    Two layers are of a kind if a model of either by itself has the same config. Most models have one kind, so that
    paths of one depth have one answer; asking for it takes longer than running a short path.
    """

    def __init__(self) -> None:
        super().__init__()
        self._alike: dict[Layer, Layer] = {}
        self._first: dict[str, Layer] = {}  # the config of one layer -> the first such layer
        self._configs: dict[str, Mapping[str, Any]] = {}

    def stack(
        self,
        base: Mapping[str, Any],
        models: Mapping[str, Mapping[str, Any]],
        layers: Sequence[Sequence[Layer]],
    ) -> dict[str, Any]:
        """See `Skeletons.stack`. All that is asked is of one base."""
        self._configs |= models
        named = [[self._named(base, layer) for layer in several] for several in layers]
        used = {name: self._configs[name] for name in sorted({name for several in named for name, _ in several})}
        return super().stack(base, used, named)

    def _named(self, base: Mapping[str, Any], layer: Layer) -> Layer:
        if layer not in self._alike:
            answer = super().stack(base, {layer[0]: self._configs[layer[0]]}, [[layer]])
            same = json.dumps(answer["config"], sort_keys=True) if "config" in answer else str(layer)
            self._alike[layer] = self._first.setdefault(same, layer)
        return self._alike[layer]
