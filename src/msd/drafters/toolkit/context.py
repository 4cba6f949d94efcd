"""Context of a draft network: which positions of a text it reads, what it reads there, and where drafts start.

Entry i belongs to column i and the token after it, as in EAGLE: the target's states at i and the embedding of token
i+1. Where token i+1 stands for image features, the position is *visual* and that embedding is the projector's output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from msd.core.layout import Layout
from msd.core.modality import LANGUAGE


@dataclass
class Anchors:
    """A positions per row to draft from. B rows, S context entries.

    x, feature, embedding: [B, A, H], the last of the token that follows the anchor (the root).
    positions: [B, A] rotary position of the anchor. visible: [B, A, S] bool. image: [B, A or 1, H], see `Selection`.
    """

    x: Tensor
    feature: Tensor
    embedding: Tensor
    positions: Tensor
    visible: Tensor
    image: Tensor

    def of(self, rows: list[int] | slice, used: int) -> Anchors:
        """The anchors of some rows, which see the first `used` entries at most."""
        x, feature, embedding = self.x[rows], self.feature[rows], self.embedding[rows]
        return Anchors(x, feature, embedding, self.positions[rows], self.visible[rows][..., :used], self.image[rows])


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
class Selection:
    """The S positions of each row that a network reads, left-aligned in text order.

    taps: [B, S, T*H]. word: [B, S, H]. positions: [B, S]. present: [B, S] bool, False beyond a row's last entry.
    slot: [B, L] int64, the entry of each column (that of the nearest entry before it, where it has none).
    shift: [B, 1] int64, an entry's position less its column's, at the end of the text.
    fixed: [B, S] bool, entries whose input is `given` [B, S, H] whatever the features are; None: there are none.
    image: [B, S, H], a vector of the images before an entry; [B, 1, H or 1] where it is the same for all entries.
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

    def entered(self, x: Tensor, feature: Tensor) -> Entries:
        """Entries with the inputs x [B, S, ...] and the features [B, S, H]."""
        return Entries(x, feature, self.word, self.positions, self.present, self.slot, self.image, self.shift)


@dataclass
class Entries:
    """Context entries of B rows. x: [B, S, ...] the layers' input. feature, embedding: [B, S, H]. Rest: `Selection`."""

    x: Tensor
    feature: Tensor
    embedding: Tensor
    positions: Tensor
    present: Tensor
    slot: Tensor
    image: Tensor
    shift: Tensor

    def anchors(self, columns: Tensor) -> Anchors:
        """Anchors at text `columns` [B, A] int64."""
        at = self.slot.gather(1, columns)
        entry = torch.arange(self.x.shape[1], device=at.device)
        visible = (entry <= at[:, :, None]) & self.present[:, None]
        image = self.image if self.image.shape[1] == 1 else pick(self.image, at)
        return Anchors(
            pick(self.x, at), pick(self.feature, at), pick(self.embedding, at), self.positions.gather(1, at), visible,
            image,
        )  # fmt: skip


def pick(x: Tensor, at: Tensor) -> Tensor:
    """x [B, S, ...] at indices [B, A]: [B, A, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], at]


def columns(layout: Layout, taps: Tensor, embed: Callable[[Tensor], Tensor], hidden: int, prompt: int) -> Columns:
    """Columns whose tap states are `taps` [B, L, T*H], the first of them being the input of layer 0."""
    L = taps.shape[1]
    real = real_columns(layout, L)
    tokens = layout.tokens[:, 1 : L + 1]
    visual = real & (layout.modality[:, 1 : L + 1] != LANGUAGE.id)
    word = embed(tokens)
    if L > 1:  # token L has been emitted: it is text
        shown = torch.cat([taps[:, 1:, :hidden], taps[:, -1:, :hidden]], 1)
        word = torch.where(visual[..., None], shown.to(word.dtype), word)
    return Columns(taps, word, real, visual, tokens, layout.positions_1d()[:, :L], prompt)


def real_columns(layout: Layout, count: int) -> Tensor:
    """[B, count] bool: which of the first columns are no padding."""
    device = layout.tokens.device
    return torch.arange(count, device=device) >= torch.tensor(layout.start, device=device)[:, None]


def left_aligned(kept: Tensor) -> Tensor:
    """[B, S] int64: the columns that are `kept` [B, L] bool, in order; S is the largest number in a row, at least 1."""
    return (~kept).long().argsort(dim=1, stable=True)[:, : max(1, int(kept.sum(1).max()))]


def keep(c: Columns, kept: Tensor) -> tuple[Selection, Tensor]:
    """(the columns `kept` [B, L] bool, the column of each entry [B, S])."""
    order = left_aligned(kept)
    found = Selection(
        pick(c.taps, order), pick(c.word, order), c.positions.gather(1, order), kept.gather(1, order),
        (kept.cumsum(1) - 1).clamp_min(0), torch.zeros(len(kept), 1, dtype=torch.long, device=kept.device),
        c.word.new_zeros(len(kept), 1, 1),
    )  # fmt: skip
    return found, order


def spans(shown: list[bool]) -> list[tuple[int, int]]:
    """Runs of image columns as (first, one past the last)."""
    found: list[tuple[int, int]] = []
    start = None
    for column, image in enumerate([*shown, False]):
        if image and start is None:
            start = column
        elif not image and start is not None:
            found.append((start, column))
            start = None
    return found


@dataclass
class Images:
    """I runs of image columns of a batch, in text order. places: (row, first column, one past the last) of each.

    states: [I, n, W] what stands there, mask: [I, n] bool, False beyond a run's end.
    """

    places: list[tuple[int, int, int]]
    states: Tensor
    mask: Tensor

    @classmethod
    def of(cls, shown: Tensor, states: Tensor) -> Images:
        """The runs of `shown` [B, L] bool, with states [B, L, W]; without any run the tensors are empty."""
        places = [(row, *span) for row, columns in enumerate(shown.tolist()) for span in spans(columns)]
        longest = max((end - first for _, first, end in places), default=1)
        found = states.new_zeros(len(places), longest, states.shape[-1])
        mask = torch.zeros(len(places), longest, dtype=torch.bool, device=states.device)
        for i, (row, first, end) in enumerate(places):
            found[i, : end - first] = states[row, first:end]
            mask[i, : end - first] = True
        return cls(places, found, mask)

    @property
    def rows(self) -> Tensor:
        """[I] int64: the row that each image belongs to."""
        return torch.tensor([row for row, _, _ in self.places], dtype=torch.long, device=self.mask.device)

    def last(self, count: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        """The last `count[i]` columns of every image: row [n], column [n], (image, which of its tokens) [n, 2], int64.

        There are no more than an image has columns.
        """
        found = [
            (row, end - kept + k, i, k)
            for i, (row, first, end) in enumerate(self.places)
            for kept in [min(count[i], end - first)]
            for k in range(kept)
        ]
        table = torch.tensor(found, dtype=torch.long, device=self.mask.device).view(-1, 4)
        return table[:, 0], table[:, 1], table[:, 2:]
