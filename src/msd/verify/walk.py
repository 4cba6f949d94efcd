"""The walk down the scored trees, the same for every policy: choose a token, emit it, follow its node."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, Scores

# (tree, node [R], law [R, V] scores, sampler, rows) -> (token [R] to emit below node, child [R] carrying it or -1)
Choose = Callable[[DraftTree, Tensor, Tensor, Sampler, list[int]], tuple[Tensor, Tensor]]


def walk(tree: DraftTree, scores: Scores, sampler: Sampler, choose: Choose) -> Accepted:
    """Walks down all rows together, one level at a time.

    Each token is emitted before the next node's law is asked for, so that processors see that node's own path.
    In lockstep (see `Sampler`) the walk ends for all rows where it ends for the first.
    """
    rows = sampler.alive
    accepted = Accepted([[] for _ in range(tree.batch)], [[] for _ in range(tree.batch)], padded=sampler.finished)
    if scores.modality is not None:
        accepted.modality = [[] for _ in range(tree.batch)]
    node = torch.zeros(len(rows), dtype=torch.long, device=tree.tokens.device)
    for _ in range(tree.height + 1):
        law = sampler.law(scores.logits[rows, node], rows)  # p at the reached nodes, [R, V]
        if scores.modality is not None and accepted.modality is not None:
            for row, kind in zip(rows, scores.modality[rows, node].tolist(), strict=True):
                accepted.modality[row].append(kind)
        token, child = choose(tree, node, law, sampler, rows)
        if sampler.lockstep:
            token, child = sampler.padded(rows, token, child)
        tokens, below = token.tolist(), child.tolist()
        goes_on = sampler.emit_all(rows, tokens)
        going = [i for i, c in enumerate(below) if goes_on[i] and c >= 0]
        cut = sampler.lockstep and len(going) < len(rows)
        for i, row in enumerate(rows):
            accepted.tokens[row].append(tokens[i])
            # where the walk ends, a row's newest token is not committed, even if a draft carries it
            if below[i] >= 0 and not (cut and goes_on[i]):
                accepted.nodes[row].append(below[i])
        if cut or not going:
            break
        rows, node = [rows[i] for i in going], child[going]
    return accepted
