"""A `Mix` of the reference model's recipe, over invented data."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from invented import PHOTOS, Words
from recipes.reference_vlm.data import Mix, MixConfig


@pytest.fixture
def mix(tmp_path: Path) -> Callable[..., Mix]:
    """Makes a mix over eight photos, two of them val."""
    rows = [{"image": f"{i}.jpg", "split": "val" if i < 2 else "train"} for i in range(8)]
    for name in ("flickr8k", "coco_vqa"):
        (tmp_path / name).mkdir()
    captions = [{**r, "text": c} for r in rows for c in PHOTOS[int(r["image"][0]) % 3]]
    questions = [{**r, "question": f"What is {k}?", "answer": "cat", "source": "vqa2"} for r in rows for k in range(2)]
    for file, lines in (("flickr8k/captions.jsonl", captions), ("coco_vqa/qa.jsonl", questions)):
        (tmp_path / file).write_text("".join(json.dumps(line) + "\n" for line in lines))
    extra = {"text": "hello", "ink": "red", "ground": "blue", "motion": "left"}
    for name in ("flickr", "coco", "mirrored", "clips", "words", "receipts"):
        frames = 4 if name == "clips" else 1
        listing = {"frames": frames, "rows": [{**r, **extra} for r in rows]}
        (tmp_path / f"{name}.json").write_text(json.dumps(listing))
        np.zeros((8, frames * 64, 1280), np.float16).tofile(tmp_path / f"{name}.bin")
        np.zeros((8, frames * 64, 48), np.float16).tofile(tmp_path / f"{name}.rgb")
    texts = [{"prompt": "hi", "ids": [7], "finished": True, "task": task} for task in ("train", "val")]

    def make(config: MixConfig | None = None, seed: int = 0, split: str = "train") -> Mix:
        return Mix(tmp_path, tmp_path, texts, Words(), config or MixConfig(), seed, split)

    return make
