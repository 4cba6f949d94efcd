"""Targets: adapters of the models that drafters accelerate, one per family."""

from msd.targets.base import Target
from msd.targets.registry import Family, adapt, families, family, supported
from msd.targets.state import Past, State

__all__ = ["Family", "Past", "State", "Target", "adapt", "families", "family", "supported"]
