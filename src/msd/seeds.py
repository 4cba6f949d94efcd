"""Where a request's randomness comes from: a seed for each answer, or a generator that all of them share."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch

from msd.errors import UserError

Seed = int | Sequence[int] | torch.Generator | None
LEAST, MOST = -(1 << 63), (1 << 64) - 1  # what torch.manual_seed takes


def generators(seed: Any, batch: int, device: torch.device) -> list[torch.Generator] | torch.Generator | None:
    """Generators of a batch: of a seed s, row i gets s + i; of a list, tuple or array of seeds, row i gets number i.

    A seed is an integer of any type, as `torch.manual_seed` takes it. None and a generator are given back as they are.
    UserError for anything else.
    """
    if seed is None or isinstance(seed, torch.Generator):
        return seed
    if hasattr(seed, "tolist"):  # of numpy or torch, with or without axes
        seed = seed.tolist()
    if not isinstance(seed, list | tuple | range):
        first = _checked(seed)
        seed = [_checked(first + row) for row in range(batch)]
    if len(seed) != batch:
        raise UserError(f"{len(seed)} seeds for {batch} answers; give one seed, or one per answer")
    return [torch.Generator(device).manual_seed(_checked(s)) for s in seed]


def _checked(seed: Any) -> int:
    if not isinstance(seed, Integral) or isinstance(seed, bool):
        raise UserError(f"the seed {seed!r} is of type {type(seed).__name__}; give an integer, or one for each answer")
    number = int(seed)
    if not LEAST <= number <= MOST:
        raise UserError(f"the seed {number} does not fit 64 bits; give one from -2**63 to 2**64 - 1")
    return number
