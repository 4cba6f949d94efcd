"""A trained network in decoding: its memory of a batch, and the tree that it drafts within the plan's budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from msd.backends.packed import faster_in_bf16
from msd.core.layout import Layout
from msd.core.modality import LANGUAGE
from msd.core.sampling import Sampler, temperature
from msd.core.tree import Accepted, DraftTree, Scores
from msd.drafters.base import Drafter
from msd.drafters.toolkit.context import Anchors, pick
from msd.drafters.toolkit.growth import LevelCost, Shape, Subtrees, grow
from msd.drafters.toolkit.layers import KeyValues
from msd.errors import UserError
from msd.planning.plan import Budget
from msd.targets.state import State

if TYPE_CHECKING:
    from msd.drafters.toolkit.network import DraftNetwork


@dataclass
class Memory:
    """The context of B rows in decoding.

    length: used entries per row. shift: see `Selection`. anchor: the newest entry of each row (A = 1); its context is a
    buffer [B, C, K, D] per layer.
    """

    length: list[int]
    shift: Tensor
    anchor: Anchors

    @classmethod
    def begin(cls, network: DraftNetwork, layout: Layout, taps: Tensor, auxiliary: Tensor | None = None) -> Memory:
        """Reads the prompt's tap states [B, L, T*H]; the layout already holds the first emitted token.

        auxiliary: [B, E, H], see `DraftNetwork.read`.
        """
        L = taps.shape[1]
        entries = network.read(layout, taps, L, auxiliary)
        s = entries.selection
        last = torch.full((len(taps), 1), L - 1, device=taps.device)
        room = entries.x.shape[1] + layout.capacity - L
        memory = cls([0] * len(taps), s.shift, entries.anchors(last, []))
        memory._append(network, entries.x, s.places, s.present.sum(1).tolist(), room)
        return memory

    def append(self, network: DraftNetwork, layout: Layout, taps: Tensor, token: Tensor, added: list[int]) -> None:
        """Appends an entry for each of the newest `added[row]` tokens of every row; at most W.

        taps: [B, W, T*H], the target's states before each token. token: [B, W]. Values beyond `added[row]` are ignored.
        """
        first = torch.tensor([e - 1 - n for e, n in zip(layout.end, added, strict=True)])
        column = (first[:, None] + torch.arange(token.shape[1])).clamp_min(0).to(taps.device)
        positions = network.positions(layout).gather(1, column) + self.shift
        feature, embedding, old = network.feature(taps), network.embed(token), self.anchor
        x = network.entry(feature, embedding, old.image, 0)
        self._append(network, x, positions, added, old.visible.shape[-1])
        last = torch.tensor(added, device=taps.device)[:, None] - 1

        def newest(new: Tensor, before: Tensor) -> Tensor:
            """Returns the last new value of each row [B, 1, ...], or the one before where the row has none."""
            grown = (last >= 0).view(-1, *[1] * (new.dim() - 1))
            return torch.where(grown, pick(new, last.clamp_min(0)), before)

        self.anchor = replace(
            self.anchor, x=newest(x, old.x), feature=newest(feature, old.feature),
            embedding=newest(embedding, old.embedding), positions=newest(positions, old.positions),
        )  # fmt: skip

    def _append(self, network: DraftNetwork, x: Tensor, positions: Tensor, added: list[int], room: int) -> None:
        """Writes the keys of new entries x [B, W, ...], `added[row]` of them real, to buffers of `room` entries."""
        begin, B, W = torch.tensor(self.length, device=x.device), len(x), x.shape[1]
        used = max(old + n for old, n in zip(self.length, added, strict=True))

        def store(layer: int, new: KeyValues) -> KeyValues:
            if layer == len(self.anchor.context):
                shape = (B, room, *new.keys.shape[2:])
                self.anchor.context.append(KeyValues(new.keys.new_zeros(shape), new.values.new_zeros(shape)))
            buffer = self.anchor.context[layer]
            buffer.write(new, self.length, added)
            return KeyValues(buffer.keys[:, :used], buffer.values[:, :used])

        visible = None
        if network.deep:
            entry, new = torch.arange(used, device=x.device), torch.arange(W, device=x.device)
            visible = entry <= (begin[:, None] + new)[..., None]  # [B, W, used]
        network.context(x, positions, visible, store)
        self.length = [old + n for old, n in zip(self.length, added, strict=True)]
        present = torch.arange(room) < torch.tensor(self.length)[:, None]
        self.anchor = replace(self.anchor, visible=present.to(x.device)[:, None])

    def anchors(self, rows: list[int] | None = None) -> Anchors:
        """Returns the anchors of some rows, by default of all, with the used part of their context."""
        if rows is None or rows == list(range(len(self.length))):
            return self.anchor.of(slice(None), max(self.length))
        return self.anchor.of(rows, max(self.length[row] for row in rows))

    def select(self, rows: list[int]) -> None:
        """Drops all other rows."""
        self.length, self.shift = [self.length[row] for row in rows], self.shift[rows]
        self.anchor = self.anchor.of(rows, self.anchor.visible.shape[-1])

    def join(self, other: Memory) -> None:
        """Appends the rows of `other`."""
        self.length, self.shift = self.length + other.length, torch.cat([self.shift, other.shift])
        self.anchor = self.anchor.joined(other.anchor)


class DecodedStates:
    """The target's states of the decoded tokens; they become a `Memory` when the first draft needs it."""

    def __init__(
        self, taps: Tensor, auxiliary: Tensor | None = None, part: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """taps: [B, L, T*H] of the prompt. auxiliary: see `Memory.begin`.

        part: selects the taps that the network reads; by default all.
        """
        self._prompt, self._auxiliary, self._part = taps, auxiliary, part or (lambda taps: taps)
        self._newest = list(taps[:, -1])
        self._taps: list[list[Tensor]] = [[] for _ in taps]
        self._tokens: list[list[int]] = [[] for _ in taps]
        self._memory: Memory | None = None

    def observe(self, scores: Scores, accepted: Accepted) -> None:
        """Stores the state before every emitted token: that of the node above it."""
        assert scores.taps is not None
        for row, (nodes, tokens) in enumerate(zip(accepted.nodes, accepted.tokens, strict=True)):
            if tokens:
                self._taps[row].append(scores.taps[row, [0, *nodes[: len(tokens) - 1]]])
                self._newest[row] = self._taps[row][-1][-1]
                self._tokens[row] += tokens

    def newest(self) -> Tensor:
        """Returns the target's state before the newest emitted token of every row: [B, T*H]."""
        return torch.stack(self._newest)

    def read(self, network: DraftNetwork, layout: Layout) -> Memory:
        """Returns the memory of everything decoded so far."""
        if self._memory is None:
            self._memory = Memory.begin(network, layout, self._part(self._prompt), self._auxiliary)
        added = [len(tokens) for tokens in self._tokens]
        if any(added):
            taps = pad_sequence([torch.cat([self._prompt[0, :0], *new]) for new in self._taps], batch_first=True)
            token = pad_sequence([torch.tensor(new, dtype=torch.long) for new in self._tokens], batch_first=True)
            self._memory.append(network, layout, self._part(taps), token.to(taps.device), added)
            self._taps, self._tokens = [[] for _ in added], [[] for _ in added]
        return self._memory

    def select(self, rows: list[int]) -> None:
        """Drops all other rows."""
        self._prompt, self._newest = self._prompt[rows], [self._newest[row] for row in rows]
        self._taps, self._tokens = [self._taps[row] for row in rows], [self._tokens[row] for row in rows]
        if self._auxiliary is not None:
            self._auxiliary = self._auxiliary[rows]
        if self._memory is not None:
            self._memory.select(rows)

    def join(self, other: DecodedStates, network: DraftNetwork, layout: Layout, added: Layout) -> None:
        """Appends the rows of `other`. The network reads both first: their prompts differ in length."""
        self.read(network, layout).join(other.read(network, added))
        self._newest += other._newest
        count = len(self._newest)
        self._prompt, self._auxiliary = self._prompt.new_empty(count, 0, self._prompt.shape[-1]), None
        self._taps, self._tokens = [[] for _ in range(count)], [[] for _ in range(count)]


class TrainedDrafter(Drafter):
    """Drafts with a trained network. Its candidates are deterministic; its tree is EAGLE-2's."""

    joinable = True

    def __init__(self, network: Any, name: str | None = None) -> None:
        self.network: Any = network.eval()  # a `DraftNetwork`
        self.name, self.taps, self.cost = name or network.method, network.config.taps, LevelCost()
        self.modality_ids = torch.tensor([LANGUAGE.id])  # of the subtrees' modalities

    def fit(self, layers: int) -> None:
        """See `Drafter`."""
        self.taps = self.network.fit(layers).config.taps

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """Takes the target's embedding and output layer; UserError if it was trained for another target."""
        self.network.attach(model, self.name).to(model.device)
        if backend != "plain":
            self.network.pack(torch.bfloat16 if faster_in_bf16(model.device, tokens=8) else torch.float32)

    def twin(self, model: PreTrainedModel) -> TrainedDrafter:
        """See `Drafter`; the twin drafts the model's whole vocabulary."""
        return type(self)(self.network.twin(model.config.get_text_config(decoder=True)), self.name)

    def begin(self, state: State, scores: Scores) -> None:
        """Stores the prompt's states; the first draft reads them."""
        if scores.taps is None or scores.taps.shape[-1] != self.network.config.hidden * len(self.taps):
            raise UserError(
                f"method '{self.name}' needs the target's states at layers {self.taps}, which were not kept"
            )
        state.memory = self.decoded(state, scores.taps)

    def decoded(self, state: State, taps: Tensor) -> DecodedStates:
        """Creates the store of the target's states; taps: [B, L, T*H] of the prompt."""
        return DecodedStates(taps, state.auxiliary)

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """See `Drafter`; drafts nothing where time counts and all answers most likely end with the next token."""
        newest, rows = state.layout.newest(), budget.rows
        if budget.nodes < 1 or not rows or (budget.seconds is not None and self.all_end(state, rows)):
            return DraftTree.root_only(newest)
        return self.draft(state, rows, budget, sampler)

    def draft(self, state: State, rows: list[int], budget: Budget, sampler: Sampler) -> DraftTree:
        """Grows the `subtrees` of `rows`."""
        newest = state.layout.newest()
        anchors = state.memory.read(self.network, state.layout).anchors(rows)
        levels, subtrees = self.network.levels(anchors, newest[rows]), self.subtrees(state, rows, budget)
        ids, heat = self.modality_ids.to(newest.device), temperature(sampler)
        tree = grow(levels, self.network, subtrees, ids, newest[rows], budget.select(rows), heat, self.cost)
        return tree.scatter(rows, newest)

    def all_end(self, state: State, rows: list[int]) -> bool:
        """Whether the answers of all `rows` most likely end with the token that the target's next pass emits."""
        return False

    def subtrees(self, state: State, rows: list[int], budget: Budget) -> Subtrees:
        """Returns the subtrees of `rows`: one for each row, `config.width` wide."""
        c, newest = self.network.config, state.layout.newest()[rows]
        width = c.width if budget.width is None else min(budget.width, c.width)
        return Subtrees.single(newest, budget.nodes, Shape(width, c.depth))

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Stores the target's states of the emitted tokens."""
        state.memory.observe(scores, accepted)

    def select(self, state: State, rows: list[int]) -> None:
        """See `Drafter`."""
        state.memory.select(rows)

    def join(self, state: State, other: State) -> None:
        """See `Drafter`; reads the prompts of both."""
        state.memory.join(other.memory, self.network, state.layout, other.layout)
