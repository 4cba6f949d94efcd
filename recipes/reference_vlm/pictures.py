"""Generates pictures: rendered words, and clips of a camera that moves over a photo.

Both are pure functions of a seed, so feature files are reproducible and the training data knows the right answers.
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

FRAMES = 4
MOTIONS = ("left", "right", "up", "down", "in", "out", "still")
_COLOURS = ("black", "white", "red", "blue", "green", "yellow", "orange", "purple", "brown", "gray")
_FONTS = ("DejaVuSans.ttf", "DejaVuSans-Bold.ttf", "DejaVuSerif.ttf", "DejaVuSerif-Bold.ttf", "DejaVuSansMono.ttf")


def _font(name: str, size: int) -> ImageFont.ImageFont | ImageFont.FreeTypeFont:
    try:
        return ImageFont.truetype(name, size)
    except OSError:  # the font is not installed: use Pillow's own
        return ImageFont.load_default(size)


def word_picture(word: str, seed: int, size: int = 256) -> tuple[Image.Image, str, str]:
    """Renders a word at a random place and size. Returns the picture, the text colour and the background colour."""
    rng = random.Random(f"word-{seed}")
    ink, ground = rng.sample(_COLOURS, 2)
    picture = Image.new("RGB", (size, size), ground)
    draw = ImageDraw.Draw(picture)
    name, height = rng.choice(_FONTS), rng.randint(36, 96)
    while height > 16:
        left, top, right, bottom = draw.textbbox((0, 0), word, font=_font(name, height))
        if right - left < size - 16:
            break
        height -= 4
    x = rng.uniform(4, max(5.0, size - 4 - (right - left))) - left
    y = rng.uniform(4, max(5.0, size - 4 - (bottom - top))) - top
    draw.text((x, y), word, fill=ink, font=_font(name, height))
    return picture, ink, ground


def clip_windows(motion: str, seed: int, frames: int = FRAMES) -> list[tuple[float, float, float]]:
    """Returns the camera's window (x, y, side) in each frame, as fractions of the photo's side."""
    rng = random.Random(f"clip-{seed}")
    small, big = rng.uniform(0.5, 0.65), rng.uniform(0.9, 1.0)
    t = [i / (frames - 1) for i in range(frames)]
    if motion in ("in", "out"):
        sides = [big + (small - big) * (u if motion == "in" else 1 - u) for u in t]
        cx, cy = rng.uniform(0.4, 0.6), rng.uniform(0.4, 0.6)
        return [(_clamp(cx - s / 2, s), _clamp(cy - s / 2, s), s) for s in sides]
    side = rng.uniform(0.6, 0.75)
    far, across = 1 - side, rng.uniform(0, 1 - side)
    if motion == "still":
        return [(rng.uniform(0, far), across, side)] * frames
    travel = [far * (u if motion in ("right", "down") else 1 - u) for u in t]
    return [(v, across, side) if motion in ("left", "right") else (across, v, side) for v in travel]


def _clamp(start: float, side: float) -> float:
    return min(max(start, 0.0), 1.0 - side)


def clip(photo: Image.Image, motion: str, seed: int, frames: int = FRAMES) -> Sequence[Image.Image]:
    """Returns the frames of a camera that pans or zooms over a photo."""
    w, h = photo.size
    boxes = [(x * w, y * h, (x + s) * w, (y + s) * h) for x, y, s in clip_windows(motion, seed, frames)]
    return [photo.resize((256, 256), Image.Resampling.BICUBIC, box=b) for b in boxes]
