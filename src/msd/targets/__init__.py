"""Targets: the models whose output counts, one adapter per family."""

from msd.targets.base import Target
from msd.targets.registry import Family, adapt, families, family, supported
from msd.targets.state import State

__all__ = ["Family", "State", "Target", "adapt", "families", "family", "supported"]
