"""Models that `msd estimate` knows without their files: sizes and configs as in the released config.json."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from transformers import Gemma4Config, Qwen3_5Config, Qwen3VLConfig

from msd.errors import UserError
from msd.estimate.counts import Counts
from msd.estimate.sizes import Sizes, of_config

SIDE = 896  # pixels of the photo of models whose image tokens follow from it
_CLIP: dict[str, Any] = {
    "vision_layers": 23, "vision_hidden": 1024, "vision_intermediate": 4096, "vision_patches": 577
}  # fmt: skip
_SIZES = (  # CLIP's last layer is not used
    Sizes("llava-1.5-7b", 32, 4096, 11008, 32, 32, 128, 32064, 576, **_CLIP),
    Sizes("llava-1.5-13b", 40, 5120, 13824, 40, 40, 128, 32064, 576, **_CLIP),
    Sizes(  # a photo of about 900 x 900 pixels, 64 x 64 patches of 14, merged by 2 x 2
        "qwen2.5-vl-7b", 28, 3584, 18944, 28, 4, 128, 152064, 1024,
        vision_layers=32, vision_hidden=1280, vision_intermediate=3420, vision_gated=True, vision_patches=4096,
    ),
    # an assistant: it has no keys of its own, and reads those of the target's last layer of each type; its last layer
    # has heads of 512, and two products join and part its states and the target's
    Sizes(
        "gemma-4-31b-assistant", 4, 1024, 8192, 32, 16, 256, 262144, shares_cache=True,
        counted=Counts(
            4, 1024 * 32 * (3 * 256 + 512) * 2 + 4 * 3 * 1024 * 8192 + 3 * 5376 * 1024, 0,
            3 * 2 * 16 * 256 + 2 * 4 * 512, 4 * 32 * (3 * 256 + 512),
        ),
        total=1024 * 32 * (3 * 256 + 512) * 2 + 4 * 3 * 1024 * 8192 + 3 * 5376 * 1024 + 1024 * 262144,
    ),
)  # fmt: skip


def _qwen3_vl(layers: int, hidden: int, inner: int, heads: int, tied: bool, vision: dict[str, int]) -> Qwen3VLConfig:
    text = {
        "num_hidden_layers": layers, "hidden_size": hidden, "intermediate_size": inner, "num_attention_heads": heads,
        "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": tied,
    }  # fmt: skip
    return Qwen3VLConfig(text_config=text, vision_config=vision | {"out_hidden_size": hidden}, tie_word_embeddings=tied)


def _qwen3_vl_32b() -> Qwen3VLConfig:
    return _qwen3_vl(64, 5120, 25600, 64, False, {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304})


def _qwen3_vl_2b() -> Qwen3VLConfig:
    return _qwen3_vl(28, 2048, 6144, 16, True, {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096})


def _qwen3_5_4b() -> Qwen3_5Config:
    """A hybrid: three of four layers are recurrent. With one multi-token-prediction layer."""
    text = {
        "num_hidden_layers": 32, "hidden_size": 2560, "intermediate_size": 9216, "num_attention_heads": 16,
        "num_key_value_heads": 4, "head_dim": 256, "linear_num_key_heads": 16, "linear_num_value_heads": 32,
        "vocab_size": 248320, "tie_word_embeddings": True, "mtp_num_hidden_layers": 1,
    }  # fmt: skip
    vision = {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "out_hidden_size": 2560}
    return Qwen3_5Config(text_config=text, vision_config=vision, tie_word_embeddings=True)


def _gemma_4_31b() -> Gemma4Config:
    """Five of six layers have a window; the others have one matrix for keys and values."""
    kinds = ["full_attention" if (i + 1) % 6 == 0 else "sliding_attention" for i in range(60)]
    text = {
        "num_hidden_layers": 60, "hidden_size": 5376, "intermediate_size": 21504, "num_attention_heads": 32,
        "num_key_value_heads": 16, "head_dim": 256, "global_head_dim": 512, "num_global_key_value_heads": 4,
        "vocab_size": 262144, "sliding_window": 1024, "layer_types": kinds, "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0, "num_kv_shared_layers": 0,
    }  # fmt: skip
    vision = {
        "hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16,
        "num_key_value_heads": 16, "head_dim": 72,
    }  # fmt: skip
    return Gemma4Config(text_config=text, vision_config=vision)


def _qwen(config: Any) -> dict[str, int]:
    """The fields of a vision tower whose 2 x 2 patches of 16 pixels become one token."""
    vision, patches = config.vision_config, (SIDE // 16) ** 2
    return {
        "image_tokens": patches // 4, "vision_layers": vision.depth, "vision_hidden": vision.hidden_size,
        "vision_intermediate": vision.intermediate_size, "vision_patches": patches,
    }  # fmt: skip


def _gemma(config: Any) -> dict[str, int]:
    """The fields of a vision tower that makes 280 tokens of 3 x 3 patches each; its MLP is gated."""
    vision = config.vision_config
    return {
        "image_tokens": 280, "vision_layers": vision.num_hidden_layers, "vision_hidden": vision.hidden_size,
        "vision_intermediate": vision.intermediate_size, "vision_patches": 9 * 280, "vision_gated": True,
    }  # fmt: skip


_CONFIGS: dict[str, tuple[Callable[[], Any], Callable[[Any], dict[str, int]]]] = {
    "qwen3-vl-32b": (_qwen3_vl_32b, _qwen),
    "qwen3-vl-2b": (_qwen3_vl_2b, _qwen),
    "qwen3.5-4b": (_qwen3_5_4b, _qwen),
    "gemma-4-31b": (_gemma_4_31b, _gemma),
}
NAMES = tuple(sizes.name for sizes in _SIZES) + tuple(_CONFIGS)
_ALIASES = {
    "llava-hf/llava-1.5-7b-hf": "llava-1.5-7b",
    "llava-hf/llava-1.5-13b-hf": "llava-1.5-13b",
    "qwen/qwen2.5-vl-7b-instruct": "qwen2.5-vl-7b",
    "qwen/qwen3-vl-32b-instruct": "qwen3-vl-32b",
    "qwen/qwen3-vl-2b-instruct": "qwen3-vl-2b",
    "qwen/qwen3.5-4b": "qwen3.5-4b",
    "google/gemma-4-31b-it": "gemma-4-31b",
    "google/gemma-4-31b-it-assistant": "gemma-4-31b-assistant",
}


@cache
def preset(key: str) -> Sizes | None:
    """Returns the sizes of a built-in model by its name; None for others."""
    if key in _CONFIGS:
        make, vision = _CONFIGS[key]
        config = make()
        return of_config(key, config, **vision(config))
    return next((sizes for sizes in _SIZES if sizes.name == key), None)


def sizes(target: str) -> Sizes:
    """Returns the sizes of a built-in model, "reference", a checkpoint folder or a hub id; reads only its config.

    Raises UserError if there is no such model, or if its decoder is unsupported.
    """
    known = preset(_ALIASES.get(target.lower(), target.lower()))
    if known is not None:
        return known
    from msd.loading import load_config

    try:
        config = load_config(target)
    except UserError as error:
        raise UserError(f"{error}; known without their files: {', '.join(NAMES)}") from error
    return of_config(target, config)
