"""A tiny LLaVA as a checkpoint folder, with a processor of one token per byte: a target for the command line."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

import tiny
from msd.cli import main

SPECIAL = ["<pad>", "<s>", "</s>", "<image>"]  # ids as in `tiny`


def processor() -> LlavaProcessor:
    """16x16 images of 4 tokens."""
    vocabulary = {token: i for i, token in enumerate(SPECIAL + sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=SPECIAL[0], bos_token=SPECIAL[1], eos_token=SPECIAL[2]
    )
    pixels = CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return LlavaProcessor(
        pixels, fast, patch_size=8, vision_feature_select_strategy="default", image_token="<image>",
        num_additional_image_tokens=1,
    )  # fmt: skip


def write(folder: Path, seed: int = 0, sharpness: float = 10.0) -> Path:
    """`folder`, with model and processor in it."""
    tiny.llava(len(SPECIAL) + 256, seed, sharpness).save_pretrained(folder)
    processor().save_pretrained(folder)
    return folder


def captured(folder: Path) -> Path:
    """`folder`, with a target in it and, by `msd capture`, answers of it in captured.jsonl."""
    write(folder)
    names = photos(folder / "images", 4)
    lines: list[dict[str, str]] = [{"image": n, "prompt": p} for n in names for p in ("Describe it.", "What is it?")]
    lines += [{"prompt": f"Say {i}.", "split": "val" if i == 0 else "train"} for i in range(4)]
    lines += [{"image": names[0], "prompt": "Is it?", "split": "val"}]
    (folder / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(SystemExit) as stop:
        main([
            "capture", "--data", str(folder / "data.jsonl"), "--images", str(folder / "images"),
            "--target", str(folder), "--out", str(folder / "captured.jsonl"), "--max-new-tokens", "12", "--json",
        ])  # fmt: skip
    assert not stop.value.code
    return folder


def photos(folder: Path, count: int) -> list[str]:
    """Names of `count` noisy images written to `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    names = [f"{i}.png" for i in range(count)]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(folder / name)
    return names
