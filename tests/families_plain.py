"""Tiny families with one rotary position per token and no masks of their own."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from family import Family
from family_layouts import (
    BREAK,
    IMAGE,
    VIDEO,
    grid,
    lines,
    local_views,
    marked,
    nested,
    next_views,
    of,
    qwen,
    several,
    sized,
    stacked,
    tiled,
    tiles,
)
from family_models import (
    CLIP,
    CUT,
    LAYERS,
    LLAMA,
    PIXTRAL,
    QWEN2,
    SIDES,
    SIGLIP,
    TILED,
    WIDE_OR_TALL,
    WINDOW,
    sizes,
    tiny,
    tower,
)

_COHERE = sizes(model_type="cohere2", sliding_window=WINDOW, layer_types=LAYERS)
_EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}


def _masked(rows: Any) -> dict[str, torch.Tensor]:
    pixels = torch.stack(of(rows, "image"))
    return {"pixel_values": pixels, "pixel_mask": torch.ones(len(pixels), 16, 16, dtype=torch.bool)}


def _deepseek_ocr2() -> Any:
    """With 4 queries of the vision model instead of 144, which are fixed in its code."""
    sam = tower(
        patch_size=2,
        output_channels=8,
        initializer_range=0.02,
        window_size=4,
        global_attn_indexes=[1],
        downsample_channels=[8, 16],
    )
    encoder = tower(num_key_value_heads=2, max_position_embeddings=64)
    text = sizes(n_routed_experts=4, n_shared_experts=1, mlp_layer_types=["dense", "sparse", "sparse"], **_EXPERTS)
    make = tiny("deepseek_ocr2", strength=12.0, text_config=text,
                vision_config={"sam_config": sam, "encoder_config": encoder},
                image_token_id=IMAGE)  # fmt: skip

    def build() -> Any:
        model = make()
        model.model.vision_tower.query_768_resolution = nn.Embedding(4, 16)
        return model

    return build


PLAIN = [
    Family(
        "aya_vision",
        tiny("aya_vision", strength=12.0, text_config=_COHERE, vision_config=SIGLIP, image_token_index=IMAGE),
        marked,
        tiled,
        sizes=TILED,
    ),
    Family(
        "cohere2_vision",
        tiny(
            "cohere2_vision", strength=12.0, text_config=_COHERE, vision_config=SIGLIP, image_token_id=IMAGE,
            alignment_intermediate_size=32,
        ),
        marked,
        tiled,
        sizes=TILED,
    ),
    Family(
        "aria",
        tiny(
            "aria", text_config=sizes(moe_num_experts=4, moe_topk=2, moe_num_shared_experts=1),
            vision_config=tower(model_type="idefics3_vision"), image_token_index=IMAGE,
            projector_patch_to_query_dict={4: 4},
        ),
        several(4),
        _masked,
    ),
    Family(
        "deepseek_vl",
        tiny("deepseek_vl", text_config=LLAMA, vision_config=SIGLIP | {"patch_size": 8}, image_token_id=IMAGE),
        several(4),
        stacked,
    ),
    Family(
        "got_ocr2",
        tiny(
            "got_ocr2",
            sharpness=8.0, text_config=QWEN2, image_token_index=IMAGE,
            vision_config=tower(patch_size=2, output_channels=8, initializer_range=0.02,
            window_size=4, global_attn_indexes=[1], mlp_dim=32),
        ),
        several(4),
        stacked,
    ),
    Family(
        "janus",
        tiny(
            "janus", text_config=LLAMA, image_token_id=IMAGE,
            vision_config=tower(num_image_tokens=4, projection_dim=32, mlp_ratio=2.0),
            vq_config={
                "embed_dim": 8, "num_embeddings": 16, "latent_channels": 16, "base_channels": 32, "num_patches": 4,
                "channel_multiplier": [1, 1], "num_res_blocks": 1, "projection_dim": 32, "num_hidden_layers": 1,
                "image_token_embed_dim": 32,
            },
        ),
        several(4),
        stacked,
    ),
    Family(
        "qianfan_ocr",
        tiny(
            "qianfan_ocr", text_config=sizes(model_type="qwen3", head_dim=8), image_token_id=IMAGE,
            vision_config=tower(image_size=[16, 16], patch_size=[4, 4]),
        ),
        marked,
        tiled,
        sizes=TILED,
    ),
    Family(
        "vipllava",
        tiny(
            "vipllava", text_config=LLAMA, vision_config=CLIP, image_token_index=IMAGE, vision_feature_layer=[-1, -2]
        ),
        several(4),
        stacked,
    ),
    Family(
        "lighton_ocr",
        tiny(
            "lighton_ocr", text_config=sizes(model_type="qwen3", head_dim=8), vision_config=PIXTRAL,
            image_token_id=IMAGE,
        ),
        lines(16),
        sized,
        sizes=WIDE_OR_TALL,
    ),
    Family(
        "llava_next_video",
        tiny(
            "llava_next_video", text_config=LLAMA, vision_config=CLIP, image_token_index=IMAGE,
            video_token_index=VIDEO, image_grid_pinpoints=[[16, 32], [32, 16]], **CUT,
        ),
        lambda p, _: [VIDEO] * len(p.data) if p.kind == "video" else [IMAGE] * (14 if p.data.shape[2] == 32 else 16),
        lambda rows: (next_views(rows) if of(rows, "image") else {})
        | stacked([[p for p in row if p.kind == "video"] for row in rows]),
        ("image", "video"),
        WIDE_OR_TALL,
    ),
    Family(
        "emu3",
        tiny(
            "emu3",
            text_config=sizes(attention_dropout=0.0),
            vq_config={
                "codebook_size": 32, "embed_dim": 4, "latent_channels": 4, "base_channels": 32, "hidden_size": 32,
                "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1, "attn_resolutions": [],
            },
            vocabulary_map={f"<|visual token {i:06d}|>": 30 + i for i in range(32)}
            | {"<|extra_200|>": BREAK, "<image>": IMAGE},
        ),
        several(6),
        lambda rows: stacked(rows) | {"image_sizes": torch.tensor([[16, 16]] * len(of(rows, "image")))},
    ),
    Family(
        "deepseek_ocr2", _deepseek_ocr2(), lambda p, _: [IMAGE] * (4 * len(tiles(p.data)) + 1), local_views, sizes=TILED
    ),
    Family(
        "step3p7",
        tiny(
            "step3p7", vision_config=tower(patch_size=2, mlp_ratio=2.0, max_position_embeddings=64),
            image_token_id=IMAGE,
            text_config=sizes(
                head_dim=8, layer_types=LAYERS, sliding_window=WINDOW, num_sliding_attention_heads=2,
                mlp_layer_types=["dense", "sparse", "sparse"], share_expert_dim=16, n_routed_experts=4, **_EXPERTS,
            ),
        ),
        marked,
        local_views,
        sizes=TILED,
    ),
    Family(
        "muse_glimmer",
        tiny(
            "muse_glimmer", strength=24.0,
            image_token_id=IMAGE, video_token_id=VIDEO, out_hidden_size=64, projector_hidden_size=16,
            text_config=sizes(head_dim=8, layer_types=LAYERS, sliding_window=WINDOW),
            vision_config=tower(patch_size=4, pos_emb_height=4, pos_emb_width=4),
        ),
        grid(),
        qwen(),
        ("image", "video"),
        SIDES,
    ),
    Family(
        "kimi_k25",
        tiny(
            "kimi_k25", image_token_id=IMAGE, video_token_id=VIDEO, projection_hidden_size=16,
            text_config=sizes(
                model_type="deepseek_v3", num_key_value_heads=4, n_routed_experts=4, kv_lora_rank=8, q_lora_rank=8,
                qk_rope_head_dim=4, v_head_dim=8, qk_nope_head_dim=8, n_group=2, topk_group=1, first_k_dense_replace=1,
                num_mtp_layers=0, **_EXPERTS,
            ),
            vision_config=tower(patch_size=4, pos_emb_height=4, pos_emb_width=4),
        ),
        grid(),
        qwen(times=1, square=True),
        sizes=SIDES,
    ),
    Family(
        "idefics2",
        tiny(
            "idefics2", sharpness=4.0, strength=24.0, image_token_id=IMAGE,
            text_config=sizes(model_type="mistral", sliding_window=None),
            vision_config=tower(),
            perceiver_config={
                "hidden_size": 32, "resampler_n_latents": 4, "resampler_depth": 1, "resampler_n_heads": 2,
                "resampler_head_dim": 8, "num_key_value_heads": 2,
            },
        ),
        marked,
        nested,
        sizes=TILED,
    ),
    Family(
        "video_llama_3",
        tiny(
            "video_llama_3", text_config=QWEN2, vision_config=tower(patch_size=4), image_token_id=IMAGE,
            video_token_id=VIDEO,
        ),
        grid(True, 1),
        qwen(times=1, merged=True),
        ("image", "video"),
        SIDES,
        frame=(8, 16),
    ),
    Family(
        "chameleon",
        tiny(
            "chameleon", **sizes(),
            vq_config={
                "embed_dim": 8, "num_embeddings": 8, "latent_channels": 8, "base_channels": 32, "resolution": 16,
                "channel_multiplier": [1, 1, 1, 1], "num_res_blocks": 1,
            },
            vocabulary_map={f"IMGIMG{chr(ord('A') + i)}Z": 50 + i for i in range(8)} | {"<image>": IMAGE},
        ),
        several(4),
        stacked,
    ),
]  # fmt: skip
