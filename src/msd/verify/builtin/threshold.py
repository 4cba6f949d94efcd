"""`threshold`: the hard rule. Accept when α ≥ θ, else draw from the residual and stop. Lossless at no θ."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from msd.core.sampling import Sampler
from msd.verify.divergence import first_candidate, threshold_law
from msd.verify.lossy import Lossy, Position
from msd.verify.registry import register
from msd.verify.rejection import hard, sampled_trials, thresholds_by_id, without


@register("threshold")
class Threshold(Lossy):
    """α = min(1, p/q) against the modality's θ.

    thresholds: modality name -> θ in [0, 1], for those that shall differ from the registry's.
    Deterministic candidates are tried in descending order of q; the first with α ≥ θ is emitted. Where the tree knows
    no q, a candidate is a point mass (q = 1, α = p). A rejected one has p < θq ≤ q, so the residual is p without them,
    from which sampled candidates are then tried in order, if there are any.
    """

    rule = staticmethod(hard)

    def __init__(self, thresholds: Mapping[str, float] | None = None) -> None:
        self._thresholds = dict(thresholds or {})
        thresholds_by_id(self._thresholds)  # bad ones are told at once

    def _theta(self, at: Position, kinds: list[int], sampler: Sampler) -> list[float]:
        """From the table; it is made anew, as the registry is open."""
        table = thresholds_by_id(self._thresholds)
        return [table[k] for k in kinds]

    def _emit(self, at: Position, sampler: Sampler) -> tuple[Tensor, Tensor, Tensor]:
        """The first deterministic candidate that passes, else the sampled ones, else the residual."""
        found, token = first_candidate(at.p, at.drafted, at.q, at.theta)
        token = token[:, 0]
        among = at.tree.valid if at.tree.candidates is None else at.tree.fixed
        child = at.tree.follow(at.node, token, among).masked_fill(~found[:, 0], -1)
        open_ = (~found[:, 0]).nonzero().squeeze(1).tolist()
        if open_:
            residual = without(at.p[open_], at.drafted[open_])
            token[open_], child[open_] = sampled_trials(
                at.tree_of(open_), at.node[open_], residual, sampler, [at.rows[i] for i in open_], hard, at.theta[open_]
            )
        return token, child, threshold_law(at.p, at.theta, at.drafted, at.q, at.distributions, at.present)
