"""A trained network in decoding: its memory of a batch, and the tree that it drafts within the plan's budget."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from msd.backends.packed import draft_dtype
from msd.core.layout import Layout
from msd.core.modality import LANGUAGE
from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, Scores
from msd.drafters.toolkit.context import Anchors, pick
from msd.drafters.toolkit.growth import Shape, Subtrees, grow
from msd.drafters.toolkit.layers import KeyValues
from msd.drafters.toolkit.level_cost import LevelCost
from msd.drafters.toolkit.observed import ObservedDrafter
from msd.errors import UserError
from msd.planning.plan import Budget
from msd.targets.registry import weights_hash
from msd.targets.state import State

if TYPE_CHECKING:
    from msd.drafters.toolkit.network import DraftNetwork

SPARE = 64  # entries of a buffer for the draft tokens of one step; with more the buffer is copied


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
        room = entries.x.shape[1] + layout.capacity - L + SPARE
        memory = cls([0] * len(taps), s.shift, entries.anchors(last, []))
        memory._append(network, entries.x, s.places, s.present.sum(1).tolist(), room)
        return memory

    def append(self, network: DraftNetwork, taps: Tensor, token: Tensor, added: list[int]) -> None:
        """Appends an entry for each of the newest `added[row]` tokens of every row; at most W.

        taps: [B, W, T*H], the target's states before each token. token: [B, W]. Values beyond `added[row]` are ignored.
        """
        old = self.anchor
        positions = old.positions + torch.arange(1, 1 + token.shape[1], device=taps.device)  # text follows text
        feature, embedding = network.feature(taps), network.embed(token)
        x = network.entry(feature, embedding, old.image, 0)
        self._append(network, x, positions, added)

        def newest(new: Tensor, before: Tensor) -> Tensor:
            """Returns the last new value of each row [B, 1, ...], or the one before where the row has none."""
            if added[0] and len(set(added)) == 1:
                return new[:, added[0] - 1 : added[0]]
            return torch.stack([new[row, n - 1 : n] if n else before[row] for row, n in enumerate(added)])

        self.anchor = replace(
            old, x=newest(x, old.x), feature=newest(feature, old.feature),
            embedding=newest(embedding, old.embedding), positions=newest(positions, old.positions),
        )  # fmt: skip

    def _append(
        self, network: DraftNetwork, x: Tensor, positions: Tensor, added: list[int], room: int | None = None
    ) -> None:
        """Writes the keys of new entries x [B, W, ...], `added[row]` of them real; first creates buffers of `room`."""
        used = max(old + n for old, n in zip(self.length, added, strict=True))

        def store(layer: int, new: KeyValues) -> KeyValues:
            if room is not None:
                shape = (len(x), room, *new.keys.shape[2:])
                self.anchor.context.append(KeyValues(new.keys.new_zeros(shape), new.values.new_zeros(shape)))
            buffer = self.anchor.context[layer]
            buffer.write(new, self.length, added)
            return buffer.first(used)

        visible = None
        if network.deep:
            begin = torch.tensor(self.length, device=x.device)[:, None]
            entry, new = torch.arange(used, device=x.device), torch.arange(x.shape[1], device=x.device)
            visible = entry <= (begin + new)[..., None]  # [B, W, used]
        network.context(x, positions, visible, store)
        self.length = [old + n for old, n in zip(self.length, added, strict=True)]

    def anchors(self, rows: list[int] | None = None) -> Anchors:
        """Returns the anchors of some rows, by default of all, with the used part of their context."""
        everything = list(range(len(self.length)))
        rows = everything if rows is None else rows
        length = [self.length[row] for row in rows]
        used, visible = max(length), None
        if min(length) < used:
            end = torch.tensor(length, device=self.anchor.x.device)
            visible = (torch.arange(used, device=end.device) < end[:, None])[:, None]
        if rows != everything:
            return replace(self.anchor.of(rows, used), visible=visible)
        return replace(self.anchor, visible=visible, context=[buffer.first(used) for buffer in self.anchor.context])

    def select(self, rows: list[int]) -> None:
        """Drops all other rows."""
        self.length, self.shift = [self.length[row] for row in rows], self.shift[rows]
        self.anchor = self.anchor.of(rows)

    def join(self, *others: Memory) -> None:
        """Appends the rows of `others`."""
        self.length = [n for memory in (self, *others) for n in memory.length]
        self.shift = torch.cat([memory.shift for memory in (self, *others)])
        self.anchor = self.anchor.joined(*(memory.anchor for memory in others))


@dataclass
class _Row:
    """What a row has decoded and the network has not read.

    prompt: [L, T*H], the target's states; None: read. auxiliary: [E, H], see `Memory.begin`. taps: [n, T*H] of some
    emitted tokens each, the states before them; tokens: [n]. last: [T*H], before the newest token that has been read.
    """

    prompt: Tensor | None
    auxiliary: Tensor | None
    last: Tensor
    taps: list[Tensor] = field(default_factory=list)
    tokens: list[Tensor] = field(default_factory=list)

    @property
    def newest(self) -> Tensor:
        """The target's state before the newest token: [T*H]."""
        return self.taps[-1][-1] if self.taps else self.last

    @property
    def sizes(self) -> tuple[int, int]:
        """L and E of a row that is not read; rows of the same sizes are read together."""
        assert self.prompt is not None
        return len(self.prompt), 0 if self.auxiliary is None else len(self.auxiliary)


