"""How many tokens a target pass gives, as it is known: a mean acceptance length, one for each tree size, or rates."""

from __future__ import annotations

from dataclasses import dataclass, field

from msd.errors import UserError
from msd.estimate.cards import CARDS, Card
from msd.estimate.probe import probe


@dataclass(frozen=True)
class Acceptance:
    """Exactly one of the three is given. All lengths count the bonus token, so that 1 means nothing was accepted.

    length: for trees of any size. lengths: by drafted nodes. rates: of the first, second… level of a chain, given that
    the level before was accepted; a tree of n nodes is then a chain of n.
    """

    length: float | None = None
    lengths: dict[int, float] = field(default_factory=dict)
    rates: tuple[float, ...] = ()

    @classmethod
    def parse(cls, text: str) -> Acceptance:
        """From "3.5", "8=3.1,60=4.7" or "0.8,0.7,0.6". UserError for anything else."""
        parts = [part.strip() for part in text.split(",") if part.strip()]
        try:
            if "=" in text:
                pairs = [part.split("=") for part in parts]
                found = cls(lengths={int(nodes): float(length) for nodes, length in pairs})
            elif len(parts) == 1 and float(parts[0]) >= 1:
                found = cls(length=float(parts[0]))
            else:
                found = cls(rates=tuple(float(part) for part in parts))
        except ValueError as error:
            raise UserError(f"--acceptance '{text}' is none of 3.5, 8=3.1,60=4.7 and 0.8,0.7,0.6") from error
        if not found.rates and not found.lengths and found.length is None:
            raise UserError("--acceptance is empty; give a length such as 3.5, or rates such as 0.8,0.7,0.6")
        wrong = [rate for rate in found.rates if not 0 <= rate <= 1]
        wrong += [length for nodes, length in found.lengths.items() if not 1 <= length <= nodes + 1]
        if wrong:
            raise UserError(f"--acceptance '{text}': {wrong[0]:g} is neither a rate in [0, 1] nor a length that fits")
        return found

    def of(self, nodes: int, depth: int) -> float | None:
        """Tokens that a pass over a tree of `nodes` drafted nodes and `depth` levels gives; None where not known."""
        if self.lengths:
            return self.lengths.get(nodes)
        if self.length is not None:
            return min(self.length, 1.0 + min(nodes, depth))
        total, alive = 1.0, 1.0
        for rate in self.rates[: min(nodes, depth)]:
            alive *= rate
            total += alive
        return total

    def sizes(self, usual: tuple[int, ...]) -> tuple[int, ...]:
        """The tree sizes it can speak of."""
        return tuple(sorted(self.lengths)) if self.lengths else usual


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
