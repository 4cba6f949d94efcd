"""The context of a draft network: the positions of a text that it reads, its input there, and where drafts start.

Entry i belongs to column i and the token after it, as in EAGLE: it combines the target's states at i with the embedding
of token i+1. Where token i+1 is an image placeholder, the position is *visual* and the embedding is the projector's
output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from msd.core.layout import Layout
from msd.core.modality import LANGUAGE
from msd.drafters.toolkit.layers import KeyValues, Seen


@dataclass
class Anchors:
    """A positions per row that drafts start from, and their context. B rows, S context entries.

    x, feature: [B, A, H]. embedding: [B, A, H], of the token after the anchor (the root). positions: [B, A], rotary.
    visible: [B, A, S] bool, the entries that an anchor sees; None in decoding where all rows see all entries.
    image: [B, A or 1, H], see `Selection`. context: keys and values [B, S, K, D] of each layer. seen: see `Selection`.
    """

    x: Tensor
    feature: Tensor
    embedding: Tensor
    positions: Tensor
    visible: Tensor | None
    image: Tensor
    context: list[KeyValues]
    seen: Seen | None = None

    def of(self, rows: list[int], used: int | None = None) -> Anchors:
        """Selects rows, with the first `used` context entries, by default all; each row must see all of them."""
        context = [KeyValues(k.keys[rows, :used], k.values[rows, :used]) for k in self.context]
        x, feature, embedding, positions = (t[rows] for t in (self.x, self.feature, self.embedding, self.positions))
        seen = None if self.seen is None else self.seen.of(rows)
        return Anchors(x, feature, embedding, positions, None, self.image[rows], context, seen)

    def joined(self, *others: Anchors) -> Anchors:
        """The rows of all, in this order, with buffers as long as the longest ones; their `visible` is None."""
        parts = (self, *others)
        x, feature, embedding, positions = (
            torch.cat([getattr(part, name) for part in parts]) for name in ("x", "feature", "embedding", "positions")
        )
        width = max(part.image.shape[-1] for part in parts)
        image = torch.cat([part.image.expand(-1, -1, width) for part in parts])
        context = [first.joined(*rest) for first, *rest in zip(*(part.context for part in parts), strict=True)]
        seen = self.seen and self.seen.joined(*(part.seen for part in others if part.seen is not None))
        return Anchors(x, feature, embedding, positions, None, image, context, seen)


@dataclass
class Columns:
    """Columns 0 to L-1 of B texts.

    taps: [B, L, T*H]. embedding: [B, L, H], of the token after each column. real: [B, L] bool, False at padding.
    visual: [B, L] bool, columns of an image. positions: [B, L], rotary. prompt: number of columns of the prompt.
    axes: [B, L, 3], the positions of each M-RoPE axis; None: the same on all.
    """

    taps: Tensor
    embedding: Tensor
    real: Tensor
    visual: Tensor
    positions: Tensor
    prompt: int
    axes: Tensor | None = None


@dataclass
class Selection:
    """The S positions of each row that a network reads, left-aligned in text order.

    taps: [B, S, T*H]. embedding: [B, S, H]. positions: [B, S]. present: [B, S] bool, False beyond a row's last entry.
    slot: [B, L] int64, the entry of each column (for a column without one, the nearest entry before it).
    shift: [B, 1] int64, the position of an entry minus that of its column, at the end of the text.
    image: [B, S, H], a vector of the images before an entry; [B, 1, H or 1] where it is the same for all entries.
    fixed: [B, S] bool, the entries whose input is `given` [B, S, H] instead of the method's `entry`; None: no entry.
    axes: [B, S, 3], as in `Columns`. seen: what a read-out attends to; None without one.
    """

    taps: Tensor
    embedding: Tensor
    positions: Tensor
    present: Tensor
    slot: Tensor
    shift: Tensor
    image: Tensor
    fixed: Tensor | None = None
    given: Tensor | None = None
    axes: Tensor | None = None
    seen: Seen | None = None

    @property
    def places(self) -> Tensor:
        """The positions of the entries' keys: [B, S], or [B, S, 3] by axis."""
        return self.positions if self.axes is None else self.axes


@dataclass
class Entries:
    """Context entries of B rows at selected positions. x: [B, S, ...], the layers' input. feature: [B, S, H]."""

    selection: Selection
    x: Tensor
    feature: Tensor

    def anchors(self, columns: Tensor, context: list[KeyValues]) -> Anchors:
        """Returns the anchors at text `columns` [B, A] int64; context: keys and values of these entries."""
        s = self.selection
        at = s.slot.gather(1, columns)
        entry = torch.arange(self.x.shape[1], device=at.device)
        visible = (entry <= at[:, :, None]) & s.present[:, None]
        image = s.image if s.image.shape[1] == 1 else pick(s.image, at)
        x, feature, embedding = (pick(values, at) for values in (self.x, self.feature, s.embedding))
        return Anchors(x, feature, embedding, s.positions.gather(1, at), visible, image, context, s.seen)


