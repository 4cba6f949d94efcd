"""A record of the draft trees of a generation and of what the target took of them."""

from __future__ import annotations

from dataclasses import dataclass, field

from msd.core.modality import known
from msd.core.tree import Step


@dataclass(frozen=True)
class Node:
    """A drafted token. parent: index of its node in the step, 0 for the root. q: None where the drafter knows none.

    p, q: probability of the token given its parent's path, under the target (without logits processors) and the draft.
    modality: of the subtree that it is of. accepted: whether the target took it.
    """

    token: int
    parent: int
    depth: int
    modality: str
    p: float
    q: float | None
    accepted: bool


@dataclass(frozen=True)
class Pass:
    """One target pass of a row. root: the newest token; nodes: what was drafted below it, parents first, node 1 first.

    emitted: the accepted drafts and the target's own token after them. seconds: of the draft, and of the pass.
    """

    root: int
    nodes: tuple[Node, ...]
    emitted: tuple[int, ...]
    draft_seconds: float
    verify_seconds: float


@dataclass
class Trace:
    """The passes of a row, to be given to `SpeculativeVLM.generate(on_step=…)`."""

    row: int = 0
    passes: list[Pass] = field(default_factory=list)

    def __call__(self, step: Step) -> None:
        """Keeps one step, unless the row has ended before, or it is the one that prefill gives."""
        if step.prefill or not step.accepted.tokens[self.row] or self.row in step.accepted.padded:
            return
        tree, row = step.tree, self.row
        parts = (tree.tokens, tree.parents, tree.depths, tree.modality, tree.valid)
        tokens, parents, depths, kinds, valid = (part[row].tolist() for part in parts)
        above = tree.parents[row].clamp_min(0)
        p = step.scores.logits[row].float().softmax(-1)[above, tree.tokens[row]].tolist()
        q = [None] * tree.size if tree.q is None else tree.q[row].tolist()
        names, taken = known(), set(step.accepted.nodes[row])
        drafted = [n for n in range(1, tree.size) if valid[n]]
        index = {n: i for i, n in enumerate([0, *drafted])}
        nodes = tuple(
            Node(tokens[n], index[parents[n]], depths[n], names[kinds[n]].name, p[n], q[n], n in taken) for n in drafted
        )
        emitted = tuple(step.accepted.tokens[row])
        self.passes.append(Pass(tokens[0], nodes, emitted, step.draft_seconds, step.verify_seconds))
