"""Where processors put pictures: the ids that stand for one, and the tensors that describe all of a batch.

As the processors of transformers 5.23 have it, for pictures of a few pixels.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

PAD, BOS, EOS, IMAGE, VIDEO, AUDIO, START, END, BREAK = range(9)
WORDS, VOCABULARY = 9, 64  # the first word; ids below stand for something else


@dataclass(frozen=True)
class Picture:
    """kind: "image", "video" or "audio". data: [3, h, w], [frames, 3, h, w] or [mel bins, frames]."""

    kind: str
    data: Tensor


Rows = list[list[Picture]]  # the pictures of every row


def of(rows: Rows, kind: str) -> list[Tensor]:
    return [p.data for pictures in rows for p in pictures if p.kind == kind]


def stacked(rows: Rows, image: str = "pixel_values", video: str = "pixel_values_videos") -> dict[str, Tensor]:
    """Pictures of one size: [I, 3, h, w] and [V, frames, 3, h, w]."""
    found = {image: of(rows, "image"), video: of(rows, "video")}
    return {name: torch.stack(data) for name, data in found.items() if data}


def several(tokens: int, frame: int = 0) -> Callable[[Picture, bool], list[int]]:
    """`tokens` placeholders for an image, `frame` for each frame of a video."""
    return lambda p, _: [IMAGE] * tokens if p.kind == "image" else [VIDEO] * (frame * len(p.data))


# LLaVA-NeXT and LLaVA-OneVision: a base view, and tiles of wide or tall images


def views(image: Tensor) -> Tensor:
    """[3, 3, 16, 16]: the base view (here any pixels of the image) and its two tiles."""
    tall = image.shape[1] == 32
    halves = [image[:, :16, :16], image[:, 16:] if tall else image[:, :, 16:]]
    return torch.stack([image[:, ::2] if tall else image[:, :, ::2], *halves])


def next_views(rows: Rows) -> dict[str, Tensor]:
    images = of(rows, "image")
    return {
        "pixel_values": torch.stack([views(x) for x in images]),
        "image_sizes": torch.tensor([x.shape[1:] for x in images]),
    }


def one_vision(rows: Rows) -> dict[str, Tensor]:
    """Images of a prompt with several are not cut; views are filled up with zeros."""
    groups = [[p.data for p in row if p.kind == "image"] for row in rows]
    cut = [views(x) if len(group) == 1 else views(x)[:1] for group in groups for x in group]
    out = stacked([[p for p in row if p.kind == "video"] for row in rows])
    if cut:
        most = max(map(len, cut))
        padded = [torch.cat([v, v.new_zeros(most - len(v), *v.shape[1:])]) for v in cut]
        out |= {
            "pixel_values": torch.stack(padded),
            "image_sizes": torch.tensor([x.shape[1:] for group in groups for x in group]),
            "batch_num_images": torch.tensor([len(group) for group in groups if group]),
        }
    return out


def one_vision_place(p: Picture, alone: bool) -> list[int]:
    """A base view of 4 tokens, then 2x4 or 4x2 of tiles with a newline per row, or one newline. A frame pools to 1."""
    if p.kind == "video":
        return [VIDEO] * (len(p.data) + 1)
    return [IMAGE] * (4 + (1 if not alone else 10 if p.data.shape[2] == 32 else 12))


# Pixtral: images of any size, padded to the largest


def sized(rows: Rows) -> dict[str, Tensor]:
    images = of(rows, "image")
    high, wide = (max(x.shape[i] for x in images) for i in (1, 2))
    padded = [torch.nn.functional.pad(x, (0, wide - x.shape[2], 0, high - x.shape[1])) for x in images]
    return {"pixel_values": torch.stack(padded), "image_sizes": torch.tensor([x.shape[1:] for x in images])}


def lines(unit: int) -> Callable[[Picture, bool], list[int]]:
    """A line of placeholders for each row of patches of `unit` pixels, a break after each and an end after the last."""

    def place(p: Picture, _: bool) -> list[int]:
        rows = [[IMAGE] * (p.data.shape[2] // unit) + [BREAK]] * (p.data.shape[1] // unit)
        return [*[token for row in rows for token in row][:-1], END]

    return place


# Qwen-VL: rows of patches of 4x4 pixels and 2 frames, merged by 2x2


def patches(frames: Tensor, times: int = 2) -> tuple[Tensor, list[int]]:
    """([patches, 48 * times], grid [t, h, w]) of frames [t * times, 3, 4h, 4w], in the order of merged blocks."""
    t, h, w = frames.shape[0] // times, frames.shape[2] // 4, frames.shape[3] // 4
    cut = frames.reshape(t, times, 3, h // 2, 2, 4, w // 2, 2, 4).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
    return cut.reshape(t * h * w, -1), [t, h, w]


def qwen(
    seconds: str | None = None, times: int = 2, square: bool = False, merged: bool = False
) -> Callable[[Rows], dict[str, Tensor]]:
    """seconds: the name of the videos' seconds per grid. times: frames of a patch. square: patches are [3, 4, 4].
    merged: with the side of a merged block, 2.
    """

    def tensors(rows: Rows) -> dict[str, Tensor]:
        out = {}
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            found = of(rows, kind)
            if found:
                cut = [patches(torch.stack([x] * times) if kind == "image" else x, times) for x in found]
                out[pixels] = torch.cat([patches.unflatten(1, (3, 4, 4)) if square else patches for patches, _ in cut])
                out[f"{kind}_grid_thw"] = torch.tensor([grid for _, grid in cut])
                if merged:
                    out[f"{kind}_merge_sizes"] = torch.tensor([2] * len(found))
        if seconds and of(rows, "video"):
            out[seconds] = torch.tensor([1.0] * len(of(rows, "video")))
        return out

    return tensors


def grid(frame_by_frame: bool = False, frames: int = 2, breaks: bool = False) -> Callable[[Picture, bool], list[int]]:
    """frames: of a video that share their tokens. breaks: each line and each image has further placeholders."""

    def place(p: Picture, _: bool) -> list[int]:
        high, wide = p.data.shape[-2] // 8, p.data.shape[-1] // 8
        each = high * (wide + 1) + 2 if breaks else high * wide
        if p.kind == "image":
            return [START, *[IMAGE] * each, END]
        times = len(p.data) // frames
        if not frame_by_frame:
            return [START, *[VIDEO] * (each * times), END]
        return [token for t in range(times) for token in (WORDS + t, START, *[VIDEO] * each, END)]

    return place


# Idefics3, SmolVLM and InternVL: tiles of one size; a wide image has three


def tiles(data: Tensor) -> list[Tensor]:
    """Tiles [3, 16, 16] of an image; of a video, its frames."""
    if data.dim() == 4:
        return list(data)
    return [data] if data.shape[1] == data.shape[2] else list(views(data))


def tiled(rows: Rows) -> dict[str, Tensor]:
    return {"pixel_values": torch.stack([tile for row in rows for p in row for tile in tiles(p.data)])}


def nested(rows: Rows) -> dict[str, Tensor]:
    found = [[tile for p in row for tile in tiles(p.data)] for row in rows]
    pixels = torch.zeros(len(rows), max(map(len, found)), 3, 16, 16)
    for i, row in enumerate(found):
        for j, tile in enumerate(row):
            pixels[i, j] = tile
    return {"pixel_values": pixels, "pixel_attention_mask": (pixels != 0).any(2).long()}


def marked(p: Picture, _: bool) -> list[int]:
    """Four placeholders for each tile, marks around every one."""
    return [token for _ in tiles(p.data) for token in (START, *[IMAGE] * 4, END)]


# DeepSeek-OCR2 and Step3: a whole view of each image, and tiles of wide ones


def local_views(rows: Rows) -> dict[str, Tensor]:
    found = [tiles(x) for x in of(rows, "image")]
    near = [tile for views in found for tile in views[1:]]
    return {
        "pixel_values": torch.stack([views[0] for views in found]),
        "num_local_patches": torch.tensor([len(views) - 1 for views in found]),
        **({"pixel_values_local": torch.stack(near)} if near else {}),
    }


# Gemma 4 and Fuyu: flat patches in raster order


def raster(image: Tensor, side: int) -> Tensor:
    """[h * w, 3 * side * side] of an image [3, h * side, w * side]."""
    cut = image.unflatten(1, (-1, side)).unflatten(3, (-1, side))  # [3, h, side, w, side]
    return cut.permute(1, 3, 2, 4, 0).flatten(2).flatten(0, 1)


def placed_patches(side: int, pool: int) -> Callable[[Rows], dict[str, Tensor]]:
    """Patches with their (x, y), padded to the most in a largest image; pool * pool of them to a token."""

    def placed(image: Tensor) -> tuple[Tensor, Tensor]:
        high, wide = image.shape[1] // side, image.shape[2] // side
        xy = torch.tensor([[x, y] for y in range(high) for x in range(wide)])
        more = 24 * 16 // side**2 - len(xy)
        pad = torch.nn.functional.pad
        return pad(raster(image, side), (0, 0, 0, more)), pad(xy, (0, 0, 0, more), value=-1)

    def tensors(rows: Rows) -> dict[str, Tensor]:
        videos = [list(video) for video in of(rows, "video")]
        out = {"num_frames_per_video": torch.tensor([len(frames) for frames in videos])} if videos else {}
        shown = {"image": of(rows, "image"), "video": [frame for frames in videos for frame in frames]}
        for kind, found in shown.items():
            if found:
                cut = [placed(x) for x in found]
                out["pixel_values" if kind == "image" else "pixel_values_videos"] = torch.stack([x for x, _ in cut])
                out[f"{kind}_position_ids"] = torch.stack([xy for _, xy in cut])
        return out

    return tensors


def flat_patches(side: int) -> Callable[[Rows], dict[str, Tensor]]:
    return lambda rows: {"pixel_values": torch.cat([raster(x, side) for x in of(rows, "image")])}


# Molmo2: crops of an image, and the patches that each of its tokens pools


def crops(rows: Rows) -> dict[str, Tensor]:
    """Crops of 4x4 patches; a token pools 2x2 of them."""
    out = {}
    for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
        found = [tiles(x) for x in of(rows, kind)]
        if not found:
            continue
        cut = [torch.stack([raster(view, 4) for view in views]) for views in found]
        pool = torch.arange(16).reshape(2, 2, 2, 2).transpose(1, 2).reshape(4, 4)  # [tokens of a crop, patches]
        out[pixels] = torch.cat(cut)
        out[f"{kind}_token_pooling"] = torch.cat([pool + 16 * i for i in range(sum(map(len, cut)))])
        if kind == "image":
            out["image_grids"] = torch.tensor([[2, 2, 2 * (len(x) > 1), 2 * (len(x) - 1)] for x in cut])
            out["image_num_crops"] = torch.tensor([len(x) for x in cut])
        else:
            out["video_grids"] = torch.tensor([[len(x), 2, 2] for x in cut])
    return out


# Qwen2-Audio: mel frames padded to one length, with a mask; four of them to a token


def sounds(length: int) -> Callable[[Rows], dict[str, Tensor]]:
    def tensors(rows: Rows) -> dict[str, Tensor]:
        heard = of(rows, "audio")
        if not heard:
            return {}
        return {
            "input_features": torch.stack([torch.nn.functional.pad(x, (0, length - x.shape[1])) for x in heard]),
            "feature_attention_mask": torch.tensor([[int(i < x.shape[1]) for i in range(length)] for x in heard]),
        }

    return tensors
