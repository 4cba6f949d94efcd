"""What speculative decoding would give on a card: a roofline from a model's sizes and a card's bandwidth and FLOP/s.

No weights are loaded and no card is needed. docs/estimate.md says what is assumed and how far it was checked.
"""

from msd.estimate.plans import Acceptance, Workload, card, plans
from msd.estimate.roofline import Card, pass_seconds
from msd.estimate.sizes import Sizes, sizes

__all__ = ["Acceptance", "Card", "Sizes", "Workload", "card", "pass_seconds", "plans", "sizes"]
