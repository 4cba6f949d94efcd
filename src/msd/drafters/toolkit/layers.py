"""Decoder layers of drafters: attention over a shared context and over the draft below an anchor.

An *anchor* is a position that drafts start from. Its n queries see the context up to the anchor, whose keys and values
come straight from target features (context injection, DFlash, arXiv 2602.06036, section 3), and the m nodes of their
own draft that `mask` allows. Decoding has one anchor per row, the root; training has many, all over one context.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from msd.backends.packed import Linear, Packed, can_pack
from msd.errors import UserError


class Sizes(Protocol):
    """What a layer needs to know of a drafter's configuration."""

    @property
    def hidden(self) -> int:
        """H."""

    @property
    def heads(self) -> int:
        """Query heads."""

    @property
    def kv_heads(self) -> int:
        """Key heads."""

    @property
    def head_dim(self) -> int:
        """Numbers per head."""

    @property
    def intermediate(self) -> int:
        """Width of the MLP."""

    @property
    def eps(self) -> float:
        """Of RMSNorm."""


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

    def then(self, more: Keys) -> Keys:
        """These and more of the same anchors' drafts."""
        return Keys(torch.cat([self.keys, more.keys], 2), torch.cat([self.values, more.values], 2))

    def write(self, more: Keys, at: Sequence[int], count: Sequence[int]) -> None:
        """Puts the first `count[row]` of a context's new entries from `at[row]` on, in a buffer with room for them."""
        for row, (first, n) in enumerate(zip(at, count, strict=True)):
            self.keys[row, first : first + n] = more.keys[row, :n]
            self.values[row, first : first + n] = more.values[row, :n]


class Rotary(nn.Module):
    """Rotary positions (Su et al. 2021), halves rotated as in LLaMA."""

    inverse: Tensor

    def __init__(self, dim: int, theta: float) -> None:
        super().__init__()
        inverse = theta ** -(torch.arange(0, dim, 2).float() / dim)
        self.register_buffer("inverse", torch.cat([inverse, inverse]), persistent=False)

    def forward(self, positions: Tensor) -> Turn:
        """How integer positions [...] turn what stands there: [..., 1, D] each."""
        angle = (positions[..., None].float() * self.inverse)[..., None, :]
        return Turn(angle.cos(), angle.sin())


