"""Batch: requests that are decoded together. One joins before any step, and leaves after the step that ends it.

A row keeps its own columns, sampler and random generator, so every answer is the one that the request gets alone.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import torch
from torch import Tensor

from msd.core.joined import JoinedSampler
from msd.core.modality import known
from msd.core.tree import Step
from msd.decode import Engine
from msd.inspect import Pass, read
from msd.model import Prefilled
from msd.targets.state import State

M = TypeVar("M")


@dataclass(frozen=True)
class Emission:
    """What one step emitted in one row.

    tokens: ids. logits: for each token, (raw, processed) logits [V]; empty unless the request keeps them. finish: why
    the row ended ("eos", "length", "criteria", or the reason given to `end`), or None. drafted, accepted: number of its
    drafted nodes by the modality whose subtree they are in; modality: of each token, as the router predicts it, empty
    without a router, and in steps without drafts that no request traces. divergence: total variation of each token from
    the target's distribution; empty for a lossless policy and for the first token, which is exact. traced: the step
    with its tree, if the request wants it; None for the first token.
    """

    tokens: list[int]
    finish: str | None
    drafted: Counter[str] = field(default_factory=Counter)
    accepted: Counter[str] = field(default_factory=Counter)
    logits: tuple[tuple[Tensor, Tensor], ...] = ()
    modality: tuple[str, ...] = ()
    divergence: tuple[float, ...] = ()
    traced: Pass | None = None


class Batch(Generic[M]):
    """The running requests of one engine. members: the caller's object of each row. traced: whether one wants traces.

    An engine whose drafter or policy cannot join requests holds one at a time (`Engine.joins`).
    """

    def __init__(self, engine: Engine, traced: Callable[[M], bool] = lambda _: False) -> None:
        self.engine, self.members, self.traced = engine, list[M](), traced
        self._state: State | None = None
        self._sampler: JoinedSampler | None = None

    @property
    def open(self) -> bool:
        """Whether a request can join now."""
        return self.engine.joins or not self.members

    def bytes_with(self, capacity: int, rows: int = 1) -> int:
        """Bytes of keys and values if `rows` requests of `capacity` slots joined; 0 before the first request."""
        if self._state is None:
            return 0
        cache = self._state.cache
        return cache.slot_bytes * (len(self.members) + rows) * max(cache.capacity, capacity)

    @torch.inference_mode()
    def join(self, member: M, request: Prefilled) -> Emission:
        """Emits the first token of a prefilled request of one row, and adds it unless that token ends it."""
        assert len(request.input_ids) == 1 and self.open
        step = self.engine.begin(request.sampler, request.state, request.prompt)
        first = _emission(step, 0, [], request.sampler.finish[0])
        if first.finish is not None:
            return first
        if self._state is None or self._sampler is None:
            self._state, self._sampler = request.state, JoinedSampler(request.state.layout, request.sampler)
        else:
            self.engine.join(self._state, request.state)
            self._sampler.join(request.sampler)
        self.members.append(member)
        return first

    @torch.inference_mode()
    def step(self) -> list[tuple[M, Emission]]:
        """Computes one step of all rows; returns what each emitted. Rows that have ended leave."""
        assert self._state is not None and self._sampler is not None
        step = self.engine.step(self._sampler, self._state, any(map(self.traced, self.members)))
        kinds = step.tree.modality.where(step.tree.valid, -1).tolist()
        finish = self._sampler.finish
        emitted = [
            (member, _emission(step, row, kinds[row], finish[row], self.traced(member)))
            for row, member in enumerate(self.members)
        ]
        if self._drop_ended():
            self.engine.drafter.finish()
        return emitted

    @torch.inference_mode()
    def end(self, members: list[M], reason: str) -> None:
        """Ends the rows of `members`, which leave before the next step; ignores members that are not here."""
        for row, member in enumerate(self.members):
            if self._sampler is not None and any(member is one for one in members):
                self._sampler.end(row, reason)
        self._drop_ended()

    def _drop_ended(self) -> bool:
        """Removes ended rows from the state, the sampler and the members; returns whether there were any."""
        if self._state is None or self._sampler is None:
            return False
        rows = self._sampler.alive
        if len(rows) == len(self.members):
            return False
        self.members = [self.members[row] for row in rows]
        if not rows:
            self._state = self._sampler = None
            return True
        self.engine.select(self._state, rows)
        self._sampler.select(rows)
        return True


def _emission(step: Step, row: int, kinds: list[int], finish: str | None, traced: bool = False) -> Emission:
    """What `step` emitted in `row`. kinds: modality ids of its nodes, the root's first; -1 for none."""
    accepted, names = step.accepted, [modality.name for modality in known()]
    logits = accepted.logits[row] if accepted.logits is not None else ()
    modality = tuple(names[kind] for kind in accepted.modality[row]) if accepted.modality is not None else ()
    drafted, correct = (
        Counter(names[kind] for kind in some if kind >= 0)
        for some in (kinds[1:], [kinds[node] for node in accepted.nodes[row]])
    )
    divergence = tuple(accepted.divergence[row]) if accepted.divergence is not None and modality else ()
    trace = read(step, row) if traced else None
    return Emission(accepted.tokens[row], finish, drafted, correct, tuple(logits), modality, divergence, trace)
