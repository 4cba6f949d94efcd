"""Estimates the speedup of speculative decoding on a GPU with a roofline model. Needs neither the GPU nor weights.

docs/estimate.md states the assumptions and how far the estimate was checked.
"""

from msd.estimate.plans import Acceptance, Workload, card, plans
from msd.estimate.presets import sizes
from msd.estimate.roofline import Card, pass_seconds
from msd.estimate.sizes import Sizes

__all__ = ["Acceptance", "Card", "Sizes", "Workload", "card", "pass_seconds", "plans", "sizes"]
