"""Drafters propose trees of continuations. A method is a file in `algorithms`, built from the parts in `toolkit`."""

from msd.drafters.base import Drafter
from msd.drafters.registry import catalogue, choose, create, default, methods, ready, register, register_folder

__all__ = [
    "Drafter",
    "catalogue",
    "choose",
    "create",
    "default",
    "methods",
    "ready",
    "register",
    "register_folder",
]
