"""`threshold`: accepts a candidate when α ≥ θ, else draws from the residual distribution. No θ makes it lossless."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from msd.core.sampling import Sampler
from msd.verify.divergence import first_candidate, threshold_distribution
from msd.verify.lossy import Lossy, Position
from msd.verify.registry import register
from msd.verify.rejection import hard, thresholds_by_id


@register("threshold")
class Threshold(Lossy):
    """Compares α = min(1, p/q) with the threshold θ of the position's modality.

    thresholds: modality name -> θ in [0, 1]; the registry's default for all others.
    Deterministic candidates are tried in descending order of q, and the first with α ≥ θ is emitted. Without draft
    probabilities q is 1, so α = p. A rejected candidate has p < θq ≤ q, so the residual is p without the candidates;
    sampled candidates are then tried against it in order.
    """

    rule = staticmethod(hard)

    def __init__(self, thresholds: Mapping[str, float] | None = None) -> None:
        self._thresholds = dict(thresholds or {})
        thresholds_by_id(self._thresholds)  # raises UserError for invalid ones

    def _choose_thresholds(self, position: Position, kinds: list[int], sampler: Sampler) -> list[float]:
        """θ by modality; the table is built anew because modalities may have been registered since."""
        table = thresholds_by_id(self._thresholds)
        return [table[kind] for kind in kinds]

    def _emit(self, position: Position, sampler: Sampler) -> tuple[Tensor, Tensor, Tensor]:
        """The first deterministic candidate with α ≥ θ; without one, a sampled candidate or the residual's token."""
        p, drafted, q, threshold = position.p, position.drafted, position.q, position.threshold
        accepts, token = first_candidate(p, drafted, q, threshold)
        token = token[:, 0]
        child = position.follow(token).masked_fill(~accepts[:, 0], -1)
        rejected = (~accepts[:, 0]).nonzero().squeeze(1).tolist()
        if rejected:
            token[rejected], child[rejected] = position.try_sampled(rejected, sampler, hard)
        out = threshold_distribution(p, threshold, drafted, q, position.distributions, position.present)
        return token, child, out
