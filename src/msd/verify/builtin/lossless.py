"""`lossless`: the target's own law, whatever was drafted. docs/verification.md proves it."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, Scores
from msd.verify import rejection
from msd.verify.registry import register
from msd.verify.rejection import ratio, walk


@register("lossless")
class Lossless:
    """Emits tokens distributed exactly as the target alone would emit them.

    Deterministic trials: draw y ~ p as plain decoding does and follow the child that carries y (one draw per emitted
    token, hence the same tokens as plain sampling with the same seed; at temperature 0, the longest argmax path).
    Sampled trials: multi-candidate rejection in trial order (SpecInfer, algorithm 2; Leviathan et al., section 2.3),
    after the deterministic ones have been taken out of p.
    """

    routed: ClassVar[bool] = False
    lossless: ClassVar[bool] = True
    calibrated: ClassVar[bool] = False
    rule = staticmethod(ratio)

    def accept(self, tree: DraftTree, scores: Scores, sampler: Sampler) -> Accepted:
        """The walk with `_choose`."""
        return walk(tree, scores, sampler, self._choose)

    def _choose(
        self, tree: DraftTree, node: Tensor, law: Tensor, sampler: Sampler, rows: list[int]
    ) -> tuple[Tensor, Tensor]:
        """(token [R], child [R] or -1): the next emitted token below `node` [R], and the node that carries it."""
        view = tree.of(rows)
        token = sampler.draw(law, rows)
        if tree.candidates is None or not sampler.do_sample:
            return token, view.follow(node, token, view.valid)
        child = view.follow(node, token, view.fixed)
        open_ = [i for i, c in enumerate(child.tolist()) if c < 0]  # no deterministic trial carries the draw
        if open_:
            below = (view.parents[open_] == node[open_, None]) & view.fixed[open_] & view.valid[open_]
            p = sampler.probabilities(law[open_])
            taken = torch.zeros_like(p).scatter_add_(1, view.tokens[open_], below.to(p.dtype))
            token[open_], child[open_] = rejection.sampled_trials(
                view.of(open_), node[open_], rejection.normalise(p.masked_fill(taken > 0, 0.0)), sampler,
                [rows[i] for i in open_], ratio,
            )  # fmt: skip
        return token, child
