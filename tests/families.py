"""A tiny random model of every family, with what its processor would write, without torchvision.

What stands where is in `family_layouts`, what a family is in `family`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma2Config,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    InternVLConfig,
    InternVLForConditionalGeneration,
    InternVLVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    Mistral3Config,
    Mistral3ForConditionalGeneration,
    MistralConfig,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    PixtralVisionConfig,
    PreTrainedModel,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
    VideoLlavaConfig,
    VideoLlavaForConditionalGeneration,
    VoxtralConfig,
    VoxtralForConditionalGeneration,
)

from family import Family
from family_layouts import (
    AUDIO,
    BOS,
    END,
    EOS,
    IMAGE,
    PAD,
    START,
    VIDEO,
    VOCABULARY,
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
    tiles,
)  # fmt: skip
from msd.targets.taps import output_layer
from recurrent_models import RECURRENT

WINDOW = 12  # of sliding layers: shorter than every prompt


def _text(kind: type, **more: Any) -> Any:
    return kind(**_sizes(), **more)


def _sizes() -> dict[str, Any]:
    return {
        "vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": BOS,
        "eos_token_id": EOS, "pad_token_id": PAD,
    }  # fmt: skip


def _tower(kind: type, **more: Any) -> Any:
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return kind(**(sizes | {"image_size": 16, "patch_size": 8} | more))


def _made(model: type, config: Any, sharpness: float = 10.0, strength: float = 6.0) -> Callable[[], PreTrainedModel]:
    """A maker of seeded models, with larger weights than at the start of training, so that pictures matter and laws
    have shape: `strength` times as large, the output layer's `sharpness` times.
    """

    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        made = model(config)
        with torch.no_grad():
            output_layer(made).weight.mul_(sharpness)
            for name, weight in made.named_parameters():
                if weight.dim() > 1 and not weight.any():  # such as Gemma 3's projector
                    torch.nn.init.normal_(weight, std=0.02)
                if weight.dim() > 1 and "embed_tokens" not in name and "lm_head" not in name:
                    weight.mul_(strength)
        made.generation_config.eos_token_id, made.generation_config.pad_token_id = EOS, PAD
        return made.eval()

    return make


_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_MARKS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
_PATCH = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


_PIXTRAL = {"head_dim": 8, "image_size": 32}
_SIGLIP = {"vision_use_head": False}


def _paligemma(text: Any) -> Callable[[], PreTrainedModel]:
    tower = _tower(SiglipVisionConfig, projection_dim=32, **_SIGLIP)
    config = PaliGemmaConfig(
        vision_config=tower, text_config=text, image_token_id=IMAGE, projection_dim=32, hidden_size=32
    )
    return _made(PaliGemmaForConditionalGeneration, config, 2.0, 12.0)


def _llava_like(config: type, tower: Any, text: Any, **more: Any) -> Any:
    return config(vision_config=tower, text_config=text, image_token_id=IMAGE, **more)


_CUT = {"vision_feature_layer": -2, "vision_feature_select_strategy": "default"}
_FULL = {"vision_feature_layer": -1, "vision_feature_select_strategy": "full"}
_LLAMA, _QWEN2 = _text(LlamaConfig), _text(Qwen2Config)
_MISTRAL = _text(MistralConfig, sliding_window=None)
_CLIP = _tower(CLIPVisionConfig, projection_dim=16)
_WIDE_OR_TALL = ((16, 32), (32, 16))
_SIDES = ((16, 24), (24, 8))

FAMILIES = [
    Family(
        "llava",
        _made(LlavaForConditionalGeneration, _llava_like(LlavaConfig, _CLIP, _LLAMA, image_seq_length=4, **_CUT)),
        several(4),
        stacked,
    ),
    Family(
        "pixtral",
        _made(
            LlavaForConditionalGeneration,
            _llava_like(LlavaConfig, _tower(PixtralVisionConfig, **_PIXTRAL), _MISTRAL, **_FULL),
        ),
        lines(8),
        sized,
        sizes=_SIDES,
    ),
    Family(
        "llava_next",
        _made(
            LlavaNextForConditionalGeneration,
            _llava_like(LlavaNextConfig, _CLIP, _LLAMA, image_grid_pinpoints=[[16, 32], [32, 16]], **_CUT),
        ),
        lambda p, _: [IMAGE] * (14 if p.data.shape[2] == 32 else 16),
        next_views,
        sizes=_WIDE_OR_TALL,
    ),
    Family(
        "llava_onevision",
        _made(
            LlavaOnevisionForConditionalGeneration,
            _llava_like(
                LlavaOnevisionConfig, _tower(SiglipVisionConfig, **_SIGLIP), _QWEN2, video_token_id=VIDEO,
                image_grid_pinpoints=[[16, 16], [16, 32], [32, 16]], **_FULL,
            ),
        ),
        one_vision_place,
        one_vision,
        ("image", "video"),
        _WIDE_OR_TALL,
    ),
    Family(
        "video_llava",
        _made(
            VideoLlavaForConditionalGeneration,
            _llava_like(VideoLlavaConfig, _CLIP, _LLAMA, video_token_id=VIDEO, image_seq_length=4, **_CUT),
        ),
        several(4, 5),
        stacked,
        ("image", "video"),
    ),
    Family(
        "qwen2_vl",
        _made(
            Qwen2VLForConditionalGeneration,
            Qwen2VLConfig(
                text_config=_sizes() | {"rope_parameters": _ROPE}, **_MARKS,
                vision_config=_PATCH | {"embed_dim": 16, "hidden_size": 32, "mlp_ratio": 2},
            ),
        ),
        grid(False),
        qwen(False),
        ("image", "video"),
        _SIDES,
        "mm_token_type_ids",
        frame=(8, 16),  # narrow, so that the time axis runs ahead of the others
    ),
    Family(
        "qwen2_5_vl",
        _made(
            Qwen2_5_VLForConditionalGeneration,
            Qwen2_5_VLConfig(
                text_config=_sizes() | {"rope_parameters": _ROPE}, **_MARKS,
                vision_config=_PATCH | {
                    "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "window_size": 16,
                    "fullatt_block_indexes": [1], "tokens_per_second": 2,
                },
            ),
        ),
        grid(False),
        qwen(True),
        ("image", "video"),
        _SIDES,
        "mm_token_type_ids",
        frame=(8, 16),  # narrow, so that the time axis runs ahead of the others
    ),
    Family(
        "qwen3_vl",
        _made(
            Qwen3VLForConditionalGeneration,
            Qwen3VLConfig(
                text_config=_sizes() | {"head_dim": 8, "rope_parameters": _ROPE}, **_MARKS,
                vision_config=_PATCH | {
                    "hidden_size": 16, "out_hidden_size": 32, "intermediate_size": 32, "num_position_embeddings": 16,
                    "deepstack_visual_indexes": [0, 1],
                },
            ),
        ),
        grid(True),
        qwen(False),
        ("image", "video"),
        _SIDES,
        "mm_token_type_ids",
        frame=(8, 16),  # narrow, so that the time axis runs ahead of the others
    ),
    Family(
        "idefics3",
        _made(
            Idefics3ForConditionalGeneration,
            Idefics3Config(
                vision_config=_tower(dict), text_config=_LLAMA, image_token_id=IMAGE, scale_factor=1, pad_token_id=PAD
            ),
        ),
        marked,
        nested,
        sizes=((16, 32), (16, 16)),
    ),
    Family(
        "smolvlm",
        _made(
            SmolVLMForConditionalGeneration,
            SmolVLMConfig(
                vision_config=_tower(dict), text_config=_LLAMA, image_token_id=IMAGE, scale_factor=1, pad_token_id=PAD
            ),
        ),
        marked,
        nested,
        ("image", "video"),
        ((16, 32), (16, 16)),
    ),
    Family(
        "gemma3",
        _made(
            Gemma3ForConditionalGeneration,
            Gemma3Config(
                vision_config=_tower(SiglipVisionConfig, **_SIGLIP), image_token_id=IMAGE, mm_tokens_per_image=4,
                text_config=_text(
                    Gemma3TextConfig, head_dim=8, sliding_window=WINDOW, query_pre_attn_scalar=8,
                    layer_types=["sliding_attention", "full_attention", "sliding_attention"],
                ),
            ),
            8.0,
            40.0,
        ),
        marked,
        stacked,
        types="token_type_ids",
    ),
    Family(
        "paligemma",
        _paligemma(_text(GemmaConfig, head_dim=8)),
        several(4),
        stacked,
        types="token_type_ids",
        opens=True,
    ),
    Family(
        "paligemma2",
        _paligemma(_text(Gemma2Config, head_dim=8, sliding_window=256, query_pre_attn_scalar=8)),
        several(4),
        stacked,
        types="token_type_ids",
        opens=True,
    ),
    Family(
        "internvl",
        _made(
            InternVLForConditionalGeneration,
            InternVLConfig(
                vision_config=_tower(InternVLVisionConfig, image_size=[16, 16], patch_size=[4, 4]), text_config=_QWEN2,
                image_token_id=IMAGE, image_seq_length=4, downsample_ratio=0.5,
            ),
        ),
        marked,
        lambda rows: {"pixel_values": torch.stack([t for row in rows for p in row for t in tiles(p.data)])},
        ("image", "video"),
        ((16, 32), (16, 16)),
    ),
    Family(
        "mistral3",
        _made(
            Mistral3ForConditionalGeneration,
            Mistral3Config(
                vision_config=_tower(PixtralVisionConfig, **_PIXTRAL), text_config=_MISTRAL, image_token_id=IMAGE,
                vision_feature_layer=-1, spatial_merge_size=2, tie_word_embeddings=False,
            ),
        ),
        lines(16),
        sized,
        sizes=((16, 32), (32, 16)),
    ),
    Family(
        "mistral3_window",
        _made(
            Mistral3ForConditionalGeneration,
            Mistral3Config(
                vision_config=_tower(PixtralVisionConfig, **_PIXTRAL), image_token_id=IMAGE, vision_feature_layer=-1,
                text_config=_text(MistralConfig, sliding_window=WINDOW), spatial_merge_size=2,
                tie_word_embeddings=False,
            ),
        ),
        lines(16),
        sized,
        sizes=((16, 32), (32, 16)),
    ),
    Family(
        "voxtral",
        _made(
            VoxtralForConditionalGeneration,
            VoxtralConfig(
                audio_config={
                    "vocab_size": VOCABULARY, "hidden_size": 16, "intermediate_size": 64, "num_hidden_layers": 1,
                    "num_attention_heads": 2, "num_mel_bins": 8, "max_source_positions": 8,
                },
                text_config=_LLAMA, audio_token_id=AUDIO,
            ),
        ),
        lambda p, _: [START, *[AUDIO] * 2, END],
        lambda rows: {"input_features": torch.stack(of(rows, "audio"))},
        ("audio",),
    ),
    Family(
        "qwen2_audio",
        _made(
            Qwen2AudioForConditionalGeneration,
            Qwen2AudioConfig(
                audio_config={
                    "d_model": 16, "encoder_ffn_dim": 32, "encoder_layers": 1, "encoder_attention_heads": 2,
                    "num_mel_bins": 8, "max_source_positions": 8,
                },
                text_config=_QWEN2, audio_token_index=AUDIO,
            ),
        ),
        lambda p, _: [START, *[AUDIO] * (p.data.shape[1] // 4), END],
        sounds(16),
        ("audio",),
        lengths=(16, 12),
    ),
    *(
        Family(r.name, _made(r.model, r.config, *r.weights), r.place, r.tensors, r.kinds, r.sizes, r.types, r.frame)
        for r in RECURRENT
    ),
]  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}
