"""The greedy path down a tree, with one look at the device: where each choice depends on a node's logits alone."""

from __future__ import annotations

import torch

from msd.core.sampling import Sampler, argmax
from msd.core.tree import Accepted, DraftTree, Scores


def follow(tree: DraftTree, scores: Scores, sampler: Sampler) -> Accepted:
    """Emits what `walk` emits for a sampler that `reads_logits_only`: all choices of all rows are made at once."""
    batch, rows = range(tree.batch), sampler.alive
    accepted = Accepted([[] for _ in batch], [[] for _ in batch], padded=sampler.finished)
    part = tree.select(rows)
    logits = scores.logits if part is tree else scores.logits[rows]
    columns = [argmax(logits), part.tokens, part.parents]
    if scores.modality is not None:
        columns.append(scores.modality[rows])
        accepted.modality = [[] for _ in batch]
    for row, (choice, token, parent, *kind) in zip(rows, torch.stack(columns, 1).tolist(), strict=True):
        child = {(parent[n], token[n]): n for n in reversed(range(1, len(token))) if parent[n] >= 0}
        path, node = [0], 0
        while (node := child.get((node, choice[node]), -1)) >= 0:
            path.append(node)
        count = sampler.emit_path(row, [choice[n] for n in path])
        accepted.tokens[row], accepted.nodes[row] = [choice[n] for n in path[:count]], path[1 : count + 1]
        if accepted.modality is not None:
            accepted.modality[row] = [kind[0][n] for n in path[:count]]
    return accepted
