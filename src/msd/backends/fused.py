"""A whole decoder pass in few steps: packed products, merged where they read the same input, residuals added inside.

Serves decoders of the LLaMA kind (RMSNorm, rotary positions, grouped attention, gated SiLU): the ones whose parts are
exactly those named in `PARTS`. It computes what the model's own `forward` computes, up to rounding, from the same
weights and into the same cache; whoever uses it first compares the two (`msd.backends.choose`).

Three things save steps beside packing. Query and key rows are reordered so that a rotary position is one complex
product; the copies that follow anyway put both back, so that the cache holds keys as the model itself writes them. The
queries of a group share keys and values, so they enter attention as more rows of one head. Normed inputs go once
through query, key and value together, and once through gate and up.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2CLS
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from msd.backends.packed import Packed, can_pack
from msd.backends.trial import Dispatcher

DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model")
PARTS = {
    "input_layernorm.weight", "post_attention_layernorm.weight",
    "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
    "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
}  # fmt: skip
BIASES = {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"}
CLASSES = {"": "Model", "self_attn": "Attention", "mlp": "MLP", "norm": "RMSNorm"} | dict.fromkeys(
    ("input_layernorm", "post_attention_layernorm"), "RMSNorm"
)  # of a module by its name: the family's class
OTHERS = {"layers": nn.ModuleList, "act_fn": ACT2CLS["silu"]} | dict.fromkeys(
    [name.split(".")[1] for name in PARTS if "_proj" in name], nn.Linear
)
CALLED = ("embed_tokens", "rotary_emb")  # do their own work
FUNCTIONS = ("eager_attention_forward", "apply_rotary_pos_emb", "repeat_kv")
MANY = 512  # rows from which attention keeps its heads apart: a mask of groups would be large


class UnsupportedDecoderError(Exception):
    """Why a decoder has no fused pass."""


class _Layer:
    """One decoder layer's packed weights, its norms as they are, and the numbers it goes by."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        a, m = layer.self_attn, layer.mlp
        self.dim, self.scale, self.slot = a.head_dim, float(a.scaling), a.layer_idx
        self.heads, self.kv_heads = (proj.weight.shape[0] // self.dim for proj in (a.q_proj, a.k_proj))
        self.groups = a.num_key_value_groups
        self.input_norm, self.mlp_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.qkv = Packed(
            [_paired(a.q_proj.weight, self.dim), _paired(a.k_proj.weight, self.dim), a.v_proj.weight],
            [] if a.v_proj.bias is None
            else [_paired(a.q_proj.bias, self.dim), _paired(a.k_proj.bias, self.dim), a.v_proj.bias],
            dtype,
        )  # fmt: skip
        self.out, self.gate_up, self.down = (
            Packed.of(*linears, dtype=dtype) for linears in ((a.o_proj,), (m.gate_proj, m.up_proj), (m.down_proj,))
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """What all layers of a decoder have alike."""
        return self.heads, self.kv_heads, self.dim


class FusedDecoder:
    """The fused pass of one decoder as it is now; `forward` takes what the decoder's own takes.

    UnsupportedDecoderError says why there is none. dtype: of the products; what layers add up stays float32.
    `keep(index, states)` is given the hidden states before every layer and after the final norm, numbered as
    `transformers` numbers them.
    """

    def __init__(self, decoder: Any, dtype: torch.dtype = torch.float32) -> None:
        _refuse(decoder)
        self.decoder = decoder
        self.layers = [_Layer(layer, dtype) for layer in decoder.layers[: decoder.config.num_hidden_layers]]
        self.norm = _norm(decoder.norm)
        first = self.layers[0]
        self.heads, self.kv_heads, self.dim = first.shape
        if any(x.shape != first.shape or x.heads != x.kv_heads * x.groups for x in self.layers):
            raise UnsupportedDecoderError("its layers differ in their attention heads")
        if len({x.slot for x in self.layers}) < len(self.layers):
            raise UnsupportedDecoderError("a layer of it stands in two places")

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        keep: Any = None,
        **_ignored: Any,
    ) -> BaseModelOutputWithPast:
        """See the class. attention_mask: [B, S], or additive [B, 1, N, S]; causal without one."""
        h = self.decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, N = h.shape[:2]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + N, device=h.device)[None]
        cos, sin = self.decoder.rotary_emb(h, position_ids=position_ids)
        half = self.dim // 2
        turn = torch.complex(cos[..., :half].float(), sin[..., :half].float())[:, :, None]
        mask = attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None
        if mask is None:
            mask = _causal(h, past, attention_mask)
        groups = self.heads // self.kv_heads
        grouped = N < MANY
        if grouped and mask is not None:
            mask = mask.repeat(1, 1, groups, 1)
        for i, layer in enumerate(self.layers):
            if keep is not None:
                keep(i, h)
            x = layer.qkv(layer.input_norm(h)).view(B, N, self.heads + 2 * self.kv_heads, self.dim)
            turned = x[:, :, : self.heads + self.kv_heads].unflatten(-1, (half, 2))
            turned = torch.view_as_real(torch.view_as_complex(turned) * turn).transpose(-1, -2)  # [B, N, H, 2, half]
            k, v = turned[:, :, self.heads :].flatten(-2).transpose(1, 2), x[:, :, -self.kv_heads :].transpose(1, 2)
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, layer.slot)
            q = turned[:, :, : self.heads]
            if grouped:
                q = q.unflatten(2, (self.kv_heads, groups)).permute(0, 2, 3, 1, 4, 5)
                q = q.reshape(B, self.kv_heads, groups * N, self.dim)
                o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.scale)
                o = o.view(B, self.kv_heads, groups, N, self.dim).permute(0, 3, 1, 2, 4)
            else:
                q = q.flatten(-2).transpose(1, 2)
                o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=layer.scale, enable_gqa=groups > 1)
                o = o.transpose(1, 2)
            h = layer.out.plus(o.reshape(B, N, -1), h)
            gate, up = layer.gate_up(layer.mlp_norm(h)).chunk(2, -1)
            h = layer.down.plus(F.silu(gate).mul_(up), h)
        h = self.norm(h)
        if keep is not None:
            keep(len(self.layers), h)
        return BaseModelOutputWithPast(last_hidden_state=h, past_key_values=past_key_values)


