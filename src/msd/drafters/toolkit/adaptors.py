"""Learned queries over an image or over auxiliary tokens: many states become a few.

After ViSpec (arXiv 2509.15235, section 3.2): learned queries attend to the states, once per image and apart from text.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd.backends.packed import Linear
from msd.drafters.toolkit.layers import Sizes, TapNorm
from msd.errors import UserError


class Adaptor(nn.Module):
    """Learned queries over an image's embeddings: [I, n, H] -> [I, queries, H]."""

    def __init__(self, hidden: int, heads: int, queries: int) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Parameter(torch.randn(queries, heads, hidden // heads) * (hidden // heads) ** -0.5)
        self.k_proj, self.v_proj = Linear(hidden, hidden, bias=False), Linear(hidden, hidden, bias=False)
        self.o_proj = Linear(hidden, hidden, bias=False)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """mask: [I, n] bool, False is padding."""
        k, v = self.k_proj(states), self.v_proj(states)
        out: Tensor = self.o_proj(attended(self.q.flatten(1), k, v, self.heads, mask[:, None, None]))
        return out.to(states.dtype)


class VisionAdaptor(nn.Module):
    """[I, n, T*H] tap states of I images -> `kept` compressed tokens and a global vector each.

    It reads the target's states at the image positions rather than the projector's output, so that any target, with any
    number of image tokens, serves unchanged.
    """

    def __init__(self, config: Sizes, taps: int, kept: int) -> None:
        super().__init__()
        H, wide = config.hidden, config.hidden * taps
        self.heads = config.heads
        self.norm = TapNorm(taps, H, config.eps)
        self.queries = nn.Parameter(torch.randn(kept + 1, H) * H**-0.5)
        self.k_proj, self.v_proj = Linear(wide, H, bias=False), Linear(wide, H, bias=False)
        self.o_proj = Linear(H, H, bias=False)

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """states [I, n, T*H], mask [I, n] bool (False is padding) -> tokens [I, K, H], global [I, H]."""
        normed = self.norm(states)
        out = self.o_proj(
            attended(self.queries, self.k_proj(normed), self.v_proj(normed), self.heads, mask[:, None, None])
        )
        return out[:, :-1], out[:, -1]


class AuxiliaryAdaptor(nn.Module):
    """[B, E, H] auxiliary tokens of all groups, one group after another -> K kept tokens and a global vector a row.

    Auxiliary tokens are those that only the drafter sees, such as those of an event camera. They come in groups (frames
    in time, cells in space), each with a fixed number of tokens. Learned queries read each group and leave a few
    context entries per group and one global vector over all of them. groups: (tokens given, tokens kept) of each.
    """

    mask: Tensor  # [K+1, E] bool: which tokens a query reads

    def __init__(self, config: Sizes, groups: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        H = config.hidden
        given, kept = (sum(group[i] for group in groups) for i in (0, 1))
        self.heads = config.heads
        self.norm = nn.RMSNorm(H, config.eps)
        self.places = nn.Parameter(torch.randn(given, H) * H**-0.5)
        self.queries = nn.Parameter(torch.randn(kept + 1, H) * H**-0.5)
        self.k_proj, self.v_proj = Linear(H, H, bias=False), Linear(H, H, bias=False)
        self.o_proj, self.whole = Linear(H, H, bias=False), Linear(H, H, bias=False)
        blocks = [torch.ones(k, n, dtype=torch.bool) for n, k in groups]
        mask = torch.cat([torch.block_diag(*blocks).bool(), torch.ones(1, given, dtype=torch.bool)])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, E, H] -> (kept [B, K, H], global [B, 1, H]). UserError for another number of tokens."""
        if tokens.shape[1:] != self.places.shape:
            raise UserError(
                f"the drafter was trained beside {list(self.places.shape)} tokens, not {list(tokens.shape[1:])}; "
                "encode them as for its training"
            )
        normed = self.norm(tokens.to(self.places.dtype)) + self.places
        seen = attended(self.queries, self.k_proj(normed), self.v_proj(normed), self.heads, self.mask)
        return self.o_proj(seen[:, :-1]), self.whole(seen[:, -1:])


def attended(queries: Tensor, keys: Tensor, values: Tensor, heads: int, mask: Tensor) -> Tensor:
    """What learned queries [Q, H] read of keys and values [I, n, H] with `heads` heads: [I, Q, H].

    mask: bool, broadcast to [I, heads, Q, n]; False is not read.
    """
    split = (heads, -1)
    asked = queries.expand(len(keys), -1, -1)
    q, k, v = (x.unflatten(-1, split).transpose(1, 2) for x in (asked, keys, values))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)
