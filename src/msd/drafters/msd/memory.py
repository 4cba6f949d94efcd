"""What the drafter remembers of a batch in flight: context keys, preallocated, and the anchor it drafts from next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from msd.drafters.msd.context import entries, pick
from msd.drafters.msd.layer import Keys
from msd.drafters.msd.network import Anchors, MSDNetwork
from msd.layout import Layout


@dataclass
class Memory:
    """B rows. keys: a buffer [B, C, K, D] per layer. length: used entries per row. anchor: one per row (A = 1), the
    newest entry. route: [B, M] probabilities of the class of the next drafted token.
    """

    keys: list[Keys]
    length: list[int]
    anchor: Anchors
    route: Tensor

    @classmethod
    def begin(cls, network: MSDNetwork, layout: Layout, taps: Tensor, beside: Tensor | None = None) -> Memory:
        """From the prompt's tap states [B, L, T*H]; the layout holds the first emitted token already.

        beside: see `entries`.
        """
        L = taps.shape[1]
        found = entries(network, layout, taps, beside)
        length = found.present.sum(1).tolist()
        room = found.x.shape[1] + layout.capacity - L
        keys = [with_room(k, room) for k in network.context(found.x, found.positions)]
        last = torch.tensor(length, device=taps.device)[:, None] - 1
        anchor = Anchors(
            pick(found.x, last), pick(found.feature, last), pick(found.embedding, last),
            found.positions.gather(1, last), visible(length, room, taps.device), found.image,
        )  # fmt: skip
        return cls(keys, length, anchor, network.route(anchor.feature, anchor.embedding)[:, 0].exp())

    def take(self, network: MSDNetwork, layout: Layout, taps: Tensor, token: Tensor, added: list[int]) -> None:
        """Appends an entry for each of the newest `added[row]` tokens of every row, W at most.

        taps: [B, W, T*H], the target's states before each of them; token: [B, W]; any values beyond a row's number.
        """
        device, widest = taps.device, token.shape[1]
        first = torch.tensor([e - 1 - n for e, n in zip(layout.end, added, strict=True)])
        feature = network.feature(taps)
        embedding = network.embed(token)
        x = network.entry(feature, embedding, self.anchor.image)
        column = (first[:, None] + torch.arange(widest)).clamp_min(0).to(device)
        positions = layout.line().gather(1, column)
        for buffer, new in zip(self.keys, network.context(x, positions), strict=True):
            buffer.write(new, self.length, added)
        self.length = [at + n for at, n in zip(self.length, added, strict=True)]
        old, latest = self.anchor, newest(added, device)
        self.anchor = Anchors(
            latest(x, old.x), latest(feature, old.feature), latest(embedding, old.embedding),
            latest(positions, old.positions),
            visible(self.length, old.visible.shape[-1], device), old.image,
        )  # fmt: skip
        self.route = network.route(self.anchor.feature, self.anchor.embedding)[:, 0].exp()

    def upto(self, rows: list[int] | None) -> tuple[list[Keys], Anchors]:
        """(keys in use per layer [R, S, ...], the anchors behind them) of some rows, or of all."""
        return upto(self.keys, self.length, self.anchor, rows)


def upto(keys: list[Keys], length: list[int], anchor: Anchors, rows: list[int] | None) -> tuple[list[Keys], Anchors]:
    """See `Memory.upto`."""
    taken: list[int] | slice
    if rows is None or rows == list(range(len(length))):
        used, taken = max(length), slice(None)
    else:
        used, taken = max(length[row] for row in rows), rows
    return [Keys(k.keys[taken, :used], k.values[taken, :used]) for k in keys], anchor.of(taken, used)


def newest(added: list[int], device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of new values [B, W, ...], the first `added[row]` of them real, and old ones [B, 1, ...].

    It gives the last of each row's new values [B, 1, ...], and the old one where there are none.
    """
    last = torch.tensor(added, device=device)[:, None] - 1

    def latest(new: Tensor, before: Tensor) -> Tensor:
        grown = (last >= 0).view(-1, *[1] * (new.dim() - 1))
        return torch.where(grown, pick(new, last.clamp_min(0)), before)

    return latest


def with_room(keys: Keys, room: int) -> Keys:
    """The same entries in buffers of `room` entries."""

    def grow(x: Tensor) -> Tensor:
        out = x.new_zeros(x.shape[0], room, *x.shape[2:])
        out[:, : x.shape[1]] = x
        return out

    return Keys(grow(keys.keys), grow(keys.values))


def visible(length: list[int], room: int, device: torch.device) -> Tensor:
    """[B, 1, room] bool: the entries in use."""
    return (torch.arange(room) < torch.tensor(length)[:, None]).to(device)[:, None]
