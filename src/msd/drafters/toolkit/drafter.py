"""A trained network at work: its memory of a batch in flight, and the tree it drafts within the plan's budget."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from msd.core.layout import Layout
from msd.core.tree import Accepted, Scores
from msd.drafters.toolkit.context import Anchors, pick
from msd.drafters.toolkit.layers import Keys

if TYPE_CHECKING:
    from msd.drafters.toolkit.network import DraftNetwork
from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

from msd.backends.packed import faster_in_bf16
from msd.core.modality import LANGUAGE
from msd.core.sampling import Sampler, temperature
from msd.core.tree import DraftTree
from msd.drafters.toolkit.growth import Distributions, LevelCost, Levels, Shape, Subtrees, grow
from msd.errors import UserError
from msd.planning.plan import Budget
from msd.targets.state import State


@dataclass
class Memory:
    """B rows. keys: a buffer [B, C, K, D] per layer. length: used entries per row. shift: see `Selection`.

    anchor: one per row (A = 1), the newest entry.
    """

    keys: list[Keys]
    length: list[int]
    shift: Tensor
    anchor: Anchors

    @classmethod
    def begin(cls, network: DraftNetwork, layout: Layout, taps: Tensor, auxiliary: Tensor | None = None) -> Memory:
        """From the prompt's tap states [B, L, T*H]; the layout holds the first emitted token already.

        auxiliary: [B, E, H] tokens that only the drafter sees; see `DraftNetwork.read`.
        """
        L = taps.shape[1]
        found = network.read(layout, taps, L, auxiliary)
        last = torch.full((len(taps), 1), L - 1, device=taps.device)
        room = found.x.shape[1] + layout.capacity - L
        made = cls([], [0] * len(taps), found.shift, found.anchors(last))
        made._append(network, found.x, found.positions, found.present.sum(1).tolist(), room)
        return made

    def take(self, network: DraftNetwork, layout: Layout, taps: Tensor, token: Tensor, added: list[int]) -> None:
        """Appends an entry for each of the newest `added[row]` tokens of every row, W at most.

        taps: [B, W, T*H], the target's states before each of them; token: [B, W]; any values beyond a row's number.
        """
        first = torch.tensor([e - 1 - n for e, n in zip(layout.end, added, strict=True)])
        column = (first[:, None] + torch.arange(token.shape[1])).clamp_min(0).to(taps.device)
        positions = layout.positions_1d().gather(1, column) + self.shift
        feature, word, old = network.feature(taps), network.embed(token), self.anchor
        x = network.entry(feature, word, old.image, 0)
        self._append(network, x, positions, added, self.keys[0].keys.shape[1])
        latest = _newest(added, taps.device)
        self.anchor = replace(
            self.anchor, x=latest(x, old.x), feature=latest(feature, old.feature),
            embedding=latest(word, old.embedding), positions=latest(positions, old.positions),
        )  # fmt: skip

    def _append(self, network: DraftNetwork, x: Tensor, positions: Tensor, added: list[int], room: int) -> None:
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

        seen = None
        if network.deep:
            entry, new = torch.arange(used, device=x.device), torch.arange(W, device=x.device)
            seen = entry <= (begin[:, None] + new)[..., None]  # [B, W, used]
        network.context(x, positions, seen, store)
        self.length = [old + n for old, n in zip(self.length, added, strict=True)]
        visible = torch.arange(room) < torch.tensor(self.length)[:, None]
        self.anchor = replace(self.anchor, visible=visible.to(x.device)[:, None])

    def upto(self, rows: list[int] | None) -> tuple[list[Keys], Anchors]:
        """(keys in use per layer [R, S, ...], the anchors behind them) of some rows, or of all."""
        taken: list[int] | slice
        if rows is None or rows == list(range(len(self.length))):
            used, taken = max(self.length), slice(None)
        else:
            used, taken = max(self.length[row] for row in rows), rows
        return [Keys(k.keys[taken, :used], k.values[taken, :used]) for k in self.keys], self.anchor.of(taken, used)


def _newest(added: list[int], device: torch.device) -> Callable[[Tensor, Tensor], Tensor]:
    """A function of new values [B, W, ...], the first `added[row]` of them real, and old ones [B, 1, ...].

    It gives the last of each row's new values [B, 1, ...], and the old one where there are none.
    """
    last = torch.tensor(added, device=device)[:, None] - 1

    def latest(new: Tensor, before: Tensor) -> Tensor:
        grown = (last >= 0).view(-1, *[1] * (new.dim() - 1))
        return torch.where(grown, pick(new, last.clamp_min(0)), before)

    return latest


class DecodedStates:
    """The target's states of what was decoded, which become a `Memory` when it is asked for."""

    def __init__(
        self, taps: Tensor, auxiliary: Tensor | None = None, part: Callable[[Tensor], Tensor] | None = None
    ) -> None:
        """taps: [B, L, T*H] of the prompt. auxiliary: see `Memory.begin`.

        part: gives the taps that the network reads; by default all.
        """
        self._prompt, self._auxiliary, self._part = taps, auxiliary, part or (lambda taps: taps)
        self._newest = list(taps[:, -1])
        self._taps: list[list[Tensor]] = [[] for _ in taps]
        self._tokens: list[list[int]] = [[] for _ in taps]
        self._memory: Memory | None = None

    def observe(self, scores: Scores, accepted: Accepted) -> None:
        """Keeps the states before every emitted token: those of the node it followed."""
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

    def read(self, network: DraftNetwork, layout: Layout) -> Memory:
        """The memory of all that was decoded so far."""
        if self._memory is None:
            self._memory = Memory.begin(network, layout, self._part(self._prompt), self._auxiliary)
        added = [len(tokens) for tokens in self._tokens]
        if widest := max(added):
            taps = self._prompt.new_zeros(len(added), widest, self._prompt.shape[-1])
            token = torch.zeros(len(added), widest, dtype=torch.long)
            for row, n in enumerate(added):
                if n:
                    taps[row, :n] = torch.cat(self._taps[row])
                    token[row, :n] = torch.tensor(self._tokens[row])
            self._memory.take(network, layout, self._part(taps), token.to(taps.device), added)
            self._taps, self._tokens = [[] for _ in added], [[] for _ in added]
        return self._memory


