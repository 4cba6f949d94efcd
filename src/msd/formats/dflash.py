"""DFlash (z-lab and SpecForge) and DSpark (DeepSpec and SpecForge): block drafters with norms of query and key heads.

Sources: `DFlashDraftModel` of z-lab/dflash, `DFlashDraftModel` and `DSparkDraftModel` of sgl-project/SpecForge,
`Qwen3DSparkModel` of deepseek-ai/DeepSpec. Layer id i is `hidden_states[i + 1]`; DeepSpec's -1 is the embedding.
A block of B positions drafts B - 1 tokens, and DeepSpec's, whose root drafts too, B. Positions count columns.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from msd.drafters.toolkit.network import NetworkConfig
from msd.drafters.toolkit.variant import Variant
from msd.errors import UserError
from msd.formats.fields import QWEN3, Fields
from msd.formats.format import Format, Names, architecture_of, differs, flat, network_config

WIDTH = 8
BLOCK = (("context_norm.", "hidden_norm."),)
HEADS = (
    *BLOCK, ("markov_in.", "markov_head.markov_w1."), ("markov_out.", "markov_head.markov_w2."),
    ("markov_gate.", "markov_head.gate_proj."), ("markov_joint.", "markov_head.joint_proj."),
    ("confidence.", "confidence_head.proj."),
)  # fmt: skip
FLAT = {name: value for name, value in QWEN3.items() if name in ("num_key_value_heads", "head_dim", "rms_norm_eps")}


def block_network(
    method: str,
    fields: Fields,
    outer: Fields,
    own: Fields,
    taps: tuple[int, ...],
    names: Names,
    from_root: bool,
    columns: bool,
) -> NetworkConfig:
    """Returns the configuration of our `dflash` or `dspark`.

    fields: of the decoder layers. outer: of the head. own: of the method. taps: the target's states that it reads.
    columns: whether positions count columns; else they are those of M-RoPE's first axis.
    """
    sizes = fields.sizes(layers=None)
    if not taps:
        raise UserError("its config.json does not say which layers of the target it reads")
    token = own.whole("mask_token_id", outer.values.get("mask_token_id"), least=0)
    if token >= sizes["vocabulary"]:
        raise UserError(f"its config.json: the mask token {token} is outside the {sizes['vocabulary']} ids")
    bias = fields.flag("attention_bias")
    size = outer.whole("block_size", own.values.get("block_size"), least=2)
    switches: dict[str, Any] = {}
    options = {}
    if method == "dspark":
        rank = own.whole("markov_rank", 0, least=0)
        options = {"markov_rank": rank}
        markov = own.choice("markov_head_type", "vanilla", ("vanilla", "gated", "rnn")) if rank else "none"
        with_markov = own.flag("confidence_head_with_markov")
        enabled = own.flag("enable_confidence_head", own.real("confidence_head_alpha", 1e-9) > 1e-9)
        reads = ("markov" if with_markov else "state") if enabled else "none"
        if reads == "markov" and not rank:
            raise UserError("its config.json: 'confidence_head_with_markov' needs a 'markov_rank'")
        switches = {"markov": markov, "confidence": reads}
    variant = Variant(
        qkv_bias=bias, o_bias=bias, head_norm=True, mask_token=token, from_root=from_root, columns=columns,
        first_axis=not columns,
        embedding="embed_tokens.weight" in names, head="lm_head.weight" in names, rope=fields.rope()[1], **switches,
    )  # fmt: skip
    rows = outer.whole("draft_vocab_size", sizes["vocabulary"]) if variant.head else sizes["vocabulary"]
    return network_config(
        method, outer, sizes, variant, taps=taps, width=WIDTH, depth=size - (not from_root), options=options,
        draft_vocabulary=rows,
    )  # fmt: skip


def _network(method: str, fields: Fields, names: Names) -> NetworkConfig:
    fields = Fields(fields.values, FLAT)
    nested = fields.part("dflash_config")
    deepspec = method == "dspark" and not nested.values
    own = fields if deepspec else nested
    if deepspec and -1 in fields.values.get("target_layer_ids", ()):
        raise UserError("its config.json: 'target_layer_ids' names the embedding (-1), which is not supported")
    if nested.flag("shift_label") or nested.values.get("pure_draft_prefix_len"):
        raise UserError("its config.json: 'dflash_config' has shift_label or pure_draft_prefix_len: not supported")
    taps = own.layers("target_layer_ids", 1)
    last = Fields(nested.values | fields.values).whole("num_target_layers", -1, least=-1)  # -1: it does not say
    if taps and -1 < last < max(taps):
        raise UserError(f"its config.json names layer {max(taps) - 1} of a target with {last} layers")
    taps = (*taps, last) if taps else ()
    return block_network(method, fields, fields, own, taps, names, deepspec, True)


def _config(method: str, c: NetworkConfig) -> dict[str, Any]:
    v = c.variant
    own: dict[str, Any] = {"mask_token_id": v.mask_token, "target_layer_ids": [tap - 1 for tap in c.taps[:-1]]}
    more: dict[str, Any] = {"attention_bias": v.qkv_bias, "block_size": c.depth + (not v.from_root)}
    if c.taps[-1] > 0:
        more["num_target_layers"] = c.taps[-1]
    if method == "dspark":
        own |= {
            "markov_rank": int(c.options["markov_rank"]), "markov_head_type": v.markov,
            "enable_confidence_head": v.confidence != "none", "confidence_head_with_markov": v.confidence == "markov",
        }  # fmt: skip
        if v.markov == "none":
            del own["markov_head_type"]
    if v.from_root:
        return flat(c, "Qwen3DSparkModel", "qwen3", **more, **own)
    architecture = "DSparkDraftModel" if method == "dspark" else "DFlashDraftModel"
    return flat(c, architecture, "qwen3", **more, dflash_config=own)


def block_fits(c: NetworkConfig) -> str:
    """Says why a block network is none of DFlash's or DSpark's, or ""."""
    v = c.variant
    if not v.head_norm:
        return "its layers normalise query and key heads, those of this network do not"
    if v.mask_token is None:
        return "its mask is the embedding of a token, that of this network a learned vector"
    return differs(
        c, head_norm=True, mask_token=..., from_root=..., head=..., markov=..., confidence=..., qkv_bias=..., o_bias=...
    )


def _fits(c: NetworkConfig) -> str:
    if c.draft_vocabulary != c.vocabulary:
        return "it has no place for a draft vocabulary; speculators has"
    return block_fits(c) or (f"it has no place for from_root={c.variant.from_root}" if _shifted(c) else "")


def _shifted(c: NetworkConfig) -> bool:
    """Whether a `dflash` network drafts from its root."""
    return c.method == "dflash" and bool(c.variant.from_root)


BLOCK_FORMATS = (
    Format(
        "dspark", "dspark", "DSpark by DeepSpec and SpecForge",
        lambda config, names: "DSpark" in architecture_of(config) and "speculators_model_type" not in config,
        partial(_network, "dspark"), HEADS, partial(_config, "dspark"), _fits,
    ),
    Format(
        "dflash", "dflash", "DFlash by its authors and SpecForge",
        lambda config, names: "DFlash" in architecture_of(config) and "speculators_model_type" not in config,
        partial(_network, "dflash"), BLOCK, partial(_config, "dflash"), _fits,
    ),
)  # fmt: skip
