"""A record of the draft trees of a generation and of what the target took of them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from msd.drafters import Drafter
from msd.modality import known
from msd.targets.state import State
from msd.tree import Accepted, DraftTree, Scores


@dataclass(frozen=True)
class Node:
    """A drafted token. parent: index of its node in the step, 0 for the root. chance: q, where the drafter has a law.

    modality: of the subtree that it is of. accepted: whether the target took it.
    """

    token: int
    parent: int
    depth: int
    modality: str
    chance: float | None
    accepted: bool


@dataclass(frozen=True)
class Step:
    """One target pass of a row. root: the newest token; nodes: what was drafted below it, parents first, node 1 first.

    emitted: the accepted drafts and the target's own token after them.
    """

    root: int
    nodes: tuple[Node, ...]
    emitted: tuple[int, ...]


@contextmanager
def tracing(drafter: Drafter, row: int = 0) -> Iterator[list[Step]]:
    """Steps of a row of whatever is generated with the drafter in the block, in a list that grows."""
    steps: list[Step] = []
    observe = drafter.observe

    def recording(state: State, tree: DraftTree, scores: Scores, accepted: Accepted) -> None:
        if accepted.tokens[row]:
            steps.append(_step(tree, accepted, row))
        observe(state, tree, scores, accepted)

    drafter.observe = recording  # type: ignore[method-assign]
    try:
        yield steps
    finally:
        del drafter.observe  # the class's own again


def _step(tree: DraftTree, accepted: Accepted, row: int) -> Step:
    parts = (tree.tokens, tree.parents, tree.depths, tree.modality, tree.valid)
    tokens, parents, depths, kinds, valid = (part[row].tolist() for part in parts)
    chances = [None] * tree.size if tree.q is None else tree.q[row].tolist()
    names, taken = known(), set(accepted.nodes[row])
    drafted = [n for n in range(1, tree.size) if valid[n]]
    index = {n: i for i, n in enumerate([0, *drafted])}
    nodes = tuple(
        Node(tokens[n], index[parents[n]], depths[n], names[kinds[n]].name, chances[n], n in taken) for n in drafted
    )
    return Step(tokens[0], nodes, tuple(accepted.tokens[row]))
