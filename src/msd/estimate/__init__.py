"""What speculative decoding would give on a card: a roofline from a model's sizes and a card's bandwidth and FLOP/s.

No weights are loaded and no card is needed. docs/estimate.md says what is assumed and how far it was checked.
"""

from msd.estimate.acceptance import Acceptance, card
from msd.estimate.cards import Card
from msd.estimate.plans import Workload, plans
from msd.estimate.roofline import pass_seconds
from msd.estimate.sizes import Sizes, sizes

__all__ = ["Acceptance", "Card", "Sizes", "Workload", "card", "pass_seconds", "plans", "sizes"]
