"""A tiny random model of every family, and prompts for it as its processor would write them, without torchvision.

A prompt is a list of parts: word ids, and `Picture`s. `row` turns one into processor output, `batch` several into a
left-padded batch. What a family adds to its model is which ids stand for a picture, and which tensors describe all
pictures of a batch; the layouts are those of the processors of transformers 5.23.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
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

PAD, BOS, EOS, IMAGE, VIDEO, AUDIO, START, END, BREAK = range(9)
WORDS, VOCABULARY = 9, 64  # the first word; ids below stand for something else
WINDOW = 12  # of sliding layers: shorter than every prompt


@dataclass(frozen=True)
class Picture:
    """kind: "image", "video" or "audio". data: [3, h, w], [frames, 3, h, w] or [mel bins, frames]."""

    kind: str
    data: Tensor


Part = int | Picture
Rows = list[list[Picture]]  # the pictures of every row


@dataclass(frozen=True)
class Family:
    """name: the test's; the model's `model_type` unless a family is there in two forms.

    make: a fresh model. place: the ids of a picture; told whether it is its prompt's only one of the kind. tensors:
    what describes the pictures of all rows. sizes: of an image, [h, w], and of another one. frame: of a video's. types: the name of the
    token types that the processor returns, and the type of words.
    """

    name: str
    make: Callable[[], Any]
    place: Callable[[Picture, bool], list[int]]
    tensors: Callable[[Rows], dict[str, Tensor]]
    kinds: tuple[str, ...] = ("image",)
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((16, 16), (16, 16))
    types: str | None = None
    frame: tuple[int, int] = (16, 16)
    opens: bool = False  # pictures stand before all words

    def picture(self, seed: int, kind: str = "image") -> Picture:
        """A random picture: sizes take turns; a video has 8 frames."""
        g = torch.Generator().manual_seed(seed)
        if kind == "audio":
            return Picture(kind, torch.randn(8, 16, generator=g))
        shape = (3, *self.sizes[seed % 2]) if kind == "image" else (8, 3, *self.frame)
        return Picture(kind, torch.randn(shape, generator=g))

    def parts(self, seed: int, kinds: Sequence[str], words: int = 12) -> list[Part]:
        """A prompt: words, pictures of `kinds` with words between, words that repeat themselves."""
        g = torch.Generator().manual_seed(seed)
        text: list[Part] = list(torch.randint(WORDS, VOCABULARY, (words,), generator=g).tolist())
        shown: list[Part] = []
        for i, kind in enumerate(kinds):
            shown += [self.picture(10 * seed + i, kind), *([] if self.opens else text[i : i + 2])]
        opening = [BOS, *text[:3]]
        return [*([*shown, *opening] if self.opens else [*opening, *shown]), *text, *text[: words // 2]]

    def row(self, parts: Sequence[Part]) -> dict[str, Any]:
        """Processor output of one prompt."""
        return self.batch([parts])

    def batch(self, prompts: Sequence[Sequence[Part]]) -> dict[str, Any]:
        """Processor output of several, left-padded."""
        shown = [[p for p in parts if isinstance(p, Picture)] for parts in prompts]
        ids = []
        for parts, pictures in zip(prompts, shown, strict=True):
            of_kind = {kind: sum(p.kind == kind for p in pictures) for kind in self.kinds}
            written = [[p] if isinstance(p, int) else self.place(p, of_kind[p.kind] == 1) for p in parts]
            ids.append([token for some in written for token in some])
        width = max(map(len, ids))
        out = {
            "input_ids": torch.tensor([[PAD] * (width - len(x)) + x for x in ids]),
            "attention_mask": torch.tensor([[0] * (width - len(x)) + [1] * len(x) for x in ids]),
        }
        if self.types is not None:
            kinds = (out["input_ids"] == IMAGE).long() + 2 * (out["input_ids"] == VIDEO)
            out[self.types] = torch.zeros_like(kinds) if self.opens else kinds
        return {**out, **(self.tensors(shown) if any(shown) else {})}


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
    """A maker of seeded models, with larger weights than at the start of training, so that pictures matter and laws have
    shape: `strength` times as large, the output layer's `sharpness` times.
    """

    def make() -> PreTrainedModel:
        torch.manual_seed(0)
        made = model(config)
        with torch.no_grad():
            made.lm_head.weight.mul_(sharpness)
            for name, weight in made.named_parameters():
                if weight.dim() > 1 and "embed_tokens" not in name and "lm_head" not in name:
                    weight.mul_(strength)
        made.generation_config.eos_token_id, made.generation_config.pad_token_id = EOS, PAD
        return made.eval()

    return make


def _of(rows: Rows, kind: str) -> list[Tensor]:
    return [p.data for pictures in rows for p in pictures if p.kind == kind]


def _stacked(rows: Rows, image: str = "pixel_values", video: str = "pixel_values_videos") -> dict[str, Tensor]:
    """Pictures of one size: [I, 3, h, w] and [V, frames, 3, h, w]."""
    found = {image: _of(rows, "image"), video: _of(rows, "video")}
    return {name: torch.stack(data) for name, data in found.items() if data}


def _several(tokens: int, frame: int = 0) -> Callable[[Picture, bool], list[int]]:
    """`tokens` placeholders for an image, `frame` for each frame of a video."""
    return lambda p, _: [IMAGE] * tokens if p.kind == "image" else [VIDEO] * (frame * len(p.data))


# LLaVA-NeXT and LLaVA-OneVision: a base view, and tiles of wide or tall images


def _views(image: Tensor) -> Tensor:
    """[3, 3, 16, 16]: the base view (here any pixels of the image) and its two tiles."""
    tall = image.shape[1] == 32
    halves = [image[:, :16, :16], image[:, 16:] if tall else image[:, :, 16:]]
    return torch.stack([image[:, ::2] if tall else image[:, :, ::2], *halves])


def _next(rows: Rows) -> dict[str, Tensor]:
    images = _of(rows, "image")
    return {
        "pixel_values": torch.stack([_views(x) for x in images]),
        "image_sizes": torch.tensor([x.shape[1:] for x in images]),
    }


def _one_vision(rows: Rows) -> dict[str, Tensor]:
    """Images of a prompt with several are not cut; views are filled up with zeros."""
    groups = [[p.data for p in row if p.kind == "image"] for row in rows]
    views = [_views(x) if len(group) == 1 else _views(x)[:1] for group in groups for x in group]
    out = _stacked([[p for p in row if p.kind == "video"] for row in rows])
    if views:
        most = max(map(len, views))
        padded = [torch.cat([v, v.new_zeros(most - len(v), *v.shape[1:])]) for v in views]
        out |= {
            "pixel_values": torch.stack(padded),
            "image_sizes": torch.tensor([x.shape[1:] for group in groups for x in group]),
            "batch_num_images": torch.tensor([len(group) for group in groups if group]),
        }
    return out


def _one_vision_place(p: Picture, alone: bool) -> list[int]:
    """A base view of 4 tokens; 2x4 or 4x2 tokens of tiles with a newline per row, or one newline. A frame pools to 1."""
    if p.kind == "video":
        return [VIDEO] * (len(p.data) + 1)
    return [IMAGE] * (4 + (1 if not alone else 10 if p.data.shape[2] == 32 else 12))


# Pixtral: images of any size, padded to the largest


def _sized(rows: Rows) -> dict[str, Tensor]:
    images = _of(rows, "image")
    high, wide = (max(x.shape[i] for x in images) for i in (1, 2))
    padded = [torch.nn.functional.pad(x, (0, wide - x.shape[2], 0, high - x.shape[1])) for x in images]
    return {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor([x.shape[1:] for x in images])}


def _lines(unit: int) -> Callable[[Picture, bool], list[int]]:
    """A line of placeholders for each row of patches of `unit` pixels, a break after each and an end after the last."""

    def place(p: Picture, _: bool) -> list[int]:
        lines = [[IMAGE] * (p.data.shape[2] // unit) + [BREAK]] * (p.data.shape[1] // unit)
        return [token for line in lines for token in line][:-1] + [END]

    return place


# Qwen-VL: rows of patches of 4x4 pixels and 2 frames, merged by 2x2


def _patches(frames: Tensor) -> tuple[Tensor, list[int]]:
    """([patches, 96], grid [t, h, w]) of frames [2t, 3, 4h, 4w], in the order of merged blocks."""
    t, h, w = frames.shape[0] // 2, frames.shape[2] // 4, frames.shape[3] // 4
    cut = frames.reshape(t, 2, 3, h // 2, 2, 4, w // 2, 2, 4).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return cut.reshape(t * h * w, -1), [t, h, w]


def _qwen(seconds: bool) -> Callable[[Rows], dict[str, Tensor]]:
    def tensors(rows: Rows) -> dict[str, Tensor]:
        out = {}
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            found = _of(rows, kind)
            if found:
                cut = [_patches(torch.stack([x, x]) if kind == "image" else x) for x in found]
                out[pixels] = torch.cat([patches for patches, _ in cut])
                out[f"{kind}_grid_thw"] = torch.tensor([grid for _, grid in cut])
        if seconds and _of(rows, "video"):
            out["second_per_grid_ts"] = torch.tensor([1.0] * len(_of(rows, "video")))
        return out

    return tensors


def _grid(frame_by_frame: bool) -> Callable[[Picture, bool], list[int]]:
    def place(p: Picture, _: bool) -> list[int]:
        each = p.data.shape[-2] // 8 * (p.data.shape[-1] // 8)
        if p.kind == "image":
            return [START, *[IMAGE] * each, END]
        times = len(p.data) // 2
        if not frame_by_frame:
            return [START, *[VIDEO] * (each * times), END]
        return [token for t in range(times) for token in (WORDS + t, START, *[VIDEO] * each, END)]

    return place


_ROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_MARKS = {
    "image_token_id": IMAGE, "video_token_id": VIDEO, "vision_start_token_id": START, "vision_end_token_id": END,
}  # fmt: skip
_PATCH = {"depth": 2, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 2}


# Idefics3, SmolVLM and InternVL: tiles of one size; a wide image has three


def _tiles(data: Tensor) -> list[Tensor]:
    """Tiles [3, 16, 16] of an image; of a video, its frames."""
    if data.dim() == 4:
        return list(data)
    return [data] if data.shape[1] == data.shape[2] else list(_views(data))


def _nested(rows: Rows) -> dict[str, Tensor]:
    tiles = [[tile for p in row for tile in _tiles(p.data)] for row in rows]
    pixels = torch.zeros(len(rows), max(map(len, tiles)), 3, 16, 16)
    for i, row in enumerate(tiles):
        for j, tile in enumerate(row):
            pixels[i, j] = tile
    return {"pixel_values": pixels, "pixel_attention_mask": (pixels != 0).any(2).long()}


def _marked(p: Picture, _: bool) -> list[int]:
    """Four placeholders for each tile, marks around every one."""
    return [token for _ in _tiles(p.data) for token in (START, *[IMAGE] * 4, END)]


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
        _several(4),
        _stacked,
    ),
    Family(
        "pixtral",
        _made(
            LlavaForConditionalGeneration,
            _llava_like(LlavaConfig, _tower(PixtralVisionConfig, **_PIXTRAL), _MISTRAL, **_FULL),
        ),
        _lines(8),
        _sized,
        sizes=_SIDES,
    ),
    Family(
        "llava_next",
        _made(
            LlavaNextForConditionalGeneration,
            _llava_like(LlavaNextConfig, _CLIP, _LLAMA, image_grid_pinpoints=[[16, 32], [32, 16]], **_CUT),
        ),
        lambda p, _: [IMAGE] * (14 if p.data.shape[2] == 32 else 16),
        _next,
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
        _one_vision_place,
        _one_vision,
        ("image", "video"),
        _WIDE_OR_TALL,
    ),
    Family(
        "video_llava",
        _made(
            VideoLlavaForConditionalGeneration,
            _llava_like(VideoLlavaConfig, _CLIP, _LLAMA, video_token_id=VIDEO, image_seq_length=4, **_CUT),
        ),
        _several(4, 5),
        _stacked,
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
        _grid(False),
        _qwen(False),
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
        _grid(False),
        _qwen(True),
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
        _grid(True),
        _qwen(False),
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
        _marked,
        _nested,
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
        _marked,
        _nested,
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
            2.0,
            10.0,
        ),
        _marked,
        _stacked,
        types="token_type_ids",
    ),
    Family(
        "paligemma",
        _paligemma(_text(GemmaConfig, head_dim=8)),
        _several(4),
        _stacked,
        types="token_type_ids",
        opens=True,
    ),
    Family(
        "paligemma2",
        _paligemma(_text(Gemma2Config, head_dim=8, sliding_window=256, query_pre_attn_scalar=8)),
        _several(4),
        _stacked,
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
        _marked,
        lambda rows: {"pixel_values": torch.stack([t for row in rows for p in row for t in _tiles(p.data)])},
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
        _lines(16),
        _sized,
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
        _lines(16),
        _sized,
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
        lambda rows: {"input_features": torch.stack(_of(rows, "audio"))},
        ("audio",),
    ),
]  # fmt: skip
BY_NAME = {family.name: family for family in FAMILIES}
