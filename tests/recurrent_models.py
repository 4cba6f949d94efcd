"""Tiny hybrid models: configs, and where their processors put pictures. `families` makes families of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from family_layouts import BOS, BREAK, END, EOS, IMAGE, PAD, START, VIDEO, VOCABULARY, Picture, Rows, grid, of, qwen

SLICE = 1000  # a token that no prompt has
LAYERS = ["linear_attention", "full_attention", "linear_attention"]


@dataclass(frozen=True)
class Recurrent:
    """The fields of a `Family`, with the config of its model instead of a maker; `name` is its `model_type`.

    weights: how much larger than at the start of training: those of the output layer, and all others.
    """

    name: str
    config: dict[str, Any]
    place: Callable[[Picture, bool], list[int]]
    tensors: Callable[[Rows], dict[str, Tensor]]
    kinds: tuple[str, ...] = ("image",)
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((16, 24), (24, 8))
    types: str | None = None
    frame: tuple[int, int] = (8, 16)
    weights: tuple[float, float] = (10.0, 6.0)


def _sizes(**more: Any) -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": BOS,
        "eos_token_id": EOS, "pad_token_id": PAD, **more,
    }  # fmt: skip


def _delta_net(**more: Any) -> dict[str, Any]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1], "partial_rotary_factor": 0.5}
    return _sizes(
        head_dim=16, rope_parameters=rope, layer_types=LAYERS, linear_num_value_heads=4, linear_num_key_heads=2,
        linear_key_head_dim=8, linear_value_head_dim=8, linear_conv_kernel_dim=4, **more,
    )  # fmt: skip


_MARKS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
_PATCH = {
    "depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2, "hidden_size": 16,
    "out_hidden_size": 32, "intermediate_size": 32, "num_position_embeddings": 16,
}  # fmt: skip
_EXPERTS = {
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32,
}  # fmt: skip
_TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 4}


# LFM2-VL: patches of 4x4 pixels, padded to 32 per image; a placeholder for each block of 2x2


def _shaped(rows: Rows) -> dict[str, Tensor]:
    images = of(rows, "image")
    cut = [x.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 3, 4, 0).flatten(0, 1).flatten(1) for x in images]
    return {
        "pixel_values": torch.stack([torch.nn.functional.pad(x, (0, 0, 0, 32 - len(x))) for x in cut]),
        "spatial_shapes": torch.tensor([[x.shape[1] // 4, x.shape[2] // 4] for x in images]),
        "pixel_attention_mask": torch.tensor([[int(i < len(x)) for i in range(32)] for x in cut]),
    }


def _blocks(side: int) -> Callable[[Picture, bool], list[int]]:
    """A placeholder for each block of `side` pixels in square, marks around the image and around every frame."""

    def place(p: Picture, _: bool) -> list[int]:
        each = p.data.shape[-2] // side * (p.data.shape[-1] // side)
        if p.kind == "image":
            return [START, *[IMAGE] * each, END]
        return [token for _ in p.data for token in (START, *[VIDEO] * each, END)]

    return place


# MiniCPM-V 4.6: patches of 4x4 pixels side by side, [1, 3, 4, patches * 4]; frames of a video as images


def _packed(rows: Rows) -> dict[str, Tensor]:
    out = {}
    for kind, pixels, sizes in (
        ("image", "pixel_values", "target_sizes"), ("video", "pixel_values_videos", "target_sizes_videos"),
    ):  # fmt: skip
        found = [frame for x in of(rows, kind) for frame in (x if kind == "video" else [x])]
        if found:
            cut = [x.unfold(1, 4, 4).permute(0, 3, 1, 2).flatten(2) for x in found]
            out[pixels] = torch.cat(cut, -1)[None]
            out[sizes] = torch.tensor([[x.shape[1] // 4, x.shape[2] // 4] for x in found], dtype=torch.int32)
    return out


_MINICPM = {
    "text_config": _delta_net(model_type="qwen3_5_text"), "vision_config": _TOWER | {"image_size": 16},
    "image_token_id": IMAGE, "video_token_id": VIDEO, "insert_layer_id": 0, "image_size": 16,
}  # fmt: skip


# Nemotron 3 Nano Omni: rows of patches of 4x4 pixels; a placeholder for each block of 2x2


def _gridded(rows: Rows) -> dict[str, Tensor]:
    images = of(rows, "image")
    cut = [x.unfold(1, 4, 4).unfold(2, 4, 4).permute(1, 2, 0, 3, 4).flatten(0, 1).flatten(1) for x in images]
    return {
        "pixel_values": torch.cat(cut),
        "image_grid_hw": torch.tensor([[x.shape[1] // 4, x.shape[2] // 4] for x in images]),
    }


_MAMBA = {
    "model_type": "nemotron_h", "hidden_size": 32, "vocab_size": VOCABULARY, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "intermediate_size": 64,
    "ssm_state_size": 8, "mamba_num_heads": 4, "mamba_head_dim": 16, "n_groups": 2, "conv_kernel": 4, "chunk_size": 16,
    "n_routed_experts": 4, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 32,
    "num_experts_per_tok": 2, "pad_token_id": PAD, "bos_token_id": BOS, "eos_token_id": EOS,
    "layer_types": ["linear_attention", "moe", "full_attention", "linear_attention", "mlp"],
    "time_step_min": 1e-9,  # the library clamps time steps to it where it reads several tokens, not where it reads one
}  # fmt: skip
_RADIO = {
    "model_type": "radio", "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
    "patch_size": 4, "image_size": 16, "video_temporal_patch_size": 2, "max_img_size": 16,
}  # fmt: skip
_VIDEOS = ("image", "video")
RECURRENT = [
    Recurrent(
        "qwen3_5", {"text_config": _delta_net(), "vision_config": _PATCH, **_MARKS},
        grid(True), qwen(False), _VIDEOS, types="mm_token_type_ids",
    ),
    Recurrent(
        "qwen3_5_moe", {"text_config": _delta_net(**_EXPERTS), "vision_config": _PATCH, **_MARKS},
        grid(True), qwen(False), _VIDEOS, types="mm_token_type_ids",
    ),
    Recurrent(
        "lfm2_vl",
        {
            "text_config": _sizes(
                model_type="lfm2", layer_types=["conv", "full_attention", "conv"], conv_L_cache=3,
                block_auto_adjust_ff_dim=False, tie_word_embeddings=False,
            ),
            "vision_config": _TOWER | {
                "model_type": "siglip2_vision_model", "num_patches": 16, "vision_use_head": False,
            },
            "image_token_id": IMAGE, "projector_hidden_size": 32, "downsample_factor": 2, "tie_word_embeddings": False,
        },
        _blocks(8), _shaped,
    ),
    Recurrent(
        "lfm3_vl",
        {
            "text_config": _sizes(
                model_type="lfm3", layer_types=["conv", "full_attention", "conv", "sliding_attention"],
                num_hidden_layers=4, head_dim=8, conv_L_cache=3, sliding_window=12, tie_word_embeddings=False,
            ),
            "vision_config": {
                "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2,
                "num_key_value_heads": 2, "patch_size": 4, "layer_types": ["conv", "full_attention"],
            },
            "projector_hidden_size": 32, "tie_word_embeddings": False, **_MARKS,
        },
        grid(True), qwen(False), _VIDEOS,
    ),
    Recurrent(
        "minicpm_ocr", _MINICPM,
        _blocks(8), _packed, _VIDEOS, ((16, 32), (32, 16)), frame=(16, 16), weights=(20.0, 12.0),
    ),
    Recurrent(
        "minicpmv4_6", _MINICPM,
        _blocks(16), _packed, _VIDEOS, ((16, 32), (32, 16)), frame=(16, 16),
    ),
    Recurrent(
        "minicpmv4_7",
        _MINICPM | {
            "image_start_id": START, "image_end_id": END, "slice_start_id": SLICE, "slice_end_id": SLICE,
            "newline_id": BREAK,
        },
        _blocks(16), _packed, _VIDEOS, ((16, 32), (32, 16)), "mm_token_type_ids", (16, 16),
    ),
    Recurrent(
        "nemotron_h_omni",
        {
            "text_config": _MAMBA, "vision_config": _RADIO, "vision_hidden_size": 16, "projector_hidden_size": 32,
            "image_token_id": IMAGE, "video_token_id": VIDEO, "force_image_size": 16,
        },
        _blocks(8), _gridded, weights=(10.0, 24.0),
    ),
]  # fmt: skip
