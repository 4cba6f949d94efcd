"""`budget`: the soft rule. Accept surely when α ≥ θ, else with probability α; θ is kept where mean TV stays ≤ ε."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from msd.core.sampling import Sampler
from msd.verify.divergence import budget_law, total_variation
from msd.verify.lossy import Lossy, Position
from msd.verify.registry import register
from msd.verify.rejection import checked_epsilon, normalise, sampled_trials, soft, thresholds_by_id, without


@dataclass
class Ledger:
    """θ of the next position from what the earlier ones spent, so that the mean never exceeds ε.

    One modality of one answer. epsilon: mean total variation allowed per token. wish: the θ to begin with.

    Each emitted position earns ε and pays its exact TV. The wish is followed where its price can be paid from what has
    been saved. Where not, θ = 1 - savings: under the soft rule no position costs more than 1 - θ, whatever was drafted.
    So Σ TV ≤ nε after *every* position, for certain and not on average. Both numbers come from earlier positions, and
    the price from laws, not from draws. The wish follows TV - ε by integral control (the update of Gibbs and Candès
    2021, adaptive conformal inference), which corrects a calibration that was too bold or too shy.
    """

    epsilon: float
    wish: float
    step: float = 0.1
    count: int = 0
    spent: float = 0.0

    @property
    def savings(self) -> float:
        """The most that the next position may pay."""
        return self.epsilon * (self.count + 1) - self.spent

    def theta(self, price: float) -> float:
        """θ of the next position, which would cost `price` at the wish."""
        return self.wish if price <= self.savings else min(1.0, max(self.wish, 1.0 - self.savings))

    def pay(self, total_variation: float) -> None:
        """Closes a position."""
        self.count += 1
        self.spent += total_variation
        self.wish = min(1.0, max(0.0, self.wish + self.step * (total_variation - self.epsilon)))


@register("budget")
class Budget(Lossy):
    """Spends at most ε of total variation per emitted token, for each modality of each answer; ε = 0 is `lossless`.

    epsilon: in [0, 1]. thresholds: modality name -> θ to begin with (see `calibrate`), the registry's where there is
    none. A deterministic candidate was drawn from a point mass, so α of all deterministic children together is their
    mass P = Σ p(c): the chance that the lossless walk goes on. When P ≥ θ the token is drawn from p restricted to them;
    else all is as in `lossless`. The first draw is always plain decoding's own, so a seed gives the same tokens until ε
    is first spent.
    """

    calibrated: ClassVar[bool] = True
    rule = staticmethod(soft)

    def __init__(self, epsilon: float = 0.0, thresholds: Mapping[str, float] | None = None) -> None:
        self.epsilon = checked_epsilon(epsilon)
        self._thresholds = dict(thresholds or {})
        thresholds_by_id(self._thresholds)  # bad ones are told at once
        self._ledgers: WeakKeyDictionary[Sampler, dict[tuple[int, int], Ledger]] = WeakKeyDictionary()

    def _is_lossless(self) -> bool:
        """Whether nothing may be spent."""
        return self.epsilon == 0.0

    def _ledger(self, sampler: Sampler, row: int, kind: int) -> Ledger:
        """The ledger of a modality in a request's row. It ends with the request, so that seeds keep their meaning."""
        mine = self._ledgers.setdefault(sampler, {})
        if (row, kind) not in mine:
            mine[row, kind] = Ledger(self.epsilon, thresholds_by_id(self._thresholds)[kind])
        return mine[row, kind]

    def _theta(self, at: Position, kinds: list[int], sampler: Sampler) -> list[float]:
        """From the ledgers, each of which is told what its wish would cost here."""
        ledgers = [self._ledger(sampler, row, kind) for row, kind in zip(at.rows, kinds, strict=True)]
        wish = torch.tensor([ledger.wish for ledger in ledgers], dtype=torch.float64, device=at.p.device)[:, None]
        prices = total_variation(budget_law(at.p, wish, at.drafted, at.distributions, at.present), at.p).tolist()
        return [ledger.theta(price) for ledger, price in zip(ledgers, prices, strict=True)]

    def _learn(self, sampler: Sampler, rows: list[int], kinds: list[int], spent: list[float]) -> None:
        """Into the ledgers."""
        for row, kind, tv in zip(rows, kinds, spent, strict=True):
            self._ledger(sampler, row, kind).pay(tv)

    def _emit(self, at: Position, sampler: Sampler) -> tuple[Tensor, Tensor, Tensor]:
        """Plain decoding's draw; where no child carries it, the children if P ≥ θ, else the sampled candidates."""
        token = sampler.draw(at.logits, at.rows)
        among = at.tree.valid if at.tree.candidates is None else at.tree.fixed
        child = at.tree.follow(at.node, token, among)
        kept = at.p.masked_fill(~at.drafted, 0.0)
        mass = kept.sum(-1)
        sure = (mass > 0) & (mass >= at.theta[:, 0])
        again = ((child < 0) & sure).nonzero().squeeze(1).tolist()
        if again:
            token[again] = sampler.multinomial(normalise(kept[again]), [at.rows[i] for i in again])
            child[again] = at.tree_of(again).follow(at.node[again], token[again], among[again])
        open_ = [] if at.distributions is None else ((child < 0) & ~sure).nonzero().squeeze(1).tolist()
        if open_:
            residual = without(at.p[open_], at.drafted[open_])
            token[open_], child[open_] = sampled_trials(
                at.tree_of(open_), at.node[open_], residual, sampler, [at.rows[i] for i in open_], soft, at.theta[open_]
            )
        return token, child, budget_law(at.p, at.theta, at.drafted, at.distributions, at.present)
