"""Gemma 3: the tokens of an image see each other, and five of six layers look back a window only.

The cache keeps every slot, so that trees and later turns may begin anywhere; the masks forget what is out of the
window. A processor marks image tokens by `token_type_ids`; without them the model is causal everywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from msd.core.layout import Layout
from msd.core.modality import LANGUAGE
from msd.targets.base import Target


class Gemma3(Target):
    """See the module."""

    def both_ways(self, layout: Layout, prompt: int) -> Tensor:
        """Columns of the same image."""
        shown = layout.modality != LANGUAGE.id
        before = torch.nn.functional.pad(shown, (1, 0))[:, :-1]
        number = (shown & ~before).cumsum(1)
        return shown[:, :, None] & shown[:, None] & (number[:, :, None] == number[:, None])
