"""Supported architectures, the adapter of each, and fingerprints that identify a target by its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from msd.backends.revision import plain_tensors, whole
from msd.errors import UserError
from msd.targets.base import Target
from msd.targets.bidirectional import Gemma3, Gemma4, Gemma4Unified, Molmo2, PaliGemma
from msd.targets.grouped import Compressed, Crops, Grouped, Indicated, Layered
from msd.targets.llama4 import Llama4
from msd.targets.mrope import Columns, HunYuan, MRope
from msd.targets.pictures import AnyResolution, NestedTiles, Packed, Patches, Pictures
from msd.targets.qwen2_audio import Omni, Qwen2Audio, Qwen3Omni
from msd.targets.recurrent import Recurrent, RecurrentMRope
from msd.targets.renamed import Fuyu, VideoLlava
from msd.targets.shared_mark import Glm
from msd.targets.vision import VisionCache

_SAMPLES = 64  # elements of each weight


@dataclass(frozen=True)
class Family:
    """One architecture.

    models: released models. modalities: what a prompt may contain besides text. packages: what its processor requires
    beyond this package's dependencies. note: a limitation.
    """

    models: str
    modalities: tuple[str, ...]
    adapter: type[Target] = Target
    pictures: tuple[Pictures, ...] = ()
    packages: tuple[str, ...] = ()
    note: str = ""


_VISION, _VIDEO, _ALL = ("image",), ("image", "video"), ("image", "video", "audio")
_TORCHVISION = ("torchvision",)
_SOUNDS = "every prefill encodes its sounds"
_IMAGES = Pictures()
_STACK = Pictures(join="stack")
_TILES = Pictures(join="stack", limit=512)
_QWEN = (Patches(), Patches("video", "pixel_values_videos", ("video_grid_thw",)))
_FRAMES = Pictures("video", "pixel_values_videos", join="cat")
_CLIPS = Pictures("video", "pixel_values_videos", ())
_ONE_VISION = (
    AnyResolution(),
    Pictures("video", "pixel_values_videos", ("image_sizes_videos",), join="stack"),
)

_GRID = (Patches(),)
_LOCAL = (Grouped(),)
_PLACED = (
    Pictures(extra_tensors=("image_position_ids",)),
    Grouped(
        "video", "pixel_values_videos", (), counts="num_frames_per_video",
        grouped=("pixel_values_videos", "video_position_ids"),
    ),
)  # fmt: skip
_CROPS = (Crops(), Crops("video", "pixel_values_videos", (), "list", 32, "pooler_output", False,
                         "video_token_pooling", "video_grids", None))  # fmt: skip
_MERGED = (
    Patches(extra_tensors=("image_grid_thw", "image_merge_sizes")),
    Compressed("video", "pixel_values_videos", ("video_grid_thw", "video_merge_sizes")),
)
_CODES = Pictures(extra_tensors=(), join="stack", reads_embeddings=True)
_ONE_KIND = "images or videos, not both at once"
_SHAPES = Pictures(extra_tensors=("spatial_shapes", "pixel_attention_mask"), limit=512)
_PACKED = (Packed(), Packed("video", "pixel_values_videos", ("target_sizes_videos",)))
_SIZED = (Packed(keeps=True), Packed("video", "pixel_values_videos", ("target_sizes_videos",), keeps=True))
_GRIDS = Patches(extra_tensors=("image_grid_hw",))
_STATES = "turns reuse whole states only"

_FAMILIES: dict[str, Family] = {
    "gemma3": Family("Gemma 3", _VISION, Gemma3, (_STACK,)),
    "idefics3": Family("Idefics3", _VISION, Target, (NestedTiles(),)),
    "internvl": Family("InternVL", _VIDEO, Target, (_TILES,), _TORCHVISION, "frames enter as images"),
    "llava": Family("LLaVA-1.5, Pixtral", _VISION, Target, (_IMAGES,), (), "Pixtral's processor needs torchvision"),
    "llava_next": Family("LLaVA-NeXT (1.6)", _VISION, Target, (_IMAGES,)),
    "llava_onevision": Family("LLaVA-OneVision", _VIDEO, Target, _ONE_VISION, _TORCHVISION),
    "mistral3": Family("Mistral Small 3.1", _VISION, Target, (_IMAGES,), _TORCHVISION),
    "paligemma": Family("PaliGemma 1 and 2", _VISION, PaliGemma, (_STACK,), (), "turns of a chat reuse nothing"),
    "qwen2_audio": Family("Qwen2-Audio", ("audio",), Qwen2Audio, (), (), _SOUNDS),
    "qwen2_5_vl": Family("Qwen2.5-VL", _VIDEO, MRope, _QWEN, _TORCHVISION),
    "qwen2_vl": Family("Qwen2-VL", _VIDEO, MRope, _QWEN, _TORCHVISION),
    "qwen3_vl": Family("Qwen3-VL", _VIDEO, MRope, _QWEN, _TORCHVISION),
    "smolvlm": Family("SmolVLM", _VIDEO, Target, (NestedTiles(),), _TORCHVISION, "frames enter as images"),
    "video_llava": Family("Video-LLaVA", _VIDEO, VideoLlava, (_STACK, _FRAMES), _TORCHVISION),
    "voxtral": Family("Voxtral", ("audio",), Target, (), ("mistral-common",), _SOUNDS),
    "aria": Family("Aria", _VISION, Target, (Pictures(extra_tensors=("pixel_mask",), join="stack"),)),
    "aya_vision": Family("Aya Vision", _VISION, Target, (_TILES,)),
    "chameleon": Family("Chameleon", _VISION, Target, (_CODES,)),
    "cohere2_vision": Family("Command A Vision", _VISION, Target, (_TILES,), _TORCHVISION),
    "cohere_compass": Family("Cohere Compass", _VIDEO, MRope, _QWEN, _TORCHVISION),
    "cosmos3_edge": Family("Cosmos 3 Edge", _VIDEO, MRope, _QWEN, _TORCHVISION),
    "cosmos3_omni": Family("Cosmos 3 Omni", _VIDEO, MRope, _QWEN, _TORCHVISION),
    "deepseek_ocr2": Family("DeepSeek-OCR 2", _VISION, Target, _LOCAL),
    "deepseek_vl": Family("DeepSeek-VL", _VISION, Target, (_STACK,)),
    "emu3": Family("Emu3", _VISION, Target, (Pictures(reads_embeddings=True),), note="answers in text only"),
    "ernie4_5_vl_moe": Family("ERNIE 4.5 VL", _VIDEO, MRope, _QWEN, _TORCHVISION),
    "exaone4_5": Family("EXAONE 4.5", _VIDEO, Columns, _QWEN, _TORCHVISION),
    "fuyu": Family("Fuyu", _VISION, Fuyu, (Pictures("image", "pixel_values", (), "stack", 4096, "last_hidden_state"),)),
    "gemma4": Family("Gemma 4", _VIDEO, Gemma4, _PLACED, _TORCHVISION, "no sounds"),
    "gemma4_unified": Family("Gemma 4 Unified", _VIDEO, Gemma4Unified, _PLACED, _TORCHVISION, "no sounds"),
    "glm46v": Family("GLM-4.6V", _VIDEO, Glm, _QWEN, _TORCHVISION, _ONE_KIND),
    "glm4v": Family("GLM-4.1V", _VIDEO, Glm, _QWEN, _TORCHVISION, _ONE_KIND),
    "glm4v_moe": Family("GLM-4.5V", _VIDEO, Glm, _QWEN, _TORCHVISION, _ONE_KIND),
    "glm_ocr": Family("GLM-OCR", _VIDEO, Glm, _QWEN, _TORCHVISION, _ONE_KIND),
    "got_ocr2": Family("GOT-OCR 2", _VISION, Target, (_TILES,)),
    "granite4_vision": Family("Granite 4 Vision", _VISION, Target, (Layered(),)),
    "hunyuan_vl": Family("HunYuan-VL", _VISION, HunYuan, _GRID),
    "idefics2": Family("Idefics2", _VISION, Target, (NestedTiles(),)),
    "janus": Family("Janus", _VISION, Target, (_STACK,), note="answers in text only"),
    "kimi_k25": Family("Kimi K2.5", _VISION, Target, _GRID, _TORCHVISION, "no videos: transformers 5.23 fails"),
    "lighton_ocr": Family("LightOnOCR", _VISION, Target, (_IMAGES,)),
    "llama4": Family(
        "Llama 4",
        _VISION,
        Llama4,
        (Pictures("image", "pixel_values", (), "stack", 512, "last_hidden_state"),),
        _TORCHVISION,
    ),
    "llava_next_video": Family("LLaVA-NeXT-Video", _VIDEO, Target, (_IMAGES, _CLIPS), _TORCHVISION),
    "molmo2": Family("Molmo2", _VIDEO, Molmo2, _CROPS, _TORCHVISION, _ONE_KIND),
    "muse_glimmer": Family("Muse Glimmer", _VIDEO, Target, _QWEN, _TORCHVISION),
    "ovis2": Family("Ovis2", _VISION, Target, (Indicated(join="stack", limit=512),)),
    "paddleocr_vl": Family("PaddleOCR-VL", _VISION, MRope, _GRID),
    "qianfan_ocr": Family("Qianfan-OCR", _VISION, Target, (_TILES,)),
    "qwen2_5_omni_thinker": Family("Qwen2.5-Omni thinker", _ALL, Omni, _QWEN, _TORCHVISION, _SOUNDS),
    "qwen3_omni_moe_thinker": Family("Qwen3-Omni thinker", _ALL, Qwen3Omni, _QWEN, _TORCHVISION, _SOUNDS),
    "qwen3_vl_moe": Family("Qwen3-VL MoE", _VIDEO, MRope, _QWEN, _TORCHVISION),
    "step3p7": Family("Step 3.7", _VISION, Target, _LOCAL, _TORCHVISION),
    "video_llama_3": Family("VideoLLaMA 3", _VIDEO, Target, _MERGED, _TORCHVISION),
    "vipllava": Family("ViP-LLaVA", _VISION, Target, (_STACK,)),
    "qwen3_5": Family("Qwen3.5", _VIDEO, RecurrentMRope, _QWEN, _TORCHVISION, _STATES),
    "qwen3_5_moe": Family("Qwen3.5 MoE", _VIDEO, RecurrentMRope, _QWEN, _TORCHVISION, _STATES),
    "lfm2_vl": Family("LFM2-VL", _VISION, Recurrent, (_SHAPES,), _TORCHVISION, _STATES),
    "lfm3_vl": Family("LFM3-VL", _VIDEO, Recurrent, _QWEN, _TORCHVISION, _STATES),
    "minicpm_ocr": Family("MiniCPM-OCR", _VIDEO, Recurrent, _PACKED, _TORCHVISION, f"{_STATES}; needs opencv-python"),
    "minicpmv4_6": Family("MiniCPM-V 4.6", _VIDEO, Recurrent, _PACKED, _TORCHVISION, _STATES),
    "minicpmv4_7": Family("MiniCPM-V 4.7", _VIDEO, RecurrentMRope, _SIZED, _TORCHVISION, _STATES),
    "nemotron_h_omni": Family("Nemotron 3 Omni", _VISION, Recurrent, (_GRIDS,), _TORCHVISION, _STATES),
}


def supported() -> list[str]:
    """Each `model_type` with an adapter, sorted."""
    return sorted(_FAMILIES)


def families() -> dict[str, Family]:
    """`model_type` -> family, sorted."""
    return dict(sorted(_FAMILIES.items()))


def family(config: Any) -> Family:
    """The family of a model's config. UserError for an unsupported architecture."""
    kind = config.model_type
    if kind not in _FAMILIES:
        raise UserError(
            f"no adapter for architecture '{kind}' (supported: {', '.join(supported())}); to add one, write "
            f"msd/targets/{kind.replace('-', '_')}.py and its line in msd/targets/registry.py, as docs/targets.md shows"
        )
    return _FAMILIES[kind]


def adapt(
    model: PreTrainedModel,
    taps: tuple[int, ...] = (),
    vision_cache: VisionCache | None = None,
    backend: str = "measure",
) -> Target:
    """The adapter of `model`; the other arguments are those of `Target`. UserError for an unsupported architecture."""
    found = family(model.config)
    target = found.adapter(model, taps, vision_cache, backend, found.pictures)
    target.modalities = found.modalities
    return target


def fingerprint(model: PreTrainedModel) -> str:
    """Model type and `weights_hash`, such as "llava-3f9a0c12b7d4"."""
    return f"{model.config.model_type}-{weights_hash(model)}"


def weights_hash(module: nn.Module) -> str:
    """Hashes names, shapes and evenly spaced elements of all weights, rounded to bfloat16.

    A checkpoint loaded in float32 and in bfloat16 has one hash; training and quantisation change it.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(module.named_parameters()):
        digest.update(f"{name}|{tuple(weight.shape)}|".encode())
        for tensor in plain_tensors(whole(weight.detach())):
            flat = tensor.reshape(-1)
            samples = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].to("cpu", torch.bfloat16)
            digest.update(samples.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
