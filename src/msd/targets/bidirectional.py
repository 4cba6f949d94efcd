"""Families in which some prompt columns attend to each other in both directions."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from msd.core.layout import Layout
from msd.core.modality import VISION
from msd.targets.base import Target
from msd.targets.masks import SLIDING, Windows
from msd.targets.shared_mark import SharedMark
from msd.targets.state import Media, State


class Gemma3(Target):
    """Columns of one image attend to each other."""

    def bidirectional_mask(self, layout: Layout, types: Tensor) -> Tensor | None:
        """[B, S, S] bool: True between columns of the same image."""
        image = layout.modality == VISION.id
        before = pad(image, (1, 0))[:, :-1]
        number = (image & ~before).cumsum(1)  # images that begin up to each column
        return image[:, :, None] & image[:, None] & (number[:, :, None] == number[:, None])


class Gemma4Unified(Gemma3):
    """Columns of one image or frame attend to each other where the config says so."""

    def bidirectional_mask(self, layout: Layout, types: Tensor) -> Tensor | None:
        """See `Gemma3`; None for models that are causal."""
        seeing = getattr(self.text_config, "use_bidirectional_attention", None) == "vision"
        return super().bidirectional_mask(layout, types) if seeing else None


class Gemma4(Gemma4Unified):
    """As Gemma 4 Unified, but in sliding layers only.

    Layers that share keys compute only the columns whose logits are needed, so their states are asked of all columns
    with a tensor of these, which turns this off.
    """

    bidirectional_layers = SLIDING

    def kept_logits(self, count: int) -> int | Tensor:
        """See `Target`."""
        shared = self.text_config.num_hidden_layers - self.text_config.num_kv_shared_layers
        return torch.arange(-count, 0) if any(index > shared for index in self.taps.indices) else count


class Molmo2(SharedMark):
    """Columns of all images, and of the marks around them, attend to each other."""

    def bidirectional_mask(self, layout: Layout, types: Tensor) -> Tensor:
        """[B, S, S] bool: True between columns whose token type is that of images."""
        image = pad(types == 1, (0, layout.capacity - types.shape[1]))
        return image[:, :, None] & image[:, None]

    def reusable(self, layout: Layout, media: Media, past: State) -> tuple[int, dict[str, int]]:
        """See `Target`; nothing where an image is added, removed or changed, which changes the states of all images."""
        length, counts = super().reusable(layout, media, past)
        later = [(some.modality[0, length:] == VISION.id).any() for some in (layout, past.layout)]
        return (0, {}) if any(later) else (length, counts)


class PaliGemma(Target):
    """All columns of the prompt attend to each other."""

    reuses_prefix = False  # a longer prompt changes the states of all its columns

    def attention_windows(self) -> Windows:
        """No window: the context ends where the sliding layers would begin to forget."""
        return {None: None}

    @property
    def context_length(self) -> int | None:
        """The smaller of the model's positions and its sliding window."""
        limits = [super().context_length, getattr(self.text_config, "sliding_window", None)]
        return min((limit for limit in limits if limit is not None), default=None)

    def position_ids(self, positions: Tensor) -> Tensor:
        """[B, N]; PaliGemma's `forward` counts positions from 1."""
        return positions[0] + 1

    def bidirectional_mask(self, layout: Layout, types: Tensor) -> Tensor:
        """[B, S, S] bool: True between columns of the prompt."""
        column = torch.arange(layout.capacity, device=layout.tokens.device)
        first = torch.tensor(layout.start, device=column.device)[:, None]
        inside = (column >= first) & (column < types.shape[1])
        return inside[:, :, None] & inside[:, None]
