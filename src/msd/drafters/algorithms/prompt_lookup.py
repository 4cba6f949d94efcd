"""`prompt-lookup`: drafts the continuations of earlier occurrences of the last n tokens (Saxena 2023), as a tree.

The last n tokens are searched in the prompt and the output so far, longest match first. The continuations of all
occurrences are merged into one tree, and the most frequent nodes are drafted. `sampled=True` samples the candidates
from the same counts, which tests verification with a draft distribution q.

`NAME+prompt-lookup`: uses lookup where the last 10 tokens occurred before, and the drafter NAME elsewhere. On 4,400
answers of the reference model, a match of the last 2 tokens was followed by 1.3 equal tokens (of at most 6), a match
of 5 by 1.6, of 10 by 3.7, and of 12 or more by 5.3; a trained drafter reaches about 3. A lookup costs almost nothing.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from transformers import PreTrainedModel

from msd.core.modality import LANGUAGE
from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, SampledCandidates, Scores
from msd.drafters import registry
from msd.drafters.base import Drafter, ReadsAuxiliary
from msd.errors import UserError
from msd.planning.plan import Budget
from msd.targets.state import State

BRANCHES = 2  # sampled candidates at the root
LEAST = 10  # tokens that must match for a lookup to replace the trained drafter


@dataclass
class _Index:
    """One row's tokens so far and the end positions of each n-gram; -1 marks a position without text (an image)."""

    tokens: list[int] = field(default_factory=list)
    ends: dict[tuple[int, ...], list[int]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class _Node:
    """A node in the trie of continuations: the weight of its occurrences, and its children by token."""

    weight: float = 0.0
    children: dict[int, _Node] = field(default_factory=dict)


class PromptLookup(Drafter):
    """Looks up the last `max_ngram` to `min_ngram` tokens; a longer match has more weight."""

    joinable = True

    def __init__(self, max_ngram: int = 3, min_ngram: int = 2, sampled: bool = False) -> None:
        self.name = "prompt-lookup:sampled" if sampled else "prompt-lookup"
        self.max_ngram, self.min_ngram, self.sampled = max_ngram, min_ngram, sampled

    def twin(self, model: PreTrainedModel) -> PromptLookup:
        """Returns another one with the same settings."""
        return PromptLookup(self.max_ngram, self.min_ngram, self.sampled)

    def begin(self, state: State, scores: Scores) -> None:
        """Creates an empty index for each row; `propose` fills it."""
        state.memory = [_Index() for _ in range(state.layout.batch)]

    def _read(self, state: State) -> None:
        """Adds the new tokens of each row to its index."""
        for row, index in enumerate(state.memory):
            new = slice(len(index.tokens) + state.layout.start[row], state.layout.end[row])
            text = torch.where(state.layout.modality[row, new] == LANGUAGE.id, state.layout.tokens[row, new], -1)
            for token in text.tolist():
                index.tokens.append(token)
                for n in range(self.min_ngram, self.max_ngram + 1):
                    gram = tuple(index.tokens[-n:])
                    if len(gram) == n and -1 not in gram:
                        index.ends[gram].append(len(index.tokens))

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """Drafts the most frequent continuations, or samples from them."""
        if budget.rows:
            self._read(state)
        roots = [self._continuations(index, depth) for index, depth in zip(state.memory, budget.depth, strict=True)]
        if self.sampled:
            return self._draw(state, roots, budget, sampler)
        picked = [_most_frequent(root, budget.nodes, budget.width) for root in roots]
        return DraftTree.from_lists(state.layout.newest(), [t for t, _ in picked], [p for _, p in picked])

    def select(self, state: State, rows: list[int]) -> None:
        """Keeps the indices of `rows`."""
        state.memory = [state.memory[row] for row in rows]

    def join(self, state: State, other: State) -> None:
        """Appends the other indices."""
        state.memory += other.memory

    def _continuations(self, index: _Index, depth: int) -> _Node:
        """Builds the trie of continuations of the last tokens; an occurrence counts once, at its longest match."""
        root, seen, text = _Node(), set(), index.tokens
        if depth < 1:
            return root
        for n in range(self.max_ngram, self.min_ngram - 1, -1):
            for end in index.ends.get(tuple(text[-n:]), ()):
                if end == len(text) or end in seen:
                    continue
                seen.add(end)
                node = root
                for token in text[end : end + depth]:
                    if token < 0:
                        break
                    node = node.children.setdefault(token, _Node())
                    node.weight += 4.0**n
        return root

    def _draw(self, state: State, roots: list[_Node], budget: Budget, sampler: Sampler) -> DraftTree:
        """Samples trees breadth first: `BRANCHES` candidates at the root, one at each deeper node."""
        branches = min(BRANCHES, budget.width or BRANCHES)
        drafts = [
            _sample_tree(root, budget.nodes, branches, partial(sampler.multinomial, rows=[row]))
            for row, root in enumerate(roots)
        ]
        size = 1 + max(len(d.tokens) for d in drafts)
        count = max(1, max(len(d.distributions) for d in drafts))
        child = torch.full((len(drafts), size, BRANCHES), -1)
        source, q = torch.zeros_like(child), torch.zeros(len(drafts), count, sampler.vocabulary)
        for row, draft in enumerate(drafts):
            for parent, k, node, drawn_from in draft.candidates:
                child[row, parent, k], source[row, parent, k] = node, drawn_from
            for r, (tokens, p) in enumerate(draft.distributions):
                q[row, r, tokens] = p
        device = state.layout.tokens.device
        candidates = SampledCandidates(child.to(device), source.to(device), q.to(device))
        fixed = [[False] * len(d.tokens) for d in drafts]
        newest = state.layout.newest()
        return DraftTree.from_lists(newest, [d.tokens for d in drafts], [d.parents for d in drafts], candidates, fixed)


def _most_frequent(root: _Node, budget: int, width: int | None) -> tuple[list[int], list[int]]:
    """Returns the `budget` nodes of the largest weight as (tokens, parents), at most `width` per level.

    A child has no more weight than its parent, so these nodes form a tree.
    """
    tokens: list[int] = []
    parents: list[int] = []
    depths = [0]
    frontier = [(child.weight, token, child, 0) for token, child in root.children.items()]
    while frontier and len(tokens) < budget:
        best = max(range(len(frontier)), key=lambda i: frontier[i][0])
        _, token, node, parent = frontier.pop(best)
        depth = depths[parent] + 1
        if width is not None and depths.count(depth) >= width:
            continue
        tokens.append(token)
        parents.append(parent)
        depths.append(depth)
        frontier += [(child.weight, t, child, len(tokens)) for t, child in node.children.items()]
    return tokens, parents


@dataclass
class _Draft:
    """One row's sampled tree.

    tokens, parents: of its nodes. candidates: (parent, rank, node, distribution) of each draw. distributions: (tokens,
    probabilities).
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    candidates: list[tuple[int, int, int, int]] = field(default_factory=list)
    distributions: list[tuple[list[int], Tensor]] = field(default_factory=list)


def _sample_tree(root: _Node, budget: int, branches: int, draw: Callable[[Tensor], Tensor]) -> _Draft:
    """Samples a tree. draw: from probabilities q [1, n] to an index [1].

    Whether a node exists depends on its ancestors and on earlier draws, never on its own token. This keeps the output
    distribution exact.
    """
    draft = _Draft()
    queue = [(root, 0, branches)]
    room = budget
    while queue:
        node, at, count = queue.pop(0)
        count = min(count, room)
        if not node.children or count == 0:
            continue
        room -= count  # a repeated draw counts too, or whether a node exists would depend on its sibling's token
        choices = list(node.children)
        q = torch.tensor([node.children[t].weight for t in choices])
        q = q / q.sum()
        draft.distributions.append((choices, q))
        drawn: dict[int, int] = {}
        for k in range(count):
            i = int(draw(q[None]))
            if i not in drawn:
                draft.tokens.append(choices[i])
                draft.parents.append(at)
                drawn[i] = len(draft.tokens)
                queue.append((node.children[choices[i]], drawn[i], 1))
            draft.candidates.append((at, k, drawn[i], len(draft.distributions) - 1))
    return draft


class Repeats(Drafter):
    """Drafts by lookup in rows whose last `least` tokens occurred before, and with `drafter` in all others.

    `State.memory` holds two views of the state, each with the memory of one of the two. UserError for a drafter that
    samples its candidates, as some rows of a tree would be sampled and others not.
    """

    def __init__(self, drafter: Drafter, least: int = LEAST) -> None:
        if drafter.sampled:
            raise UserError(f"drafter '{drafter.name}' samples its candidates, which lookups cannot be mixed with")
        self.drafter, self.lookup, self.least = drafter, PromptLookup(least, least), least
        self.name, self.taps = f"{drafter.name}+{self.lookup.name}", drafter.taps

    def translate(self, tokenizer: Any) -> None:
        """See `Drafter`."""
        self.drafter.translate(tokenizer)

    def fit(self, layers: int) -> None:
        """See `Drafter`."""
        self.drafter.fit(layers)
        self.taps = self.drafter.taps

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """See `Drafter`."""
        self.drafter.attach(model, backend)

    def twin(self, model: PreTrainedModel) -> Repeats:
        """See `Drafter`."""
        return Repeats(self.drafter.twin(model), self.least)

    def share_vision_tower(self, encode: Callable[[list[Image.Image]], Tensor]) -> None:
        """See `Drafter`."""
        self.drafter.share_vision_tower(encode)

    @property
    def auxiliary_source(self) -> str | None:
        """The drafter's source; see `ReadsAuxiliary`."""
        return self.drafter.auxiliary_source if isinstance(self.drafter, ReadsAuxiliary) else None

    def encode(self, item: Any) -> Tensor:
        """See `ReadsAuxiliary`."""
        assert isinstance(self.drafter, ReadsAuxiliary)
        return self.drafter.encode(item)

    def thresholds(self, epsilon: float) -> dict[str, float]:
        """See `Drafter`."""
        return self.drafter.thresholds(epsilon)

    def begin(self, state: State, scores: Scores) -> None:
        """See `Drafter`."""
        views = copy.copy(state), copy.copy(state)
        for part, view in zip((self.drafter, self.lookup), views, strict=True):
            part.begin(view, scores)
        state.memory = views

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """Drafts by lookup where the last tokens match, and with the drafter in the other rows."""
        drafter_state, lookup_state = state.memory
        matched = self.lookup.propose(lookup_state, budget, sampler)
        rows = (matched.valid.sum(1) > 1).nonzero()[:, 0].tolist()
        depth = [0 if row in rows else depth for row, depth in enumerate(budget.depth)]
        if rows and not any(depth):
            return matched
        drafted = self.drafter.propose(drafter_state, replace(budget, depth=depth), sampler)
        if not rows or drafted.size == 1:
            return matched if rows else drafted
        return drafted.replace_rows(rows, matched)

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """See `Drafter`."""
        return self.drafter.route(state.memory[0], tree, scores)

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """See `Drafter`."""
        self.drafter.observe(state.memory[0], tree, scores, accepted)

    @property
    def joinable(self) -> bool:
        """See `Drafter`."""
        return self.drafter.joinable

    def select(self, state: State, rows: list[int]) -> None:
        """See `Drafter`."""
        for part, view in zip((self.drafter, self.lookup), state.memory, strict=True):
            part.select(view, rows)

    def join(self, state: State, other: State) -> None:
        """See `Drafter`."""
        for part, view, added in zip((self.drafter, self.lookup), state.memory, other.memory, strict=True):
            part.join(view, added)


registry.add(registry.Method("prompt-lookup", PromptLookup))
registry.add(registry.Method("prompt-lookup:sampled", partial(PromptLookup, sampled=True)))
registry.add_option("prompt-lookup", Repeats)
for _name, _target in ((registry.DEFAULT, registry.REFERENCE), (registry.DEFAULT + registry.FOR_VIDEO, registry.VIDEO)):
    _make = lambda network, name=_name: Repeats(type(network).drafter(network, name))  # noqa: E731
    registry.add(registry.Method(f"{_name}+prompt-lookup", _make, (_name,), form_of=_name, target=_target))
