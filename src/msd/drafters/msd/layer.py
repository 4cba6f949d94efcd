"""The drafter's decoder layer: attention over a shared context and over what hangs below an anchor.

An *anchor* is a position that drafts start from. Its n queries see the context up to the anchor, whose keys and values
come straight from target features (context injection, DFlash, arXiv 2602.06036, section 3), and the m nodes of their
own draft that `mask` allows. Decoding has one anchor per row, the root; training has many, all over one context.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd.drafters.msd.config import MSDConfig


class TapNorm(nn.Module):
    """RMSNorm of each of T tap states by itself, [..., T*H] -> the same: layers differ in scale by orders."""

    def __init__(self, taps: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.taps, self.eps = taps, eps
        self.weight = nn.Parameter(torch.ones(taps * hidden))

    def forward(self, states: Tensor) -> Tensor:
        """See the class."""
        normed = F.rms_norm(states.unflatten(-1, (self.taps, -1)), (states.shape[-1] // self.taps,), eps=self.eps)
        return normed.flatten(-2) * self.weight


@dataclass
class Keys:
    """Keys and values: [B, S, K, D] of a context, or [B, A, m, K, D] of drafts; K key heads of D numbers."""

    keys: Tensor
    values: Tensor


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021), halves rotated as in LLaMA."""

    inverse: Tensor

    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        self.register_buffer("inverse", theta ** -(torch.arange(0, dim, 2).float() / dim), persistent=False)

    def forward(self, x: Tensor, positions: Tensor) -> Tensor:
        """x [..., heads, D] at integer positions [...]."""
        angle = positions[..., None].float() * self.inverse
        cos, sin = angle.cos()[..., None, :], angle.sin()[..., None, :]
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Layer(nn.Module):
    """Pre-norm attention and gated MLP. Context entries enter by their keys and values only."""

    def __init__(self, config: MSDConfig) -> None:
        super().__init__()
        c, H = config, config.hidden
        self.heads, self.kv_heads, self.dim = c.heads, c.kv_heads, c.head_dim
        self.input_norm, self.mlp_norm = nn.RMSNorm(H, c.eps), nn.RMSNorm(H, c.eps)
        self.q_proj = nn.Linear(H, c.heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(H, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(H, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.heads * c.head_dim, H, bias=False)
        self.gate_proj = nn.Linear(H, c.intermediate, bias=False)
        self.up_proj = nn.Linear(H, c.intermediate, bias=False)
        self.down_proj = nn.Linear(c.intermediate, H, bias=False)
        self.rotary = Rotary(c.head_dim, c.rope_theta)

    def keys(self, x: Tensor, positions: Tensor) -> Keys:
        """Keys and values of entries x [..., H] at positions [...]: [..., K, D] each."""
        n = self.input_norm(x)
        k, v = (p(n).unflatten(-1, (self.kv_heads, self.dim)) for p in (self.k_proj, self.v_proj))
        return Keys(self.rotary(k, positions), v)

    def forward(
        self, x: Tensor, positions: Tensor, context: Keys, visible: Tensor, own: Keys | None, mask: Tensor | None
    ) -> Tensor:
        """Queries x [B, A, n, H] at positions [B, A, n] -> [B, A, n, H].

        visible: [B, A, S] bool, what of the context an anchor sees. own, mask: the anchor's drafts [B, A, m, ...] and
        which of them a query sees, [B, A, n, m] bool; None when there is none yet.
        """
        B, A, n, _ = x.shape
        q = self.q_proj(self.input_norm(x)).unflatten(-1, (self.heads, self.dim))
        q = self.rotary(q, positions).unflatten(-2, (self.kv_heads, -1)) * self.dim**-0.5  # [B, A, n, K, G, D]
        flat = q.permute(0, 3, 1, 2, 4, 5).reshape(B, self.kv_heads, -1, self.dim)  # [B, K, A*n*G, D]
        scores = (flat @ context.keys.permute(0, 2, 3, 1)).view(B, self.kv_heads, A, n, -1, visible.shape[-1])
        scores = scores.masked_fill(~visible[:, None, :, None, None], torch.finfo(scores.dtype).min)
        if own is not None and mask is not None:
            below = torch.einsum("bankgd,bamkd->bkangm", q, own.keys)
            below = below.masked_fill(~mask[:, None, :, :, None], torch.finfo(scores.dtype).min)
            scores = torch.cat([scores, below], -1)
        weights = scores.softmax(-1)
        S = visible.shape[-1]
        out = weights[..., :S].reshape(B, self.kv_heads, -1, S) @ context.values.transpose(1, 2)
        out = out.view(B, self.kv_heads, A, n, -1, self.dim)
        if own is not None:
            out = out + torch.einsum("bkangm,bamkd->bkangd", weights[..., S:], own.values)
        x = x + self.o_proj(out.permute(0, 2, 3, 1, 4, 5).reshape(B, A, n, -1))
        m = self.mlp_norm(x)
        hidden: Tensor = x + self.down_proj(F.silu(self.gate_proj(m)) * self.up_proj(m))
        return hidden
