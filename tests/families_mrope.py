"""Tiny families with more than one rotary position per token."""

from __future__ import annotations

from typing import Any

from family import Family
from family_layouts import END, IMAGE, START, grid, qwen
from family_models import (
    BOTH,
    DEEP,
    ENCODER,
    EXPERTS,
    FRAME,
    HEAD,
    LAYERS,
    MARKS,
    ROPE,
    SIDES,
    TYPES,
    WINDOW,
    sizes,
    tiny,
    tower,
)


def _qwen3(name: str, **text: Any) -> Family:
    """Deepstack features; time stamps between the frames of a video."""
    make = tiny(name, text_config=sizes(**HEAD, **text), vision_config=DEEP, **MARKS)
    return Family(name, make, grid(True), qwen(), BOTH, SIDES, TYPES, frame=FRAME)


def _glm(name: str, **text: Any) -> Family:
    """The frames of a video stand in image tokens."""
    marks = {"image_token_id": IMAGE, "video_token_id": 63, "image_start_token_id": START, "image_end_token_id": END}
    rope = ROPE | {"partial_rotary_factor": 1.0}
    make = tiny(
        name, text_config=sizes(rope_parameters=rope, **text), vision_config=ENCODER | {"image_size": 16}, **marks
    )
    return Family(name, make, grid(True), qwen(), BOTH, SIDES, TYPES, frame=FRAME, one_mark=True)


_GLM_EXPERTS = {
    "moe_intermediate_size": 16, "num_experts_per_tok": 2, "n_routed_experts": 4, "first_k_dense_replace": 1,
}  # fmt: skip
_ERNIE_MARKS = {"image_token_id": IMAGE, "video_token_id": MARKS["video_token_id"]}
_ERNIE_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}

MROPE = [
    _qwen3("qwen3_vl_moe", **EXPERTS),
    _qwen3("cosmos3_omni", model_type="qwen3_vl_text"),
    _glm("glm4v"),
    _glm("glm46v", model_type="glm4v_text"),
    _glm("glm4v_moe", **_GLM_EXPERTS),
    _glm("glm_ocr", head_dim=8),
    Family(
        "paddleocr_vl",
        tiny(
            "paddleocr_vl", text_config=sizes(**HEAD), vision_config=tower(patch_size=4), **MARKS
        ),
        grid(),
        qwen(times=1, square=True),
        sizes=SIDES,
        types=TYPES,
    ),
    Family(
        "ernie4_5_vl_moe",
        tiny(
            "ernie4_5_vl_moe",
            text_config=sizes(
                rope_parameters=_ERNIE_ROPE, moe_intermediate_size=[16, 16], moe_k=2, moe_num_experts=4,
                moe_num_shared_experts=1,
            ),
            vision_config={"depth": 2, "num_heads": 2, "patch_size": 4, "hidden_size": 16, "intermediate_size": 32},
            **_ERNIE_MARKS,
        ),
        grid(),
        qwen(times=1),
        BOTH,
        SIDES,
        (*TYPES, "moe_mm_token_type_ids"),
        frame=FRAME,
    ),
    Family(
        "cohere_compass",
        tiny(
            "cohere_compass", vision_config=DEEP, **MARKS,
            text_config=sizes(
                sliding_window=WINDOW, layer_types=LAYERS, rope_parameters=dict.fromkeys(LAYERS, ROPE),
            ),
        ),
        grid(True),
        qwen(),
        BOTH,
        SIDES,
        TYPES,
        frame=FRAME,
    ),
    Family(
        "cosmos3_edge",
        tiny(
            "cosmos3_edge", text_config=sizes(**HEAD), projector_hidden_size=32,
            vision_config=tower(patch_size=4, num_patches=16), **MARKS,
        ),
        grid(True, 1),
        qwen(times=1),
        BOTH,
        SIDES,
        TYPES,
        frame=FRAME,
    ),
    Family(
        "hunyuan_vl",
        tiny(
            "hunyuan_vl",
            text_config=sizes(head_dim=8, rope_parameters=ROPE | {"mrope_section": [1, 1, 1, 1]}),
            vision_config=tower(patch_size=4, out_hidden_size=32, text_hidden_size=32, max_image_size=32),
            image_token_id=IMAGE, im_start_id=START, im_end_id=END,
        ),
        grid(breaks=True),
        qwen(times=1),
        sizes=SIDES,
        types=TYPES,
    ),
]  # fmt: skip
