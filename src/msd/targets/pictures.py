"""Pictures: where the images or videos of a prompt lie in processor output, and how a model takes their features.

Families differ in three things only: which tensors describe one picture, how several are handed to the model's
`get_image_features` (or `get_video_features`), and in which container `forward` expects the results. A *piece* is what
is encoded, and remembered, by itself: an image, a video, or a tile where processors cut images into tiles of one size.
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

Piece = dict[str, Tensor]


@dataclass(frozen=True)
class Features:
    """What the encoder says of a piece. states: [tokens, H] as a rule. deep: more of them, for deeper layers."""

    states: Tensor
    deep: tuple[Tensor, ...] = ()


@dataclass(frozen=True)
class Pictures:
    """Pictures whose tensors all count them in their first dimension.

    modality: "image" or "video". pixels: name of the tensor with the pixels. beside: further tensors that the encoder
    takes. join: how `forward` wants the features of several: a "list", or one tensor of a "stack" or a "cat".
    limit: how many pieces are worth remembering.
    """

    modality: str = "image"
    pixels: str = "pixel_values"
    beside: tuple[str, ...] = ("image_sizes",)
    join: str = "list"
    limit: int = 32

    @property
    def spent(self) -> tuple[str, ...]:
        """Names of tensors that leave the inputs once their pictures are encoded."""
        return (self.pixels, *self.beside)

    def pieces(self, inputs: dict[str, Any]) -> list[Piece]:
        """The pieces in reading order."""
        tensors = {name: inputs[name] for name in self.spent if inputs.get(name) is not None}
        return [{name: t[i] for name, t in tensors.items()} for i in range(len(inputs[self.pixels]))]

    def identity(self, piece: Piece) -> Piece:
        """What makes a piece itself: all of it, but for the padding that other pictures of its batch brought."""
        size, pixels = piece.get("image_sizes"), piece[self.pixels]
        if size is None:
            return piece
        if pixels.dim() == 3:  # padded to the largest image of the batch
            height, width = size.tolist()
            return {**piece, self.pixels: pixels[:, :height, :width]}
        if pixels.dim() == 4:  # padded to the largest number of tiles: the size says how many are its own
            real = pixels.flatten(1).any(1).nonzero()
            return {**piece, self.pixels: pixels[: int(real[-1]) + 1 if len(real) else 1]}
        return piece

    def settings(self, model: PreTrainedModel, inputs: dict[str, Any]) -> dict[str, Any]:
        """What else of `inputs` the model's encoder takes, such as `vision_feature_layer`; as `generate()` hands it."""
        tensors = {self.pixels, *self.beside, *self.spent}
        names = inspect.signature(self._encoder(model)).parameters
        return {name: inputs[name] for name in names if name in inputs and name not in tensors}

    def encode(
        self, model: PreTrainedModel, pieces: Sequence[Piece], settings: dict[str, Any] | None = None
    ) -> list[Features]:
        """The model's own features of pieces that came in one batch. settings: further arguments of its encoder."""
        return self._divided(self._run(model, {**(settings or {}), **self._together(pieces)}), len(pieces))

    def joined(self, features: Sequence[Features]) -> BaseModelOutputWithPooling:
        """Features of all pieces as `forward` takes them."""
        states: Any = [f.states for f in features]
        if self.join != "list":
            states = torch.stack(states) if self.join == "stack" else torch.cat(states)
        if not features[0].deep:
            return BaseModelOutputWithPooling(pooler_output=states)
        deep = [list(layer) for layer in zip(*(f.deep for f in features), strict=True)]
        return BaseModelOutputWithDeepstackFeatures(pooler_output=states, deepstack_features=deep)

    def tokens(self, features: Features) -> int:
        """Placeholders that a piece fills."""
        return features.states.shape[:-1].numel()

    def _together(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        """Arguments of the encoder for several pieces."""
        return {name: torch.stack([p[name] for p in pieces]) for name in pieces[0]}

    @torch.no_grad()
    def _run(self, model: PreTrainedModel, arguments: dict[str, Any]) -> Any:
        """The model's own encoder."""
        moved = {k: v.to(model.device) if isinstance(v, Tensor) else v for k, v in arguments.items()}
        return self._encoder(model)(**moved, return_dict=True)

    def _encoder(self, model: PreTrainedModel) -> Callable[..., Any]:
        return getattr(model.base_model, f"get_{self.modality}_features")

    def _divided(self, output: Any, count: int) -> list[Features]:
        """An encoder's output by piece. Where it does not tell them apart, they are equally long."""
        states = output.pooler_output
        if len(states) != count:
            states = (states if isinstance(states, Tensor) else torch.cat(list(states))).chunk(count)
        deep = getattr(output, "deepstack_features", None) or ()
        return [Features(s, tuple(layer[i] for layer in deep)) for i, s in enumerate(states)]


@dataclass(frozen=True)
class Patches(Pictures):
    """Pictures of any size as rows of patches, one behind the other, with a grid of [frames, rows, columns] for each.

    The grids stay among the inputs: rotary positions follow from them.
    """

    beside: tuple[str, ...] = ("image_grid_thw",)

    @property
    def spent(self) -> tuple[str, ...]:
        """See `Pictures`."""
        return (self.pixels,)

    def pieces(self, inputs: dict[str, Any]) -> list[Piece]:
        """See `Pictures`."""
        (name,) = self.beside
        grids = inputs[name]
        parts = inputs[self.pixels].split(grids.prod(-1).tolist())
        return [{self.pixels: part, name: grid} for part, grid in zip(parts, grids, strict=True)]

    def _together(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        (name,) = self.beside
        grids = torch.stack([p[name] for p in pieces])
        return {self.pixels: torch.cat([p[self.pixels] for p in pieces]), name: grids}


@dataclass(frozen=True)
class NestedTiles(Pictures):
    """Tiles by row of the batch, [B, tiles, 3, h, w], filled up with tiles of zeros where a row has fewer."""

    beside: tuple[str, ...] = ("pixel_attention_mask",)
    limit: int = 512

    def pieces(self, inputs: dict[str, Any]) -> list[Piece]:
        """See `Pictures`."""
        tensors = {name: inputs[name].flatten(0, 1) for name in self.spent if inputs.get(name) is not None}
        real = tensors[self.pixels].flatten(1).any(1).nonzero()[:, 0].tolist()
        return [{name: t[i] for name, t in tensors.items()} for i in real]

    def _together(self, pieces: Sequence[Piece]) -> dict[str, Any]:
        return {name: t[None] for name, t in super()._together(pieces).items()}


@dataclass(frozen=True)
class AnyResolution(Pictures):
    """LLaVA-OneVision's images: cut into tiles only where an image is its prompt's only one.

    A piece knows that of itself ("alone", a bool), from the number of images of every prompt that has any.
    """

    groups: str = "batch_num_images"

    @property
    def spent(self) -> tuple[str, ...]:
        """See `Pictures`."""
        return (*super().spent, self.groups)

    def pieces(self, inputs: dict[str, Any]) -> list[Piece]:
        """See `Pictures`."""
        pieces = super().pieces({k: v for k, v in inputs.items() if k != self.groups})
        sizes = inputs.get(self.groups)
        alone = [True] * len(pieces) if sizes is None else [int(n) == 1 for n in sizes for _ in range(int(n))]
        return [{**piece, "alone": torch.tensor(a)} for piece, a in zip(pieces, alone, strict=True)]

    def encode(
        self, model: PreTrainedModel, pieces: Sequence[Piece], settings: dict[str, Any] | None = None
    ) -> list[Features]:
        """See `Pictures`; those that are cut apart from those that are not."""
        found: dict[int, Features] = {}
        for alone in (True, False):
            some = [i for i, piece in enumerate(pieces) if bool(piece["alone"]) is alone]
            if some:
                together = self._together([{k: v for k, v in pieces[i].items() if k != "alone"} for i in some])
                arguments = {**(settings or {}), **together}
                arguments[self.groups] = torch.tensor([1] * len(some) if alone else [max(2, len(some))])
                found.update(zip(some, self._divided(self._run(model, arguments), len(some)), strict=True))
        return [found[i] for i in range(len(pieces))]
