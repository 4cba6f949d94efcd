"""Cards by name."""

from __future__ import annotations

from msd.errors import UserError
from msd.estimate.cards import CARDS, Card
from msd.estimate.probe import probe


def card(name: str) -> Card:
    """A card by name, or "cpu", this machine, measured now (some seconds). UserError names those known."""
    key = name.lower().replace(" ", "-").replace("_", "-")
    if key == "cpu":
        return probe()
    key = {"h100-sxm": "h100", "a100": "a100-80", "4090": "rtx-4090", "3090": "rtx-3090"}.get(key, key)
    if key not in CARDS:
        known = ", ".join(["cpu", *(card.name for card in CARDS.values())])
        raise UserError(f"unknown card '{name}'; known: {known}")
    return CARDS[key]
