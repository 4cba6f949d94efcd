"""Supported architectures, the adapter of each, and fingerprints that identify a target by its weights."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel

from msd.backends.revision import plain_tensors
from msd.errors import UserError
from msd.targets.base import Target
from msd.targets.bidirectional import Gemma3, PaliGemma
from msd.targets.mrope import MRope
from msd.targets.pictures import AnyResolution, NestedTiles, Packed, Patches, Pictures
from msd.targets.qwen2_audio import Qwen2Audio
from msd.targets.recurrent import Recurrent, RecurrentMRope
from msd.targets.video_llava import VideoLlava
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


_VISION, _VIDEO = ("image",), ("image", "video")
_TORCHVISION = ("torchvision",)
_IMAGES = Pictures()
_STACK = Pictures(join="stack")
_TILES = Pictures(join="stack", limit=512)
_QWEN = (Patches(), Patches("video", "pixel_values_videos", ("video_grid_thw",)))
_FRAMES = Pictures("video", "pixel_values_videos", join="cat")
_ONE_VISION = (
    AnyResolution(),
    Pictures("video", "pixel_values_videos", ("image_sizes_videos",), join="stack"),
)

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
    "qwen2_audio": Family("Qwen2-Audio", ("audio",), Qwen2Audio, (), (), "every prefill encodes its sounds"),
    "qwen2_5_vl": Family("Qwen2.5-VL", _VIDEO, MRope, _QWEN, _TORCHVISION),
    "qwen2_vl": Family("Qwen2-VL", _VIDEO, MRope, _QWEN, _TORCHVISION),
    "qwen3_vl": Family("Qwen3-VL", _VIDEO, MRope, _QWEN, _TORCHVISION),
    "smolvlm": Family("SmolVLM", _VIDEO, Target, (NestedTiles(),), _TORCHVISION, "frames enter as images"),
    "video_llava": Family("Video-LLaVA", _VIDEO, VideoLlava, (_STACK, _FRAMES), _TORCHVISION),
    "voxtral": Family("Voxtral", ("audio",), Target, (), ("mistral-common",), "every prefill encodes its sounds"),
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
    return found.adapter(model, taps, vision_cache, backend, found.pictures)


def fingerprint(model: PreTrainedModel) -> str:
    """Model type and weight hash, such as "llava-3f9a0c12b7d4".

    Hashes names, shapes and evenly spaced elements of all weights, rounded to bfloat16: a checkpoint loaded in float32
    and in bfloat16 has one fingerprint; training and quantisation change it.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        digest.update(f"{name}|{tuple(weight.shape)}|".encode())
        for tensor in plain_tensors(weight.detach()):
            flat = tensor.reshape(-1)
            samples = flat[:: max(1, len(flat) // _SAMPLES)][:_SAMPLES].to("cpu", torch.bfloat16)
            digest.update(samples.contiguous().view(torch.uint8).numpy().tobytes())
    return f"{model.config.model_type}-{digest.hexdigest()[:12]}"
