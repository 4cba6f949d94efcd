"""The walk down the scored trees, the same for every policy: choose a token, emit it, follow its node."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msd.sampling import Sampler
from msd.tree import Accepted, DraftTree, Scores

# (tree, node [R], law [R, V] scores, sampler, rows) -> (token [R] to emit below node, child [R] carrying it or -1)
Choose = Callable[[DraftTree, Tensor, Tensor, Sampler, list[int]], tuple[Tensor, Tensor]]


def walk(tree: DraftTree, scores: Scores, sampler: Sampler, choose: Choose) -> Accepted:
    """Walks down all rows together, one level at a time.

    Each token is emitted before the next node's law is asked for, so that processors see that node's own path.
    """
    rows = sampler.alive
    accepted = Accepted([[] for _ in range(tree.batch)], [[] for _ in range(tree.batch)])
    if scores.modality is not None:
        accepted.modality = [[] for _ in range(tree.batch)]
    node = torch.zeros(len(rows), dtype=torch.long, device=tree.tokens.device)
    for _ in range(tree.height + 1):
        law = sampler.law(scores.logits[rows, node], rows)  # p at the reached nodes, [R, V]
        if scores.modality is not None and accepted.modality is not None:
            for row, kind in zip(rows, scores.modality[rows, node].tolist(), strict=True):
                accepted.modality[row].append(kind)
        token, child = choose(tree, node, law, sampler, rows)
        going = []
        for i, (row, y, c) in enumerate(zip(rows, token.tolist(), child.tolist(), strict=True)):
            accepted.tokens[row].append(y)
            if c >= 0:
                accepted.nodes[row].append(c)
            if sampler.emit(row, y) and c >= 0:
                going.append(i)
        if not going:
            break
        rows, node = [rows[i] for i in going], child[going]
    return accepted
