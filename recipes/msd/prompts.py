"""Writes the prompts for MSD's training data: `prompts`, `more` and `sampled.jsonl` (train splits), and `val.jsonl`.

python -m recipes.msd.prompts --data ../shared/data --out runs/msd
msd capture --data runs/msd/prompts.jsonl --images ../shared/data --out runs/msd/captured.jsonl
msd capture --data runs/msd/more.jsonl --images ../shared/data --out runs/msd/more_captured.jsonl
msd capture --data runs/msd/sampled.jsonl --images ../shared/data --out runs/msd/sampled_captured.jsonl --temperature 1

Image names are relative to the data folder. Each photo gets at most one prompt for a long description: those of Flickr
("detail") and those of COCO ("scene"). Lines of scanned receipts are to be read ("receipt"). Half of the questions are
about COCO photos, each with and without a request for a one-word answer. The other half is derived from the captions of
Flickr photos (yes/no and open questions). The prompts depend on the seed only: a smaller set of a kind is a prefix of a
larger one. `more.jsonl` and `sampled.jsonl` share those that follow (`MORE`): other photos and texts, for the long
training.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from msd.system.files import write_whole
from recipes.reference_vlm.data import CAPTION_PROMPTS, DETAIL_PROMPTS, ONE_WORD, absence_weights, load_captions
from recipes.reference_vlm.facts import extract, open_questions, yes_no
from recipes.reference_vlm.features import read_jsonl
from recipes.reference_vlm.text_turns import TRAIN_FILES, VAL_FILES

LONGEST = 240  # characters of a text-only prompt
READ = ("What does the text in the image say?", "Read the text in the picture.", "Which words are printed here?")
COUNTS = {  # of each kind, in the training data and in the validation data
    "detail": (2500, 100),
    "caption": (800, 60),
    "questions": (800, 60),
    "text": (1500, 20),
    "scene": (500, 0),
    "receipt": (400, 0),
}
MORE = {"detail": 1000, "scene": 400, "text": 600}
Line = dict[str, Any]


def photos(data: Path, split: str, rng: random.Random) -> list[str]:
    """Returns all Flickr photos of a split, in random order."""
    rows = read_jsonl(data / "flickr8k" / "captions.jsonl")
    names = sorted({row["image"] for row in rows if row["split"] == split})
    return rng.sample(names, len(names))


def about_photos(
    names: list[str], prompts: tuple[str, ...], task: str, rng: random.Random, folder: str = "flickr8k"
) -> Iterator[Line]:
    """Yields one prompt about each photo."""
    for name in names:
        yield {"image": f"{folder}/images/{name}", "prompt": rng.choice(prompts), "task": task}


def receipt_lines(data: Path, train: bool, rng: random.Random) -> Iterator[Line]:
    """Yields prompts to read a line of a scanned receipt, of several words."""
    rows = [r for r in read_jsonl(data / "sroie_lines" / "captions.jsonl") if (r.get("split") == "train") == train]
    for row in rng.sample(rows, len(rows)):
        if len(row["text"].split()) > 2:
            yield {"image": f"sroie_lines/images/{row['image']}", "prompt": rng.choice(READ), "task": "ocr"}


def coco_photos(data: Path, split: str) -> dict[str, list[str]]:
    """Returns the questions about each COCO photo of a split."""
    by_photo: dict[str, list[str]] = {}
    for row in read_jsonl(data / "coco_vqa" / "qa.jsonl"):
        if row["split"] == split:
            by_photo.setdefault(row["image"], []).append(row["question"])
    return by_photo


def coco_questions(by_photo: dict[str, list[str]], rng: random.Random) -> Iterator[Line]:
    """Yields one question about each photo, without and with a request for a one-word answer."""
    for name in rng.sample(sorted(by_photo), len(by_photo)):
        question, image = rng.choice(by_photo[name]), f"coco_vqa/images/{name}"
        yield {"image": image, "prompt": question, "task": "question"}
        yield {"image": image, "prompt": question + rng.choice(ONE_WORD), "task": "vqa"}


def caption_questions(data: Path, names: list[str], rng: random.Random) -> Iterator[Line]:
    """Yields yes/no and open questions alternately, one about each photo whose captions support one."""
    captions = load_captions(data)
    facts = {name: extract(captions[name]) for name in names}
    frequency = absence_weights(list(facts.values()))
    yes_no_next = True
    for name in names:
        if yes_no_next:
            question, task = yes_no(facts[name], frequency, rng, rng.random() < 0.5), "yesno"
        else:
            question, task = next(iter(open_questions(facts[name], rng)), None), "question"
        if question:
            yield {"image": f"flickr8k/images/{name}", "prompt": question[0], "task": task}
            yes_no_next = not yes_no_next


def texts(data: Path, split: str, rng: random.Random) -> Iterator[Line]:
    """Yields text-only instructions; for validation, the first turns of benchmark prompts."""
    rows = [r for name in (TRAIN_FILES if split == "train" else VAL_FILES) for r in read_jsonl(data / "text" / name)]
    prompts = [r["turns"][0] if "turns" in r else "\n".join(filter(None, (r["instruction"], r["input"]))) for r in rows]
    short = sorted({text for text in prompts if text.strip() and len(text) <= LONGEST})
    for text in rng.sample(short, len(short)):
        yield {"prompt": text, "task": "text"}


def build(data: Path, split: str, counts: dict[str, int], seed: int) -> list[Line]:
    """Returns the data lines of a split. counts: of each kind of `COUNTS`. Raises SystemExit if the data has fewer."""
    kinds = ("photos", "detail", "caption", "coco", "facts", "text", "scene", "receipt")
    rng = {kind: random.Random(f"{seed}-{split}-{kind}") for kind in kinds}
    names = photos(data, split, rng["photos"])
    by_photo = coco_photos(data, split)
    scenes = rng["scene"].sample(sorted(by_photo), len(by_photo))
    sources = {  # captions and questions start at the other end, so that most photos get one prompt
        "detail": (counts["detail"], about_photos(names, DETAIL_PROMPTS, "detail", rng["detail"])),
        "caption": (counts["caption"], about_photos(names[::-1], CAPTION_PROMPTS, "caption", rng["caption"])),
        "coco": (counts["questions"] // 2, coco_questions(by_photo, rng["coco"])),
        "facts": (-(-counts["questions"] // 2), caption_questions(data, names[::-1], rng["facts"])),
        "text": (counts["text"], texts(data, split, rng["text"])),
        "scene": (counts["scene"], about_photos(scenes, DETAIL_PROMPTS, "scene", rng["scene"], "coco_vqa")),
        "receipt": (counts["receipt"], receipt_lines(data, split == "train", rng["receipt"])),
    }
    lines: list[Line] = []
    for kind, (count, found) in sources.items():
        taken = [line for _, line in zip(range(count), found, strict=False)]
        if len(taken) < count:
            raise SystemExit(f"{split}: {count} '{kind}' prompts wanted, the data gives {len(taken)}")
        lines += taken
    return [{**line, "split": split} for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/msd"))
    parser.add_argument("--seed", type=int, default=0)
    for i, split in enumerate(("", "val-")):
        for kind, counts in COUNTS.items():
            parser.add_argument(f"--{split}{kind}", type=int, default=counts[i])
    args = vars(parser.parse_args())
    args["out"].mkdir(parents=True, exist_ok=True)

    def lines(split: str, counts: dict[str, int]) -> list[str]:
        return [json.dumps(line, ensure_ascii=False) for line in build(args["data"], split, counts, args["seed"])]

    counts = {prefix: {kind: args[prefix + kind] for kind in COUNTS} for prefix in ("", "val_")}
    train = lines("train", counts[""])
    larger, known = lines("train", {kind: n + MORE.get(kind, 0) for kind, n in counts[""].items()}), set(train)
    more = [line for line in larger if line not in known]
    parts = {"prompts": train, "more": more[::2], "sampled": more[1::2], "val": lines("val", counts["val_"])}
    for stem, some in parts.items():
        name = f"{stem}.jsonl"
        write_whole(args["out"] / name, "".join(f"{line}\n" for line in some))
        print(f"{args['out'] / name}: {len(some)} prompts")


if __name__ == "__main__":
    main()