def _joined(rows: Sequence[Sequence[Tensor]]) -> Tensor:
    """Concatenates the parts [n, ...] of each row, and pads the rows at their ends: [B, W, ...]; one has parts."""
    if len(rows) == 1:
        return (rows[0][0] if len(rows[0]) == 1 else torch.cat(list(rows[0])))[None]
    empty = next(parts[0] for parts in rows if parts)[:0]
    return pad_sequence([torch.cat([empty, *parts]) for parts in rows], batch_first=True)


class DecodedStates:
    """The target's states of the decoded tokens; they become a `Memory` when the first draft needs it.

    The memory has the first rows, and rows that have left since the last draft; the others have joined since.
    """

    def __init__(
        self, taps: Tensor, auxiliary: Tensor | None = None, part: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """taps: [B, L, T*H] of the prompt. auxiliary: see `Memory.begin`.

        part: selects the taps that the network reads; by default all.
        """
        others = [None] * len(taps) if auxiliary is None else list(auxiliary)
        self._rows = [_Row(prompt, other, prompt[-1]) for prompt, other in zip(taps, others, strict=True)]
        self._part = part or (lambda taps: taps)
        self._memory: Memory | None = None
        self._kept: list[int] = []  # the rows of the memory that have not left; they are the first rows

    @property
    def unread(self) -> bool:
        """Whether no prompt has been read yet."""
        return self._memory is None

    def observe(self, scores: Scores, accepted: Accepted) -> None:
        """Stores the state before every emitted token: that of the node above it."""
        assert scores.taps is not None
        count = [len(tokens) for tokens in accepted.tokens]
        most = max(count)
        if not most:
            return
        nodes = [[0, *above][:n] for above, n in zip(accepted.nodes, count, strict=True)]
        fill = [[0] * (most - n) for n in count]
        table = [[*row, *rest] for part in (nodes, accepted.tokens) for row, rest in zip(part, fill, strict=True)]
        node, tokens = torch.tensor(table, device=scores.taps.device).split(len(count))
        taps = pick(scores.taps, node)
        for row, n, *some in zip(self._rows, count, taps.unbind(), tokens.unbind(), strict=True):
            if n:
                before, emitted = some if n == most else (x[:n] for x in some)
                row.taps.append(before)
                row.tokens.append(emitted)

    def newest(self) -> Tensor:
        """Returns the target's state before the newest emitted token of every row: [B, T*H]."""
        return torch.stack([row.newest for row in self._rows])

    def read(self, network: DraftNetwork, layout: Layout) -> Memory:
        """Returns the memory of everything decoded so far."""
        read = len(self._kept)
        if self._memory is not None:
            if read < len(self._memory.length):
                self._memory.select(self._kept)
            self._append(self._memory, network, list(range(read)))
        memories = [] if self._memory is None else [self._memory]
        unread = range(read, len(self._rows))
        groups = groupby(unread, lambda i: self._rows[i].sizes)
        memories += [self._begin(network, layout, list(group)) for _, group in groups]
        self._memory = memories[0]
        if memories[1:]:
            self._memory.join(*memories[1:])
        self._kept = list(range(len(self._rows)))
        return self._memory

    def _begin(self, network: DraftNetwork, layout: Layout, rows: list[int]) -> Memory:
        """Reads the prompts of `rows`, which have the same sizes, and their emitted tokens."""
        states = [self._rows[row] for row in rows]
        prompts = [row.prompt for row in states if row.prompt is not None]
        auxiliary = [row.auxiliary for row in states if row.auxiliary is not None]
        part = layout.of(rows)
        memory = Memory.begin(
            network, part, self._part(torch.stack(prompts)), torch.stack(auxiliary) if auxiliary else None
        )
        for row in states:
            row.prompt = row.auxiliary = None
        self._append(memory, network, rows)
        return memory

    def _append(self, memory: Memory, network: DraftNetwork, rows: list[int]) -> None:
        """Appends what `rows`, those of the memory, have emitted since the network has read them."""
        states = [self._rows[row] for row in rows]
        count = [sum(map(len, row.tokens)) for row in states]
        if not any(count):
            return
        taps, tokens = _joined([row.taps for row in states]), _joined([row.tokens for row in states])
        memory.append(network, self._part(taps), tokens, count)
        for row in states:
            row.taps, row.tokens, row.last = [], [], row.newest

    def select(self, rows: list[int]) -> None:
        """Drops all rows but `rows`, which are in ascending order."""
        self._kept = [self._kept[row] for row in rows if row < len(self._kept)]
        if not self._kept:
            self._memory = None
        self._rows = [self._rows[row] for row in rows]

    def join(self, other: DecodedStates, network: DraftNetwork, layout: Layout, added: Layout) -> None:
        """Appends the rows of `other`; their prompts stay unread until the next draft."""
        if other._memory is not None:
            self.read(network, layout).join(other.read(network, added))
            self._kept = list(range(len(self._rows) + len(other._rows)))
        self._rows += other._rows


class TrainedDrafter(ObservedDrafter):
    """Drafts with a trained network. Its candidates are deterministic; its tree is EAGLE-2's.

    The network has the node chances. Only a head that another project trained, without calibration or a confidence of
    its own, is calibrated by what the target accepts.
    """

    joinable = True

    def __init__(self, network: Any, name: str | None = None) -> None:
        self.network: Any = network.eval()  # a `DraftNetwork`
        self.name, self.taps, self.cost = name or network.method, network.config.taps, LevelCost()
        self.modality_ids: tuple[int, ...] = (LANGUAGE.id,)  # of the subtrees' modalities

    def fit(self, layers: int) -> None:
        """See `Drafter`."""
        self.taps = self.network.fit(layers).config.taps

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """Takes the target's embedding and output layer; UserError if it was trained for another target."""
        self.network.attach(model, self.name).to(model.device)
        if backend != "plain":
            self.network.pack(draft_dtype(model.device))

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
        self.cost.begin()

    def decoded(self, state: State, taps: Tensor) -> DecodedStates:
        """Creates the store of the target's states; taps: [B, L, T*H] of the prompt."""
        return DecodedStates(taps, state.auxiliary)

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """See `Drafter`; does not read a prompt to draft where all answers most likely end with the next token.

        Only before the first draft, which reads the prompt, is that worth another look at the host.
        """
        newest, rows = state.layout.newest(), budget.rows
        if budget.nodes < 1 or not rows:
            return DraftTree.root_only(newest)
        if budget.seconds is not None and state.memory.unread and self.all_end(state, rows):
            return DraftTree.root_only(newest)
        return self.draft(state, rows, budget, sampler)

    def draft(self, state: State, rows: list[int], budget: Budget, sampler: Sampler) -> DraftTree:
        """Grows the `subtrees` of `rows`."""
        newest = state.layout.newest()
        roots = newest if len(rows) == len(newest) else newest[rows]
        anchors = state.memory.read(self.network, state.layout).anchors(rows)
        levels, subtrees = self.network.levels(anchors, roots), self.subtrees(state, rows, budget)
        tree = grow(
            levels, self.network, subtrees, self.modality_ids, roots, budget.select(rows),
            partial(sampler.outlook, rows), self.cost,
        )  # fmt: skip
        return tree.scatter(rows, newest)

    def all_end(self, state: State, rows: list[int]) -> bool:
        """Whether the answers of all `rows` most likely end with the token that the target's next pass emits."""
        ends: bool = self.network.all_end(state.memory.newest()[rows], state.layout.newest()[rows])
        return ends

    def subtrees(self, state: State, rows: list[int], budget: Budget) -> Subtrees:
        """Returns the subtrees of `rows`: one for each row, `config.width` wide, but no wider than half of its nodes.

        A narrow tree of few nodes accepts as much as a wide one, and its levels take less time (docs/trees.md).
        """
        c, newest = self.network.config, state.layout.newest()[rows]
        width = min(c.width, max(1, budget.nodes // 2))
        width = width if budget.width is None else min(budget.width, width)
        return Subtrees.single(newest, Shape(width, c.depth))

    def fingerprint(self) -> str:
        """See `ObservedDrafter`."""
        return weights_hash(self.network)

    def remember(self, model: PreTrainedModel) -> None:
        """See `Drafter`."""
        network = self.network
        if network.config.variant.published and not network.confident and network.calibration is None:
            super().remember(model)
            self._calibrate()

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Stores the target's states of the emitted tokens."""
        state.memory.observe(scores, accepted)
        super().observe(state, tree, scores, accepted)

    def select(self, state: State, rows: list[int]) -> None:
        """See `Drafter`."""
        state.memory.select(rows)

    def join(self, state: State, other: State) -> None:
        """See `Drafter`; the next draft reads the prompts of `other`."""
        state.memory.join(other.memory, self.network, state.layout, other.layout)

    def finish(self) -> None:
        """See `Drafter`."""
        super().finish()
        self._calibrate()

    def _calibrate(self) -> None:
        """Gives the network the chances that were observed."""
        if self.observed is not None:
            self.network.calibration = self.observed.weights or None