@dataclass
class Turn:
    """Cosines and sines of positions [..., 1, D]."""

    cos: Tensor
    sin: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., heads, D] turned."""
        a, b = x.chunk(2, -1)
        return torch.addcmul(x * self.cos.to(x.dtype), torch.cat([-b, a], -1), self.sin.to(x.dtype))


class Layer(nn.Module):
    """Pre-norm attention and gated MLP. Context entries enter by their keys and values only."""

    _packed: tuple[Packed, Packed] | None = None  # query, key and value; gate and up

    def __init__(self, config: Sizes) -> None:
        super().__init__()
        c, H = config, config.hidden
        self.heads, self.kv_heads, self.dim = c.heads, c.kv_heads, c.head_dim
        self.input_norm: nn.Module = nn.RMSNorm(H, c.eps)
        self.mlp_norm = nn.RMSNorm(H, c.eps)
        self.q_proj = Linear(H, c.heads * c.head_dim, bias=False)
        self.k_proj = Linear(H, c.kv_heads * c.head_dim, bias=False)
        self.v_proj = Linear(H, c.kv_heads * c.head_dim, bias=False)
        self.o_proj = Linear(c.heads * c.head_dim, H, bias=False)
        self.gate_proj, self.up_proj = (nn.Linear(H, c.intermediate, bias=False) for _ in range(2))
        self.down_proj = Linear(c.intermediate, H, bias=False)

    def pack(self, dtype: torch.dtype) -> None:
        """Packs together the products that read the same input; see `msd.backends.packed.Linear`."""
        if can_pack(self.q_proj.weight):
            qkv = Packed.of(self.q_proj, self.k_proj, self.v_proj, dtype=dtype)
            self._packed = qkv, Packed.of(self.gate_proj, self.up_proj, dtype=dtype)

    def keys(self, x: Tensor, turn: Turn) -> Keys:
        """Keys and values of entries x [..., H] whose positions are `turn`: [..., K, D] each."""
        return self._keys(self.input_norm(x), turn)

    def _keys(self, n: Tensor, turn: Turn) -> Keys:
        k, v = (p(n).unflatten(-1, (self.kv_heads, self.dim)) for p in (self.k_proj, self.v_proj))
        return Keys(turn(k), v)

    def forward(
        self,
        x: Tensor,
        turn: Turn,
        context: Keys,
        visible: Tensor,
        past: Keys | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Keys | None]:
        """Queries x [B, A, n, H] -> ([B, A, n, H], keys of `past` and these queries).

        visible: [B, A, S] bool, what of the context an anchor sees. mask: [B, A, n, m+n] bool, which of the drafts
        before (`past`, m of them) and of the queries themselves a query sees; None: the queries are entries of the
        context, and there are no others.
        """
        q, own = self._project(self.input_norm(x), turn, mask is not None)
        if own is not None and past is not None:
            own = past.then(own)
        attend = self._attend_one if x.shape[1] == 1 and not torch.is_grad_enabled() else self._attend
        x = self._carried(x) + self.o_proj(attend(q, context, visible, own, mask))
        m = self.mlp_norm(x)
        packed = self._packed if not torch.is_grad_enabled() else None
        gate, up = packed[1](m).chunk(2, -1) if packed else (self.gate_proj(m), self.up_proj(m))
        return x + self.down_proj(F.silu(gate) * up), own

    def _carried(self, x: Tensor) -> Tensor:
        """The part of the input that is added to the attention's output."""
        return x

    def _project(self, n: Tensor, turn: Turn, with_keys: bool) -> tuple[Tensor, Keys | None]:
        """(queries [B, A, n, heads, D], their own keys and values)."""
        if not with_keys:
            return turn(self.q_proj(n).unflatten(-1, (self.heads, self.dim))), None
        if self._packed is not None and not torch.is_grad_enabled():
            qkv = self._packed[0](n)
        else:
            qkv = torch.cat([self.q_proj(n), self.k_proj(n), self.v_proj(n)], -1)
        qkv = qkv.unflatten(-1, (-1, self.dim))
        q, k = turn(qkv[..., : -self.kv_heads, :]).split((self.heads, self.kv_heads), -2)
        return q, Keys(k, qkv[..., -self.kv_heads :, :])

    def _attend(self, q: Tensor, context: Keys, visible: Tensor, own: Keys | None, mask: Tensor | None) -> Tensor:
        """[B, A, n, heads * D]: attention of every anchor's queries, the context's keys shared by all of them."""
        B, A, n = q.shape[:3]
        S = visible.shape[-1]
        q = q.unflatten(-2, (self.kv_heads, -1)) * self.dim**-0.5  # [B, A, n, K, G, D]
        flat = q.permute(0, 3, 1, 2, 4, 5).reshape(B, self.kv_heads, -1, self.dim)  # [B, K, A*n*G, D]
        scores = (flat @ context.keys.permute(0, 2, 3, 1)).view(B, self.kv_heads, A, n, -1, S)
        scores = scores.masked_fill(~visible[:, None, :, None, None], torch.finfo(scores.dtype).min)
        if own is not None and mask is not None:
            below = torch.einsum("bankgd,bamkd->bkangm", q, own.keys)
            below = below.masked_fill(~mask[:, None, :, :, None], torch.finfo(scores.dtype).min)
            scores = torch.cat([scores, below], -1)
        weights = scores.softmax(-1)
        out = weights[..., :S].reshape(B, self.kv_heads, -1, S) @ context.values.transpose(1, 2)
        out = out.view(B, self.kv_heads, A, n, -1, self.dim)
        if own is not None:
            out = out + torch.einsum("bkangm,bamkd->bkangd", weights[..., S:], own.values)
        return out.permute(0, 2, 3, 1, 4, 5).reshape(B, A, n, -1)

    def _attend_one(self, q: Tensor, context: Keys, visible: Tensor, own: Keys | None, mask: Tensor | None) -> Tensor:
        """The same for one anchor per row: context and drafts are one sequence, a group's queries rows of one head."""
        B, _, n = q.shape[:3]
        k, v, seen = context.keys, context.values, visible[:, :, None].expand(-1, -1, n, -1)
        if own is not None and mask is not None:
            k, v = torch.cat([k, own.keys[:, 0]], 1), torch.cat([v, own.values[:, 0]], 1)
            seen = torch.cat([seen, mask], -1)
        q = q[:, 0].unflatten(-2, (self.kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B, K, G, n, D]
        groups = q.shape[2]
        out = F.scaled_dot_product_attention(
            q.flatten(2, 3), k.transpose(1, 2), v.transpose(1, 2), attn_mask=seen.repeat(1, 1, groups, 1)
        )
        return out.unflatten(2, (groups, n)).permute(0, 3, 1, 2, 4).reshape(B, 1, n, -1)


def step(
    layers: Iterable[Layer],
    x: Tensor,
    turn: Turn,
    context: Sequence[Keys],
    visible: Tensor,
    own: list[Keys] | None,
    mask: Tensor | None,
) -> tuple[Tensor, list[Keys] | None]:
    """n queries x [B, A, n, H] through all layers -> (states [B, A, n, H], drafts' keys with theirs added).

    own: keys of the drafts before. mask: [B, A, n, m+n] bool; None: the queries are entries of the context.
    """
    grown = []
    for i, (layer, keys) in enumerate(zip(layers, context, strict=True)):
        x, mine = layer(x, turn, keys, visible, own[i] if own else None, mask)
        grown.append(mine)
    return x, None if mask is None else grown


class BareLayer(Layer):
    """EAGLE-1 and 2: the attention's input is not normalised (arXiv 2401.15077, released model)."""

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
    """EAGLE-3 (arXiv 2503.01840, section 3.1): attention reads [norm(e); norm(h)]; h is added to its output.

    Inputs are [e; h] [..., 2H]; output states are [..., H].
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
    """DFlash (arXiv 2602.06036, section 3): the context's inputs are normalised once for all layers, not here."""

    def keys(self, x: Tensor, turn: Turn) -> Keys:
        """Keys and values of context entries x [..., H]."""
        return self._keys(x, turn)


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

    Auxiliary tokens are those that only the drafter sees, such as those of a second sensor. They come in groups (frames
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
                f"the drafter was trained with auxiliary tokens of shape {list(self.places.shape)}, not "
                f"{list(tokens.shape[1:])}; encode them as for its training"
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
