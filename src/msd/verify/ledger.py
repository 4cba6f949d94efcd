"""Ledger: θ of the next position from what the earlier ones spent, so that the mean never exceeds ε."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass
class Ledger:
    """One modality of one answer. epsilon: mean total variation allowed per token. wish: the θ to begin with.

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
