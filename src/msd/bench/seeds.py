"""Several seeds of a method ("standard seed 0", …) count as one method, and one method of all is MSD.

That is MSD with as much training as the control and the rivals had, where it was measured; the one that ships was
trained longer, and is compared apart.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from msd.drafters.algorithms.msd import CONTROL, OURS, SHIPPED

__all__ = ["CONTROL", "SHIPPED", "grouped", "ours"]

_SEED = re.compile(r" seed \d+$")


def grouped(methods: Iterable[str]) -> dict[str, list[str]]:
    """Name without a seed -> the method of that name, or else its seeds, in their order."""
    groups: dict[str, list[str]] = {}
    for method in dict.fromkeys(methods):
        groups.setdefault(_SEED.sub("", method), []).append(method)
    return {name: [name] if name in found else found for name, found in groups.items()}


def ours(groups: dict[str, list[str]]) -> str | None:
    """The group that stands for MSD, the first that was measured; None where there is none."""
    return next((name for name in OURS if name in groups), None)
