"""How sure the target is of its next token: the mass of its likeliest 1, 4 and 8 tokens, averaged over answer tokens.

Sampling accepts a draft with the overlap of two laws, so a table of speedups at a temperature means little without it.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor

from msd.targets import Target
from msd.targets.teacher import teach

SIZES = (1, 4, 8)


@torch.inference_mode()
def top_mass(target: Target, inputs: dict[str, Any], tokens: Sequence[int], temperature: float) -> Tensor:
    """[T, 3]: mass of the likeliest 1, 4 and 8 tokens at `temperature` (1 for greedy) at every answer token.

    The answer counts up to a spelled image placeholder.
    """
    said = list(takewhile(lambda token: token not in target.placeholders, tokens))
    if not said:
        return torch.zeros(0, len(SIZES))
    logits = teach(target, dict(inputs), [said]).logits[0] / (temperature or 1.0)
    return logits.softmax(-1).topk(max(SIZES), -1).values.cumsum(-1)[:, [n - 1 for n in SIZES]]


def mean_mass(masses: Iterable[Tensor]) -> dict[str, float] | None:
    """Means over all tokens of several answers, by size as text; None without tokens."""
    found = torch.cat([torch.zeros(0, len(SIZES)), *masses])
    return {str(n): float(m) for n, m in zip(SIZES, found.mean(0), strict=True)} if len(found) else None
