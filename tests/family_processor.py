"""A processor for the tiny families: images, videos and sounds at the sizes that a family takes, a token per letter."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image

from family import Family, Part
from family_layouts import BOS, VOCABULARY, WORDS, Picture

RATE = 16_000  # samples a second
LETTERS = "".join(chr(c) for c in range(ord("0"), ord("0") + VOCABULARY - WORDS))


class Letters:
    """Token i is the letter `LETTERS[i - WORDS]`; tokens below `WORDS` are not written."""

    bos_token, chat_template, padding_side = None, None, "left"
    added_tokens_decoder = {i: SimpleNamespace(special=True) for i in range(WORDS)}  # noqa: RUF012

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(LETTERS[t - WORDS] for t in tokens if t >= WORDS)

    def get_vocab(self) -> dict[str, int]:
        return {f"<{i}>": i for i in range(WORDS)} | {letter: WORDS + i for i, letter in enumerate(LETTERS)}

    def encode(self, text: str) -> list[int]:
        return [WORDS + ord(c) % len(LETTERS) if c not in LETTERS else WORDS + LETTERS.index(c) for c in text]


class FamilyProcessor:
    """As far as `msd.inputs.prompts` and `msd.model` use one."""

    chat_template = "parts as they come"

    def __init__(self, family: Family) -> None:
        self.family, self.tokenizer = family, Letters()
        self.marks = {f"<{kind}>": kind for kind in family.kinds}
        for mark, kind in self.marks.items():
            setattr(self, f"{kind}_token", mark)
        self.feature_extractor = SimpleNamespace(sampling_rate=RATE, n_samples=RATE)

    def apply_chat_template(self, chat: list[dict[str, Any]], **_: Any) -> str:
        parts = [part for message in chat for part in message["content"]]
        return "".join(part["text"] if part["type"] == "text" else f"<{part['type']}>" for part in parts)

    def __call__(
        self,
        images: list[list[Image.Image]] | None = None,
        text: Sequence[str] = (),
        videos: Sequence[Sequence[np.ndarray]] = (),
        audio: Sequence[np.ndarray] = (),
        **_: Any,
    ) -> dict[str, Any]:
        left = {
            "image": iter([image for group in images or () for image in group]), "video": iter(videos),
            "audio": iter(audio),
        }  # fmt: skip
        prompts = []
        for one in text:
            parts: list[Part] = [] if self.family.opens else [BOS]
            for words in re.split("(<[a-z]+>)", one):
                kind = self.marks.get(words)
                parts += self.tokenizer.encode(words) if kind is None else [self._picture(kind, next(left[kind]))]
            prompts.append([*parts, BOS] if self.family.opens else parts)
        return self.family.batch(prompts)

    def _picture(self, kind: str, source: Any) -> Picture:
        if kind == "audio":
            return Picture(kind, _spectrogram(source, self.family.lengths[0]))
        if kind == "video":
            return Picture(
                kind, torch.stack([_pixels(Image.fromarray(frame), [self.family.frame]) for frame in source])
            )
        return Picture(kind, _pixels(source, self.family.sizes))


def _spectrogram(samples: np.ndarray, frames: int) -> torch.Tensor:
    """[8, frames]: the logarithm of the mean amplitude in each of 8 bands of equal width."""
    cut = samples[: len(samples) // frames * frames].reshape(frames, -1)
    bands = np.array_split(np.abs(np.fft.rfft(cut)), 8, axis=1)
    return torch.from_numpy(np.stack([np.log(band.mean(1) + 1e-2) for band in bands])).float()


def _pixels(image: Image.Image, sizes: Sequence[tuple[int, int]]) -> torch.Tensor:
    """[3, h, w], of the first of the sizes if it is of none."""
    if image.size[::-1] not in sizes:
        image = image.resize(sizes[0][::-1])
    pixels = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float()
    return (pixels / 255 - 0.5) * 4


def photos(family: Family, folder: Path, count: int) -> list[Path]:
    """`count` noisy images of the family's sizes, in turn."""
    rng = np.random.default_rng(0)
    paths = [folder / f"{i}.png" for i in range(count)]
    for i, path in enumerate(paths):
        Image.fromarray(rng.integers(0, 256, (*family.sizes[i % 2], 3), dtype=np.uint8)).save(path)
    return paths
