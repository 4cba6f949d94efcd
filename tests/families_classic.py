"""Tiny families of the first fifteen architectures."""

from __future__ import annotations

import torch

from family import Family
from family_layouts import (
    AUDIO,
    END,
    IMAGE,
    START,
    VIDEO,
    grid,
    lines,
    marked,
    nested,
    next_views,
    of,
    one_vision,
    one_vision_place,
    qwen,
    several,
    sized,
    sounds,
    stacked,
    tiled,
)
from family_models import (
    BOTH,
    CLIP,
    CUT,
    DEEP,
    FRAME,
    HEAD,
    LAYERS,
    LLAMA,
    MARKS,
    PATCH,
    PIXTRAL,
    QWEN2,
    ROPE,
    SIDES,
    SIGLIP,
    TILED,
    TYPES,
    WIDE_OR_TALL,
    WINDOW,
    WINDOWED,
    sizes,
    tiny,
    tower,
)

_FULL = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
_MISTRAL = sizes(model_type="mistral", sliding_window=None)
_SIGLIP = SIGLIP | {"patch_size": 8}
_AUDIO = {"hidden_size": 16, "num_mel_bins": 8, "max_source_positions": 8}
_TIED = {"tie_word_embeddings": True}
_IDEFICS = {"vision_config": tower(), "text_config": LLAMA, "image_token_id": IMAGE, "scale_factor": 1}


def _qwen(name: str, by_frame: bool, seconds: str | None, **config: object) -> Family:
    make = tiny(name, **config, **MARKS)
    return Family(name, make, grid(by_frame), qwen(seconds), BOTH, SIDES, TYPES, frame=FRAME)


def _paligemma(name: str, **text: object) -> Family:
    make = tiny(
        "paligemma", sharpness=2.0, strength=12.0, text_config=sizes(head_dim=8, **_TIED, **text), **_TIED,
        image_token_index=IMAGE, vision_config=_SIGLIP | {"projection_dim": 32}, projection_dim=32, hidden_size=32,
    )  # fmt: skip
    return Family(name, make, several(4), stacked, types=("token_type_ids",), opens=True)


def _mistral3(name: str, window: int | None) -> Family:
    make = tiny(
        "mistral3", vision_config=PIXTRAL, text_config=sizes(model_type="mistral", sliding_window=window),
        image_token_index=IMAGE, vision_feature_layer=-1, spatial_merge_size=2,
    )  # fmt: skip
    return Family(name, make, lines(16), sized, sizes=WIDE_OR_TALL)


CLASSIC = [
    Family(
        "llava",
        tiny("llava", vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE, image_seq_length=4, **CUT),
        several(4),
        stacked,
    ),
    Family(
        "pixtral",
        tiny("llava", vision_config=PIXTRAL, text_config=_MISTRAL, image_token_index=IMAGE, **_FULL),
        lines(8),
        sized,
        sizes=((16, 24), (24, 8)),
    ),
    Family(
        "llava_next",
        tiny(
            "llava_next", vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE,
            image_grid_pinpoints=[[16, 32], [32, 16]], **CUT,
        ),
        lambda p, _: [IMAGE] * (14 if p.data.shape[2] == 32 else 16),
        next_views,
        sizes=WIDE_OR_TALL,
    ),
    Family(
        "llava_onevision",
        tiny(
            "llava_onevision", vision_config=_SIGLIP, text_config=QWEN2, image_token_index=IMAGE,
            video_token_index=VIDEO, image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]], **_FULL,
        ),
        one_vision_place,
        one_vision,
        BOTH,
        WIDE_OR_TALL,
    ),
    Family(
        "video_llava",
        tiny(
            "video_llava", vision_config=CLIP, text_config=LLAMA, image_token_index=IMAGE, video_token_index=VIDEO,
            image_seq_length=4, **CUT,
        ),
        several(4, 5),
        stacked,
        BOTH,
    ),
    _qwen(
        "qwen2_vl", False, None, text_config=sizes(rope_parameters=ROPE),
        vision_config=PATCH | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
    ),
    _qwen(
        "qwen2_5_vl", False, "second_per_grid_ts", text_config=sizes(rope_parameters=ROPE),
        vision_config=WINDOWED | {"tokens_per_second": 2},
    ),
    _qwen("qwen3_vl", True, None, text_config=sizes(**HEAD), vision_config=DEEP),
    Family("idefics3", tiny("idefics3", **_IDEFICS), marked, nested, sizes=TILED),
    Family("smolvlm", tiny("smolvlm", **_IDEFICS), marked, nested, BOTH, TILED),
    Family(
        "gemma3",
        tiny(
            "gemma3", sharpness=8.0, strength=40.0, vision_config=_SIGLIP, image_token_index=IMAGE,
            mm_tokens_per_image=4,
            text_config=sizes(
                head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8, layer_types=LAYERS, **_TIED,
            ),
            **_TIED,
        ),
        marked,
        stacked,
        types=("token_type_ids",),
    ),
    _paligemma("paligemma", model_type="gemma"),
    _paligemma("paligemma2", model_type="gemma2", sliding_window=256, query_pre_attn_scalar=8),
    Family(
        "internvl",
        tiny(
            "internvl", vision_config=tower(image_size=[16, 16], patch_size=[4, 4]), text_config=QWEN2 | _TIED,
            image_token_id=IMAGE, image_seq_length=4, downsample_ratio=0.5, **_TIED,
        ),
        marked,
        tiled,
        BOTH,
        TILED,
    ),
    _mistral3("mistral3", None),
    _mistral3("mistral3_window", WINDOW),
    Family(
        "voxtral",
        tiny(
            "voxtral", text_config=LLAMA, audio_token_id=AUDIO,
            audio_config=_AUDIO | {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
        ),
        lambda p, _: [START, *[AUDIO] * 2, END],
        lambda rows: {"input_features": torch.stack(of(rows, "audio"))},
        ("audio",),
    ),
    Family(
        "qwen2_audio",
        tiny(
            "qwen2_audio", text_config=QWEN2, audio_token_index=AUDIO,
            audio_config={
                "d_model": 16, "encoder_ffn_dim": 32, "encoder_layers": 1, "encoder_attention_heads": 2,
                "num_mel_bins": 8, "max_source_positions": 8,
            },
        ),
        lambda p, _: [START, *[AUDIO] * (p.data.shape[1] // 4), END],
        sounds(16),
        ("audio",),
        lengths=(16, 12),
    ),
]  # fmt: skip