class TrainedDrafter:
    """Drafts with a trained network; its candidates are deterministic, the tree EAGLE-2's."""

    sampled = False

    def __init__(self, network: Any, name: str | None = None) -> None:
        self.network: Any = network.eval()  # a `DraftNetwork`
        self.name, self.taps, self.cost = name or network.method, network.config.taps, LevelCost()
        self.modality_ids = torch.tensor([LANGUAGE.id])  # of the subtrees' modalities

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """Takes the target's embedding and head; UserError when the target is not the one it was trained for."""
        self.network.attach(model, self.name).to(model.device)
        if backend != "plain":
            self.network.pack(torch.bfloat16 if faster_in_bf16(model.device, tokens=8) else torch.float32)

    def twin(self, model: PreTrainedModel) -> TrainedDrafter:
        """The same method with random weights, for a model of any size: its whole vocabulary is drafted."""
        return type(self)(self.network.twin(model.config.get_text_config(decoder=True)), self.name)

    def begin(self, state: State, scores: Scores) -> None:
        """Keeps the prompt's states; they are read when the first draft is asked for."""
        if scores.taps is None or scores.taps.shape[-1] != self.network.config.hidden * len(self.taps):
            raise UserError(
                f"method '{self.name}' needs the target's states at layers {self.taps}, which were not kept"
            )
        state.memory = self.decoded(state, scores.taps)

    def decoded(self, state: State, taps: Tensor) -> DecodedStates:
        """What keeps the target's states, from the prompt's `taps` [B, L, T*H] on."""
        return DecodedStates(taps)

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """See `Drafter`; nothing where answers most likely end and time counts."""
        newest, rows = state.layout.newest(), budget.rows
        if budget.nodes < 1 or not rows or (budget.seconds is not None and self.all_end(state, rows)):
            return DraftTree.root_only(newest)
        return self.draft(state, rows, budget, sampler)

    def draft(self, state: State, rows: list[int], budget: Budget, sampler: Sampler) -> DraftTree:
        """The likeliest nodes of the `subtrees`, in `rows`."""
        newest = state.layout.newest()
        context, anchors = state.memory.read(self.network, state.layout).upto(rows)
        levels, subtrees = self.levels(context, anchors, newest[rows]), self.subtrees(state, rows, budget)
        kinds, warmth = self.modality_ids.to(newest.device), temperature(sampler)
        tree = grow(levels, self.network, subtrees, kinds, newest[rows], budget.select(rows), warmth, self.cost)
        return tree.scatter(rows, newest)

    def all_end(self, state: State, rows: list[int]) -> bool:
        """Whether the answers of all `rows` most likely end with the token that the target's pass gives anyway."""
        return False

    def levels(self, context: Sequence[Keys], anchors: Anchors, newest: Tensor) -> Levels:
        """The draft distributions below the tokens `newest` [R]."""
        return SharedLevels(self.network.levels(context, anchors, newest))

    def subtrees(self, state: State, rows: list[int], budget: Budget) -> Subtrees:
        """Those of the budget's `rows`: one for each, `config.width` wide."""
        c, newest = self.network.config, state.layout.newest()[rows]
        width = c.width if budget.width is None else min(budget.width, c.width)
        return Subtrees.single(newest, budget.nodes, Shape(width, c.depth))

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """No router."""
        return None

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Keeps the target's states of what was emitted."""
        state.memory.observe(scores, accepted)


class SharedLevels:
    """One network's distributions for all subtrees, which keep their modality all the way down (see `Levels`)."""

    def __init__(self, levels: Levels) -> None:
        self.inner, self.weights, self.at_root = levels, torch.empty(0), True

    def root(self, weights: Tensor) -> Distributions:
        """See `Levels`; the network has one distribution for all F of them."""
        self.weights, F = weights, weights.shape[1]
        found = self.inner.root(weights[:, :1, :1])
        return Distributions(found.logits.expand(-1, F, -1), found.sure.expand(-1, F), weights)

    def below(self, tokens: Tensor, above: Tensor) -> Distributions:
        """See `Levels`."""
        self.weights = pick(self.weights, above)
        found = self.inner.below(tokens, torch.zeros_like(above) if self.at_root else above)
        self.at_root = False
        return Distributions(found.logits, found.sure, self.weights)