def pick(x: Tensor, at: Tensor) -> Tensor:
    """Gathers x [B, S, ...] at indices [B, A]: [B, A, ...]."""
    if len(x) == 1:
        return x.index_select(1, at[0])
    return x[torch.arange(len(x), device=x.device)[:, None], at]


def text_columns(
    layout: Layout,
    taps: Tensor,
    embed: Callable[[Tensor], Tensor],
    hidden: int,
    prompt: int,
    placeholders: bool = False,
) -> Columns:
    """Returns the columns with tap states `taps` [B, L, T*H]; the first tap must be the input of layer 0.

    placeholders: image columns have the embedding of the placeholder token, not the projector's output.
    """
    L = taps.shape[1]
    real = real_columns(layout, L) & before_newest(layout, L)
    visual = real & (layout.modality[:, 1 : L + 1] != LANGUAGE.id)
    embedding = embed(layout.tokens[:, 1 : L + 1])
    if L > 1 and not placeholders:  # token L has been emitted: it is text
        projected = torch.cat([taps[:, 1:, :hidden], taps[:, -1:, :hidden]], 1)
        embedding = torch.where(visual[..., None], projected.to(embedding.dtype), embedding)
    return Columns(taps, embedding, real, visual, layout.positions_1d()[:, :L], prompt)


def real_columns(layout: Layout, count: int) -> Tensor:
    """Returns [B, count] bool: which of the first columns are not padding on the left."""
    device = layout.tokens.device
    return torch.arange(count, device=device) >= torch.tensor(layout.start, device=device)[:, None]


def visual_columns(layout: Layout, count: int) -> Tensor:
    """Returns [B, count] bool: which of the first columns belong to an image or another medium."""
    return (layout.modality[:, :count] != LANGUAGE.id) & real_columns(layout, count)


def before_newest(layout: Layout, count: int) -> Tensor:
    """Returns [B, count] bool: which of the first columns have a token after them; not those of an answer's padding."""
    device = layout.tokens.device
    return torch.arange(count, device=device) < torch.tensor(layout.end, device=device)[:, None] - 1


def left_aligned(kept: Tensor) -> Tensor:
    """Returns the `kept` [B, L] bool columns in order, [B, S] int64; S is the largest count of a row, at least 1."""
    return (~kept).long().argsort(dim=1, stable=True)[:, : max(1, int(kept.sum(1).max()))]


def select_columns(c: Columns, kept: Tensor) -> tuple[Selection, Tensor]:
    """Selects the columns `kept` [B, L] bool; returns (selection, the column of each entry [B, S])."""
    order = left_aligned(kept)
    selection = Selection(
        pick(c.taps, order), pick(c.embedding, order), c.positions.gather(1, order), kept.gather(1, order),
        (kept.cumsum(1) - 1).clamp_min(0), torch.zeros(len(kept), 1, dtype=torch.long, device=kept.device),
        c.embedding.new_zeros(len(kept), 1, 1),
    )  # fmt: skip
    selection.axes = None if c.axes is None else pick(c.axes, order)
    return selection, order


@dataclass
class Images:
    """The I runs of image columns of a batch, in text order. spans: (row, first column, end column) of each run.

    states: [I, n, W], the values at the columns. mask: [I, n] bool, False beyond the end of a run.
    """

    spans: list[tuple[int, int, int]]
    states: Tensor
    mask: Tensor

    @classmethod
    def of(cls, visual: Tensor, states: Tensor) -> Images | None:
        """Finds the runs of `visual` [B, L] bool in states [B, L, W]; None without any."""
        edges = torch.nn.functional.pad(visual.int(), (1, 1)).diff(dim=1)
        firsts, ends = ((edges == sign).nonzero().tolist() for sign in (1, -1))
        spans = [(row, first, end) for (row, first), (_, end) in zip(firsts, ends, strict=True)]
        if not spans:
            return None
        padded, mask = (
            pad_sequence([x[row, first:end] for row, first, end in spans], batch_first=True) for x in (states, visual)
        )
        return cls(spans, padded, mask)

    @property
    def rows(self) -> Tensor:
        """[I] int64: the batch row of each image."""
        return torch.tensor([row for row, _, _ in self.spans], dtype=torch.long, device=self.mask.device)

    def replaced(self, c: Columns, tokens: Tensor, count: list[int]) -> tuple[Selection, Tensor]:
        """Selects the text columns and replaces image i by its first `count[i]` compressed tokens.

        tokens: [I, K, H], compressed; they become the inputs at the image's last columns, at most one per column.
        Returns (selection, the column of each entry [B, S]).
        """
        places = [
            (row, end - kept + k, i, k)
            for i, (row, first, end) in enumerate(self.spans)
            for kept in [min(count[i], end - first)]
            for k in range(kept)
        ]
        rows, at, image, which = torch.tensor(places, dtype=torch.long, device=self.mask.device).view(-1, 4).T
        given = tokens[image, which].to(c.embedding.dtype)
        selection, order = select_columns(c, (c.real & ~c.visual).index_put((rows, at), c.real.new_ones(())))
        selection.fixed = c.visual.gather(1, order)
        selection.given = pick(torch.zeros_like(c.embedding).index_put((rows, at), given), order)
        return selection, order
