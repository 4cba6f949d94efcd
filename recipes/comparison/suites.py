"""Writes the prompts for the comparison of all methods.

python -m recipes.comparison.suites --data DIR --out runs/comparison

Nothing was trained on the photos. Tasks: long descriptions and captions (Flickr8k val), VQA v2 and COCO-QA questions
(COCO val photos; COCO-QA replaces GQA), conversations of three turns about one photo, receipt crops with one line of
text (a stress task: 64 image tokens are hardly enough to read them), and text-only prompts. Each photo is used once.
The prompts depend on the seed only.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Set
from pathlib import Path
from typing import Any

from msd.system.files import write_whole
from recipes.msd.prompts import about_photos, photos, receipt_lines, texts
from recipes.reference_vlm.data import CAPTION_PROMPTS, DETAIL_PROMPTS
from recipes.reference_vlm.features import read_jsonl

COUNTS = {"detail": 18, "caption": 20, "vqa": 12, "cocoqa": 10, "chat": 3, "ocr": 6, "text": 3}
TURNS = (
    ("What is in the foreground?", "Which colours stand out?", "What is the mood of the picture?"),
    ("What is happening here?", "Where could this have been taken?", "What might happen next?"),
    ("Who or what can be seen?", "What is in the background?", "Give the picture a title."),
)
Line = dict[str, Any]


def questions(data: Path, source: str, task: str, rng: random.Random, seen: set[str]) -> Iterator[Line]:
    """Yields one question of a source about each val photo that has no question yet."""
    rows = [r for r in read_jsonl(data / "coco_vqa" / "qa.jsonl") if (r["split"], r["source"]) == ("val", source)]
    for row in rng.sample(rows, len(rows)):
        if row["image"] not in seen:
            seen.add(row["image"])
            yield {"image": f"coco_vqa/images/{row['image']}", "prompt": row["question"], "task": task}


def conversations(names: list[str], rng: random.Random) -> Iterator[Line]:
    """Yields conversations of three turns about one photo each."""
    for name in names:
        yield {"image": f"flickr8k/images/{name}", "turns": list(rng.choice(TURNS)), "task": "chat"}


def build(data: Path, counts: dict[str, int], seed: int, without: Set[str] = frozenset()) -> list[Line]:
    """Returns the lines of all tasks. Raises SystemExit if the data has fewer.

    without: file names of photos, and text-only prompts, that are left out.
    """
    rng = {kind: random.Random(f"{seed}-comparison-{kind}") for kind in ("photos", *counts)}
    names, seen = (name for name in photos(data, "val", rng["photos"]) if name not in without), set(without)
    images = {kind: [next(names) for _ in range(counts[kind])] for kind in ("detail", "caption", "chat")}
    sources = {
        "detail": about_photos(images["detail"], DETAIL_PROMPTS, "detail", rng["detail"]),
        "caption": about_photos(images["caption"], CAPTION_PROMPTS, "caption", rng["caption"]),
        "vqa": questions(data, "vqa2", "vqa", rng["vqa"], seen),
        "cocoqa": questions(data, "cocoqa", "cocoqa", rng["cocoqa"], seen),
        "chat": conversations(images["chat"], rng["chat"]),
        "ocr": receipt_lines(data, False, rng["ocr"]),
        "text": (line for line in texts(data, "val", rng["text"]) if line["prompt"] not in without),
    }
    lines: list[Line] = []
    for kind, source in sources.items():
        taken = [line for _, line in zip(range(counts[kind]), source, strict=False)]
        if len(taken) < counts[kind]:
            raise SystemExit(f"{counts[kind]} '{kind}' prompts wanted, the data gives {len(taken)}")
        lines += taken
    return [{**line, "split": "val"} for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/comparison"))
    parser.add_argument("--seed", type=int, default=0)
    for kind, count in COUNTS.items():
        parser.add_argument(f"--{kind}", type=int, default=count)
    args = vars(parser.parse_args())
    args["out"].mkdir(parents=True, exist_ok=True)
    lines = build(args["data"], {kind: args[kind] for kind in COUNTS}, args["seed"])
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    write_whole(args["out"] / "val.jsonl", text)
    pictures = len({line["image"] for line in lines if "image" in line})
    print(f"{args['out'] / 'val.jsonl'}: {len(lines)} prompts and conversations, {pictures} pictures")


if __name__ == "__main__":
    main()
