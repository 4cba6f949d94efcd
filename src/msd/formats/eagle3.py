"""EAGLE-3 as its authors, SpecForge (SGLang) and AngelSlim write it: one layer named `midlayer`.

Sources: `cnets.Model` of SafeAILab/EAGLE, `LlamaForCausalLMEagle3` of sgl-project/SpecForge, `Eagle3LlamaForCausalLM`
of Tencent/AngelSlim. A layer id i of the last two is `hidden_states[i + 1]`. Without ids all fuse layers 2, L//2, L-3.
AngelSlim's image positions have the placeholder token's embedding, and its M-RoPE sections are always interleaved.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from msd.drafters.algorithms.eagle3 import fused_layers
from msd.drafters.toolkit.network import NetworkConfig
from msd.drafters.toolkit.variant import Variant
from msd.errors import UserError
from msd.formats.fields import PLAIN, Fields
from msd.formats.format import Format, Names, architecture_of, differs, flat, has, network_config

SPECFORGE, ANGELSLIM = "LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM"
WIDTH, DEPTH = 10, 8


def eagle3_network(
    fields: Fields, outer: Fields, variant: dict[str, Any], fused: tuple[int, ...], depth: int = DEPTH
) -> NetworkConfig:
    """Returns the configuration of our `eagle3`.

    fields: of the decoder layer. outer: of the head. fused: the taps that it fuses; empty: the default ones.
    """
    sizes = fields.sizes()
    hidden = outer.whole("target_hidden_size", sizes["hidden"])
    if hidden != sizes["hidden"]:
        raise UserError(
            f"its config.json: the target's hidden size {hidden} is not the head's {sizes['hidden']}, which is not "
            "supported"
        )
    if len(fused) not in (0, 3):
        raise UserError(f"its config.json names {len(fused)} layers of the target; supported: 3")
    rows = outer.whole("draft_vocab_size", sizes["vocabulary"])
    taps = (*sorted({0, *fused}), -1) if fused else ()
    made = Variant(fused=fused, rope=fields.rope()[1], **variant)
    return network_config("eagle3", outer, sizes, made, taps=taps, draft_vocabulary=rows, width=WIDTH, depth=depth)


def _network(kind: str, fields: Fields, names: Names) -> NetworkConfig:
    fields = Fields(fields.values, PLAIN)
    sections = fields.rope()[2] if kind != "eagle3" else ()
    if sections and sum(sections) * 2 != fields.sizes()["head_dim"]:
        raise UserError(f"its config.json: the M-RoPE sections {list(sections)} do not fill half of the head dimension")
    variant: dict[str, Any] = {
        "embedding": "embed_tokens.weight" in names, "columns": not sections, "sections": sections,
        "interleaved": bool(sections) and (kind == "angelslim" or fields.rope()[3]),
        "placeholders": kind == "angelslim",
    }  # fmt: skip
    if kind == "angelslim":
        return eagle3_network(fields, fields, variant, fields.layers("aux_hidden_states_layer_ids", 1))
    if kind == "eagle3":
        return eagle3_network(fields, fields, variant, ())
    variant |= {"fc_norm": "each" if fields.flag("fc_norm") else "", "final_norm": fields.flag("norm_output", True)}
    eagle = fields.part("eagle_config")
    if not eagle.flag("use_aux_hidden_state", True):
        raise UserError("its config.json: 'eagle_config.use_aux_hidden_state' is false, which is not supported")
    return eagle3_network(fields, fields, variant, eagle.layers("eagle_aux_hidden_state_layer_ids", 1))


def _config(c: NetworkConfig) -> dict[str, Any]:
    return flat(c, "LlamaForCausalLM", draft_vocab_size=c.draft_vocabulary, target_hidden_size=c.hidden)


def _specforge_config(c: NetworkConfig) -> dict[str, Any]:
    ids = [tap - 1 for tap in fused_taps(c)]
    eagle = {"use_aux_hidden_state": True} | ({"eagle_aux_hidden_state_layer_ids": ids} if ids else {})
    more: dict[str, Any] = {"fc_norm": c.variant.fc_norm == "each"}
    if not c.variant.final_norm:  # "norm_output" is true by default, and means something else to SGLang
        more["norm_output"] = False
    return flat(
        c, SPECFORGE, draft_vocab_size=c.draft_vocabulary, target_hidden_size=c.hidden, **more, eagle_config=eagle
    )


def fused_taps(c: NetworkConfig) -> tuple[int, ...]:
    """Returns the taps that an `eagle3` network fuses; empty: the default ones of a target that is not known yet."""
    return c.variant.fused or (tuple(fused_layers(c.taps[-1])) if c.taps else ())


def _fits(c: NetworkConfig) -> str:
    layers = c.taps[-1] if c.taps else -1
    default = (2, layers // 2, layers - 3)
    if c.variant.fused and c.variant.fused != default:
        return f"it has no place for the layers that the head reads, {c.variant.fused}; speculators and sglang have"
    return differs(c, fused=...)


def _specforge_fits(c: NetworkConfig) -> str:
    if c.variant.fc_norm == "all":
        return "it has no place for fc_norm='all'"
    return differs(c, fused=..., fc_norm=..., final_norm=..., sections=..., interleaved=...)


def _is(architecture: str, config: dict[str, Any], names: Names) -> bool:
    return architecture_of(config) == architecture


EAGLE3_FORMATS = (
    Format(
        "angelslim", "eagle3", "AngelSlim's EAGLE-3, such as for Qwen3-VL", partial(_is, ANGELSLIM),
        partial(_network, "angelslim"), (("layers.0.", "midlayer."),),
    ),
    Format(
        "specforge", "eagle3", "EAGLE-3 by SpecForge, for SGLang", partial(_is, SPECFORGE),
        partial(_network, "specforge"), (("layers.0.", "midlayer."),), _specforge_config,
        _specforge_fits,
    ),
    Format(
        "eagle3", "eagle3", "EAGLE-3 by its authors",
        lambda config, names: has(names, "midlayer.") or ("draft_vocab_size" in config and "lm_head.weight" in names),
        partial(_network, "eagle3"), (("layers.0.", "midlayer."),), _config, _fits,
    ),
)  # fmt: skip
