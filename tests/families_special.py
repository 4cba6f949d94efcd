"""Tiny families whose masks, positions, caches or pictures are of their own kind."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from family import Family
from family_layouts import (
    AUDIO,
    BREAK,
    END,
    IMAGE,
    START,
    VIDEO,
    VOCABULARY,
    Picture,
    Rows,
    crops,
    flat_patches,
    grid,
    marked,
    next_views,
    placed_patches,
    qwen,
    several,
    sounds,
    stacked,
    tiled,
)
from family_models import BOTH, DEEP, FRAME, LAYERS, ROPE, SIDES, TYPES, WINDOW, WINDOWED, sizes, tiny, tower

_FOUR = [*LAYERS, "full_attention"]
_MARKS = {"image_token_id": IMAGE, "video_token_id": VIDEO}
_GEMMA4 = {
    "head_dim": 8, "global_head_dim": 16, "sliding_window": WINDOW, "layer_types": _FOUR, "num_hidden_layers": 4,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e6},
    },
}  # fmt: skip
_GEMMA4_MARKS = _MARKS | {"audio_token_id": AUDIO, "boi_token_id": START, "eoi_token_id": END, "audio_config": None}
_OMNI_MARKS = {"audio_start_token_id": BREAK, "vision_start_token_id": START, "vision_end_token_id": END}


def _omni(frames: int) -> Callable[[Picture, bool], list[int]]:
    """frames: of a sound, for each of its tokens."""

    def place(p: Picture, alone: bool) -> list[int]:
        return [BREAK, *[AUDIO] * -(-p.data.shape[1] // frames), END] if p.kind == "audio" else grid()(p, alone)

    return place


def _omni_tensors(rows: Rows) -> dict[str, Tensor]:
    return qwen("video_second_per_grid")(rows) | sounds(16)(rows)


def _lines(p: Picture, _: bool) -> list[int]:
    return [token for _ in range(p.data.shape[1] // 8) for token in [*[IMAGE] * (p.data.shape[2] // 8), BREAK]]


SPECIAL = [
    Family(
        "gemma4",
        tiny(
            "gemma4", sharpness=4.0, strength=12.0,
            text_config=sizes(
                num_kv_shared_layers=2, hidden_size_per_layer_input=8, vocab_size_per_layer_input=VOCABULARY,
                use_bidirectional_attention="vision", **_GEMMA4,
            ),
            vision_config=tower(
                num_key_value_heads=2, head_dim=8, pooling_kernel_size=2, patch_size=4, position_embedding_size=16
            ),
            **_GEMMA4_MARKS,
        ),
        grid(True, 1),
        placed_patches(4, 2),
        BOTH,
        SIDES,
        TYPES,
        frame=FRAME,
    ),
    Family(
        "gemma4_unified",
        tiny(
            "gemma4_unified", text_config=sizes(num_global_key_value_heads=1, attention_k_eq_v=True, **_GEMMA4),
            vision_config={
                "patch_size": 4, "pooling_kernel_size": 2, "mm_embed_dim": 16, "mm_posemb_size": 8,
                "output_proj_dims": 16,
            },
            **_GEMMA4_MARKS,
        ),
        grid(True, 1),
        placed_patches(8, 1),
        BOTH,
        SIDES,
        TYPES,
        frame=FRAME,
    ),
    Family(
        "llama4",
        tiny(
            "llama4", image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END,
            text_config=sizes(
                num_hidden_layers=4, head_dim=8, intermediate_size_mlp=32, num_local_experts=4, attention_chunk_size=8,
                interleave_moe_layer_step=2, no_rope_layer_interval=2,
            ),
            vision_config=tower(
                patch_size=4, vision_output_dim=16, projector_input_dim=16, projector_output_dim=16,
                intermediate_size=64,
            ),
        ),
        several(4),
        stacked,
    ),
    Family(
        "ovis2",
        tiny(
            "ovis2", text_config=sizes(model_type="qwen2"), image_token_id=IMAGE, vocab_size=VOCABULARY, hidden_size=32,
            visual_indicator_token_ids=[START, END, BREAK, AUDIO, VIDEO],
            vision_config=tower(vocab_size=16, num_visual_indicator_tokens=5),
        ),
        marked,
        tiled,
        sizes=((16, 32), (16, 16)),
    ),
    Family(
        "granite4_vision",
        tiny(
            "granite4_vision", text_config=sizes(), image_token_index=IMAGE, image_grid_pinpoints=[[16, 32], [32, 16]],
            vision_config=tower(
                model_type="clip_vision_model", hidden_size=64, num_attention_heads=2, patch_size=4, projection_dim=16
            ),
            qformer_config={
                "num_hidden_layers": 1, "intermediate_size": 32, "cross_attention_frequency": 1, "model_type":
                "blip_2_qformer",
            },
            downsample_rate="2/4", deepstack_layer_map=[[-1, 0], [-2, 1]], spatial_target_layers=[2],
        ),
        lambda p, _: [IMAGE] * (14 if p.data.shape[2] == 32 else 16),
        next_views,
        sizes=((16, 32), (32, 16)),
    ),
    Family(
        "molmo2",
        tiny(
            "molmo2", image_patch_id=IMAGE, image_start_token_id=START, image_end_token_id=END,
            text_config=sizes(head_dim=8, additional_vocab_size=4),
            vision_config=tower(num_key_value_heads=2, head_dim=8, patch_size=4, image_size=[16, 16]),
            adapter_config={
                "hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
                "intermediate_size": 32, "text_hidden_size": 32, "vision_feature_layer": [-1],
            },
        ),
        marked,
        crops,
        BOTH,
        sizes=((16, 32), (16, 16)),
        types=TYPES,
        one_mark=True,
        marks=(START, END),
    ),
    Family(
        "exaone4_5",
        tiny(
            "exaone4_5", text_config=sizes(model_type="exaone4", sliding_window=WINDOW, layer_types=LAYERS),
            vision_config=WINDOWED | {"num_key_value_heads": 2}, **_MARKS,
        ),
        grid(),
        qwen(),
        BOTH,
        SIDES,
        frame=FRAME,
    ),
    Family(
        "fuyu",
        tiny("fuyu", text_config=sizes(model_type="persimmon"), patch_size=8, image_size=16, image_token_id=IMAGE),
        _lines,
        flat_patches(8),
        sizes=((16, 24), (24, 8)),
    ),
    Family(
        "qwen2_5_omni_thinker",
        tiny(
            "qwen2_5_omni_thinker", strength=12.0, text_config=sizes(rope_parameters=ROPE), vision_config=WINDOWED,
            audio_config={
                "d_model": 16, "encoder_ffn_dim": 32, "encoder_layers": 1, "encoder_attention_heads": 2,
                "num_mel_bins": 8, "max_source_positions": 16, "n_window": 8, "output_dim": 32,
            },
            audio_token_index=AUDIO, image_token_index=IMAGE, video_token_index=VIDEO, **_OMNI_MARKS,
        ),
        _omni(4),
        _omni_tensors,
        ("image", "video", "audio"),
        SIDES,
        frame=FRAME,
        lengths=(16, 12),
    ),
    Family(
        "qwen3_omni_moe_thinker",
        tiny(
            "qwen3_omni_moe_thinker",
            strength=12.0,
            text_config=sizes(
                head_dim=8, rope_parameters=ROPE, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16
            ),
            vision_config=DEEP,
            audio_config={
                "d_model": 16, "encoder_ffn_dim": 32, "encoder_layers": 1, "encoder_attention_heads": 2,
                "num_mel_bins": 8, "max_source_positions": 16, "n_window": 50, "n_window_infer": 100, "output_dim": 32,
                "downsample_hidden_size": 8,
            },
            audio_token_id=AUDIO, **_MARKS, **_OMNI_MARKS,
        ),
        _omni(8),
        _omni_tensors,
        ("image", "video", "audio"),
        SIDES,
        frame=FRAME,
        lengths=(16, 12),
    ),
]  # fmt: skip
