"""Pictures: how a family's images or videos lie in processor output, and how its model encodes them.

Families differ in which tensors describe one image, how the model's `get_image_features` (or `get_video_features`)
takes several, and in which container `forward` expects the features. An *item* is what the cache stores separately: an
image, a video, or a tile where the processor cuts images into tiles of one size.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

VisionItem = dict[str, Tensor]  # name in processor output -> this item's part of the tensor


@dataclass(frozen=True)
class Features:
    """Encoder output for one item.

    states: usually [tokens, H]. deep: deepstack features, one tensor per layer. layers: their decoder layers, where the
    encoder chooses them.
    """

    states: Tensor
    deep: tuple[Tensor, ...] = ()
    layers: tuple[int, ...] = ()


@dataclass(frozen=True)
class Pictures:
    """The layout in which the first dimension of each tensor is the number of items.

    modality: "image" or "video". pixels: name of the pixel tensor. extra_tensors: names of the encoder's other tensors.
    join: the form in which `forward` expects the features: a "list", or one tensor by "stack" or "cat".
    limit: default number of items in the cache. output: the encoder's output that has the features.
    reads_embeddings: whether the encoder looks its features up in the text embeddings.
    """

    modality: str = "image"
    pixels: str = "pixel_values"
    extra_tensors: tuple[str, ...] = ("image_sizes",)
    join: str = "list"
    limit: int = 32
    output: str = "pooler_output"
    reads_embeddings: bool = False

    @property
    def consumed(self) -> tuple[str, ...]:
        """Names of the tensors that the features replace."""
        return (self.pixels, *self.extra_tensors)

    def split(self, inputs: dict[str, Any]) -> list[VisionItem]:
        """The items in reading order."""
        tensors = {name: inputs[name] for name in self.consumed if inputs.get(name) is not None}
        return [{name: t[i] for name, t in tensors.items()} for i in range(len(inputs[self.pixels]))]

    def unpadded(self, item: VisionItem) -> VisionItem:
        """The item without the padding that depends on the other items of its batch."""
        size, pixels = item.get("image_sizes"), item[self.pixels]
        if size is None:
            return item
        if pixels.dim() == 3:  # padded to the largest image of the batch
            height, width = size.tolist()
            return {**item, self.pixels: pixels[:, :height, :width]}
        if pixels.dim() == 4:  # padded with zero tiles to the largest number of tiles
            real = pixels.flatten(1).any(1).nonzero()
            return {**item, self.pixels: pixels[: int(real[-1]) + 1 if len(real) else 1]}
        return item

    def options(self, model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
        """The encoder's arguments in `inputs` that are no picture tensors, such as `vision_feature_layer`."""
        tensors = {self.pixels, *self.extra_tensors, *self.consumed}
        names = inspect.signature(self._encoder(model)).parameters
        return {name: inputs[name] for name in names if name in inputs and name not in tensors}

    def encode(
        self, model: PreTrainedModel, items: Sequence[VisionItem], options: dict[str, Any] | None = None
    ) -> list[Features]:
        """The model's own features of items of one batch. options: further arguments of its encoder."""
        return self._unbatch(self._run(model, {**(options or {}), **self._batch(items)}), len(items))

    def join_features(self, features: Sequence[Features]) -> BaseModelOutputWithPooling:
        """The features of all items in the container that `forward` expects."""
        states: Any = [f.states for f in features]
        if self.join != "list":
            states = torch.stack(states) if self.join == "stack" else torch.cat(states)
        if not features[0].deep:
            return BaseModelOutputWithPooling(**{"pooler_output": states, self.output: states})
        deep = [list(layer) for layer in zip(*(f.deep for f in features), strict=True)]
        return BaseModelOutputWithDeepstackFeatures(pooler_output=states, deepstack_features=deep)

    def _batch(self, items: Sequence[VisionItem]) -> dict[str, Any]:
        """The encoder's tensor arguments for several items."""
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}

    @torch.no_grad()
    def _run(self, model: PreTrainedModel, arguments: dict[str, Any]) -> Any:
        """Output of the model's own encoder."""
        moved = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        return self._encoder(model)(**moved, return_dict=True)

    def _encoder(self, model: PreTrainedModel) -> Callable[..., Any]:
        return getattr(model.base_model, f"get_{self.modality}_features")

    def _unbatch(self, output: Any, count: int) -> list[Features]:
        """The encoder's output by item. Where the output has one tensor for all, items have equal lengths."""
        states = getattr(output, self.output)  # not an item: LLaVA adds it to outputs of any class
        if len(states) != count:
            states = (states if isinstance(states, Tensor) else torch.cat(list(states))).chunk(count)
        deep = getattr(output, "deepstack_features", None) or ()
        return [Features(s, tuple(layer[i] for layer in deep)) for i, s in enumerate(states)]


