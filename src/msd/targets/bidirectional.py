"""Gemma 3 and PaliGemma: some prompt columns attend to each other in both directions."""

from __future__ import annotations

import torch
from torch import Tensor

from msd.core.layout import Layout
from msd.core.modality import LANGUAGE
from msd.targets.base import Target
from msd.targets.masks import Windows


class Gemma3(Target):
    """Columns of one image attend to each other."""

    def bidirectional_mask(self, layout: Layout, prompt: int) -> Tensor:
        """[B, S, S] bool: True between columns of the same image."""
        image = layout.modality != LANGUAGE.id
        before = torch.nn.functional.pad(image, (1, 0))[:, :-1]
        number = (image & ~before).cumsum(1)  # images that begin up to each column
        return image[:, :, None] & image[:, None] & (number[:, :, None] == number[:, None])


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

    def bidirectional_mask(self, layout: Layout, prompt: int) -> Tensor:
        """[B, S, S] bool: True between columns of the prompt."""
        column = torch.arange(layout.capacity, device=layout.tokens.device)
        first = torch.tensor(layout.start, device=column.device)[:, None]
        inside = (column >= first) & (column < prompt)
        return inside[:, :, None] & inside[:, None]
