"""State: one batch in flight, and what of it a later turn of the same conversation can use again."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from msd.backends.revision import Revision
from msd.core.cache import KVCache
from msd.core.layout import Layout


@dataclass(frozen=True)
class Piece:
    """What fills some placeholders. columns: how many; None where all pieces of a prompt fill equally many."""

    data: Tensor
    columns: int | None


Contents = dict[str, list[Piece]]  # by modality: "image", "video" or "audio"


@dataclass(frozen=True)
class Source:
    """What a state was computed by: a model, the indices of its taps, and what the model was then."""

    model: PreTrainedModel
    taps: tuple[int, ...]
    revision: Revision

    def same(self, other: Source) -> bool:
        """Whether the one goes on where the other ended, as if it had computed all of it."""
        return self.model is other.model and self.taps == other.taps and self.revision.same(other.revision)


@dataclass
class State:
    """One batch in flight: its text, its cache, and what the drafter remembers of it.

    beside: [B, E, H] tokens that only the drafter sees, zero in rows without any.
    prefilled: rows that the target computed for the prompt, columns of the batch; those of an earlier turn left out.
    contents: what stands at the placeholders, kept for comparison where the state is to be continued.
    trail: [1, C, T*H] tap states of the committed slots, where the state is to be continued and there are taps.
    """

    layout: Layout
    cache: KVCache
    memory: Any = field(default=None)
    beside: Tensor | None = None
    source: Source | None = None
    prefilled: int = 0
    contents: Contents = field(default_factory=dict)
    trail: Tensor | None = None
    scored: Tensor | None = None  # [1, N, T*H] tap states of the tree scored last, where there is a trail

    def follow(self, nodes: list[int]) -> None:
        """Adds the states of the committed `nodes` of the tree scored last to the trail; before the cache commits."""
        if self.trail is not None and self.scored is not None:
            at = self.cache.committed[0]
            self.trail[0, at : at + len(nodes)] = self.scored[0, nodes]


@dataclass
class Past:
    """What a conversation has computed so far: the state after its last answer, or None before the first.

    Given to one generation after another, which begin where their prompt parts from it and leave their own state here.
    """

    state: State | None = None

    def renew(self, state: State) -> None:
        """Takes the state of a finished generation, without what only a running one needs."""
        state.memory = state.scored = None
        self.state = state
