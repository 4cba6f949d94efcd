"""A decoder pass with fewer operators: fast products, merged where their input is the same, with residuals fused in.

Supports LLaMA-like decoders (RMSNorm, rotary positions, grouped attention, gated SiLU) whose modules are exactly those
in `PARTS`. The pass computes the same function as the model's own `forward`, up to rounding, with the same weights and
the same cache. `msd.backends` compares both before it uses this pass.

Three more things save operators. A rotary position is one complex product. Queries of a group share keys and values, so
they enter attention as further rows of one head. One product computes query, key and value, and one gate and up.
"""

from __future__ import annotations

import copy
import sys
from bisect import bisect_right
from collections.abc import Callable, Collection
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from msd.backends import comparison
from msd.backends.comparison import Calls, Dispatcher, redirected
from msd.backends.compiled import can_compile
from msd.backends.kernels import (
    KERNELS,
    MANY,
    MEASURED,
    PACKED,
    ROWS,
    SAVING,
    Choice,
    Product,
    Weights,
    for_rows,
    measure,
    select,
)
from msd.backends.norms import rms_norm
from msd.backends.packed import can_pack, exact_exponent
from msd.system import measurements
from msd.system.measurements import cached

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
FUSED = ("fused",) * len(ROWS)
LAYERS, LAYERS_OF_MANY_ROWS = 10, 2  # that a measurement of passes runs
FOLDER = measurements.folder("kernels")
Record = Callable[[int, Tensor], None] | None  # receives the index and the hidden states of each layer


class UnsupportedDecoderError(Exception):
    """The decoder has no fused pass; the message is the reason."""


