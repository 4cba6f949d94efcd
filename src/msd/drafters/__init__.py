"""Drafters: whatever proposes a tree of continuations, one file per published method."""

from msd.drafters.base import BorrowsEye, Calibrated, Drafter, ReadsAhead, Translates
from msd.drafters.registry import create, default, known, methods, register, register_folder

__all__ = [
    "BorrowsEye",
    "Calibrated",
    "Drafter",
    "ReadsAhead",
    "Translates",
    "create",
    "default",
    "known",
    "methods",
    "register",
    "register_folder",
]
