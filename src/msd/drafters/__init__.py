"""Drafters propose trees of continuations. A method is a file in `algorithms`, built from the parts in `toolkit`."""

from msd.drafters.base import Calibrated, Drafter, ReadsAuxiliary, ReadsPrompt, SharesVisionTower, Translates
from msd.drafters.registry import catalogue, create, default, methods, ready, register, register_folder

__all__ = [
    "Calibrated",
    "Drafter",
    "ReadsAuxiliary",
    "ReadsPrompt",
    "SharesVisionTower",
    "Translates",
    "catalogue",
    "create",
    "default",
    "methods",
    "ready",
    "register",
    "register_folder",
]
