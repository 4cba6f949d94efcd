"""A processor for the tiny families: PIL images of the sizes that a family takes, and one token per letter."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from family import Family, Part
from family_layouts import BOS, VOCABULARY, WORDS, Picture

LETTERS = "".join(chr(c) for c in range(ord("0"), ord("0") + VOCABULARY - WORDS))


class Letters:
    """Token i is the letter `LETTERS[i - WORDS]`; tokens below `WORDS` are not written."""

    bos_token, chat_template, padding_side = None, None, "left"

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(LETTERS[t - WORDS] for t in tokens if t >= WORDS)

    def encode(self, text: str) -> list[int]:
        return [WORDS + ord(c) % len(LETTERS) if c not in LETTERS else WORDS + LETTERS.index(c) for c in text]


class FamilyProcessor:
    """As far as `msd.prompts` and `msd.model` use one."""

    image_token, chat_template = "<image>", "parts as they come"

    def __init__(self, family: Family) -> None:
        self.family, self.tokenizer = family, Letters()

    def apply_chat_template(self, chat: list[dict[str, Any]], **_: Any) -> str:
        parts = [part for message in chat for part in message["content"]]
        return "".join(self.image_token if part["type"] == "image" else part["text"] for part in parts)

    def __call__(self, images: list[list[Image.Image]] | None, text: list[str], **_: Any) -> dict[str, Any]:
        left = iter([image for group in images or () for image in group])
        prompts = []
        for one in text:
            parts: list[Part] = [] if self.family.opens else [BOS]
            for i, words in enumerate(one.split(self.image_token)):
                parts += ([_picture(next(left))] if i else []) + list(self.tokenizer.encode(words))
            prompts.append([*parts, BOS] if self.family.opens else parts)
        return self.family.batch(prompts)


def _picture(image: Image.Image) -> Picture:
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()
    return Picture("image", (pixels / 255 - 0.5) * 4)


def photos(family: Family, folder: Path, count: int) -> list[Path]:
    """`count` noisy images of the family's sizes, in turn."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (*family.sizes[i % 2], 3), dtype=np.uint8)).save(path)
    return paths