@dataclass(frozen=True)
class Patches(Pictures):
    """Images of any size as concatenated rows of patches, with a grid of [frames, rows, columns] per image first in
    `extra_tensors`.

    The extra tensors remain in the inputs, because rotary positions depend on them.
    """

    extra_tensors: tuple[str, ...] = ("image_grid_thw",)

    @property
    def consumed(self) -> tuple[str, ...]:
        """The pixels only."""
        return (self.pixels,)

    def split(self, inputs: dict[str, Any]) -> list[VisionItem]:
        """See `Pictures`."""
        each = {name: inputs[name] for name in self.extra_tensors}
        parts = inputs[self.pixels].split(each[self.extra_tensors[0]].prod(-1).tolist())
        return [{self.pixels: part, **{name: t[i] for name, t in each.items()}} for i, part in enumerate(parts)]

    def _batch(self, items: Sequence[VisionItem]) -> dict[str, Any]:
        each = {name: torch.stack([item[name] for item in items]) for name in self.extra_tensors}
        return {self.pixels: torch.cat([item[self.pixels] for item in items]), **each}


@dataclass(frozen=True)
class NestedTiles(Pictures):
    """Tiles [B, tiles, 3, h, w] by row of the batch, padded with zero tiles. Each tile is an item."""

    extra_tensors: tuple[str, ...] = ("pixel_attention_mask",)
    limit: int = 512

    def split(self, inputs: dict[str, Any]) -> list[VisionItem]:
        """See `Pictures`."""
        tensors = {name: inputs[name].flatten(0, 1) for name in self.consumed if inputs.get(name) is not None}
        real = tensors[self.pixels].flatten(1).any(1).nonzero()[:, 0].tolist()
        return [{name: t[i] for name, t in tensors.items()} for i in real]

    def _batch(self, items: Sequence[VisionItem]) -> dict[str, Any]:
        return {name: t[None] for name, t in super()._batch(items).items()}


@dataclass(frozen=True)
class AnyResolution(Pictures):
    """LLaVA-OneVision's images: an image is cut into tiles only where its prompt has no other image.

    Each item has this as a bool tensor "alone", from the number of images of each prompt that has any.
    """

    groups: str = "batch_num_images"

    @property
    def consumed(self) -> tuple[str, ...]:
        """See `Pictures`; also the numbers of images."""
        return (*super().consumed, self.groups)

    def split(self, inputs: dict[str, Any]) -> list[VisionItem]:
        """See `Pictures`."""
        items = super().split({k: v for k, v in inputs.items() if k != self.groups})
        counts = inputs.get(self.groups)
        alone = [True] * len(items) if counts is None else [int(n) == 1 for n in counts for _ in range(int(n))]
        return [{**item, "alone": torch.tensor(a)} for item, a in zip(items, alone, strict=True)]

    def encode(
        self, model: PreTrainedModel, items: Sequence[VisionItem], options: dict[str, Any] | None = None
    ) -> list[Features]:
        """See `Pictures`. Encodes images with tiles and images without in separate batches."""
        found: dict[int, Features] = {}
        for alone in (True, False):
            some = [i for i, item in enumerate(items) if bool(item["alone"]) is alone]
            if some:
                batch = self._batch([{k: v for k, v in items[i].items() if k != "alone"} for i in some])
                batch[self.groups] = torch.tensor([1] * len(some) if alone else [max(2, len(some))])
                output = self._run(model, {**(options or {}), **batch})
                found.update(zip(some, self._unbatch(output, len(some)), strict=True))
        return [found[i] for i in range(len(items))]


@dataclass(frozen=True)
class Packed(Pictures):
    """The patches of all images side by side, [1, 3, P, patches * P], with [rows, columns] of patches per image.

    keeps: whether these sizes remain in the inputs, because rotary positions depend on them.
    """

    extra_tensors: tuple[str, ...] = ("target_sizes",)
    limit: int = 512
    keeps: bool = False

    @property
    def consumed(self) -> tuple[str, ...]:
        """See `Pictures`."""
        return (self.pixels,) if self.keeps else super().consumed

    def split(self, inputs: dict[str, Any]) -> list[VisionItem]:
        """See `Pictures`."""
        (name,) = self.extra_tensors
        sizes, pixels = inputs[name], inputs[self.pixels][0]
        patches = sizes.prod(-1).tolist()
        parts = pixels.split([n * (pixels.shape[-1] // sum(patches)) for n in patches], -1)
        return [{self.pixels: part, name: size} for part, size in zip(parts, sizes, strict=True)]

    def _batch(self, items: Sequence[VisionItem]) -> dict[str, Any]:
        (name,) = self.extra_tensors
        return {
            self.pixels: torch.cat([item[self.pixels] for item in items], -1)[None],
            name: torch.stack([item[name] for item in items]),
        }
