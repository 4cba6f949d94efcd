"""EAGLE-1 and 2, and what builds on their layer: MSD for LLaVA and Qwen2-VL, and ViSpec for LLaVA and Qwen2.5-VL.

Sources: the classes `Model` of SafeAILab/EAGLE (`cnets1`), Lyn-Lucy/MSD and KangJialiang/ViSpec (`cnets_ours`). They
count positions by columns, also for targets with M-RoPE. The width and depth are those of their decoding.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from msd.drafters.toolkit.network import NetworkConfig
from msd.drafters.toolkit.variant import Variant
from msd.formats.fields import PLAIN, Fields
from msd.formats.format import Format, Names, differs, flat, has, network_config

TREES = {"eagle2": (10, 6), "msd-published": (10, 6), "vispec": (8, 4)}  # width, depth
QWEN2_VL = "qwen2_vl"  # model type of MSD heads whose layer is Qwen2's


def _network(method: str, fields: Fields, names: Names) -> NetworkConfig:
    fields = Fields(fields.values, PLAIN)
    sizes, rope = fields.sizes(), fields.rope()[1]
    qwen = fields.values.get("model_type") == QWEN2_VL and method == "msd-published"
    width, depth = TREES[method]
    variant = Variant(
        qkv_bias=qwen or fields.flag("qkv_bias"), input_norm=qwen, fc_bias=fields.flag("bias", True), columns=True,
        embedding="embed_tokens.weight" in names, rope=rope,
    )  # fmt: skip
    return network_config(
        method, fields, sizes, variant, taps=(0, -1), width=width, depth=depth, options={"noise": 0.1}
    )


def _config(model_type: str, c: NetworkConfig) -> dict[str, Any]:
    more = {"bias": c.variant.fc_bias, "qkv_bias": c.variant.qkv_bias}
    return flat(c, "LlamaForCausalLM", model_type, **(more | ({"qkv_bias": True} if model_type == QWEN2_VL else {})))


def _is_msd(model_type: str, config: dict[str, Any], names: Names) -> bool:
    return config.get("model_type") == model_type and "fc.weight" in names and not has(names, "imadpt.")


def _fits(c: NetworkConfig) -> str:
    return differs(c, qkv_bias=..., fc_bias=...)


def _fits_qwen(c: NetworkConfig) -> str:
    return differs(c, qkv_bias=True, input_norm=True, fc_bias=...)


EAGLE_FORMATS = (
    Format(
        "vispec", "vispec", "ViSpec for LLaVA-1.6 and Qwen2.5-VL", lambda config, names: has(names, "imadpt."),
        partial(_network, "vispec"), (("adaptor.", "imadpt."),), partial(_config, "llava_next"), _fits,
    ),
    Format(
        "msd-qwen2-vl", "msd-published", "MSD for Qwen2-VL", partial(_is_msd, QWEN2_VL),
        partial(_network, "msd-published"), (), partial(_config, QWEN2_VL), _fits_qwen,
    ),
    Format(
        "msd-llava", "msd-published", "MSD for LLaVA-1.5", partial(_is_msd, "llava"),
        partial(_network, "msd-published"), (), partial(_config, "llava"), _fits,
    ),
    Format(
        "eagle2", "eagle2", "EAGLE-1 and EAGLE-2",
        lambda config, names: {"fc.weight", "layers.0.self_attn.q_proj.weight"} <= names
        and not {"lm_head.weight", "hidden_norm.weight"} & names,
        partial(_network, "eagle2"), (), partial(_config, "llama"), _fits,
    ),
)  # fmt: skip