class _Layer:
    """One decoder layer's products, norms and sizes."""

    def __init__(self, layer: Any, dtype: torch.dtype, kernels: Choice) -> None:
        a = layer.self_attn
        self.dim, self.scale, self.slot = a.head_dim, float(a.scaling), a.layer_idx
        self.heads, self.kv_heads = (proj.weight.shape[0] // self.dim for proj in (a.q_proj, a.k_proj))
        self.groups = a.num_key_value_groups
        self.input_norm, self.mlp_norm = _norm(layer.input_layernorm), _norm(layer.post_attention_layernorm)
        self.products = [Product(x, kernels.get(name, PACKED), dtype) for name, x in layer_products(layer).items()]
        self.qkv, self.out, self.gate_up, self.down = self.products

    @property
    def shape(self) -> tuple[int, int, int]:
        """(heads, key/value heads, head dimension), which all layers of a decoder must share."""
        return self.heads, self.kv_heads, self.dim


class FusedDecoder:
    """The fused pass of one decoder with its current weights.

    dtype: of the products; the residual stream remains float32. kernels: of `layer_products`; packed where not named.
    UnsupportedDecoderError where there is no such pass.
    """

    def __init__(self, decoder: Any, dtype: torch.dtype = torch.float32, kernels: Choice | None = None) -> None:
        check_supported(decoder)
        self.decoder = decoder
        self.layers = [_Layer(layer, dtype, kernels or {}) for layer in active_layers(decoder)]
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
            real, imaginary = x[:, :, : self.heads + self.kv_heads].split(half, -1)  # [B, N, H, half] each
            rotated = torch.view_as_real(torch.complex(real, imaginary) * rotation).transpose(-1, -2)
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


class FusedPass:
    """The fused pass of a model's decoder, and the product of its output layer, with the current weights.

    copied: the weights of which there are copies.
    """

    def __init__(self, model: PreTrainedModel, dtype: torch.dtype, choice: Choice) -> None:
        self._decoder, self._output = model.get_decoder(), model.get_output_embeddings()
        self._fused, self._choice = FusedDecoder(self._decoder, dtype, choice), choice
        self._product = None
        if _is_linear(self._output):
            self._product = Product([(self._output.weight, self._output.bias)], choice.get("output", PACKED), dtype)
        products = [product for layer in self._fused.layers for product in layer.products]
        products += [] if self._product is None else [self._product]
        self.copied = [tensor for product in products for tensor in product.copied]

    def calls(self, record: Record = None) -> Calls:
        """The functions that replace the decoder and, where it is an `nn.Linear`, the output layer."""
        decoder: Calls = {self._decoder: partial(self._run, record)}
        return decoder if self._product is None else {**decoder, self._output: self._product}

    def distinct_rows(self) -> list[int]:
        """Numbers of rows that together use each kernel of each product, the first so that the causal mask matters."""
        chosen, seen = [5], {(name, kernels[bisect_right(ROWS, 5) - 1]) for name, kernels in self._choice.items()}
        for rows, *column in zip(ROWS, *self._choice.values(), strict=True):
            used = set(zip(self._choice, column, strict=True))
            if not used <= seen:
                chosen.append(rows)
                seen |= used
        return chosen

    def _run(self, record: Record, **kwargs: Any) -> Any:
        """The decoder's `forward`: fused, or its own code where that is faster for this number of rows."""
        x = kwargs["input_ids"][..., None] if kwargs.get("inputs_embeds") is None else kwargs["inputs_embeds"]
        if for_rows(self._choice.get("pass", FUSED), x) == "fused":
            return self._fused.forward(record=record, **kwargs)
        with redirected({} if record is None else recording_calls(self._decoder, record)):
            return type(self._decoder).forward(self._decoder, **kwargs)


def kernel_choice(decoder: Any, output: Any = None) -> Choice:
    """The fastest kernels, measured, of the products of a decoder and its output layer."""
    check_supported(decoder)
    layers = [layer_products(layer) for layer in active_layers(decoder)]
    products = {name: [layer[name] for layer in layers] for name in layers[0]}
    if _is_linear(output):
        products["output"] = [[(output.weight, output.bias)]]
    sizes = {n: (len(p), [(tuple(weight.shape), bias is None) for weight, bias in p[0]]) for n, p in products.items()}
    first = {n: [weight for weight, _ in p[0]] for n, p in products.items()}
    halves = {n for n, weights in first.items() if exact_exponent(weights) is not None}
    compilable = {n for n, weights in first.items() if can_compile(weights)}

    def fastest() -> Choice:
        return {name: select(times) for name, times in measure(products).items()}

    return cached(
        FOLDER, (sizes, sorted(halves), sorted(compilable), ROWS, MEASURED, SAVING), Choice,
        lambda found: _valid(found, products, KERNELS), fastest,
    )  # fmt: skip


def pass_choice(decoder: Any, kernels: Choice) -> Choice:
    """`kernels`, and under "pass" which code of a decoder is faster with them, measured: "fused", or its own, "plain".

    Where its own code runs, the layers need no copies.
    """

    def passes() -> Choice:
        found = comparison.faster(*pass_functions(decoder, kernels))
        return {"pass": tuple("fused" if rows in found else "plain" for rows in ROWS)}

    attention = decoder.config._attn_implementation, active_layers(decoder)[0].self_attn.head_dim
    shapes = [(name, tuple(parameter.shape)) for name, parameter in decoder.named_parameters()]
    key = (type(decoder).__name__, attention, shapes, kernels, ROWS)
    found = cached(FOLDER, key, Choice, lambda found: _valid(found, ("pass",), ("fused", "plain")), passes)

    def needed(name: str) -> tuple[str, ...]:
        pairs = zip(kernels[name], found["pass"], strict=True)
        return tuple("library" if name != "output" and code == "plain" else kernel for kernel, code in pairs)

    return {**{name: needed(name) for name in kernels}, **found}


def pass_functions(decoder: Any, kernels: Choice) -> tuple[Callable[[int], object], Callable[[int], object]]:
    """(the decoder's own code, its fused pass), as functions that run a pass over some number of rows.

    They use the first layers only, because all have the same sizes; fewest for many rows, which take long.
    """
    few, many = (_shortened(decoder, layers) for layers in (LAYERS, LAYERS_OF_MANY_ROWS))
    few_fused, many_fused = (FusedDecoder(each, kernels=kernels) for each in (few, many))

    def states(rows: int) -> Tensor:
        return torch.ones(1, rows, decoder.config.hidden_size)

    def own(rows: int) -> object:
        with redirected({}):
            return (many if rows >= MANY else few)(inputs_embeds=states(rows), use_cache=False)

    def fused(rows: int) -> object:
        return (many_fused if rows >= MANY else few_fused).forward(inputs_embeds=states(rows))

    return own, fused


def _shortened(decoder: Any, layers: int) -> Any:
    """A decoder of the first layers of another one, with the same modules."""
    short = copy.copy(decoder)
    short._modules = decoder._modules | {"layers": nn.ModuleList(active_layers(decoder)[:layers])}
    vars(short).pop("forward", None)  # a dispatcher of the whole decoder
    return short


def _valid(choice: Choice, names: Collection[str], allowed: Collection[str]) -> bool:
    """Whether a stored choice has these names and, for each number of `ROWS`, one of the allowed entries."""
    return choice.keys() == set(names) and all(len(k) == len(ROWS) and set(k) <= set(allowed) for k in choice.values())


def active_layers(decoder: Any) -> list[Any]:
    """The layers that the decoder's own `forward` runs."""
    return list(decoder.layers[: decoder.config.num_hidden_layers])


def layer_products(layer: Any) -> dict[str, Weights]:
    """The weights and biases of a decoder layer's linear layers, grouped by their input."""
    a, m = layer.self_attn, layer.mlp
    groups = {
        "qkv": (a.q_proj, a.k_proj, a.v_proj), "out": (a.o_proj,), "gate_up": (m.gate_proj, m.up_proj),
        "down": (m.down_proj,),
    }  # fmt: skip
    return {name: [(linear.weight, linear.bias) for linear in linears] for name, linears in groups.items()}


def recording_calls(decoder: Any, record: Callable[[int, Tensor], None]) -> dict[nn.Module, Callable[..., Any]]:
    """Functions that run the decoder's own layers and final norm and record the states as `FusedDecoder.forward`."""
    layers = active_layers(decoder)

    def before(index: int, layer: nn.Module, states: Tensor, *args: Any, **kwargs: Any) -> Any:
        record(index, states)
        return type(layer).forward(layer, states, *args, **kwargs)

    def final_norm(states: Tensor) -> Tensor:
        output: Tensor = type(decoder.norm).forward(decoder.norm, states)
        record(len(layers), output)
        return output

    return {layer: partial(before, i, layer) for i, layer in enumerate(layers)} | {decoder.norm: final_norm}


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
    """The norm in few operators."""
    weight, eps = norm.weight, norm.variance_epsilon
    return lambda h: rms_norm(h, weight, eps)


def called_functions(decoder: Any) -> list[Any]:
    """Module-level functions that the decoder's layers call; a user may have replaced them."""
    library = sys.modules[type(decoder).__module__]
    attention = ALL_ATTENTION_FUNCTIONS.get(decoder.config._attn_implementation)
    return [attention, *(getattr(library, name, None) for name in FUNCTIONS)]


def check_supported(decoder: Any) -> None:
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


def _is_linear(output: Any) -> bool:
    """Whether the output layer is one that `Product` computes. UnsupportedDecoderError if its forward is replaced."""
    if type(output) is not nn.Linear or not can_pack(output.weight):
        return False
    if not isinstance(vars(output).get("forward"), Dispatcher | None):
        raise UnsupportedDecoderError("the forward of its output layer has been replaced")
    return True
