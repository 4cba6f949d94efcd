"""`budget`: accepts a candidate when α ≥ θ, else with probability α, and adapts θ so that the mean TV stays ≤ ε.

`calibrate` solves for the θ to start with, from recorded positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from msd.core import modality
from msd.core.sampling import Sampler
from msd.errors import UserError
from msd.verify.divergence import budget_distribution, total_variation
from msd.verify.lossy import Lossy, Position
from msd.verify.registry import register
from msd.verify.rejection import checked_epsilon, normalise, ratio, soft, thresholds_by_id

BISECTIONS = 40


@dataclass
class Ledger:
    """Chooses θ of the next position so that the mean total variation (TV) of all positions never exceeds ε.

    There is one ledger per modality and answer. epsilon: the allowed mean TV per token. preferred: the θ to start with.

    Each emitted token adds ε to the balance and subtracts its exact TV. The next position uses the preferred θ if the
    balance covers its cost. Otherwise θ = 1 - balance, because no position costs more than 1 - θ under the soft rule.
    So Σ TV ≤ nε holds after *every* position, not only on average. The balance and the preferred θ depend on earlier
    positions, and the cost depends on distributions, not on draws. Integral control moves the preferred θ by
    step · (TV - ε) (Gibbs and Candès 2021, adaptive conformal inference); this corrects a poor calibration.
    """

    epsilon: float
    preferred: float
    step: float = 0.1
    count: int = 0
    spent: float = 0.0

    @property
    def balance(self) -> float:
        """The largest TV that the next position may have."""
        return self.epsilon * (self.count + 1) - self.spent

    def threshold(self, cost: float) -> float:
        """θ of the next position. cost: its TV at the preferred θ."""
        return self.preferred if cost <= self.balance else min(1.0, max(self.preferred, 1.0 - self.balance))

    def spend(self, total_variation: float) -> None:
        """Books the TV of an emitted token."""
        self.count += 1
        self.spent += total_variation
        self.preferred = min(1.0, max(0.0, self.preferred + self.step * (total_variation - self.epsilon)))


@register("budget")
class Budget(Lossy):
    """Spends at most ε of total variation per emitted token, for each modality of each answer; ε = 0 is `lossless`.

    epsilon: in [0, 1]. thresholds: modality name -> θ to start with (see `calibrate`); the registry's default for all
    others. The deterministic children count as one candidate with α = P = Σ p(c), the probability that the lossless
    walk continues. If P ≥ θ, the token is drawn from p restricted to them; otherwise the step is lossless. The first
    draw is that of plain decoding, so a seed gives plain decoding's tokens until ε is first spent.
    """

    calibrated: ClassVar[bool] = True
    rule = staticmethod(soft)

    def __init__(self, epsilon: float = 0.0, thresholds: Mapping[str, float] | None = None) -> None:
        self.epsilon = checked_epsilon(epsilon)
        self._thresholds = dict(thresholds or {})
        thresholds_by_id(self._thresholds)  # raises UserError for invalid ones
        self._ledgers: WeakKeyDictionary[Sampler, dict[tuple[int, int], Ledger]] = WeakKeyDictionary()

    def _is_lossless(self) -> bool:
        """Whether ε is 0."""
        return self.epsilon == 0.0

    def _ledger(self, sampler: Sampler, row: int, kind: int) -> Ledger:
        """The ledger of a row and a modality. It lasts for one request, so a seed always gives the same answer."""
        ledgers = self._ledgers.setdefault(sampler, {})
        if (row, kind) not in ledgers:
            ledgers[row, kind] = Ledger(self.epsilon, thresholds_by_id(self._thresholds)[kind])
        return ledgers[row, kind]

    def _choose_thresholds(self, position: Position, kinds: list[int], sampler: Sampler) -> list[float]:
        """θ from the ledgers, given the cost of their preferred θ at this position."""
        ledgers = [self._ledger(sampler, row, kind) for row, kind in zip(position.rows, kinds, strict=True)]
        p = position.p
        preferred = torch.tensor([ledger.preferred for ledger in ledgers], dtype=torch.float64, device=p.device)
        out = budget_distribution(p, preferred[:, None], position.drafted, position.distributions, position.present)
        costs = total_variation(out, p).tolist()
        return [ledger.threshold(cost) for ledger, cost in zip(ledgers, costs, strict=True)]

    def _record(self, sampler: Sampler, rows: list[int], kinds: list[int], spent: list[float]) -> None:
        """Books the total variation in the ledgers."""
        for row, kind, tv in zip(rows, kinds, spent, strict=True):
            self._ledger(sampler, row, kind).spend(tv)

    def _emit(self, position: Position, sampler: Sampler) -> tuple[Tensor, Tensor, Tensor]:
        """Plain decoding's draw; if no child has it, a child's token where P ≥ θ, else the sampled candidates."""
        p, drafted, threshold = position.p, position.drafted, position.threshold
        token = sampler.draw(position.logits, position.rows)
        child = position.follow(token)
        p_drafted = p.masked_fill(~drafted, 0.0)
        P = p_drafted.sum(-1)
        accepts = (P > 0) & (threshold[:, 0] <= P)
        redrawn = ((child < 0) & accepts).nonzero().squeeze(1).tolist()
        if redrawn:
            token[redrawn] = sampler.multinomial(normalise(p_drafted[redrawn]), [position.rows[i] for i in redrawn])
            child[redrawn] = position.follow(token)[redrawn]
        rejected = ((child < 0) & ~accepts).nonzero().squeeze(1).tolist()
        if rejected and position.distributions is not None:
            token[rejected], child[rejected] = position.try_sampled(rejected, sampler, soft)
        out = budget_distribution(p, threshold, drafted, position.distributions, position.present)
        return token, child, out


def calibrate(records: Mapping[str, tuple[Tensor, Tensor]], epsilon: float) -> dict[str, float]:
    """Solves for the smallest θ of each modality at which the mean TV of `budget` over its records is at most ε.

    records: modality name -> (p, q). p: [n, V], distributions of the target. q: [n, V], the draft distributions of one
    sampled candidate per position; or bool, the tokens of the deterministic candidates. The mean TV does not increase
    with θ and is 0 at θ = 1, so bisection finds θ; the result never exceeds ε on the records. At ε = 0 it is 1.
    Raises UserError for invalid records.
    """
    checked_epsilon(epsilon)
    return {modality.get(name).name: _bisect(*_costs(name, p, q), epsilon) for name, (p, q) in records.items()}


def _costs(name: str, p: Tensor, q: Tensor) -> tuple[Tensor, Tensor]:
    """(α, TV if θ ≤ α), float64: both [n, V] for sampled candidates and [n, 1] for deterministic ones."""
    if p.dim() != 2 or p.shape != q.shape or not len(p):
        raise UserError(f"calibration records of '{name}': p {list(p.shape)} and q {list(q.shape)} must both be [n, V]")
    p = p.double()
    if q.dtype == torch.bool:
        P = p.masked_fill(~q, 0.0).sum(-1, keepdim=True).clamp_max(1.0)
        return P, torch.where(P > 0, 1 - P, 0.0)
    q = q.double()
    return ratio(p, q), torch.where(p > 0, (q - p).clamp_min(0.0), 0.0)


def _mean(alpha: Tensor, cost: Tensor, threshold: float) -> float:
    """Mean TV per position at θ = `threshold`."""
    return float(cost.masked_fill(alpha < threshold, 0.0).sum() / len(cost))


def _bisect(alpha: Tensor, cost: Tensor, epsilon: float) -> float:
    """The smallest θ with a mean TV of at most ε, by bisection."""
    if epsilon == 0.0:
        return 1.0  # exact for all positions, not only for the recorded ones
    low, high = 0.0, 1.0
    if _mean(alpha, cost, low) <= epsilon:
        return low
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if _mean(alpha, cost, middle) <= epsilon:
            high = middle
        else:
            low = middle
    return high
