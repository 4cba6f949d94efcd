"""A family under test: its tiny model, and prompts for it as its processor would write them.

A prompt is a list of parts: word ids, and `Picture`s. `row` turns one into processor output, `batch` several into a
left-padded batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from family_layouts import BOS, IMAGE, PAD, VIDEO, VOCABULARY, WORDS, Picture, Rows

Part = int | Picture


@dataclass(frozen=True)
class Family:
    """name: the test's; the model's `model_type` unless a family is there in two forms.

    make: a fresh model. place: the ids of a picture; told whether it is its prompt's only one of the kind. tensors:
    what describes the pictures of all rows. sizes: of an image, [h, w], and of another one; frame: of a video's.
    lengths: of a sound, in mel frames, and of another one.
    types: the names of the token types that the processor returns. opens: pictures stand before all words.
    one_mark: videos stand in image tokens, so the model has either images or videos in one call. marks: ids around
    images that have their token type.
    """

    name: str
    make: Callable[[], Any]
    place: Callable[[Picture, bool], list[int]]
    tensors: Callable[[Rows], dict[str, Tensor]]
    kinds: tuple[str, ...] = ("image",)
    sizes: tuple[tuple[int, int], tuple[int, int]] = ((16, 16), (16, 16))
    types: tuple[str, ...] = ()
    frame: tuple[int, int] = (16, 16)
    lengths: tuple[int, int] = (16, 16)
    opens: bool = False
    one_mark: bool = False
    marks: tuple[int, ...] = ()

    def picture(self, seed: int, kind: str = "image") -> Picture:
        """A random picture: sizes take turns; a video has 8 frames."""
        g = torch.Generator().manual_seed(seed)
        if kind == "audio":
            return Picture(kind, torch.randn(8, self.lengths[seed % 2], generator=g))
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

    @property
    def mixed(self) -> list[str]:
        """A video and an image, where a prompt may have both."""
        return ["video", "image"] if "video" in self.kinds and not self.one_mark else []

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
        kinds = (out["input_ids"] == IMAGE).long() + 2 * (out["input_ids"] == VIDEO)
        kinds[torch.isin(out["input_ids"], torch.tensor(self.marks, dtype=torch.long))] = 1
        out |= {name: torch.zeros_like(kinds) if self.opens else kinds for name in self.types}
        if self.one_mark:
            out["input_ids"][out["input_ids"] == VIDEO] = IMAGE
        return {**out, **(self.tensors(shown) if any(shown) else {})}
