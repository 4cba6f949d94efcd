"""Makers of tiny random models from the sizes in their configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForMultimodalLM, PreTrainedModel

from family_layouts import BOS, END, EOS, IMAGE, PAD, START, VIDEO, VOCABULARY
from msd.targets.taps import output_layer

WINDOW = 12  # of sliding layers: shorter than every prompt
MARKS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
PATCH = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


BOTH = ("image", "video")
TYPES = ("mm_token_type_ids",)
SIDES = ((16, 24), (24, 8))
WIDE_OR_TALL = ((16, 32), (32, 16))
TILED = ((16, 32), (16, 16))
FRAME = (8, 16)  # narrow, so that the time axis runs ahead of the others


def sizes(**more: Any) -> dict[str, Any]:
    """Of a text model."""
    return {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": BOS,
        "eos_token_id": EOS, "pad_token_id": PAD, "tie_word_embeddings": False,
    } | more  # fmt: skip


def tower(**more: Any) -> dict[str, Any]:
    """Sizes of a vision model for images of 16x16."""
    found = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return found | {"image_size": 16, "patch_size": 8} | more


LLAMA, QWEN2 = sizes(model_type="llama"), sizes(model_type="qwen2")
CLIP = tower(model_type="clip_vision_model", projection_dim=16)
SIGLIP = tower(model_type="siglip_vision_model", patch_size=4, vision_use_head=False)
PIXTRAL = tower(model_type="pixtral", head_dim=8, image_size=32)
CUT = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
HEAD = {"head_dim": 8, "rope_parameters": ROPE}
LAYERS = ["sliding_attention", "full_attention", "sliding_attention"]
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
ENCODER = PATCH | {"hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32}
DEEP = ENCODER | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
WINDOWED = ENCODER | {"window_size": 16, "fullatt_block_indexes": [1]}


def tiny(kind: str, *, sharpness: float = 10.0, strength: float = 6.0, **config: Any) -> Callable[[], PreTrainedModel]:
    """A maker of seeded models of `model_type` `kind`; `config` as in its config class."""

    config = {"tie_word_embeddings": False} | config
    return made(lambda: built(kind, config), sharpness, strength)


def built(kind: str, config: dict[str, Any]) -> PreTrainedModel:
    """A model of `model_type` `kind`; skips the test where this release of the library does not have it."""
    if kind not in CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    return AutoModelForMultimodalLM.from_config(AutoConfig.for_model(kind, **config))


def made(
    build: Callable[[], PreTrainedModel], sharpness: float = 10.0, strength: float = 6.0
) -> Callable[[], PreTrainedModel]:
    """A maker of seeded models, with larger weights than at the start of training, so that pictures matter and
    distributions have shape: `strength` times as large, the output layer's `sharpness` times.
    """

    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for name, weight in model.named_parameters():
                if weight.dim() > 1 and not weight.any():  # such as Gemma 3's projector
                    torch.nn.init.normal_(weight, std=0.02)
                if weight.dim() > 1 and "embed_tokens" not in name and "lm_head" not in name:
                    weight.mul_(strength)
            output_layer(model).weight.mul_(sharpness)
        model.generation_config.eos_token_id, model.generation_config.pad_token_id = EOS, PAD
        return model.eval()

    return make
