"""Hybrid targets: some decoder layers hold a recurrent or convolutional state instead of keys and values.

Such a *mixer* (gated delta net, short convolution, mamba2) reads a sequence in order, so no mask can make it read a
tree. A pass over N nodes therefore runs each mixer level by level: the nodes of one depth are the batch of a
single-token step of the library's own code, each begins with its parent's state, and the state after every node is
kept. `commit` selects the state of the last accepted node. Attention and all other layers run once over all nodes.
Nothing is computed twice, and rounding is that of single-token decoding.

A *node's state* is what all mixers hold after it, for one row. A state cannot be cut back to an earlier column.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from msd.backends.comparison import own_forward, redirected
from msd.core.cache import KVCache
from msd.core.layout import Layout
from msd.core.tree import DraftTree
from msd.errors import UserError
from msd.targets import masks
from msd.targets.base import Target
from msd.targets.mrope import MRope
from msd.targets.state import Media, State
from msd.targets.taps import text_decoder

RECURRENT = frozenset(("linear_attention", "conv"))  # layer types with a state
STATELESS = frozenset(("mlp", "moe"))  # layer types with neither a state nor keys: Nemotron-H's
CACHE_ARGUMENTS = frozenset(("cache_params", "past_key_values"))  # a mixer's `forward` has one of them
Level = tuple[Tensor, Tensor | None]  # indices in [R * N] of the nodes of one depth, and of their parents (None: roots)


@dataclass(eq=False)
class _States:
    """The states of one layer: `layer` is the library's cache layer, which holds the committed ones.

    nodes: of each node scored last, [R, N, ...] per state; empty after a commit.
    """

    layer: LinearAttentionCacheLayerMixin
    nodes: list[Tensor] = field(default_factory=list)

    @property
    def committed(self) -> list[Tensor]:
        """The states [R, ...]: convolution windows [R, C, K], then recurrent states, such as [R, heads, Dk, Dv]."""
        held = [*self.layer.conv_states.values(), *self.layer.recurrent_states.values()]
        return [state for state in held if state is not None]

    def replace(self, states: list[Tensor]) -> None:
        """Puts other states in place of the committed ones."""
        remaining = iter(states)
        for held in (self.layer.conv_states, self.layer.recurrent_states):
            held.update({index: next(remaining) for index, state in held.items() if state is not None})

    def run(self, step: Callable[..., Tensor], levels: list[Level], hidden_states: Tensor, **kwargs: Any) -> Tensor:
        """The mixer's output [R, N, H] for nodes [R, N, H]; 0 at padding nodes. Keeps the state after every node.

        step: the mixer's own `forward`, which reads and replaces the states of `layer`.
        """
        R, N, _ = hidden_states.shape
        flat, committed = hidden_states.flatten(0, 1), self.committed
        output = torch.zeros_like(flat)
        kept = [state.new_empty(R * N, *state.shape[1:]) for state in committed]
        try:
            for nodes, parents in levels:
                # copies, because single-token kernels write into the states
                self.replace([x.clone() for x in committed] if parents is None else [x[parents] for x in kept])
                output[nodes] = step(flat[nodes, None], **kwargs)[:, 0]
                for state, after in zip(kept, self.committed, strict=True):
                    state[nodes] = after
        finally:
            self.replace(committed)
        self.nodes = [state.unflatten(0, (R, N)) for state in kept]
        return output.view_as(hidden_states)

    def commit(self, last: list[int | None]) -> None:
        """Replaces each row's state by that of its node `last`; None keeps the state."""
        node = torch.tensor([n or 0 for n in last], device=self.nodes[0].device)
        moved = torch.tensor([n is not None for n in last], device=node.device)
        row = torch.arange(len(last), device=node.device)
        states = [nodes[row, node] for nodes in self.nodes]
        if None in last:
            states = [
                torch.where(moved.view(-1, *[1] * (new.dim() - 1)), new, old)
                for new, old in zip(states, self.committed, strict=True)
            ]
        self.replace(states)
        self.nodes = []


