"""Decoder layers of drafters: attention over a shared context and over the draft tokens below an anchor.

An *anchor* is a position that a draft starts from. Its n queries attend to the context up to the anchor and to the m
draft tokens that `mask` allows. Context keys and values are computed directly from target features (context injection,
DFlash, arXiv 2602.06036, section 3). Decoding has one anchor per row, the root; training has many over one context.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from msd.backends.norms import RMSNorm, rms_norm
from msd.backends.packed import Linear, Packed, can_pack
from msd.drafters.toolkit.checkpoint import DrafterConfig
from msd.drafters.toolkit.rotary import axes, frequencies
from msd.drafters.toolkit.variant import PLAIN, Variant
from msd.errors import UserError

Cosines = tuple[Tensor, Tensor]  # of positions [...]: cosines, and sines with the signs of `rotate`, [..., 1, D] each


class TapNorm(nn.Module):
    """Normalises each of T tap states separately (RMSNorm): layers differ in scale by orders of magnitude."""

    def __init__(self, taps: int, hidden: int, eps: float) -> None:
        super().__init__()
        self.taps, self.eps = taps, eps
        self.weight = nn.Parameter(torch.ones(taps * hidden))

    def forward(self, states: Tensor) -> Tensor:
        """states [..., T*H] -> [..., T*H]."""
        return rms_norm(states.unflatten(-1, (self.taps, -1)), None, self.eps).flatten(-2) * self.weight


@dataclass
class KeyValues:
    """Keys and values with K key heads of size D: [B, S, K, D] of a context, or [B, A, m, K, D] of draft tokens.

    room: the larger buffer that a context is the beginning of; None without one.
    """

    keys: Tensor
    values: Tensor
    room: KeyValues | None = None

    def first(self, used: int) -> KeyValues:
        """Returns the first `used` entries of this buffer."""
        return KeyValues(self.keys[:, :used], self.values[:, :used], self)

    def followed_by(self, keys: Tensor, values: Tensor) -> KeyValues:
        """Returns this context followed by keys and values [B, n, K, D]; they are written to its buffer if they fit."""
        start, end = self.keys.shape[1], self.keys.shape[1] + keys.shape[1]
        if self.room is None or self.room.keys.shape[1] < end:
            return KeyValues(torch.cat([self.keys, keys], 1), torch.cat([self.values, values], 1))
        self.room.keys[:, start:end], self.room.values[:, start:end] = keys, values
        return self.room.first(end)

    def write(self, new: KeyValues, start: Sequence[int], count: Sequence[int]) -> None:
        """Copies the first `count[row]` new context entries to `start[row]` of this buffer, in place."""
        for row, (first, n) in enumerate(zip(start, count, strict=True)):
            self.keys[row, first : first + n] = new.keys[row, :n]
            self.values[row, first : first + n] = new.values[row, :n]

    def joined(self, *others: KeyValues) -> KeyValues:
        """The rows of all context buffers, in this order; shorter ones are padded with zeros."""

        def stacked(buffers: list[Tensor]) -> Tensor:
            rows, room = sum(map(len, buffers)), max(buffer.shape[1] for buffer in buffers)
            out = buffers[0].new_zeros(rows, room, *buffers[0].shape[2:])
            for part, buffer in zip(out.split([len(b) for b in buffers]), buffers, strict=True):
                part[:, : buffer.shape[1]] = buffer
            return out

        parts = (self, *others)
        return KeyValues(stacked([part.keys for part in parts]), stacked([part.values for part in parts]))


class Rotary(nn.Module):
    """Rotary position embedding (Su et al. 2021); rotates halves as LLaMA does. v: a published head's."""

    inverse: Tensor
    signs: Tensor  # [D]: of the sines
    axis: Tensor  # [D] int64: the M-RoPE axis of each frequency

    def __init__(self, dim: int, theta: float, v: Variant = PLAIN) -> None:
        super().__init__()
        inverse, self.scale = frequencies(dim, theta, v.rope)
        self.sectioned = bool(v.sections)
        self.register_buffer("inverse", torch.cat([inverse, inverse]), persistent=False)
        signs = torch.ones_like(inverse) * self.scale
        self.register_buffer("signs", torch.cat([-signs, signs]), persistent=False)
        self.register_buffer("axis", axes(dim // 2, v.sections, v.interleaved).repeat(2), persistent=False)

    def forward(self, positions: Tensor) -> Cosines:
        """Computes `Cosines` of integer positions [...]."""
        return self._turned(positions[..., None].float() * self.inverse)

    def by_axis(self, positions: Tensor) -> Cosines:
        """Computes them of the three positions [..., 3] that each token has under M-RoPE."""
        return self._turned(positions[..., self.axis].float() * self.inverse)

    def _turned(self, angle: Tensor) -> Cosines:
        angle = angle[..., None, :]
        cos = angle.cos()
        return cos if self.scale == 1.0 else cos * self.scale, angle.sin() * self.signs


def rotate(x: Tensor, rotary: Cosines) -> Tensor:
    """Rotates queries or keys x [..., heads, D] by the result of `Rotary`: [a; b] cos + [-b; a] sin."""
    cos, sin = rotary
    return torch.addcmul(x * cos.to(x.dtype), x.roll(x.shape[-1] // 2, -1), sin.to(x.dtype))


class Layer(nn.Module):
    """Pre-norm attention and gated MLP. Context entries enter only as keys and values.

    normalizes_context: whether `input_norm` applies to context entries as well as to queries.
    """

    normalizes_context: ClassVar[bool] = True
    _packed: tuple[Packed, Packed, Packed] | None = None  # query, key and value; gate and up; key and value

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        c, H = config, config.hidden
        self.heads, self.kv_heads, self.dim = c.heads, c.kv_heads, c.head_dim
        self.input_norm: nn.Module = RMSNorm(H, c.eps)
        self.mlp_norm = RMSNorm(H, c.eps)
        self._add_projections(H, c)
        self.o_proj = Linear(c.heads * c.head_dim, H, bias=c.variant.o_bias)
        self.gate_proj, self.up_proj = (nn.Linear(H, c.intermediate, bias=False) for _ in range(2))
        self.down_proj = Linear(c.intermediate, H, bias=False)
        normed = c.variant.head_norm
        self.q_norm = RMSNorm(c.head_dim, c.eps) if normed else None
        self.k_norm = RMSNorm(c.head_dim, c.eps) if normed else None

    def _add_projections(self, width: int, c: DrafterConfig) -> None:
        """Creates the projections of inputs [..., width] to queries, keys and values."""
        self.q_proj = Linear(width, c.heads * c.head_dim, bias=c.variant.qkv_bias)
        self.k_proj = nn.Linear(width, c.kv_heads * c.head_dim, bias=c.variant.qkv_bias)
        self.v_proj = nn.Linear(width, c.kv_heads * c.head_dim, bias=c.variant.qkv_bias)

    def pack(self, dtype: torch.dtype) -> None:
        """Packs together the products that read the same input; see `msd.backends.packed.Linear`."""
        if can_pack(self.q_proj.weight):
            qkv = Packed.of(self.q_proj, self.k_proj, self.v_proj, dtype=dtype)
            gate_up = Packed.of(self.gate_proj, self.up_proj, dtype=dtype)
            self._packed = qkv, gate_up, Packed.of(self.k_proj, self.v_proj, dtype=dtype)

    def key_values(self, x: Tensor, rotary: Cosines) -> KeyValues:
        """Computes keys and values [..., K, D] of context entries x [..., H]."""
        n = self.input_norm(x) if self.normalizes_context else x
        packed = self._packed if not torch.is_grad_enabled() else None
        kv = packed[2](n) if packed else torch.cat([self.k_proj(n), self.v_proj(n)], -1)
        k, v = kv.unflatten(-1, (-1, self.dim)).chunk(2, -2)
        return KeyValues(rotate(k if self.k_norm is None else self.k_norm(k), rotary), v)

    def forward(
        self,
        x: Tensor,
        rotary: Cosines,
        context: KeyValues,
        visible: Tensor,
        draft: KeyValues | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, KeyValues | None]:
        """Transforms queries x [B, A, n, ...]; returns (states [B, A, n, H], `draft` extended by the queries).

        visible: [B, A, S] bool, the context entries that an anchor sees. draft: of the m earlier draft tokens.
        mask: [B, A, n, m+n] bool, the draft tokens (earlier ones, then the queries) that a query sees. Without a mask
        the queries are context entries, which have keys and values already: the second result is None.
        """
        q, new = self._project(self.input_norm(x), rotary, mask is not None)
        if new is not None and draft is not None:
            new = KeyValues(torch.cat([draft.keys, new.keys], 2), torch.cat([draft.values, new.values], 2))
        return self._finish(x, self._attend(q, context, visible, new, mask)), new

    def draft(
        self, x: Tensor, rotary: Cosines, context: KeyValues, seen: Tensor | None, stored: bool
    ) -> tuple[Tensor, KeyValues]:
        """`forward` for one anchor per row: queries x [B, n, ...]; returns (states [B, n, H], extended context).

        stored: whether the queries are context entries, which have keys and values already. seen: [B, n, all] bool, the
        entries of the context and draft tokens that a query sees, the queries included; None: all.
        """
        q, new = self._project(self.input_norm(x), rotary, not stored)
        if new is not None:
            context = context.followed_by(new.keys, new.values)
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), context.keys.transpose(1, 2), context.values.transpose(1, 2),
            attn_mask=None if seen is None else seen[:, None], enable_gqa=True,
        )  # fmt: skip
        return self._finish(x, out.transpose(1, 2).flatten(2)), context

    def _finish(self, x: Tensor, attended: Tensor) -> Tensor:
        """Adds the attention output and the gated MLP to the residual of inputs x."""
        x = self.o_proj.plus(attended, self._residual(x))
        m = self.mlp_norm(x)
        packed = self._packed if not torch.is_grad_enabled() else None
        gate, up = packed[1](m).chunk(2, -1) if packed else (self.gate_proj(m), self.up_proj(m))
        return self.down_proj.plus(F.silu(gate) * up, x)

    def _residual(self, x: Tensor) -> Tensor:
        """Returns the part of the input that is added to the attention output."""
        return x

    def _project(self, n: Tensor, rotary: Cosines, with_keys: bool) -> tuple[Tensor, KeyValues | None]:
        """Returns (queries [..., n, heads, D], their keys and values); n [..., n, H] are the normalised inputs."""
        if not with_keys:
            q = self.q_proj(n).unflatten(-1, (self.heads, self.dim))
            return rotate(q if self.q_norm is None else self.q_norm(q), rotary), None
        if self._packed is not None and not torch.is_grad_enabled():
            qkv = self._packed[0](n)
        else:
            qkv = torch.cat([self.q_proj(n), self.k_proj(n), self.v_proj(n)], -1)
        qkv = qkv.unflatten(-1, (-1, self.dim))
        q, k = rotate(self._head_normed(qkv[..., : -self.kv_heads, :]), rotary).split((self.heads, self.kv_heads), -2)
        return q, KeyValues(k, qkv[..., -self.kv_heads :, :])

    def _head_normed(self, qk: Tensor) -> Tensor:
        """Normalises queries and keys [..., heads + kv_heads, D], each head alone, where the variant does."""
        if self.q_norm is None or self.k_norm is None:
            return qk
        return torch.cat([self.q_norm(qk[..., : self.heads, :]), self.k_norm(qk[..., self.heads :, :])], -2)

    def _attend(
        self, q: Tensor, context: KeyValues, visible: Tensor, draft: KeyValues | None, mask: Tensor | None
    ) -> Tensor:
        """Attention [B, A, n, heads * D] of the queries of all anchors, which share the context's keys."""
        B, A, n = q.shape[:3]
        S = visible.shape[-1]
        q = q.unflatten(-2, (self.kv_heads, -1)) * self.dim**-0.5  # [B, A, n, K, G, D]
        flat = q.permute(0, 3, 1, 2, 4, 5).reshape(B, self.kv_heads, -1, self.dim)  # [B, K, A*n*G, D]
        scores = (flat @ context.keys.permute(0, 2, 3, 1)).view(B, self.kv_heads, A, n, -1, S)
        scores = scores.masked_fill(~visible[:, None, :, None, None], torch.finfo(scores.dtype).min)
        if draft is not None and mask is not None:
            draft_scores = torch.einsum("bankgd,bamkd->bkangm", q, draft.keys)
            draft_scores = draft_scores.masked_fill(~mask[:, None, :, :, None], torch.finfo(scores.dtype).min)
            scores = torch.cat([scores, draft_scores], -1)
        weights = scores.softmax(-1)
        out = weights[..., :S].reshape(B, self.kv_heads, -1, S) @ context.values.transpose(1, 2)
        out = out.view(B, self.kv_heads, A, n, -1, self.dim)
        if draft is not None:
            out = out + torch.einsum("bkangm,bamkd->bkangd", weights[..., S:], draft.values)
        return out.permute(0, 2, 3, 1, 4, 5).reshape(B, A, n, -1)


class BareLayer(Layer):
    """The layer of EAGLE-1 and 2: no norm before the attention (arXiv 2401.15077, released model)."""

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        if not config.variant.input_norm:
            self.input_norm = nn.Identity()


class PairNorm(nn.Module):
    """Normalises both halves of [e; h] [..., 2H] separately."""

    def __init__(self, hidden: int, eps: float) -> None:
        super().__init__()
        self.word, self.feature = RMSNorm(hidden, eps), RMSNorm(hidden, eps)

    def forward(self, x: Tensor) -> Tensor:
        """[e; h] -> [norm(e); norm(h)], both [..., 2H]."""
        weight = torch.cat([self.word.weight, self.feature.weight])
        return rms_norm(x.unflatten(-1, (2, -1)), None, self.word.eps).flatten(-2) * weight


class PairLayer(Layer):
    """The layer of EAGLE-3 (arXiv 2503.01840, section 3.1): attention reads [norm(e); norm(h)]; the residual is h.

    Inputs are [e; h] [..., 2H]; output states are [..., H].
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__(config)
        self.input_norm: PairNorm = PairNorm(config.hidden, config.eps)
        self.normed_residual = config.variant.residual_norm
        self._add_projections(2 * config.hidden, config)

    def _residual(self, x: Tensor) -> Tensor:
        feature = x.chunk(2, -1)[1]
        return self.input_norm.feature(feature) if self.normed_residual else feature


class InjectedLayer(Layer):
    """The layer of DFlash (arXiv 2602.06036, section 3): context entries are normalised once, before all layers."""

    normalizes_context = False


class Adaptor(nn.Module):
    """Compresses the embeddings of an image with learned queries: [I, n, H] -> [I, queries, H]."""

    def __init__(self, hidden: int, heads: int, queries: int, bias: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.q = nn.Parameter(torch.randn(queries, heads, hidden // heads) * (hidden // heads) ** -0.5)
        self.k_proj, self.v_proj = Linear(hidden, hidden, bias=bias), Linear(hidden, hidden, bias=bias)
        self.o_proj = Linear(hidden, hidden, bias=False)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """states [I, n, H], mask [I, n] bool (False at padding) -> [I, queries, H]."""
        k, v = self.k_proj(states), self.v_proj(states)
        return self.o_proj(cross_attention(self.q.flatten(1), k, v, self.heads, mask[:, None, None])).to(states.dtype)


class VisionAdaptor(nn.Module):
    """Compresses the tap states of an image [I, n, T*H] to `kept` tokens and one global vector.

    It reads the target's states at the image positions, which every target has, instead of the projector's output.
    """

    def __init__(self, config: DrafterConfig, taps: int, kept: int) -> None:
        super().__init__()
        H, wide = config.hidden, config.hidden * taps
        self.heads = config.heads
        self.norm = TapNorm(taps, H, config.eps)
        self.queries = nn.Parameter(torch.randn(kept + 1, H) * H**-0.5)
        self.k_proj, self.v_proj = Linear(wide, H, bias=False), Linear(wide, H, bias=False)
        self.o_proj = Linear(H, H, bias=False)

    def forward(self, states: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """states [I, n, T*H], mask [I, n] bool (False at padding) -> (tokens [I, kept, H], global vector [I, H])."""
        n = self.norm(states)
        out = self.o_proj(
            cross_attention(self.queries, self.k_proj(n), self.v_proj(n), self.heads, mask[:, None, None])
        )
        return out[:, :-1], out[:, -1]


@dataclass
class Seen:
    """The keys and values [B, P, H] of the P image tokens of each row that a `ReadOut` attends to.

    mask: [B, P] bool, False at padding. The first token of each row is a zero, for rows without an image.
    """

    keys: Tensor
    values: Tensor
    mask: Tensor

    def of(self, rows: list[int]) -> Seen:
        """Selects rows."""
        return Seen(self.keys[rows], self.values[rows], self.mask[rows])

    def joined(self, *others: Seen) -> Seen:
        """The rows of all, in this order; shorter ones are padded."""
        rows = [row for part in (self, *others) for row in zip(part.keys, part.values, part.mask, strict=True)]
        return Seen(*(pad_sequence(list(each), batch_first=True) for each in zip(*rows, strict=True)))


class ReadOut(nn.Module):
    """Attends once from draft states to the image's tokens, just before the output layer.

    It is gated, and initially closed (Flamingo, arXiv 2204.14198, section 2.2).
    """

    def __init__(self, config: DrafterConfig) -> None:
        super().__init__()
        H, self.heads = config.hidden, config.heads
        self.norm = RMSNorm(H, config.eps)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (Linear(H, H, bias=False) for _ in range(4))
        self.gate = nn.Parameter(torch.zeros(1))

    def read(self, features: Tensor, mask: Tensor) -> Seen:
        """features [B, P, H] of image tokens, mask [B, P] bool (False at padding) -> their keys and values."""
        keys, values = (F.pad(proj(features), (0, 0, 1, 0)) for proj in (self.k_proj, self.v_proj))
        return Seen(keys, values, F.pad(mask, (1, 0), value=True))

    def forward(self, states: Tensor, seen: Seen) -> Tensor:
        """states [B, ..., H] -> [B, ..., H]."""
        queries = self.q_proj(self.norm(states)).flatten(1, -2)
        out = cross_attention(queries, seen.keys, seen.values, self.heads, seen.mask[:, None, None])
        return states + self.gate.tanh() * self.o_proj(out).view_as(states)


class AuxiliaryAdaptor(nn.Module):
    """Compresses auxiliary tokens [B, E, H] to K tokens and one global vector per row.

    The tokens form groups of fixed size (frames in time, cells in space), concatenated along E. Each group has its own
    learned queries; the query of the global vector reads all. groups: (tokens of the group, tokens kept of it) each.
    """

    mask: Tensor  # [K+1, E] bool: the tokens that each query reads

    def __init__(self, config: DrafterConfig, groups: tuple[tuple[int, int], ...]) -> None:
        super().__init__()
        H = config.hidden
        size, kept = (sum(group[i] for group in groups) for i in (0, 1))
        self.heads = config.heads
        self.norm = RMSNorm(H, config.eps)
        self.places = nn.Parameter(torch.randn(size, H) * H**-0.5)
        self.queries = nn.Parameter(torch.randn(kept + 1, H) * H**-0.5)
        self.k_proj, self.v_proj = Linear(H, H, bias=False), Linear(H, H, bias=False)
        self.o_proj, self.whole = Linear(H, H, bias=False), Linear(H, H, bias=False)
        blocks = [torch.ones(k, n, dtype=torch.bool) for n, k in groups]
        mask = torch.cat([torch.block_diag(*blocks).bool(), torch.ones(1, size, dtype=torch.bool)])
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """tokens [B, E, H] -> (kept tokens [B, K, H], global vector [B, 1, H]); UserError for a wrong shape."""
        if tokens.shape[1:] != self.places.shape:
            raise UserError(
                f"the drafter was trained with auxiliary tokens of shape {list(self.places.shape)}, got "
                f"{list(tokens.shape[1:])}; encode them as for its training"
            )
        n = self.norm(tokens.to(self.places.dtype)) + self.places
        out = cross_attention(self.queries, self.k_proj(n), self.v_proj(n), self.heads, self.mask)
        return self.o_proj(out[:, :-1]), self.whole(out[:, -1:])


def cross_attention(queries: Tensor, keys: Tensor, values: Tensor, heads: int, mask: Tensor) -> Tensor:
    """Attention [I, Q, H] of queries [I, Q, H], or [Q, H] for all, over keys and values [I, n, H].

    mask: bool, broadcast to [I, heads, Q, n]; False is not read.
    """
    inputs = (queries.expand(len(keys), -1, -1), keys, values)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in inputs)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(-2)
