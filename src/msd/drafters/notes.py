"""What was decoded and not read yet: tap states are kept as they come and read when a draft is asked for.

A request that is over before, or while nothing is drafted, costs the drafter nothing.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor

from msd.layout import Layout
from msd.tree import Accepted, Scores


class Remembers(Protocol):
    """A drafter's memory of a batch."""

    def take(self, network: Any, layout: Layout, taps: Tensor, token: Tensor, added: list[int]) -> None:
        """Appends the newest `added[row]` tokens of every row, W at most.

        taps: [B, W, T*H], the target's states before each of them; token: [B, W]; any values beyond a row's number.
        """
        ...


M = TypeVar("M", bound=Remembers)


class Notes(Generic[M]):
    """Of a batch. What reads them is made by `begin(network, layout, taps)` from the prompt's."""

    def __init__(self, taps: Tensor, begin: Callable[[Any, Layout, Tensor], M]) -> None:
        """taps: [B, L, T*H] of the prompt."""
        self._prompt, self._begin = taps, begin
        self._newest = list(taps[:, -1])
        self._taps: list[list[Tensor]] = [[] for _ in taps]
        self._tokens: list[list[int]] = [[] for _ in taps]
        self._memory: M | None = None

    def observe(self, scores: Scores, accepted: Accepted) -> None:
        """Notes every emitted token with the states before it: the node it followed is known to the target now."""
        assert scores.taps is not None
        for row, (nodes, tokens) in enumerate(zip(accepted.nodes, accepted.tokens, strict=True)):
            if tokens:
                self._taps[row].append(scores.taps[row, [0, *nodes[: len(tokens) - 1]]])
                self._newest[row] = self._taps[row][-1][-1]
                self._tokens[row] += tokens

    def newest(self) -> Tensor:
        """[B, T*H]: the target's state before the newest emitted token of every row, be it read already or not.

        The prompt's last at first.
        """
        return torch.stack(self._newest)

    def read(self, network: Any, layout: Layout) -> M:
        """The memory of all that was decoded so far."""
        if self._memory is None:
            self._memory = self._begin(network, layout, self._prompt)
        assert self._memory is not None
        added = [len(tokens) for tokens in self._tokens]
        if widest := max(added):
            taps = self._prompt.new_zeros(len(added), widest, self._prompt.shape[-1])
            token = torch.zeros(len(added), widest, dtype=torch.long)
            for row, n in enumerate(added):
                if n:
                    taps[row, :n] = torch.cat(self._taps[row])
                    token[row, :n] = torch.tensor(self._tokens[row])
            self._memory.take(network, layout, taps, token.to(taps.device), added)
            self._taps, self._tokens = [[] for _ in added], [[] for _ in added]
        return self._memory
