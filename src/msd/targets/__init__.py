"""Targets: the vision-language models whose output counts, one adapter per family."""

from msd.targets.base import State, Target
from msd.targets.registry import adapt, supported

__all__ = ["State", "Target", "adapt", "supported"]
