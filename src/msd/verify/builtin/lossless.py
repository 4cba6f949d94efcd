"""`lossless`: the output has exactly the target's distribution, for any draft; docs/verification.md proves it."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from msd.core.sampling import Sampler
from msd.core.tree import Accepted, DraftTree, Scores
from msd.verify import greedy, rejection
from msd.verify.registry import register
from msd.verify.rejection import ratio, walk


@register("lossless")
class Lossless:
    """Emits tokens with exactly the distribution of the target alone.

    Deterministic candidates: draw y ~ p as plain decoding does, and follow the child with token y. There is one draw
    per emitted token, so the same seed gives the same tokens as plain sampling; greedy decoding follows the longest
    argmax path. Sampled candidates: multi-candidate rejection sampling in order (SpecInfer, algorithm 2; Leviathan et
    al. 2023, section 2.3), after the tokens of the deterministic candidates have been removed from p.
    """

    routed: ClassVar[bool] = False
    lossless: ClassVar[bool] = True
    calibrated: ClassVar[bool] = False
    rule = staticmethod(ratio)

    def accept(self, tree: DraftTree, scores: Scores, sampler: Sampler) -> Accepted:
        """Follows the greedy path at once where it can, else walks the trees with `_choose`."""
        if sampler.reads_logits_only:
            return greedy.follow(tree, scores, sampler)
        return walk(tree, scores, sampler, self._choose)

    def _choose(
        self, tree: DraftTree, node: Tensor, logits: Tensor, sampler: Sampler, rows: list[int]
    ) -> tuple[Tensor, Tensor]:
        """The next token below `node` [R] and the child that has it: (token [R], child [R] or -1)."""
        tree = tree.select(rows)
        token = sampler.draw(logits, rows)
        if tree.candidates is None or not sampler.do_sample:
            return token, tree.follow(node, token, tree.valid)
        child = tree.follow(node, token, tree.deterministic)
        unmatched = [i for i, c in enumerate(child.tolist()) if c < 0]  # no deterministic candidate has the token
        if unmatched:
            part, p = tree.select(unmatched), logits[unmatched].softmax(-1)
            p = rejection.without(p, part.child_tokens(node[unmatched], p.shape[-1]))
            token[unmatched], child[unmatched] = rejection.try_sampled_candidates(
                part, node[unmatched], p, sampler, [rows[i] for i in unmatched], ratio
            )
        return token, child
