"""`prompt-lookup`: what followed the same words earlier in prompt and output (Saxena 2023), as a tree.

The last n tokens are looked up in the text so far, longest match first; the continuations of all occurrences are merged
into one tree, and the nodes seen most often are drafted. `sampled=True` draws the candidates from the same counts
instead of taking the most frequent, which exercises verification with a draft distribution q.

`msd+prompt-lookup`: where a text repeats itself at length, what followed last time is drafted instead of what a trained
drafter says. After two equal words an answer rarely goes on as it did before; after ten it does. On 4,400 answers of
the reference model a match of the last 2 tokens was followed by 1.3 equal ones (of at most 6), of 5 by 1.6, of 10 by
3.7 and of 12 and more by 5.3, where a trained drafter gets about 3. A lookup costs next to nothing, and a drafter that
was trained on other texts cannot know what was said a line ago.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd.core.modality import LANGUAGE
from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, SampledCandidates, Scores
from msd.drafters import recordings, registry
from msd.drafters.base import BorrowsEye, Calibrated, Drafter
from msd.drafters.toolkit.network import DraftNetwork
from msd.events.recording import Events
from msd.planning.plan import Budget
from msd.targets.state import State

LEAST = 10  # tokens that must be equal for a lookup to come before a trained drafter


@dataclass
class _Index:
    """One row's text so far and where each of its n-grams ends. -1 stands for anything but text (an image)."""

    tokens: list[int] = field(default_factory=list)
    ends: dict[tuple[int, ...], list[int]] = field(default_factory=lambda: defaultdict(list))


@dataclass
class _Node:
    """A continuation: how much evidence led here, and what came next."""

    weight: float = 0.0
    children: dict[int, _Node] = field(default_factory=dict)


class PromptLookup:
    """Looks up the last `max_ngram` to `min_ngram` tokens; an occurrence of a longer match weighs more."""

    taps: tuple[int, ...] = ()

    def __init__(self, max_ngram: int = 3, min_ngram: int = 2, sampled: bool = False, branches: int = 2) -> None:
        self.name = "prompt-lookup:sampled" if sampled else "prompt-lookup"
        self.max_ngram, self.min_ngram, self.sampled, self.branches = max_ngram, min_ngram, sampled, branches

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """Any target will do."""

    def twin(self, model: PreTrainedModel) -> PromptLookup:
        """Another with the same settings."""
        return PromptLookup(self.max_ngram, self.min_ngram, self.sampled, self.branches)

    def begin(self, state: State, scores: Scores) -> None:
        """An empty index for each row; texts are read into them when a draft is asked for."""
        state.memory = [_Index() for _ in range(state.layout.batch)]

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """No router."""
        return None

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Nothing to note: what was emitted stands in the layout."""

    def _read(self, state: State) -> None:
        """Indexes the tokens of every row that it has not seen yet."""
        for row, index in enumerate(state.memory):
            have = len(index.tokens) + state.layout.start[row]
            new = slice(have, state.layout.end[row])
            text = torch.where(state.layout.modality[row, new] == LANGUAGE.id, state.layout.tokens[row, new], -1)
            for token in text.tolist():
                index.tokens.append(token)
                for n in range(self.min_ngram, self.max_ngram + 1):
                    gram = tuple(index.tokens[-n:])
                    if len(gram) == n and -1 not in gram:
                        index.ends[gram].append(len(index.tokens))

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """The most frequent continuations, or draws from them, within the budget."""
        if budget.rows:
            self._read(state)
        roots = [self._continuations(index, depth) for index, depth in zip(state.memory, budget.depth, strict=True)]
        if self.sampled:
            return self._draw(state, roots, budget, sampler)
        picked = [_most_frequent(root, budget.nodes, budget.width) for root in roots]
        return DraftTree.from_lists(state.layout.newest(), [t for t, _ in picked], [p for _, p in picked])

    def _continuations(self, index: _Index, depth: int) -> _Node:
        """Trie of what followed the current last tokens, each occurrence counted once, at its longest match."""
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
        """Trees of sampled trials: `branches` draws at the root, one at every deeper node, breadth first."""
        branches = min(self.branches, budget.width or self.branches)
        drafts = [
            _sample_tree(root, budget.nodes, branches, partial(sampler.multinomial, rows=[row]))
            for row, root in enumerate(roots)
        ]
        size = 1 + max(len(d.tokens) for d in drafts)
        count = max(1, max(len(d.sources) for d in drafts))
        child = torch.full((len(drafts), size, self.branches), -1)
        source, q = torch.zeros_like(child), torch.zeros(len(drafts), count, sampler.vocabulary)
        for row, draft in enumerate(drafts):
            for parent, k, node, drawn_from in draft.trials:
                child[row, parent, k], source[row, parent, k] = node, drawn_from
            for r, (tokens, p) in enumerate(draft.sources):
                q[row, r, tokens] = p
        device = state.layout.tokens.device
        candidates = SampledCandidates(child.to(device), source.to(device), q.to(device))
        fixed = [[False] * len(d.tokens) for d in drafts]
        newest = state.layout.newest()
        return DraftTree.from_lists(
            newest, [d.tokens for d in drafts], [d.parents for d in drafts], None, candidates, fixed
        )


def _most_frequent(root: _Node, budget: int, width: int | None) -> tuple[list[int], list[int]]:
    """The `budget` heaviest nodes as (tokens, parents), at most `width` on a level.

    A child weighs no more than its parent, so they form a tree.
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
    """One row's sampled tree: nodes, trials (parent, rank, node, source) and sources (tokens, probabilities)."""

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    trials: list[tuple[int, int, int, int]] = field(default_factory=list)
    sources: list[tuple[list[int], Tensor]] = field(default_factory=list)


