"""Verification: which drafted tokens are emitted. Losslessness lives here; docs/verification.md proves it.

Glossary. p: the target's law at a node after all logits processors. q: the draft's law a sampled token was drawn from.
Accepted token: a drafted token that is emitted. Recovered token: drawn from the residual norm(max(p - q, 0)) after a
rejection. Bonus token: drawn from p at the end of an accepted path. All emitted tokens are followed, in order, by
exactly one that is not drafted, the recovered or bonus one, unless the text stops before it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from msd.errors import UserError
from msd.sampling import Sampler
from msd.tree import Accepted, DraftTree, Scores, Trials


class Verifier(Protocol):
    """Chooses what to emit from a scored tree, and emits it through the sampler.

    routed: whether `scores.modality` is to be filled in for it.
    """

    routed: bool

    def accept(self, tree: DraftTree, scores: Scores, sampler: Sampler) -> Accepted:
        """Walks each row's tree from the root and returns the accepted path and the emitted tokens."""
        ...


class Lossless:
    """Emits tokens distributed exactly as the target alone would emit them.

    Deterministic trials: draw y ~ p as plain decoding does and follow the child that carries y (one draw per emitted
    token, hence the same tokens as plain sampling with the same seed; at temperature 0, the longest argmax path).
    Sampled trials: multi-candidate rejection in trial order (SpecInfer, algorithm 2; Leviathan et al., section 2.3),
    after the deterministic ones have been taken out of p.
    """

    routed = False

    def accept(self, tree: DraftTree, scores: Scores, sampler: Sampler) -> Accepted:
        """Walks down all rows together, one level at a time."""
        rows = sampler.alive
        accepted = Accepted([[] for _ in range(tree.batch)], [[] for _ in range(tree.batch)])
        node = torch.zeros(len(rows), dtype=torch.long, device=tree.tokens.device)
        for _ in range(tree.height + 1):
            law = sampler.law(scores.logits[rows, node], rows)  # p at the reached nodes, [R, V]
            token, child = self._choose(tree, node, law, sampler, rows)
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

    def _choose(
        self, tree: DraftTree, node: Tensor, law: Tensor, sampler: Sampler, rows: list[int]
    ) -> tuple[Tensor, Tensor]:
        """(token [R], child [R] or -1): the next emitted token below `node` [R], and the node that carries it."""
        view = tree if len(rows) == tree.batch else _rows(tree, rows)
        token = sampler.draw(law, rows)
        if tree.trials is None or not sampler.do_sample:
            return token, view.follow(node, token, view.valid)
        child = view.follow(node, token, view.fixed)
        open_ = [i for i, c in enumerate(child.tolist()) if c < 0]  # no deterministic trial carries the draw
        if open_:
            below = (view.parents[open_] == node[open_, None]) & view.fixed[open_] & view.valid[open_]
            p = sampler.probabilities(law[open_])
            taken = torch.zeros_like(p).scatter_add_(1, view.tokens[open_], below.to(p.dtype))
            token[open_], child[open_] = _sampled_trials(
                _rows(view, open_), node[open_], _normalise(p.masked_fill(taken > 0, 0.0)), sampler,
                [rows[i] for i in open_],
            )  # fmt: skip
        return token, child


_POLICIES: dict[str, Callable[[], Verifier]] = {"lossless": Lossless}


def policies() -> list[str]:
    """Names of the verification policies, the default first."""
    return list(_POLICIES)


def create(name: str) -> Verifier:
    """The verifier of policy `name`; UserError names the known ones."""
    if name not in _POLICIES:
        raise UserError(f"unknown verifier '{name}'; known: {', '.join(_POLICIES)}")
    return _POLICIES[name]()


def _rows(tree: DraftTree, rows: list[int]) -> DraftTree:
    """The trees of some rows only."""
    t = tree.trials
    trials = None if t is None else Trials(t.child[rows], t.law[rows], t.laws[rows])
    fixed, modality = tree.fixed[rows], tree.modality[rows]
    return DraftTree(
        tree.tokens[rows], tree.parents[rows], tree.depths[rows], tree.valid[rows], modality, fixed, tree.height, trials
    )


def _normalise(p: Tensor) -> Tensor:
    """p / Σp along the last axis."""
    return p / p.sum(-1, keepdim=True).clamp_min(torch.finfo(p.dtype).tiny)


def _sampled_trials(
    tree: DraftTree, node: Tensor, residual: Tensor, sampler: Sampler, rows: list[int]
) -> tuple[Tensor, Tensor]:
    """Multi-candidate rejection at `node` [R] from the law `residual` [R, V]: (token [R], child [R] or -1).

    Each trial (child c, law q) is accepted with probability min(1, residual(c) / q(c)); on rejection the residual
    becomes norm(max(residual - q, 0)). After the last rejection the token is drawn from the residual.
    """
    assert tree.trials is not None
    R = len(rows)
    child, token = torch.full_like(node, -1), torch.zeros_like(node)
    each = torch.arange(R, device=node.device)
    for k in range(tree.trials.child.shape[-1]):
        trial = tree.trials.child[each, node, k]
        trying = (child < 0) & (trial >= 0)
        active = trying.nonzero().squeeze(1).tolist()
        if not active:
            continue
        q = tree.trials.laws[active, tree.trials.law[active, node[active], k]]
        c = tree.tokens[active, trial[active]]
        p_c, q_c = residual[active].gather(1, c[:, None])[:, 0], q.gather(1, c[:, None])[:, 0]
        u = sampler.uniform([rows[i] for i in active], node.device)
        accept = u * q_c.double() < p_c.double()
        left = (residual[active] - q).clamp_min(0.0)
        # nothing is left when q and the residual agree but for rounding; the rejection then says nothing about them
        left = _normalise(torch.where(left.sum(-1, keepdim=True) > 0, left, residual[active]))
        residual[active] = torch.where(accept[:, None], residual[active], left)
        token[active] = torch.where(accept, c, token[active])
        child[active] = torch.where(accept, trial[active], -1)
    rejected = (child < 0).nonzero().squeeze(1).tolist()
    if rejected:
        token[rejected] = sampler.multinomial(residual[rejected], [rows[i] for i in rejected])
    return token, child
