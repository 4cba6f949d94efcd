"""Decoders in which tokens of an image see each other in both directions: Gemma 3 and PaliGemma."""

from __future__ import annotations

import torch
from torch import Tensor

from msd.core.layout import Layout
from msd.core.modality import LANGUAGE
from msd.targets.base import Target
from msd.targets.masks import Windows
from msd.targets.state import Contents, State


class Gemma3(Target):
    """See the module."""

    def both_ways(self, layout: Layout, prompt: int) -> Tensor:
        """Columns of the same image."""
        shown = layout.modality != LANGUAGE.id
        before = torch.nn.functional.pad(shown, (1, 0))[:, :-1]
        number = (shown & ~before).cumsum(1)
        return shown[:, :, None] & shown[:, None] & (number[:, :, None] == number[:, None])


FIRST = 1  # position of the first token


class PaliGemma(Target):
    """See the module."""

    def attention_kinds(self) -> Windows:
        """One, within the context."""
        return {None: None}

    @property
    def context_length(self) -> int | None:
        """As far as all layers see everything."""
        limits = [super().context_length, getattr(self.text_config, "sliding_window", None)]
        known = [limit for limit in limits if limit is not None]
        return min(known) if known else None

    def positions(self, positions: Tensor) -> Tensor:
        """[B, N]."""
        return positions[0] + FIRST

    def both_ways(self, layout: Layout, prompt: int) -> Tensor:
        """Columns of the prompt."""
        column = torch.arange(layout.capacity, device=layout.tokens.device)
        first = torch.tensor(layout.start, device=column.device)[:, None]
        inside = (column >= first) & (column < prompt)
        return inside[:, :, None] & inside[:, None]

    def shared(self, layout: Layout, held: Contents, past: State) -> tuple[int, dict[str, int]]:
        """Nothing."""
        return 0, {}