def _sample_tree(root: _Node, budget: int, branches: int, draw: Callable[[Tensor], Tensor]) -> _Draft:
    """Draws a tree with `draw` (q [1, n] -> index [1]).

    A node exists for what stands above it and was drawn before it, never for what it turned out to be itself.
    """
    draft = _Draft()
    queue = [(root, 0, branches)]
    room = budget
    while queue:
        node, at, count = queue.pop(0)
        count = min(count, room)
        if not node.children or count == 0:
            continue
        room -= count  # a repeated draw uses up budget too, or a node's existence would depend on its sibling's value
        choices = list(node.children)
        q = torch.tensor([node.children[t].weight for t in choices])
        q = q / q.sum()
        draft.sources.append((choices, q))
        drawn: dict[int, int] = {}
        for k in range(count):
            i = int(draw(q[None]))
            if i not in drawn:
                draft.tokens.append(choices[i])
                draft.parents.append(at)
                drawn[i] = len(draft.tokens)
                queue.append((node.children[choices[i]], drawn[i], 1))
            draft.trials.append((at, k, drawn[i], len(draft.sources) - 1))
    return draft


@dataclass
class _Memories:
    drafter: Any
    lookup: Any


class Repeats:
    """Drafts with `drafter`, and in rows whose last `least` tokens stood there before with what followed them."""

    sampled = False

    def __init__(self, drafter: Drafter, least: int = LEAST) -> None:
        self.drafter, self.lookup, self.least = drafter, PromptLookup(least, least), least
        self.name, self.taps = f"{drafter.name}+{self.lookup.name}", drafter.taps

    def attach(self, model: PreTrainedModel, backend: str = "plain") -> None:
        """See `Drafter`."""
        self.drafter.attach(model, backend)

    def twin(self, model: PreTrainedModel) -> Repeats:
        """See `Drafter`."""
        return Repeats(self.drafter.twin(model), self.least)

    def borrow(self, look: Callable[[Events], Tensor]) -> None:
        """For a drafter that looks at recordings; see `BorrowsEye`."""
        if isinstance(self.drafter, BorrowsEye):
            self.drafter.borrow(look)

    @property
    def beside(self) -> Callable[[Events], Tensor] | None:
        """The drafter's, if it sees recordings; see `msd.drafters.recordings`."""
        return recordings.encoder(self.drafter)

    def thresholds(self, epsilon: float) -> dict[str, float]:
        """The drafter's, if it knows any."""
        return self.drafter.thresholds(epsilon) if isinstance(self.drafter, Calibrated) else {}

    def begin(self, state: State, scores: Scores) -> None:
        """Both begin, each with its own memory."""
        parts = []
        for part in (self.drafter, self.lookup):
            view = copy.copy(state)
            part.begin(view, scores)
            parts.append(view.memory)
        state.memory = _Memories(*parts)

    def propose(self, state: State, budget: Budget, sampler: Sampler) -> DraftTree:
        """Looked up where that is possible, in the other rows the drafter's."""
        found = self.lookup.propose(_as(state, state.memory.lookup), budget, sampler)
        rows = [row for row, any_ in enumerate((found.valid.sum(1) > 1).tolist()) if any_]
        left = [0 if row in rows else depth for row, depth in enumerate(budget.depth)]
        if rows and not any(left):
            return found
        drafted = self.drafter.propose(_as(state, state.memory.drafter), replace(budget, depth=left), sampler)
        if not rows or drafted.size == 1:
            return found if rows else drafted
        return drafted.replace_rows(rows, found)

    def route(self, state: State, tree: DraftTree, scores: Scores) -> Tensor | None:
        """The drafter's."""
        return self.drafter.route(_as(state, state.memory.drafter), tree, scores)

    def observe(self, state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        """Both see it."""
        self.drafter.observe(_as(state, state.memory.drafter), tree, scores, accepted)
        self.lookup.observe(_as(state, state.memory.lookup), tree, scores, accepted)


def _as(state: State, memory: Any) -> State:
    """The state as one of the two knows it."""
    view = copy.copy(state)
    view.memory = memory
    return view


def _with_lookup(name: str, network: DraftNetwork) -> Repeats:
    return Repeats(type(network).drafter(network, name))


registry.add(registry.Method("prompt-lookup", PromptLookup))
registry.add(registry.Method("prompt-lookup:sampled", partial(PromptLookup, sampled=True)))
for _name, _target in ((registry.DEFAULT, registry.REFERENCE), (registry.DEFAULT + registry.FOR_VIDEO, registry.VIDEO)):
    registry.add(
        registry.Method(f"{_name}+prompt-lookup", partial(_with_lookup, _name), (_name,), form_of=_name, target=_target)
    )
