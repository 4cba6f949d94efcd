"""Heads of vllm-project/speculators, for vLLM: EAGLE-3 with LLaMA or Qwen3 layers, DFlash and DSpark.

Sources: `Eagle3DraftModel`, `DFlashDraftModel` and `DSparkDraftModel` of that project. A layer id i is
`hidden_states[i]`. Image positions have the placeholder token's embedding, and under M-RoPE the positions of its first
axis, as vLLM gives them to draft heads. The config of the layers leaves out what equals the defaults of their class.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from msd.drafters.toolkit.network import NetworkConfig
from msd.errors import UserError
from msd.formats.dflash import HEADS, block_fits, block_network
from msd.formats.eagle3 import DEPTH, eagle3_network, fused_taps
from msd.formats.fields import LLAMA, QWEN3, Fields
from msd.formats.format import OURS, Format, Names, differs, flat

VERSION = "0.5.0"  # of the config's fields


def _layer(fields: Fields) -> tuple[Fields, bool]:
    """Returns (the fields of the decoder layer, whether it is Qwen3's)."""
    kind = fields.part("transformer_layer_config").choice("model_type", "qwen3", ("llama", "qwen3"))
    return fields.part("transformer_layer_config", QWEN3 if kind == "qwen3" else LLAMA), kind == "qwen3"


def _depth(fields: Fields, default: int) -> int:
    """Returns the number of tokens that the head's first proposal method drafts."""
    methods = fields.part("speculators_config").values.get("proposal_methods")
    first = methods[0] if isinstance(methods, list) and methods and isinstance(methods[0], dict) else {}
    return Fields(first).whole("speculative_tokens", default)


def _eagle3(fields: Fields, names: Names) -> NetworkConfig:
    fields = Fields(fields.values, {"draft_vocab_size": 32000})
    layer, qwen = _layer(fields)
    if fields.flag("norm_before_fc") and fields.flag("fc_norm"):
        raise UserError("its config.json sets both 'norm_before_fc' and 'fc_norm'; it can have one of them")
    bias = layer.flag("attention_bias")
    variant: dict[str, Any] = {
        "head_norm": qwen, "qkv_bias": bias, "o_bias": bias, "first_axis": True, "placeholders": True,
        "residual_norm": fields.flag("norm_before_residual"), "fed_norm": fields.flag("norm_output"),
        "fc_norm": "all" if fields.flag("norm_before_fc") else "each" if fields.flag("fc_norm") else "",
        "embedding": "embed_tokens.weight" in names,
    }  # fmt: skip
    taps = fields.layers("eagle_aux_hidden_state_layer_ids", 0)
    return eagle3_network(layer, fields, variant, taps, _depth(fields, DEPTH))


def _block(method: str, fields: Fields, names: Names) -> NetworkConfig:
    fields = Fields(fields.values, {"draft_vocab_size": 32000, "block_size": 8})
    defaults = {"markov_rank": 256, "enable_confidence_head": True, "confidence_head_with_markov": True}
    own = Fields(fields.values, defaults)
    taps = fields.layers("aux_hidden_state_layer_ids", 0)
    taps = (*taps, -1) if taps else ()
    from_root = fields.flag("sample_from_anchor", method == "dspark")
    return block_network(method, _layer(fields)[0], fields, own, taps, names, from_root, False)


def _wrapped(kind: str, c: NetworkConfig, layer: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Returns the config of a head: its own fields around those of its layers."""
    proposal = {
        "proposal_type": "greedy",
        "speculative_tokens": c.depth,
        "verifier_accept_k": 1,
        "accept_tolerance": 0.0,
    }
    extra = layer.pop(OURS)
    name = {"eagle3": "Eagle3", "dflash": "DFlash", "dspark": "DSpark"}[kind]
    return {
        "architectures": [f"{name}{'Speculator' if kind == 'eagle3' else 'DraftModel'}"],
        "speculators_model_type": kind,
        "speculators_version": VERSION,
        "tie_word_embeddings": False,
        "draft_vocab_size": c.draft_vocabulary,
        "target_hidden_size": c.hidden,
        **own,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": kind,
            "default_proposal_method": "greedy",
            "proposal_methods": [proposal],
            "verifier": {"name_or_path": None, "architectures": []},
        },
        OURS: extra,
    }


def _eagle3_config(c: NetworkConfig) -> dict[str, Any]:
    v = c.variant
    kind = "qwen3" if v.head_norm else "llama"
    layer = flat(c, "Qwen3ForCausalLM" if v.head_norm else "LlamaForCausalLM", kind, attention_bias=v.qkv_bias)
    own = {
        "eagle_aux_hidden_state_layer_ids": list(fused_taps(c)) or None, "norm_before_residual": v.residual_norm,
        "norm_before_fc": v.fc_norm == "all", "fc_norm": v.fc_norm == "each", "norm_output": v.fed_norm,
        "embed_requires_grad": False,
    }  # fmt: skip
    return _wrapped("eagle3", c, layer, own)


def _block_config(method: str, c: NetworkConfig) -> dict[str, Any]:
    v = c.variant
    own: dict[str, Any] = {
        "aux_hidden_state_layer_ids": list(c.taps[:-1]), "block_size": c.depth + (not v.from_root),
        "mask_token_id": v.mask_token, "sample_from_anchor": bool(v.from_root),
    }  # fmt: skip
    if method == "dspark":
        own |= {
            "markov_rank": int(c.options["markov_rank"]), "enable_confidence_head": v.confidence != "none",
            "markov_head_type": "vanilla" if v.markov == "none" else v.markov,
            "confidence_head_with_markov": v.confidence == "markov",
        }  # fmt: skip
    return _wrapped(method, c, flat(c, "Qwen3ForCausalLM", "qwen3", attention_bias=v.qkv_bias), own)


def _eagle3_fits(c: NetworkConfig) -> str:
    if c.variant.qkv_bias != c.variant.o_bias:
        return "its attention has all four biases or none"
    switches = ("head_norm", "qkv_bias", "o_bias", "residual_norm", "fed_norm", "fc_norm", "fused")
    return differs(c, **dict.fromkeys(switches, ...))


def _is(kind: str, config: dict[str, Any], names: Names) -> bool:
    return config.get("speculators_model_type") == kind


SPECULATORS_FORMATS = (
    Format(
        "speculators", "eagle3", "EAGLE-3 by speculators, for vLLM", partial(_is, "eagle3"), _eagle3, (),
        _eagle3_config, _eagle3_fits,
    ),
    *(
        Format(
            f"speculators-{method}", method, f"{name} by speculators, for vLLM", partial(_is, method),
            partial(_block, method), HEADS, partial(_block_config, method), block_fits,
        )
        for method, name in (("dflash", "DFlash"), ("dspark", "DSpark"))
    ),
)  # fmt: skip