def _paired(rows: Tensor, dim: int) -> Tensor:
    """Rows of q or k (or their bias) so that what a rotary position turns together lies together, head by head."""
    return rows.detach().unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).reshape(rows.shape)


def _causal(h: Tensor, past: int, present: Tensor | None) -> Tensor | None:
    """Additive [B or 1, 1, N, S] mask of N rows after `past` slots, or None where all is seen.

    present: [B, S], 0 at padding.
    """
    N, S = h.shape[1], past + h.shape[1]
    whole = present is None or bool(present.all())
    if N == 1 and whole:
        return None
    column = torch.arange(S, device=h.device)
    seen = (column <= torch.arange(past, S, device=h.device)[:, None])[None, None]
    if not whole:
        assert present is not None
        seen = seen & (present[:, None, None, :S] != 0)
    return torch.zeros(seen.shape, dtype=h.dtype, device=h.device).masked_fill_(~seen, torch.finfo(h.dtype).min)


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """An RMSNorm in one step."""
    weight, eps = norm.weight, norm.variance_epsilon
    return lambda h: F.rms_norm(h, weight.shape, weight, eps)


def code(decoder: Any) -> list[Any]:
    """Functions that layers of a decoder call by name, which somebody may have replaced."""
    library = sys.modules[type(decoder).__module__]
    attention = ALL_ATTENTION_FUNCTIONS.get(decoder.config._attn_implementation)
    return [attention, *(getattr(library, name, None) for name in FUNCTIONS)]


def _refuse(decoder: Any) -> None:
    """UnsupportedDecoderError, unless the decoder is one that `forward` computes: in kind, parts and code."""
    kind, c = type(decoder).__name__, decoder.config
    if kind not in DECODERS:
        raise UnsupportedDecoderError(f"decoders of class {kind} have no fused pass")
    if c.hidden_act != "silu":
        raise UnsupportedDecoderError(f"activation '{c.hidden_act}' has no fused pass")
    if getattr(c, "sliding_window", None) and getattr(c, "use_sliding_window", True):
        raise UnsupportedDecoderError("sliding windows have no fused pass")
    if c._attn_implementation not in ("sdpa", "eager"):
        raise UnsupportedDecoderError(f"attention '{c._attn_implementation}' has no fused pass")
    if any(f is not None and not f.__module__.startswith("transformers.") for f in code(decoder)):
        raise UnsupportedDecoderError("a function that its layers call has been replaced")
    for layer in decoder.layers:
        names = {name for name, _ in layer.named_parameters()}
        if names not in (PARTS, PARTS | BIASES):
            raise UnsupportedDecoderError(
                f"a decoder layer has parts that are not fused: {', '.join(sorted(names ^ PARTS))}"
            )
    for name, part in decoder.named_modules():
        if name.partition(".")[0] not in CALLED:
            _refuse_part(decoder, name, part)
    if not decoder.layers or decoder.training:
        raise UnsupportedDecoderError("it is in training mode" if decoder.layers else "it has no layers")


def _refuse_part(decoder: Any, name: str, part: nn.Module) -> None:
    """The same of one of its modules, of which `forward` does the work."""
    role = name.rpartition(".")[2]
    library, kind = sys.modules[type(decoder).__module__], "DecoderLayer" if role.isdigit() else CLASSES.get(role)
    known = getattr(library, type(decoder).__name__.removesuffix("Model") + kind, None) if kind else OTHERS.get(role)
    if type(part) is not known:
        raise UnsupportedDecoderError(f"{name} is a {type(part).__name__}, which has no fused pass")
    held = [tensor for tensor in part._parameters.values() if tensor is not None]
    if not all(can_pack(t) if t.dim() == 2 else t.dtype == torch.float32 and t.device.type == "cpu" for t in held):
        raise UnsupportedDecoderError(f"{name} is no float32 layer on a CPU with oneDNN")
    if isinstance(part, nn.ModuleList):
        return
    replaced = not isinstance(vars(part).get("forward"), Dispatcher | None)
    if replaced or part._compiled_call_impl or type(part).forward.__qualname__ != f"{type(part).__name__}.forward":
        raise UnsupportedDecoderError(f"the forward of its {type(part).__name__} has been replaced")
