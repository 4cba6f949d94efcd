"""The decoupled vision path: an image enters the drafter as a few compressed tokens and one global vector.

After ViSpec (arXiv 2509.15235, section 3.2): learned queries attend to the image's states, once per image and apart
from text. We read the target's tap states at the image positions rather than the projector's output, so that any
target, with any number of image tokens, serves unchanged.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd.backends.packed import Linear
from msd.drafters.msd.config import MSDConfig
from msd.drafters.msd.layer import TapNorm


class VisionAdaptor(nn.Module):
    """[I, n, T*H] tap states of I images -> `image_tokens` compressed tokens and a global vector each."""

    def __init__(self, config: MSDConfig) -> None:
        super().__init__()
        H, wide = config.hidden, config.hidden * len(config.taps)
        self.heads = config.heads
        self.norm = TapNorm(len(config.taps), H, config.eps)
        self.queries = nn.Parameter(torch.randn(config.image_tokens + 1, H) * H**-0.5)
        self.k_proj, self.v_proj = Linear(wide, H, bias=False), Linear(wide, H, bias=False)
        self.o_proj = Linear(H, H, bias=False)

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """states [I, n, T*H], mask [I, n] bool (False is padding) -> tokens [I, K, H], global [I, H]."""
        normed = self.norm(states)
        out = self.o_proj(
            attended(self.queries, self.k_proj(normed), self.v_proj(normed), self.heads, mask[:, None, None])
        )
        return out[:, :-1], out[:, -1]


def attended(queries: Tensor, keys: Tensor, values: Tensor, heads: int, mask: Tensor) -> Tensor:
    """What learned queries [Q, H] read of keys and values [I, n, H] with `heads` heads: [I, Q, H].

    mask: bool, broadcast to [I, heads, Q, n]; False is not read.
    """
    split = (heads, -1)
    asked = queries.expand(len(keys), -1, -1)
    q, k, v = (x.unflatten(-1, split).transpose(1, 2) for x in (asked, keys, values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)


def spans(shown: list[bool]) -> list[tuple[int, int]]:
    """Runs of image columns as (first, one past the last)."""
    found: list[tuple[int, int]] = []
    start = None
    for column, image in enumerate([*shown, False]):
        if image and start is None:
            start = column
        elif not image and start is not None:
            found.append((start, column))
            start = None
    return found
