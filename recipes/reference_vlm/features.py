"""Encodes every picture once: the encoder is frozen, so training reads features from fp16 memory maps.

  python -m recipes.reference_vlm.features --data ../shared/data --out runs/reference/features

Sets: flickr, coco (train and val), mirrored (coco's train photos), receipts (train lines, squashed to a square as the
processor does with any picture), words (rendered), clips (4 frames of a camera moving over a Flickr photo). A set's
`.json` file lists its rows; it is written last, so an interrupted set is encoded again. The colours of each cell are
stored next to the encoder's features.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from msd.reference.encoder import thumbnails
from msd.system.files import write_whole
from recipes.reference_vlm.base import load_encoder
from recipes.reference_vlm.pictures import FRAMES, MOTIONS, clip, word_picture

SIDE, CELLS, WIDTH, COLOURS = 256, 64, 1280, 48
Row = dict[str, Any]  # "image", "split" and, for generated pictures, "text", "motion", "ink", "ground"
Frames = Sequence[Image.Image]


def read_jsonl(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as f:
        return [json.loads(line) for line in f]


def _photos(root: Path, rows: list[Row], mirror: bool = False) -> Iterator[tuple[Row, Frames]]:
    for row in rows:
        photo = Image.open(root / "images" / row["image"]).convert("RGB")
        yield row, [photo.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirror else photo]


def _unique(rows: list[Row], *keep: str) -> list[Row]:
    seen = {row["image"]: {k: row[k] for k in ("image", "split", *keep)} for row in rows}
    return [seen[name] for name in sorted(seen)]


def _words(data: Path, n: int) -> Iterator[tuple[Row, Frames]]:
    captions = " ".join(
        r["text"] for r in read_jsonl(data / "flickr8k" / "captions.jsonl") if r["split"] == "train"
    ).lower()
    vocabulary = sorted({w for w in captions.split() if w.isalpha() and 2 < len(w) < 10})
    rng = random.Random("words")
    for i in range(n):
        word = str(rng.randint(0, 9999)) if i % 5 == 0 else rng.choice(vocabulary)
        word = rng.choice((word, word.upper(), word.capitalize()))
        picture, ink, ground = word_picture(word, i)
        row = {
            "image": f"word-{i}",
            "split": "val" if i % 30 == 0 else "train",
            "text": word,
            "ink": ink,
            "ground": ground,
        }
        yield row, [picture]


def _clips(data: Path, n_train: int, n_val: int) -> Iterator[tuple[Row, Frames]]:
    photos = _unique(read_jsonl(data / "flickr8k" / "captions.jsonl"))
    rng = random.Random("clips")
    chosen = [
        row
        for split, n in (("val", n_val), ("train", n_train))
        for row in rng.sample([p for p in photos if p["split"] == split], n)
    ]
    for i, row in enumerate(chosen):
        motion = MOTIONS[i % len(MOTIONS)]
        photo = Image.open(data / "flickr8k" / "images" / row["image"]).convert("RGB")
        yield {**row, "motion": motion}, clip(photo, motion, i)


def sets(
    data: Path, words: int, lines: int, clips: int, val_clips: int
) -> dict[str, tuple[int, Callable[[], Iterator[tuple[Row, Frames]]]]]:
    """Returns, for every set, the frames per row and a function that yields rows with their pictures."""
    flickr = _unique(read_jsonl(data / "flickr8k" / "captions.jsonl"))
    coco = _unique(read_jsonl(data / "coco_vqa" / "qa.jsonl"))
    receipts = _unique(read_jsonl(data / "sroie_lines" / "captions.jsonl"), "text")
    receipts = [{**r, "split": "train" if r["split"] == "train" else "val"} for r in receipts]
    receipts = random.Random("receipts").sample(receipts, lines)
    return {
        "flickr": (1, lambda: _photos(data / "flickr8k", flickr)),
        "coco": (1, lambda: _photos(data / "coco_vqa", coco)),
        "words": (1, lambda: _words(data, words)),
        "clips": (FRAMES, lambda: _clips(data, clips, val_clips)),
        "receipts": (1, lambda: _photos(data / "sroie_lines", receipts)),
        "mirrored": (1, lambda: _photos(data / "coco_vqa", [r for r in coco if r["split"] == "train"], mirror=True)),
    }


def pixels(pictures: Frames) -> torch.Tensor:
    """Converts pictures to [B, 3, 256, 256] float32: resized to a square (bicubic), (x - 127) / 128."""
    arrays = [np.asarray(p.resize((SIDE, SIDE), Image.Resampling.BICUBIC)) for p in pictures]
    return (torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).float() - 127) / 128


@torch.inference_mode()
def encode_set(
    encode: Callable[[torch.Tensor], torch.Tensor],
    rows: Iterator[tuple[Row, Frames]],
    frames: int,
    path: Path,
    batch: int,
) -> None:
    """Writes `path`.bin ([N, frames, 64, 1280] fp16), `path`.rgb ([N, frames, 64, 48] fp16) and `path`.json (rows).

    Features of an earlier version without colours are kept.
    """
    done: list[Row] = []
    pending: list[Image.Image] = []
    start = time.perf_counter()
    kept = path.with_suffix(".json").exists()
    shown_file = path.with_suffix(".rgb.tmp")
    with shown_file.open("wb") as colours, path.with_suffix(".bin").open("ab" if kept else "wb") as f:

        def write() -> None:
            shown = pixels(pending)
            colours.write(thumbnails(shown, SIDE // 32).half().numpy().tobytes())
            if not kept:
                f.write(encode(shown).half().numpy().tobytes())
            pending.clear()

        for row, pictures in rows:
            done.append(row)
            pending.extend(pictures)
            if len(pending) >= batch:
                write()
            if len(done) % 1000 == 0:
                speed = len(done) * frames / (time.perf_counter() - start)
                print(f"{path.name}: {len(done)} rows, {speed:.0f} pictures/s", flush=True)
        if pending:
            write()
    shown_file.replace(path.with_suffix(".rgb"))
    write_whole(path.with_suffix(".json"), json.dumps({"frames": frames, "rows": done}))
    print(f"{path.name}: {len(done)} rows in {time.perf_counter() - start:.0f} s", flush=True)


class FeatureSet:
    """The memory-mapped features of a set: `features(i)` is [frames * 64, 1280 + 48] fp16, `rows[i]` its row."""

    def __init__(self, folder: Path, name: str):
        listing = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        self.name, self.frames, self.rows = name, int(listing["frames"]), list(listing["rows"])
        shape = (len(self.rows), self.frames * CELLS)
        self._map = np.memmap(folder / f"{name}.bin", np.float16, "r", shape=(*shape, WIDTH))
        self._colours = np.memmap(folder / f"{name}.rgb", np.float16, "r", shape=(*shape, COLOURS))

    def features(self, index: int) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([self._map[index], self._colours[index]], -1))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/reference/features"))
    parser.add_argument("--words", type=int, default=1200)
    parser.add_argument("--lines", type=int, default=1200)
    parser.add_argument("--clips", type=int, default=700)
    parser.add_argument("--val-clips", type=int, default=50)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--only", nargs="*", help="sets to encode (default: all)")
    args = parser.parse_args()
    encoder = load_encoder()
    args.out.mkdir(parents=True, exist_ok=True)
    for name, (frames, rows) in sets(args.data, args.words, args.lines, args.clips, args.val_clips).items():
        if (args.only and name not in args.only) or all(
            (args.out / f"{name}{end}").exists() for end in (".rgb", ".json")
        ):
            continue
        encode_set(encoder.features, rows(), frames, args.out / name, args.batch)


if __name__ == "__main__":
    main()
