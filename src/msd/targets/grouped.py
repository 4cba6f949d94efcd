"""Pictures of single families: images with several tensors of unequal length, and encoders with further outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.granite4_vision.modeling_granite4_vision import Granite4VisionImageFeaturesOutput
from transformers.models.ovis2.modeling_ovis2 import BaseModelOutputWithVisualIndicatorFeatures

from msd.targets.pictures import Features, Patches, Pictures, VisionItem


@dataclass(frozen=True)
class Grouped(Pictures):
    """Some tensors have several rows per item; `counts` is the name of the tensor with their numbers (without it, 0).

    grouped: the names of these tensors. An item without rows of one lacks it.
    """

    counts: str = "num_local_patches"
    grouped: tuple[str, ...] = ("pixel_values_local",)

    @property
    def consumed(self) -> tuple[str, ...]:
        """See `Pictures`; also the counts and the grouped tensors."""
        return tuple(dict.fromkeys((*super().consumed, *self.grouped, self.counts)))

    def split(self, inputs: dict[str, Any]) -> list[VisionItem]:
        """See `Pictures`."""
        counts = torch.as_tensor(inputs.get(self.counts, [0] * len(inputs[self.pixels])))
        tensors = {name: inputs[name] for name in self.consumed if inputs.get(name) is not None}
        parts = {name: t.split(counts.tolist()) if name in self.grouped else t for name, t in tensors.items()}
        items = [{name: torch.as_tensor(part[i]) for name, part in parts.items()} for i in range(len(counts))]
        return [{name: t for name, t in item.items() if name not in self.grouped or len(t)} for item in items]

    def _batch(self, items: Sequence[VisionItem]) -> dict[str, Any]:
        """See `Pictures`."""
        single = super()._batch([{k: v for k, v in item.items() if k not in self.grouped} for item in items])
        grouped = {name: [item[name] for item in items if name in item] for name in self.grouped}
        return {**single, **{name: torch.cat(parts) for name, parts in grouped.items() if parts}}


@dataclass(frozen=True)
class Crops(Pictures):
    """Molmo2: crops of patches, and for each token the patches that it pools, numbered through the whole batch.

    pooling, grids, counts: names of these numbers, of the numbers of tokens per image, and of crops per image; without
    a name, the first of the grids is the number of crops.
    """

    pooling: str = "image_token_pooling"
    grids: str = "image_grids"
    counts: str | None = "image_num_crops"

    @property
    def consumed(self) -> tuple[str, ...]:
        """See `Pictures`."""
        return (self.pixels, self.pooling, self.grids, *([self.counts] if self.counts else []))

    def split(self, inputs: dict[str, Any]) -> list[VisionItem]:
        """See `Pictures`; the patches of an item are numbered from 0."""
        grids, pixels = inputs[self.grids], inputs[self.pixels]
        crops = (inputs[self.counts] if self.counts else grids[:, 0]).tolist()
        tokens = grids.prod(-1) if grids.shape[1] == 3 else grids[:, 0] * grids[:, 1] + grids[:, 2] * grids[:, 3]
        first = [n * pixels.shape[1] for n in accumulate(crops, initial=0)]
        parts = zip(pixels.split(crops), inputs[self.pooling].split(tokens.tolist()), grids, first, strict=False)
        return [
            {self.pixels: views, self.pooling: torch.where(pool < 0, pool, pool - start), self.grids: grid}
            for views, pool, grid, start in parts
        ]

    def _batch(self, items: Sequence[VisionItem]) -> dict[str, Any]:
        """See `Pictures`."""
        views = [item[self.pixels] for item in items]
        first = accumulate((v.shape[0] * v.shape[1] for v in views), initial=0)
        pools = [
            torch.where(item[self.pooling] < 0, item[self.pooling], item[self.pooling] + start)
            for item, start in zip(items, first, strict=False)
        ]
        return {
            self.pixels: torch.cat(views), self.pooling: torch.cat(pools),
            self.grids: torch.stack([item[self.grids] for item in items]),
        }  # fmt: skip


@dataclass(frozen=True)
class Compressed(Patches):
    """VideoLLaMA 3's videos: a mask over all features tells which of them have a token."""

    kept: str = "video_compression_mask"

    @property
    def consumed(self) -> tuple[str, ...]:
        """See `Patches`; also the mask."""
        return (*super().consumed, self.kept)

    def split(self, inputs: dict[str, Any]) -> list[VisionItem]:
        """See `Pictures`."""
        items, mask = super().split(inputs), inputs.get(self.kept)
        if mask is None:
            return items
        grids, sides = (torch.stack([item[name] for item in items]) for name in self.extra_tensors)
        parts = mask.split((grids.prod(-1) // sides**2).tolist())
        return [{**item, self.kept: part} for item, part in zip(items, parts, strict=True)]

    def encode(
        self, model: PreTrainedModel, items: Sequence[VisionItem], options: dict[str, Any] | None = None
    ) -> list[Features]:
        """See `Pictures`."""
        plain = [{k: v for k, v in item.items() if k != self.kept} for item in items]
        found = super().encode(model, plain, options)
        if not items or self.kept not in items[0]:
            return found
        kept = [item[self.kept].to(f.states.device) for item, f in zip(items, found, strict=True)]
        return [replace(f, states=f.states[mask]) for f, mask in zip(found, kept, strict=True)]


@dataclass(frozen=True)
class Layered(Pictures):
    """Granite 4 Vision: all features enter decoder layers; the first of them fills the placeholders."""

    def _unbatch(self, output: Any, count: int) -> list[Features]:
        """See `Pictures`."""
        layers = output.deepstack_features
        return [
            Features(layers[0][1][i], tuple(states[i] for _, states in layers), tuple(layer for layer, _ in layers))
            for i in range(count)
        ]

    def join_features(self, features: Sequence[Features]) -> BaseModelOutputWithPooling:
        """See `Pictures`; the deepstack features are (layer, states of each item)."""
        states = [list(layer) for layer in zip(*(f.deep for f in features), strict=True)]
        deep = list(zip(features[0].layers, states, strict=True))
        return Granite4VisionImageFeaturesOutput(pooler_output=[f.states for f in features], deepstack_features=deep)


@dataclass(frozen=True)
class Indicated(Pictures):
    """Ovis2: the features of the indicator tokens around images are an output of the encoder, equal for all images."""

    def _unbatch(self, output: Any, count: int) -> list[Features]:
        """See `Pictures`."""
        return [replace(f, deep=(output.visual_indicator_features,)) for f in super()._unbatch(output, count)]

    def join_features(self, features: Sequence[Features]) -> BaseModelOutputWithPooling:
        """See `Pictures`."""
        plain = super().join_features([replace(f, deep=()) for f in features])
        return BaseModelOutputWithVisualIndicatorFeatures(
            pooler_output=plain.pooler_output, visual_indicator_features=features[0].deep[0]
        )
