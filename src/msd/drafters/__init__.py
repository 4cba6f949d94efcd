"""Drafters propose trees of continuations. A method is a file in `algorithms`, made of parts in `toolkit`."""

from msd.drafters.base import BorrowsEye, Calibrated, Drafter, ReadsAhead, Translates
from msd.drafters.registry import catalogue, create, default, methods, ready, register, register_folder

__all__ = [
    "BorrowsEye",
    "Calibrated",
    "Drafter",
    "ReadsAhead",
    "Translates",
    "catalogue",
    "create",
    "default",
    "methods",
    "ready",
    "register",
    "register_folder",
]
