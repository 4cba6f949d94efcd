"""What stands beside the text: tokens that only the drafter sees, such as those of an event camera.

They come in groups (frames in time, cells in space), each with a number of tokens that is fixed by whoever encodes
them. Learned queries read each group, as the vision adaptor reads an image, and leave a few context
entries per group and one global vector over all of them.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msd.backends.packed import Linear
from msd.drafters.msd.config import MSDConfig
from msd.drafters.msd.vision import attended
from msd.errors import UserError


class BesideAdaptor(nn.Module):
    """[B, E, H] tokens of all groups, one group after another -> K kept tokens and a global vector a row."""

    mask: Tensor  # [K+1, E] bool: which tokens a query reads

    def __init__(self, config: MSDConfig) -> None:
        super().__init__()
        H = config.hidden
        given, kept = (sum(group[i] for group in config.beside) for i in (0, 1))
        self.heads = config.heads
        self.norm = nn.RMSNorm(H, config.eps)
        self.places = nn.Parameter(torch.randn(given, H) * H**-0.5)
        self.queries = nn.Parameter(torch.randn(kept + 1, H) * H**-0.5)
        self.k_proj, self.v_proj = Linear(H, H, bias=False), Linear(H, H, bias=False)
        self.o_proj, self.whole = Linear(H, H, bias=False), Linear(H, H, bias=False)
        blocks = [torch.ones(k, n, dtype=torch.bool) for n, k in config.beside]
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
