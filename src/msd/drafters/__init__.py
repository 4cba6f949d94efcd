"""Drafters: whatever proposes a tree of continuations, one file per published method."""

from msd.drafters.base import Drafter
from msd.drafters.registry import create, methods, register, register_folder

__all__ = ["Drafter", "create", "methods", "register", "register_folder"]
