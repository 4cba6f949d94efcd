"""Context entries of a rival: which positions of a text it keeps, and what stands there.

Entry i belongs to column i and the token after it, as in EAGLE: the target's states at i and the embedding of token
i+1. Where token i+1 stands for image features, the position is *visual* and that embedding is the projector's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from msd.drafters.msd.context import pick
from msd.drafters.msd.network import Anchors
from msd.layout import Layout
from msd.modality import LANGUAGE


@dataclass
class Columns:
    """Columns 0 to L-1 of B texts. taps: [B, L, T*H]. tokens: [B, L], those after them; word: [B, L, H], embedded.

    real: [B, L] bool, False at padding. prompt: how many columns the prompt has.
    visual: [B, L] bool, the token after is an image's. positions: [B, L].
    """

    taps: Tensor
    word: Tensor
    real: Tensor
    visual: Tensor
    tokens: Tensor
    positions: Tensor
    prompt: int


@dataclass
class Entries:
    """The S entries of B rows, left-aligned in text order.

    taps: [B, S, T*H]. word: [B, S, H]. positions: [B, S]. present: [B, S] bool, False beyond a row's entries.
    slot: [B, L] int64, the entry of each column (that of the nearest entry before it, where it has none).
    shift: [B, 1] int64, an entry's position less its column's, at the end of the text.
    fixed: [B, S] bool, entries whose input is `given` [B, S, H] whatever the features are; None: there are none.
    image: [B, S, H], what an entry knows of the images before it; [B, S, 1] where the method has no such thing.
    """

    taps: Tensor
    word: Tensor
    positions: Tensor
    present: Tensor
    slot: Tensor
    shift: Tensor
    image: Tensor
    fixed: Tensor | None = None
    given: Tensor | None = None

    def anchors(self, x: Tensor, feature: Tensor, columns: Tensor) -> Anchors:
        """Anchors at text `columns` [B, A] int64; x: inputs [B, S, ...] of the entries, feature: [B, S, H]."""
        at = self.slot.gather(1, columns)
        entry = torch.arange(self.word.shape[1], device=at.device)
        visible = (entry <= at[:, :, None]) & self.present[:, None]
        return Anchors(
            pick(x, at), pick(feature, at), pick(self.word, at), self.positions.gather(1, at), visible,
            pick(self.image, at),
        )  # fmt: skip


def columns(layout: Layout, taps: Tensor, embed: Callable[[Tensor], Tensor], hidden: int, prompt: int) -> Columns:
    """Columns whose tap states are `taps` [B, L, T*H], the first of them being the input of layer 0."""
    L = taps.shape[1]
    column = torch.arange(L, device=taps.device)
    real = column >= torch.tensor(layout.start, device=taps.device)[:, None]
    tokens = layout.tokens[:, 1 : L + 1]
    visual = real & (layout.modality[:, 1 : L + 1] != LANGUAGE.id)
    word = embed(tokens)
    if L > 1:  # token L has been emitted: it is text
        shown = torch.cat([taps[:, 1:, :hidden], taps[:, -1:, :hidden]], 1)
        word = torch.where(visual[..., None], shown.to(word.dtype), word)
    return Columns(taps, word, real, visual, tokens, layout.line()[:, :L], prompt)


def keep(c: Columns, kept: Tensor) -> tuple[Entries, Tensor]:
    """(entries of the columns `kept` [B, L] bool, the column of each entry [B, S])."""
    order = (~kept).long().argsort(dim=1, stable=True)[:, : max(1, int(kept.sum(1).max()))]
    found = Entries(
        pick(c.taps, order), pick(c.word, order), c.positions.gather(1, order), kept.gather(1, order),
        (kept.cumsum(1) - 1).clamp_min(0), torch.zeros(len(kept), 1, dtype=torch.long, device=kept.device),
        c.word.new_zeros(*order.shape, 1),
    )  # fmt: skip
    return found, order
