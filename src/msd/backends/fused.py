"""A decoder pass with fewer operators: packed products, merged where their input is the same, with residuals fused in.

Supports LLaMA-like decoders (RMSNorm, rotary positions, grouped attention, gated SiLU) whose modules are exactly those
in `PARTS`. The pass computes the same function as the model's own `forward`, up to rounding, with the same weights and
the same cache. `msd.backends` compares both before it uses this pass.

Three more things save operators. Rows of the query and key weights are reordered so that a rotary position is one
complex product; the copies that follow restore the model's order, so that the cache holds the model's own keys. Queries
of a group share keys and values, so they enter attention as further rows of one head. One product computes query, key
and value, and one computes gate and up.
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

from msd.backends.comparison import Dispatcher
from msd.backends.packed import Packed, can_pack

DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model")
PARTS = {
    "input_layernorm.weight", "post_attention_layernorm.weight",
    "self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight", "self_attn.o_proj.weight",
    "mlp.gate_proj.weight", "mlp.up_proj.weight", "mlp.down_proj.weight",
}  # fmt: skip
BIASES = {"self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"}
CLASSES = {"": "Model", "self_attn": "Attention", "mlp": "MLP", "norm": "RMSNorm"} | dict.fromkeys(
    ("input_layernorm", "post_attention_layernorm"), "RMSNorm"
)  # name of a module -> class name without the family's prefix
COMMON_CLASSES = {"layers": nn.ModuleList, "act_fn": ACT2CLS["silu"]} | dict.fromkeys(
    [name.split(".")[1] for name in PARTS if "_proj" in name], nn.Linear
)
CALLED = ("embed_tokens", "rotary_emb")  # modules that the fused pass calls
FUNCTIONS = ("eager_attention_forward", "apply_rotary_pos_emb", "repeat_kv")
MANY_ROWS = 512  # from here on attention does not merge heads, because the repeated mask would be large


class UnsupportedDecoderError(Exception):
    """The decoder has no fused pass; the message is the reason."""


class _Layer:
    """One decoder layer's packed weights, norms and sizes."""

    def __init__(self, layer: Any, dtype: torch.dtype) -> None:
        a, m = layer.self_attn, layer.mlp
        self.dim, self.scale, self.slot = a.head_dim, float(a.scaling), a.layer_idx
        self.heads, self.kv_heads = (proj.weight.shape[0] // self.dim for proj in (a.q_proj, a.k_proj))
        self.groups = a.num_key_value_groups
        self.input_norm, self.mlp_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.qkv = Packed(
            [_interleaved(a.q_proj.weight, self.dim), _interleaved(a.k_proj.weight, self.dim), a.v_proj.weight],
            [] if a.v_proj.bias is None
            else [_interleaved(a.q_proj.bias, self.dim), _interleaved(a.k_proj.bias, self.dim), a.v_proj.bias],
            dtype,
        )  # fmt: skip
        self.out, self.gate_up, self.down = (
            Packed.of(*linears, dtype=dtype) for linears in ((a.o_proj,), (m.gate_proj, m.up_proj), (m.down_proj,))
        )

    @property
    def shape(self) -> tuple[int, int, int]:
        """(heads, key/value heads, head dimension), which all layers of a decoder must share."""
        return self.heads, self.kv_heads, self.dim


class FusedDecoder:
    """The fused pass of one decoder with its current weights.

    dtype: of the products; the residual stream remains float32. UnsupportedDecoderError where there is no such pass.
    """

    def __init__(self, decoder: Any, dtype: torch.dtype = torch.float32) -> None:
        _check_supported(decoder)
        self.decoder = decoder
        self.layers = [_Layer(layer, dtype) for layer in decoder.layers[: decoder.config.num_hidden_layers]]
        self.norm = _norm(decoder.norm)
        first = self.layers[0]
        self.heads, self.kv_heads, self.dim = first.shape
        if any(x.shape != first.shape or x.heads != x.kv_heads * x.groups for x in self.layers):
            raise UnsupportedDecoderError("its layers differ in their attention heads")
        if len({x.slot for x in self.layers}) < len(self.layers):
            raise UnsupportedDecoderError("the same layer occurs twice in it")

    @torch.no_grad()
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        record: Any = None,
        **_ignored: Any,
    ) -> BaseModelOutputWithPast:
        """Computes the decoder's own `forward`.

        attention_mask: [B, S], or additive [B, 1, N, S]; causal without one. `record(index, states)` receives the
        hidden states [B, N, H] before each layer and after the final norm, with the indices of `transformers`.
        """
        h = self.decoder.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        B, N = h.shape[:2]
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        if position_ids is None:
            position_ids = torch.arange(past, past + N, device=h.device)[None]
        cos, sin = self.decoder.rotary_emb(h, position_ids=position_ids)
        half = self.dim // 2
        rotation = torch.complex(cos[..., :half].float(), sin[..., :half].float())[:, :, None]
        mask = attention_mask if attention_mask is not None and attention_mask.dim() == 4 else None
        if mask is None:
            mask = _causal(h, past, attention_mask)
        groups = self.heads // self.kv_heads
        grouped = N < MANY_ROWS
        if grouped and mask is not None:
            mask = mask.repeat(1, 1, groups, 1)
        for i, layer in enumerate(self.layers):
            if record is not None:
                record(i, h)
            x = layer.qkv(layer.input_norm(h)).view(B, N, self.heads + 2 * self.kv_heads, self.dim)
            rotated = x[:, :, : self.heads + self.kv_heads].unflatten(-1, (half, 2))
            rotated = torch.view_as_real(torch.view_as_complex(rotated) * rotation).transpose(
                -1, -2
            )  # [B, N, H, 2, half]
            k, v = rotated[:, :, self.heads :].flatten(-2).transpose(1, 2), x[:, :, -self.kv_heads :].transpose(1, 2)
            if past_key_values is not None:
                k, v = past_key_values.update(k, v, layer.slot)
            q = rotated[:, :, : self.heads]
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
        if record is not None:
            record(len(self.layers), h)
        return BaseModelOutputWithPast(last_hidden_state=h, past_key_values=past_key_values)