class RecurrentCache(KVCache):
    """Keys and values of the attention layers, and the states of all other layers, which the library allocates.

    states: by layer index.
    """

    def __init__(self, text_config: Any, batch: int, capacity: int) -> None:
        kinds = DynamicCache(config=text_config).layers
        super().__init__(sum(isinstance(kind, CacheLayerMixin) for kind in kinds), batch, capacity)
        attention = iter(self._attention())
        self.layers: list[Any] = [next(attention) if isinstance(kind, CacheLayerMixin) else kind for kind in kinds]
        recurrent = [i for i, kind in enumerate(kinds) if isinstance(kind, LinearAttentionCacheLayerMixin)]
        self.states = {i: _States(self.layers[i]) for i in recurrent}

    @property
    def node_bytes(self) -> int:
        """Bytes of a node's state; 0 before prefill."""
        return sum(x[0].numel() * x.element_size() for states in self.states.values() for x in states.committed)

    def keep(self, rows: list[int]) -> None:
        """See `KVCache`."""
        before = list(self.rows)
        super().keep(rows)
        if self.rows != before:
            held = [before.index(row) for row in self.rows]
            for states in self.states.values():
                states.replace([state[held] for state in states.committed])

    def join(self, other: KVCache) -> None:
        """See `KVCache`."""
        assert isinstance(other, RecurrentCache)
        super().join(other)
        for index, states in self.states.items():
            pairs = zip(states.committed, other.states[index].committed, strict=True)
            states.replace([torch.cat(pair) for pair in pairs])

    def copy_prefix(self, other: KVCache, count: int) -> None:
        """See `KVCache`; `count` must be all of the slots that `other` has committed."""
        assert isinstance(other, RecurrentCache) and count == other.committed[0]
        super().copy_prefix(other, count)
        for index, states in self.states.items():
            states.layer = self.layers[index] = copy.deepcopy(other.states[index].layer)

    def commit(self, paths: list[list[int]]) -> None:
        """See `KVCache`."""
        last = [paths[row][-1] if paths[row] else None for row in self.rows]
        for states in self.states.values():
            states.commit(last)
        super().commit(paths)


class Recurrent(Target):
    """LFM2-VL, MiniCPM-V 4.6: hybrids with one position per token.

    A later turn reuses the state of an earlier one only if its prompt begins with all columns of that state.
    """

    resumes = False

    def attention_windows(self) -> masks.Windows:
        """The windows of the attention layers. UserError for a layer of an unknown kind."""
        kinds = set(self.text_config.layer_types)
        unknown = sorted(kinds - RECURRENT - STATELESS - {masks.FULL, masks.SLIDING})
        if unknown:
            raise UserError(
                f"the text model '{self.text_config.model_type}' has layers of kind '{unknown[0]}', whose state no "
                f"adapter keeps yet; supported: {', '.join(sorted(RECURRENT))}"
            )
        windows = {masks.FULL: None, masks.SLIDING: getattr(self.text_config, "sliding_window", None)}
        return {kind: window for kind, window in windows.items() if kind in kinds}

    def layer_masks(self, mask: masks.Mask, columns: Tensor | None) -> masks.Mask:
        """Adds the mask of the mixers: [B, S], 0 at columns whose input is zero to them; None for trees."""
        assert not isinstance(mask, Tensor)
        own = None if columns is None else columns.long()
        return {**mask, **{kind: own for kind in self.text_config.layer_types if kind in RECURRENT}}

    def new_cache(self, batch: int, capacity: int) -> RecurrentCache:
        """See `Target`."""
        return RecurrentCache(self.text_config, batch, capacity)

    def reusable(self, layout: Layout, media: Media, past: State) -> tuple[int, dict[str, int]]:
        """All columns of the earlier state, or none."""
        reused, counts = super().reusable(layout, media, past)
        return (reused, counts) if reused == past.cache.committed[0] else (0, {})

    @contextmanager
    def scoring(self, state: State, tree: DraftTree) -> Iterator[None]:
        """Runs the mixers level by level."""
        assert isinstance(state.cache, RecurrentCache)
        levels, layers = _levels(tree), text_decoder(self.model).layers
        with redirected(
            {
                reader: partial(states.run, own_forward(reader), levels)
                for index, states in state.cache.states.items()
                for reader in [mixer(layers[index])]
            }
        ):
            yield


class RecurrentMRope(Recurrent, MRope):
    """Qwen3.5: a hybrid with M-RoPE."""


def _levels(tree: DraftTree) -> list[Level]:
    """The nodes of each depth, from the roots down. One host read."""
    N, device = tree.size, tree.tokens.device
    depths, parents = torch.stack([tree.depths.masked_fill(~tree.valid, -1), tree.parents]).tolist()
    found: list[tuple[list[int], list[int]]] = [([], []) for _ in range(tree.height + 1)]
    for row, (depth, above) in enumerate(zip(depths, parents, strict=True)):
        for node, (d, parent) in enumerate(zip(depth, above, strict=True)):
            if d >= 0:
                found[d][0].append(row * N + node)
                found[d][1].append(row * N + parent)
    tensors = [[torch.tensor(x, device=device) for x in level] for level in found if level[0]]
    return [(nodes, above if depth else None) for depth, (nodes, above) in enumerate(tensors)]


def mixer(layer: nn.Module) -> nn.Module:
    """The part of a decoder layer that reads the cache. UserError unless there is exactly one."""
    found = [part for part in layer.children() if _reads_cache(type(part))]  # type: ignore[arg-type]
    if len(found) != 1:
        raise UserError(f"a {type(layer).__name__} has {len(found)} parts that read a cache, and its mixer must be one")
    return found[0]


@cache
def _reads_cache(kind: Any) -> bool:
    """Whether the `forward` of a class of modules has a cache among its arguments."""
    return bool(inspect.signature(kind.forward).parameters.keys() & CACHE_ARGUMENTS)
