"""What a rival remembers of a batch in flight: context keys, preallocated, and the anchor it drafts from next."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from msd.drafters.msd.layer import Keys
from msd.drafters.msd.memory import newest, upto, visible
from msd.drafters.msd.network import Anchors
from msd.drafters.rivals.network import Rival
from msd.layout import Layout


@dataclass
class Memory:
    """B rows. keys: a buffer [B, C, K, D] per layer. length: used entries per row. shift: see `Entries`.

    anchor: one per row (A = 1), the newest entry.
    """

    keys: list[Keys]
    length: list[int]
    shift: Tensor
    anchor: Anchors

    @classmethod
    def begin(cls, network: Rival, layout: Layout, taps: Tensor) -> Memory:
        """From the prompt's tap states [B, L, T*H]; the layout holds the first emitted token already."""
        found = network.entries(layout, taps, taps.shape[1])
        feature = network.feature(found.taps)
        x = network.enter(found, feature)
        last = torch.full((len(taps), 1), taps.shape[1] - 1, device=taps.device)
        room = x.shape[1] + layout.capacity - taps.shape[1]
        made = cls([], [0] * len(taps), found.shift, found.anchors(x, feature, last))
        made._append(network, x, found.positions, found.present.sum(1).tolist(), room)
        return made

    def take(self, network: Rival, layout: Layout, taps: Tensor, token: Tensor, added: list[int]) -> None:
        """Appends an entry for each of the newest `added[row]` tokens; see `msd.drafters.notes.Remembers`."""
        first = torch.tensor([e - 1 - n for e, n in zip(layout.end, added, strict=True)])
        column = (first[:, None] + torch.arange(token.shape[1])).clamp_min(0).to(taps.device)
        positions = layout.line().gather(1, column) + self.shift
        feature, word, old = network.feature(taps), network.embed(token), self.anchor
        x = network.entry(feature, word, old.image, 0)
        self._append(network, x, positions, added, self.keys[0].keys.shape[1])
        latest = newest(added, taps.device)
        self.anchor = replace(
            self.anchor, x=latest(x, old.x), feature=latest(feature, old.feature),
            embedding=latest(word, old.embedding),
            positions=latest(positions, old.positions),
        )  # fmt: skip

    def _append(self, network: Rival, x: Tensor, positions: Tensor, added: list[int], room: int) -> None:
        """Keys of new entries x [B, W, ...], `added[row]` of them real, into buffers of `room` entries."""
        begin, B, W = torch.tensor(self.length, device=x.device), len(x), x.shape[1]
        used = max(old + n for old, n in zip(self.length, added, strict=True))

        def store(layer: int, new: Keys) -> Keys:
            if layer == len(self.keys):
                shape = (B, room, *new.keys.shape[2:])
                self.keys.append(Keys(new.keys.new_zeros(shape), new.values.new_zeros(shape)))
            buffer = self.keys[layer]
            buffer.write(new, self.length, added)
            return Keys(buffer.keys[:, :used], buffer.values[:, :used])

        entry, new = torch.arange(used, device=x.device), torch.arange(W, device=x.device)
        seen = entry <= (begin[:, None] + new)[..., None]  # [B, W, used]
        network.context(x, positions, seen, store)
        self.length = [old + n for old, n in zip(self.length, added, strict=True)]
        self.anchor = replace(self.anchor, visible=visible(self.length, room, x.device))

    def upto(self, rows: list[int] | None) -> tuple[list[Keys], Anchors]:
        """See `msd.drafters.msd.memory.Memory`."""
        return upto(self.keys, self.length, self.anchor, rows)
