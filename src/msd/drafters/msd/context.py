"""Context entries: which positions of a text the drafter keeps, and what they hold.

Text positions keep their place and their rotary position. Of every image only `image_tokens` entries remain, at the
image's last positions (decoupled vision path); without that path all image positions are entries like any other.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from msd.drafters.msd.network import Anchors, MSDNetwork
from msd.drafters.msd.vision import spans
from msd.layout import Layout
from msd.modality import LANGUAGE


@dataclass
class Entries:
    """The S entries of B rows, left-aligned in text order.

    x, feature, embedding: [B, S, H]. positions: [B, S]. present: [B, S] bool, False beyond a row's entries.
    slot: [B, L] int64, the entry of each column (that of the nearest entry before it, where it has none).
    image: [B, 1, H] global vector of the row's images, zero without one.
    """

    x: Tensor
    feature: Tensor
    embedding: Tensor
    positions: Tensor
    present: Tensor
    slot: Tensor
    image: Tensor

    def anchors(self, columns: Tensor) -> Anchors:
        """Anchors at text `columns` [B, A] int64."""
        at = self.slot.gather(1, columns)
        entry = torch.arange(self.x.shape[1], device=at.device)
        visible = (entry <= at[:, :, None]) & self.present[:, None]
        return Anchors(
            pick(self.x, at), pick(self.feature, at), pick(self.embedding, at), self.positions.gather(1, at), visible,
            self.image,
        )  # fmt: skip


def pick(x: Tensor, at: Tensor) -> Tensor:
    """x [B, S, ...] at indices [B, A]: [B, A, ...]."""
    return x[torch.arange(len(x), device=x.device)[:, None], at]


def entries(network: MSDNetwork, layout: Layout, taps: Tensor, beside: Tensor | None = None) -> Entries:
    """Entries of columns 0 to L-1, whose tap states are `taps` [B, L, T*H]; the layout holds token L as well.

    beside: [B, E, H] tokens that only the drafter sees, all zero in rows that have none.
    """
    c = network.config
    L = taps.shape[1]
    column = torch.arange(L, device=taps.device)
    real = column >= torch.tensor(layout.start, device=taps.device)[:, None]
    shown = (layout.modality[:, :L] != LANGUAGE.id) & real
    image, compressed, of_column = _images(network, taps, shown)
    present = real & (~shown | (of_column >= 0)) if c.vision else real
    order = (~present).long().argsort(dim=1, stable=True)[:, : int(present.sum(1).max())]
    feature = network.feature(pick(taps, order))
    embedding = network.embed(layout.tokens[:, 1 : L + 1].gather(1, order))
    after = (shown.cumsum(1) > 0).gather(1, order)[..., None].to(feature.dtype)
    kept, whole, given = _beside(network, beside, image)
    x = network.entry(feature, embedding, image * after + whole)
    if len(compressed):
        source = of_column.gather(1, order)
        x = torch.where((source >= 0)[..., None], compressed[source.clamp_min(0)].to(x.dtype), x)
    found = Entries(
        x, feature, embedding, layout.line()[:, :L].gather(1, order), present.gather(1, order),
        (present.cumsum(1) - 1).clamp_min(0), image + whole,
    )  # fmt: skip
    return found if kept is None else _preceded(found, kept, given)


def _images(network: MSDNetwork, taps: Tensor, shown: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(global vectors [B, 1, H], compressed tokens [I*K, H], which of them each column holds [B, L] or -1)."""
    c, (B, L, _) = network.config, taps.shape
    of_column = torch.full((B, L), -1, device=taps.device)
    image = torch.zeros(B, 1, c.hidden, dtype=network.fc.weight.dtype, device=taps.device)
    found = [(row, *span) for row, columns in enumerate(shown.tolist()) for span in spans(columns)] if c.vision else []
    if not found:
        return image, image.new_zeros(0, c.hidden), of_column
    longest = max(end - first for _, first, end in found)
    states = taps.new_zeros(len(found), longest, taps.shape[-1])
    mask = torch.zeros(len(found), longest, dtype=torch.bool, device=taps.device)
    for i, (row, first, end) in enumerate(found):
        states[i, : end - first] = taps[row, first:end]
        mask[i, : end - first] = True
        kept = min(c.image_tokens, end - first)
        of_column[row, end - kept : end] = torch.arange(i * c.image_tokens, i * c.image_tokens + kept)
    tokens, whole = network.adaptor(states.to(image.dtype), mask)
    rows = torch.tensor([row for row, _, _ in found], device=taps.device)
    share = image.new_zeros(B, len(found)).index_put_((rows, torch.arange(len(found))), image.new_ones(()))
    image = (share / share.sum(1, keepdim=True).clamp_min(1) @ whole)[:, None]
    return image, tokens.flatten(0, 1), of_column


def _beside(network: MSDNetwork, beside: Tensor | None, image: Tensor) -> tuple[Tensor | None, Tensor, Tensor]:
    """Of what stands beside: (tokens kept [B, K, H] or None, global vectors like `image`, rows with any [B, 1])."""
    if beside is None or network.beside is None:
        return None, torch.zeros_like(image), image.new_zeros(len(image), 1).bool()
    given = beside.flatten(1).any(1, keepdim=True)
    kept, whole = network.beside(beside)
    return kept, whole.to(image.dtype) * given[..., None], given


def _preceded(found: Entries, kept: Tensor, given: Tensor) -> Entries:
    """The entries with `kept` [B, K, H] before them, at the first position, in the `given` [B, 1] rows."""
    K = kept.shape[1]
    zero = torch.zeros_like(found.x[:, :1]).expand(-1, K, -1)
    present = torch.cat([given.expand(-1, K), found.present], 1)
    order = (~present).long().argsort(dim=1, stable=True)[:, : int(present.sum(1).max())]
    joined = [
        torch.cat([one, two], 1)
        for one, two in (
            (kept.to(found.x.dtype), found.x), (zero, found.feature), (zero.to(found.embedding.dtype), found.embedding),
            (found.positions[:, :1].expand(-1, K), found.positions),
        )
    ]  # fmt: skip
    x, feature, embedding, positions = (pick(values, order) for values in joined)
    return Entries(x, feature, embedding, positions, present.gather(1, order), found.slot + K * given, found.image)
