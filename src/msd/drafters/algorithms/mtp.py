"""`mtp`: the multi-token-prediction layers of the target's own checkpoint draft (DeepSeek-V3, arXiv 2412.19437, 2.2).

Layer k reads the embedding of a token and layer k-1's state of the token before it; for k = 0 that state is the
target's, after its final norm. Its output predicts the next token. The library loads the layers (`MtpModel`) and drafts
chains with them, for one prompt at a time. Here they draft trees, for batches. A single layer drafts any number of
levels from its own states. Of n layers, layer k drafts level k, so trees have n levels.

The slot of a token in the layers' cache is its column. Column c has no entry in layer k if c < start + 1 + k, since the
tokens that its state would come from do not exist. Its rotary position is that of the target's state that it reads,
1 + k columns before it. Text alone does not depend on the choice; beside images, under M-RoPE, it does, and this one is
that of vLLM. At images the layers read the placeholder's embedding.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel
from transformers.modeling_layers import MtpModel

from msd.core.cache import KVCache
from msd.core.layout import Layout
from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, Scores
from msd.drafters import registry
from msd.drafters.base import Drafter
from msd.drafters.toolkit.chained import ChainedLevels, draft, drafts
from msd.drafters.toolkit.chance import NodeFeatures, Weights, log_chance
from msd.drafters.toolkit.context import pick
from msd.drafters.toolkit.growth import Shape
from msd.drafters.toolkit.level_cost import LevelCost
from msd.drafters.toolkit.mtp_network import (
    DEPTH,
    METHOD,
    MtpNetwork,
    load,
    present,
    run_layer,
    shifted,
    token_ids,
)
from msd.drafters.toolkit.observed import ObservedDrafter
from msd.errors import UserError
from msd.planning.plan import Budget
from msd.targets import masks
from msd.targets.registry import fingerprint
from msd.targets.state import State
from msd.targets.taps import FINAL
from msd.train.losses.published import training_time_test_loss

WIDTH = 3  # of trees


class Memory:
    """The layers' cache of B rows, and the target's states before the tokens that they have not read.

    carry: for each layer, its output [B, 1, H] at the last column that was read.
    """

    def __init__(self, network: MtpModel, layout: Layout, taps: Tensor, room: int) -> None:
        """Reads the prompt's L columns. taps: [B, L, H], the target's states. room: slots for the drafts of a step."""
        (B, L, _), self.network, self.layout = taps.shape, network, layout
        self.cache = KVCache(len(network.layers), B, layout.capacity + room)
        self.windows = masks.attention_windows(network.config)
        self.carry: list[Tensor] = []
        self.seen = [L] * B
        self.unread = [[row[-1:]] for row in taps]
        state = taps
        for k in range(len(network.layers)):
            tables = masks.row_tables([first + 1 + k for first in layout.start], L, taps.device)
            positions = layout.positions[:, :, (torch.arange(L) - 1 - k).clamp_min(0)]
            state = self._layer(k, layout.tokens[:, :L], shifted(state), positions, tables)
            self.carry.append(state[:, -1:].clone())
        self.cache.advance(L)

    def propose(self, alive: list[int], depth: int, drafter: MtpDrafter, budget: Budget, sampler: Sampler) -> DraftTree:
        """Reads the emitted tokens of the rows `alive`, and grows trees of at most `depth` levels within the budget."""
        self.cache.keep(alive)
        newest, rows = self.layout.newest(), list(self.cache.rows)
        unread = [self.layout.tokens[row, self.seen[row] : self.layout.end[row]].tolist() for row in rows]
        levels = ChainedLevels(self._score, unread, newest.device)
        shape = Shape(WIDTH, depth)
        outlook = partial(sampler.outlook, rows)
        tree = draft(levels, drafter, newest[rows], shape, budget.select(rows), outlook, drafter.cost)
        paths: list[list[int]] = [[] for _ in self.seen]
        for row, tokens in zip(rows, unread, strict=True):
            paths[row], self.unread[row] = list(range(len(tokens))), []
            self.seen[row] += len(tokens)
        self.cache.commit(paths)
        return tree.scatter(rows, newest)

    def select(self, rows: list[int]) -> None:
        """Drops all other rows, before the layout does."""
        self.cache.select(rows)
        self.carry = [states[rows] for states in self.carry]
        self.seen, self.unread = [self.seen[row] for row in rows], [self.unread[row] for row in rows]

    def join(self, other: Memory) -> None:
        """Appends the rows of `other`, before the layout does."""
        self.cache.join(other.cache)
        self.carry = [torch.cat(pair) for pair in zip(self.carry, other.carry, strict=True)]
        self.seen, self.unread = self.seen + other.seen, self.unread + other.unread

    def _score(self, tree: DraftTree, scored: int) -> Tensor:
        """See `chained.Score`."""
        self.cache.reserve(len(self.cache.rows), max(self.cache.base) + tree.size)  # rows differ in what they have read
        if not scored:
            self._read(tree)
            return self._logits(self.states[0])
        self.level += 1
        single = len(self.network.layers) == 1
        k, first = (0, scored) if single else (self.level, self.chain)  # layer k has read no draft before
        above = pick(self.states[0 if single else k - 1], tree.parents[:, first:])
        new = self._nodes(k, tree, first, above)
        self.states[k] = torch.cat([self.states[k], new], 1)
        return self._logits(new[:, scored - first :])

    def _read(self, chain: DraftTree) -> None:
        """Reads a chain of unread tokens; `states` are then each layer's outputs [R, N, H] at the nodes of the tree."""
        rows = self.cache.rows
        above = pad_sequence([torch.cat(self.unread[row]) for row in rows], batch_first=True)
        self.states, self.level, self.chain = list[Tensor](), 0, chain.size
        last = chain.valid.sum(1, keepdim=True) - 1
        for k in range(len(self.network.layers)):
            self.states.append(self._nodes(k, chain, 0, above))
            above = torch.cat([self.carry[k][rows], self.states[k][:, :-1]], 1)
            self.carry[k][rows] = pick(self.states[k], last)

    def _nodes(self, k: int, tree: DraftTree, first: int, above: Tensor) -> Tensor:
        """Computes layer k's outputs [R, N - first, H] at the nodes from `first` on. above: the states they read."""
        rows = self.cache.rows
        root = self.layout.positions[:, rows, [self.seen[row] - 1 - k for row in rows]]  # [A, R]
        positions = root[:, :, None] + tree.depths[:, first:]
        start = [self.layout.start[row] + 1 + k for row in rows]
        tables = masks.without_first(masks.tree_tables(tree, start, self.cache.base), first)
        with self.cache.behind(first):
            return self._layer(k, tree.tokens[:, first:], above, positions, tables)

    def _layer(self, k: int, tokens: Tensor, above: Tensor, positions: Tensor, tables: masks.Tables) -> Tensor:
        return run_layer(self.network, k, tokens, above, positions, tables, self.windows, self.cache)

    def _logits(self, states: Tensor) -> Tensor:
        logits: Tensor = self.network._project_to_logits(states)
        return logits


