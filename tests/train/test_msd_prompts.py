"""Prompts for training and for the comparison, from invented data: counts, separate splits, reproducible."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from recipes.comparison import suites
from recipes.msd import prompts as recipe

COUNTS = {"detail": 6, "caption": 4, "questions": 8, "text": 3, "scene": 2, "receipt": 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")

    def write(name: str, rows: list[dict[str, Any]]) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))

    splits = ["val" if i % 4 == 0 else "train" for i in range(48)]
    caption = "Two brown dogs run on the beach with a red ball ."
    write("flickr8k/captions.jsonl", [{"image": f"{i}.jpg", "text": caption, "split": s} for i, s in enumerate(splits)])
    questions = [{"image": f"c{i // 2}.jpg", "question": f"What is {i}?", "answer": "a"} for i in range(48)]
    sources = ("vqa2", "cocoqa")
    write(
        "coco_vqa/qa.jsonl", [{**r, "split": splits[i // 2], "source": sources[i % 2]} for i, r in enumerate(questions)]
    )
    receipts = ("TOTAL 3.50 RM", "ROUNDING", "THANK YOU COME AGAIN")
    lines = [{"image": f"{i}.jpg", "text": receipts[i % 3], "split": ("train", "test")[i % 2]} for i in range(12)]
    write("sroie_lines/captions.jsonl", lines)
    train = [{"instruction": f"Do {i}.", "input": "it" * (i % 2), "output": ""} for i in range(9)]
    for name in recipe.TRAIN_FILES:
        write(f"text/{name}", train)
    for name in recipe.VAL_FILES:
        write(f"text/{name}", [{"turns": [f"Say {i}.", "Again."]} for i in range(9)])
    return folder


@pytest.mark.parametrize("split", ["train", "val"])
def test_counts_and_splits(data: Path, split: str) -> None:
    lines = recipe.build(data, split, COUNTS, 0)
    kinds = Counter(line["task"] for line in lines)
    assert kinds == {
        "detail": 6, "caption": 4, "vqa": 2, "question": 2 + 2, "yesno": 2, "text": 3, "scene": 2, "ocr": 1
    }  # fmt: skip
    assert len({(line.get("image"), line["prompt"]) for line in lines}) == len(lines)
    for line in lines:
        assert line["split"] == split
        if line["task"] == "text":
            assert line["prompt"].startswith("Do " if split == "train" else "Say ")
        else:
            place, number = line["image"].split("/images/")
            if line["task"] == "ocr":
                assert place == "sroie_lines" and (int(number.strip(".jpg")) % 2 == 0) == (split == "train")
                continue
            assert place == ("coco_vqa" if number.startswith("c") else "flickr8k")
            assert line["task"] != "scene" or place == "coco_vqa"
            assert (int(number.strip("c.jpg")) % 4 == 0) == (split == "val")


def test_prompts_are_reproducible_and_smaller_sets_are_subsets(data: Path) -> None:
    lines = recipe.build(data, "train", COUNTS, 0)
    assert lines == recipe.build(data, "train", COUNTS, 0) != recipe.build(data, "train", COUNTS, 1)
    more = recipe.build(data, "train", {**COUNTS, "detail": 9, "questions": 12}, 0)
    assert all(line in more for line in lines)


def test_too_few_photos(data: Path) -> None:
    with pytest.raises(SystemExit, match="100 'detail' prompts wanted, the data gives 36"):
        recipe.build(data, "train", {**COUNTS, "detail": 100}, 0)


def test_the_comparison_uses_each_photo_once_and_no_train_split(data: Path) -> None:
    counts = {"detail": 4, "caption": 3, "vqa": 3, "cocoqa": 2, "chat": 2, "ocr": 3, "text": 2}
    lines = suites.build(data, counts, 0)
    assert Counter(line["task"] for line in lines) == counts
    assert lines == suites.build(data, counts, 0) != suites.build(data, counts, 1)
    shown = [line["image"] for line in lines if "image" in line]
    assert len(set(shown)) == len(shown)
    for line in lines:
        place, _, number = line.get("image", "").partition("/images/")
        if place in ("flickr8k", "coco_vqa"):
            assert int(number.strip("c.jpg")) % 4 == 0
        elif place == "sroie_lines":
            assert int(number.strip(".jpg")) % 2 == 1 and int(number.strip(".jpg")) % 3 != 1
        assert len(line.get("turns", "abc")) == 3 and line["split"] == "val"
    left_out = {shown[0].rpartition("/")[2], lines[-1]["prompt"]}
    others = suites.build(data, counts, 0, left_out)
    assert Counter(line["task"] for line in others) == counts
    assert not any(line.get("image", "").rpartition("/")[2] in left_out for line in others)
    assert not any(line.get("prompt") in left_out for line in others)
    with pytest.raises(SystemExit, match="9 'ocr' prompts wanted"):
        suites.build(data, {**counts, "ocr": 9}, 0)
