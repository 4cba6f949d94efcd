"""Decoder layers as the rivals have them: the shared layer, but for what its input goes through."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from msd.backends.packed import Linear
from msd.drafters.msd.layer import Keys, Layer, Sizes, Turn


class BareLayer(Layer):
    """EAGLE-1 and 2: nothing is normalised before the attention (arXiv 2401.15077, released model)."""

    def __init__(self, config: Sizes) -> None:
        super().__init__(config)
        self.input_norm = nn.Identity()


class PairNorm(nn.Module):
    """[e; h] [..., 2H] -> [norm(e); norm(h)]."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.word, self.feature = nn.RMSNorm(hidden, eps), nn.RMSNorm(hidden, eps)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        e, h = x.chunk(2, -1)
        return torch.cat([self.word(e), self.feature(h)], -1)


class PairLayer(Layer):
    """EAGLE-3 (arXiv 2503.01840, section 3.1): attention reads [norm(e); norm(h)], and h goes past it.

    Entries are [e; h] [..., 2H]; states that come out are [..., H].
    """

    def __init__(self, config: Sizes) -> None:
        super().__init__(config)
        c, wide = config, 2 * config.hidden
        self.input_norm = PairNorm(c.hidden, c.eps)
        self.q_proj = Linear(wide, c.heads * c.head_dim, bias=False)
        self.k_proj = Linear(wide, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = Linear(wide, c.kv_heads * c.head_dim, bias=False)

    def _carried(self, x: Tensor) -> Tensor:
        return x.chunk(2, -1)[1]


class InjectedLayer(Layer):
    """DFlash (arXiv 2602.06036, section 3): keys and values of the context come from target features as they are.

    They are normalised once, for all layers, where they are fused.
    """

    def keys(self, x: Tensor, turn: Turn) -> Keys:
        """Of context entries x [..., H]."""
        return self._keys(x, turn)
