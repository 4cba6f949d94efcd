"""Real processors that need torchvision, with the sizes of the tiny families (`make test-full`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from real_tokenizer import CROP, SIZE, tokenizer
from transformers import (
    GotOcr2ImageProcessor,
    InternVLProcessor,
    InternVLVideoProcessor,
    LlavaOnevisionImageProcessor,
    LlavaOnevisionProcessor,
    LlavaOnevisionVideoProcessor,
    PixtralImageProcessor,
    PixtralProcessor,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
    SmolVLMImageProcessor,
    SmolVLMProcessor,
    SmolVLMVideoProcessor,
    VideoLlavaImageProcessor,
    VideoLlavaProcessor,
    VideoLlavaVideoProcessor,
)

QWEN = (
    "{% for m in messages %}{% for c in m.content %}"
    "{% if c.type == 'image' %}<start><image><end>{% elif c.type == 'video' %}VIDEO{% else %}{{ c.text }}{% endif %}"
    "{% endfor %}{% endfor %}"
)
PATCHES = {"patch_size": 4, "temporal_patch_size": 2, "merge_size": 2}


def _qwen(kind: type, video: type = Qwen2VLVideoProcessor, place: str = "<start><video><end>", most: int = 1) -> Any:
    """most: the number of frames to which the pixel limit of a video applies."""
    bounds = {"shortest_edge": 64, "longest_edge": 512}
    images = Qwen2VLImageProcessor(**PATCHES, size=bounds)
    more = {"cap_pixels_per_frame": False} if video is Qwen2VLVideoProcessor else {}
    videos = video(**PATCHES, size={"shortest_edge": 64 * most, "longest_edge": 512 * most}, **more)
    words = tokenizer(
        image_token="<image>", video_token="<video>", vision_start_token="<start>", vision_end_token="<end>"
    )
    return kind(images, words, videos, chat_template=QWEN.replace("VIDEO", place))


def _pixtral(merge: int) -> Any:
    images = PixtralImageProcessor(patch_size=8, size={"longest_edge": 32})
    marks = {"image_token": "<image>", "image_break_token": "<break>", "image_end_token": "<end>"}
    return PixtralProcessor(images, tokenizer(), patch_size=8, spatial_merge_size=merge, **marks)


def _one_vision() -> Any:
    pinpoints = [[16, 16], [16, 32], [32, 16]]
    return LlavaOnevisionProcessor(
        LlavaOnevisionImageProcessor(size=SIZE, image_grid_pinpoints=pinpoints), tokenizer(),
        LlavaOnevisionVideoProcessor(size=SIZE), num_image_tokens=4, vision_feature_select_strategy="full",
    )  # fmt: skip


def _video_llava() -> Any:
    return VideoLlavaProcessor(
        VideoLlavaImageProcessor(**CROP), VideoLlavaVideoProcessor(**CROP), tokenizer(), patch_size=8
    )


def _smolvlm() -> Any:
    tiles = tuple(f"<row_{row}_col_{column}>" for row in (1, 2) for column in (1, 2))
    words = tokenizer("<image>", "<fake_token_around_image>", "<global-img>", ("<end_of_utterance>", *tiles))
    edges = {"size": {"longest_edge": 32}, "max_image_size": {"longest_edge": 16}}
    sampling = {"fps": 1, "max_frames": 64, "video_size": {"longest_edge": 32}}
    videos = SmolVLMVideoProcessor(**edges, num_frames=8, fps=1, video_sampling=sampling)
    return SmolVLMProcessor(SmolVLMImageProcessor(**edges), words, videos, image_seq_len=4)


def _internvl() -> Any:
    marks = {
        "start_image_token": "<start>", "end_image_token": "<end>", "context_image_token": "<image>",
        "video_token": "<video>",
    }  # fmt: skip
    images = GotOcr2ImageProcessor(size=SIZE, min_patches=1, max_patches=2)
    return InternVLProcessor(images, tokenizer(**marks), InternVLVideoProcessor(size=SIZE), image_seq_length=4)


FULL: dict[str, Callable[[], Any]] = {
    "pixtral": lambda: _pixtral(1),
    "mistral3": lambda: _pixtral(2),
    "llava_onevision": _one_vision,
    "video_llava": _video_llava,
    "qwen2_vl": lambda: _qwen(Qwen2VLProcessor),
    "qwen2_5_vl": lambda: _qwen(Qwen2_5_VLProcessor),
    "qwen3_vl": lambda: _qwen(Qwen3VLProcessor, Qwen3VLVideoProcessor, "<video>", 8),
    "smolvlm": _smolvlm,
    "internvl": _internvl,
}