def _interleaved(rows: Tensor, dim: int) -> Tensor:
    """Rows of q or k (or their bias), reordered so that the two rows of each rotary pair are adjacent."""
    return rows.detach().unflatten(0, (-1, 2, dim // 2)).transpose(1, 2).reshape(rows.shape)


def _causal(h: Tensor, past: int, present: Tensor | None) -> Tensor | None:
    """Additive causal mask [B or 1, 1, N, S] of N rows after `past` slots; None for one row without padding.

    present: [B, S], 0 at padding.
    """
    N, S = h.shape[1], past + h.shape[1]
    whole = present is None or bool(present.all())
    if N == 1 and whole:
        return None
    column = torch.arange(S, device=h.device)
    visible = (column <= torch.arange(past, S, device=h.device)[:, None])[None, None]
    if not whole:
        assert present is not None
        visible = visible & (present[:, None, None, :S] != 0)
    return torch.zeros(visible.shape, dtype=h.dtype, device=h.device).masked_fill_(~visible, torch.finfo(h.dtype).min)


def _norm(norm: Any) -> Callable[[Tensor], Tensor]:
    """The norm as one operator."""
    weight, eps = norm.weight, norm.variance_epsilon
    return lambda h: F.rms_norm(h, weight.shape, weight, eps)


def called_functions(decoder: Any) -> list[Any]:
    """Module-level functions that the decoder's layers call; a user may have replaced them."""
    library = sys.modules[type(decoder).__module__]
    attention = ALL_ATTENTION_FUNCTIONS.get(decoder.config._attn_implementation)
    return [attention, *(getattr(library, name, None) for name in FUNCTIONS)]


def _check_supported(decoder: Any) -> None:
    """UnsupportedDecoderError unless `FusedDecoder.forward` computes this decoder: class, config, modules and code."""
    kind, c = type(decoder).__name__, decoder.config
    if kind not in DECODERS:
        raise UnsupportedDecoderError(f"decoders of class {kind} have no fused pass")
    if c.hidden_act != "silu":
        raise UnsupportedDecoderError(f"activation '{c.hidden_act}' has no fused pass")
    if getattr(c, "sliding_window", None) and getattr(c, "use_sliding_window", True):
        raise UnsupportedDecoderError("sliding windows have no fused pass")
    if c._attn_implementation not in ("sdpa", "eager"):
        raise UnsupportedDecoderError(f"attention '{c._attn_implementation}' has no fused pass")
    if any(f is not None and not f.__module__.startswith("transformers.") for f in called_functions(decoder)):
        raise UnsupportedDecoderError("a function that its layers call has been replaced")
    for layer in decoder.layers:
        names = {name for name, _ in layer.named_parameters()}
        if names not in (PARTS, PARTS | BIASES):
            raise UnsupportedDecoderError(
                f"a decoder layer has parts that are not fused: {', '.join(sorted(names ^ PARTS))}"
            )
    for name, module in decoder.named_modules():
        if name.partition(".")[0] not in CALLED:
            _check_module(decoder, name, module)
    if not decoder.layers or decoder.training:
        raise UnsupportedDecoderError("it is in training mode" if decoder.layers else "it has no layers")


def _check_module(decoder: Any, name: str, module: nn.Module) -> None:
    """UnsupportedDecoderError unless `FusedDecoder.forward` computes this module of the decoder."""
    role = name.rpartition(".")[2]
    library, kind = sys.modules[type(decoder).__module__], "DecoderLayer" if role.isdigit() else CLASSES.get(role)
    known = (
        getattr(library, type(decoder).__name__.removesuffix("Model") + kind, None)
        if kind
        else COMMON_CLASSES.get(role)
    )
    if type(module) is not known:
        raise UnsupportedDecoderError(f"{name} is a {type(module).__name__}, which has no fused pass")
    held = [tensor for tensor in module._parameters.values() if tensor is not None]
    if not all(can_pack(t) if t.dim() == 2 else t.dtype == torch.float32 and t.device.type == "cpu" for t in held):
        raise UnsupportedDecoderError(f"{name} is no float32 layer on a CPU with oneDNN")
    if isinstance(module, nn.ModuleList):
        return
    replaced = not isinstance(vars(module).get("forward"), Dispatcher | None)
    if (
        replaced
        or module._compiled_call_impl
        or type(module).forward.__qualname__ != f"{type(module).__name__}.forward"
    ):
        raise UnsupportedDecoderError(f"the forward of its {type(module).__name__} has been replaced")