class MtpDrafter(ObservedDrafter):
    """Drafts with the target's own layers; its candidates are deterministic.

    network: the layers, also trained further; by default those of the target's checkpoint.
    """

    name, taps, joinable = METHOD, (FINAL,), True

    def __init__(self, network: MtpModel | MtpNetwork | None = None) -> None:
        self._trained = network if isinstance(network, MtpNetwork) else None
        self._network, self.cost = None if isinstance(network, MtpNetwork) else network, LevelCost()

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """Loads the layers from the target's checkpoint; UserError if it has none."""
        if self._trained is not None:
            self._network = self._trained.attach(model).whole
        elif self._network is None:
            self._network = load(model)
        else:
            self._network.tie_with_main_model(model)
        self._network.eval()
        self._ids = token_ids(self._network)

    def remember(self, model: PreTrainedModel) -> None:
        """See `Drafter`; trained layers have calibrated chances already."""
        if self._calibration is None:
            super().remember(model)

    def log_acceptance(self, node: NodeFeatures) -> Tensor:
        """See `ObservedDrafter`."""
        fitted = self._calibration
        return super().log_acceptance(node) if fitted is None else log_chance(fitted, node)

    @property
    def _calibration(self) -> Weights | None:
        return None if self._trained is None else self._trained.calibration

    def twin(self, model: PreTrainedModel) -> Drafter:
        """See `Drafter`; UserError, because another model has no such layers, and the method does not sample."""
        raise UserError(f"method '{self.name}' has no twin: its layers belong to one target")

    def fingerprint(self) -> str:
        """See `ObservedDrafter`."""
        return fingerprint(self.network)

    @property
    def network(self) -> MtpModel:
        """The layers."""
        assert self._network is not None, "call attach first"
        return self._network

    @property
    def ids(self) -> Tensor:
        """[V] int64: all tokens of the target."""
        return self._ids

    @property
    def depth(self) -> int:
        """See `MtpConfig.depth`."""
        n = len(self.network.layers)
        return DEPTH if n == 1 else n

    def begin(self, state: State, scores: Scores) -> None:
        """Stores the prompt's states; the first draft reads them. See `observe`."""
        self.cost.begin()
        assert scores.taps is not None
        state.memory = scores.taps, [list[Tensor]() for _ in scores.taps]

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """Drafts the most probable nodes of one tree, level by level."""
        if not drafts(budget):
            return DraftTree.root_only(state.layout.newest())
        return self._memory(state).propose(state.cache.rows, self.depth, self, budget, sampler)

    def _memory(self, state: State) -> Memory:
        """The memory of the state; the first time, it reads the prompt."""
        if not isinstance(state.memory, Memory):
            taps, later = state.memory
            room = (1 + WIDTH) * (1 + self.depth)
            state.memory = Memory(self.network, state.layout, taps, room)
            for states, new in zip(state.memory.unread, later, strict=True):
                states += new
        return state.memory

    def select(self, state: State, rows: list[int]) -> None:
        """See `Drafter`."""
        if isinstance(state.memory, Memory):
            state.memory.select(rows)
        else:
            taps, later = state.memory
            state.memory = taps[rows], [later[row] for row in rows]

    def join(self, state: State, other: State) -> None:
        """See `Drafter`; reads the prompts of both, which differ in length."""
        self._memory(state).join(self._memory(other))

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Stores the target's state before every emitted token: that of the node above it."""
        super().observe(state, tree, scores, accepted)
        assert scores.taps is not None
        unread = state.memory.unread if isinstance(state.memory, Memory) else state.memory[1]
        for row, (nodes, tokens) in enumerate(zip(accepted.nodes, accepted.tokens, strict=True)):
            if tokens:
                unread[row].append(scores.taps[row, [0, *nodes[: len(tokens) - 1]]])


MtpNetwork.published_loss = training_time_test_loss
registry.add(registry.Method(METHOD, MtpDrafter, native=present, native_network=MtpNetwork, load=MtpNetwork.in_folder))
