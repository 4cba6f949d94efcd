"""Evaluates the reference model on the val splits: greedy, float32, no repetition penalty.

  python -m recipes.reference_vlm.evaluate --model runs/reference/train/checkpoint.pt
  python -m recipes.reference_vlm.evaluate --model FOLDER_OF_AN_ASSEMBLED_CHECKPOINT --out recipes/reference_vlm/results

Writes evaluation.json and evaluation.md. The wrong-image results use another val photo for the same prompt; they show
how much the image matters.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from msd.bench.data import BUNDLED, data_lines
from msd.system.files import write_whole
from msd.train.capture import Prompt
from recipes.reference_vlm.data import END, MOTION, absence_weights, load_captions
from recipes.reference_vlm.facts import extract, tidy, yes_no
from recipes.reference_vlm.features import read_jsonl, sets
from recipes.reference_vlm.metrics import caption_scores, exact_match, repetition_scores, yes_no_scores
from recipes.reference_vlm.seeing import Seeing, load

CAPTION, DETAIL = "Write a short caption for this picture.", "Describe the image in detail."
Results = dict[str, Any]


def shifted(names: Sequence[str]) -> dict[str, str]:
    """Assigns each photo another photo of the list, as the wrong image."""
    half = len(names) // 2
    return {name: names[(i + half) % len(names)] for i, name in enumerate(names)}


def presence_questions(captions: dict[str, list[str]], photos: Sequence[str]) -> list[tuple[str, str, str]]:
    """Returns (photo, question, "yes" or "no"): one of each per photo, if its captions support both.

    Each thing is in as many questions with the answer yes as with no.
    """
    facts = {name: extract(captions[name]) for name in photos}
    weights = absence_weights(list(facts.values()))
    rng = random.Random("presence")
    out = []
    for name in photos:
        pair = [yes_no(facts[name], weights, rng, there) for there in (True, False)]
        if all(pair):
            out += [(name, p[0], t) for p, t in zip(pair, ("yes", "no"), strict=True) if p]
    return out


def captions_and_details(
    seeing: Seeing, captions: dict[str, list[str]], photos: Sequence[str], report: Results
) -> None:
    wrong = shifted(photos)
    references = {n: captions[n] for n in photos}
    for key, shown in (("right", {n: n for n in photos}), ("wrong", wrong)):
        answers = seeing.answers([Prompt(CAPTION, (f"flickr8k/images/{shown[n]}",)) for n in photos], 40)
        report[f"caption_{key}"] = caption_scores(references, {n: a.text for n, a in zip(photos, answers, strict=True)})
        texts = [tidy(captions[n][0]) + "<|im_end|>" for n in photos]
        loss, _ = seeing.teacher_forced([Prompt(CAPTION, (f"flickr8k/images/{shown[n]}",)) for n in photos], texts)
        report[f"caption_{key}"]["loss"] = loss
        if key == "right":
            short = answers
    long = seeing.answers([Prompt(DETAIL, (f"flickr8k/images/{n}",)) for n in photos], 160)
    report["detail"] = repetition_scores([a.text for a in long], [len(a.ids) for a in long])
    report["detail"]["unfinished"] = sum(not a.finished for a in long) / len(long)
    report["samples"] = [
        {"image": n, "reference": captions[n][0], "caption": s.text, "detail": d.text}
        for n, s, d in list(zip(photos, short, long, strict=True))[:: max(1, len(photos) // 16)]
    ]


def questions(seeing: Seeing, data: Path, limit: int, report: Results) -> None:
    rows = [r for r in read_jsonl(data / "coco_vqa" / "qa.jsonl") if r["split"] == "val"][:limit]
    wrong = shifted(sorted({r["image"] for r in rows}))
    truths = [str(r["answer"]) for r in rows]
    polar = [i for i, t in enumerate(truths) if t in ("yes", "no")]
    for key in ("right", "wrong"):
        shown = [r["image"] if key == "right" else wrong[r["image"]] for r in rows]
        prompts = [Prompt(r["question"], (f"coco_vqa/images/{n}",)) for r, n in zip(rows, shown, strict=True)]
        answers = [a.text for a in seeing.answers(prompts, 10)]
        report[f"vqa_{key}"] = {"accuracy": exact_match(answers, truths), "questions": len(rows)}
        for source in sorted({r["source"] for r in rows}):
            indices = [i for i, r in enumerate(rows) if r["source"] == source]
            report[f"vqa_{key}"][source] = exact_match([answers[i] for i in indices], [truths[i] for i in indices])
        report[f"vqa_{key}"]["yes_no"] = yes_no_scores([answers[i] for i in polar], [truths[i] for i in polar])
        report[f"vqa_{key}"]["loss"], _ = seeing.teacher_forced(prompts, [f"{t}<|im_end|>" for t in truths])
        if key == "right":
            kept = list(zip(rows, answers, strict=True))[:: max(1, len(rows) // 20)]
            report["vqa_samples"] = [
                {"image": r["image"], "question": r["question"], "truth": r["answer"], "answer": a} for r, a in kept
            ]


def presence(seeing: Seeing, captions: dict[str, list[str]], photos: Sequence[str], report: Results) -> None:
    items, wrong = presence_questions(captions, photos), shifted(photos)
    for key in ("right", "wrong"):
        prompts = [Prompt(q, (f"flickr8k/images/{n if key == 'right' else wrong[n]}",)) for n, q, _ in items]
        report[f"presence_{key}"] = yes_no_scores([a.text for a in seeing.answers(prompts, 3)], [t for *_, t in items])
        report[f"presence_{key}"]["questions"] = len(items)


def text_only(seeing: Seeing, texts: Path, report: Results) -> None:
    """Measures the share of SmolLM2's greedy tokens that are still the model's top token."""
    turns = [r for _, r in data_lines(texts) if r["task"] == "val"]
    answers = [r["answer"] + ("<|im_end|>" if r["finished"] else "") for r in turns]
    loss, agreement = seeing.teacher_forced([Prompt(r["prompt"]) for r in turns], answers)
    written = seeing.answers([Prompt(r["prompt"]) for r in turns[:8]], 60)
    report["text_only"] = {"agreement": agreement, "loss": loss, "prompts": len(turns)}
    report["text_samples"] = [
        {"prompt": r["prompt"], "smollm2": r["answer"], "answer": a.text} for r, a in zip(turns, written, strict=False)
    ]


def clips(
    seeing: Seeing, data: Path, captions: dict[str, list[str]], frames: dict[str, Image.Image], report: Results
) -> None:
    rows = []
    for row, pictures in sets(data, 0, 0, 0, report["sizes"]["clips"])["clips"][1]():
        if row["split"] == "val":
            names = tuple(f"clip/{row['image']}/{i}" for i in range(len(pictures)))
            frames.update(zip(names, pictures, strict=True))
            rows.append((row, names))
    motion = seeing.answers([Prompt("How does the camera move?", names) for _, names in rows], 12)
    what = seeing.answers([Prompt("What happens in this clip?", names) for _, names in rows], 50)
    correct = [a.text.strip() == MOTION[row["motion"]] for a, (row, _) in zip(motion, rows, strict=True)]
    ends = ("The camera", " the camera")
    bare = {row["image"]: a.text.split(ends[0])[0] for a, (row, _) in zip(what, rows, strict=True)}
    report["clips"] = {"motion": sum(correct) / len(rows), "clips": len(rows)} | caption_scores(
        {k: captions[k] for k in bare}, bare
    )
    report["clip_samples"] = [
        {"image": r["image"], "motion": r["motion"], "answer": a.text}
        for (r, _), a in list(zip(rows, what, strict=True))[:6]
    ]


def bundled(seeing: Seeing, report: Results) -> None:
    """Collects the answers about the photos that ship with the package, for human inspection."""
    lines = [line for _, line in data_lines(BUNDLED / "prompts.jsonl")]
    lines.sort(key=lambda line: line["image"])
    prompts = [Prompt(line["prompt"], (str(BUNDLED / line["image"]),)) for line in lines]
    answers = seeing.answers(prompts, 120)
    report["bundled"] = [
        {"image": Path(p.images[0]).name, "prompt": p.text, "answer": a.text}
        for p, a in zip(prompts, answers, strict=True)
    ]


def markdown(report: Results) -> str:
    """Formats the report as Markdown: one table of figures, then samples."""
    figures = {k: v for k, v in report.items() if isinstance(v, dict) and k != "sizes"}
    lines = ["# The reference model on the val splits", "", "| part | figure | value |", "|---|---|---|"]
    for part, values in figures.items():
        for name, value in values.items():
            nested = value.items() if isinstance(value, dict) else [("", value)]
            lines += [
                f"| {part} | {name} {sub} | {v:.3f} |" if isinstance(v, float) else f"| {part} | {name} {sub} | {v} |"
                for sub, v in nested
            ]
    for part in ("samples", "vqa_samples", "clip_samples", "bundled", "text_samples"):
        if report.get(part):
            lines += ["", f"## {part.replace('_', ' ')}", ""]
            lines += [
                "- " + "; ".join(f"**{k}** {str(v).strip()}" for k, v in row.items()).replace("\n", " ")
                for row in report[part]
            ]
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", type=Path, required=True, help="training checkpoint, trained weights, or assembled folder"
    )
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--texts", type=Path, default=Path("runs/reference/text.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("recipes/reference_vlm/results"))
    parser.add_argument("--photos", type=int, default=200, help="Flickr8k val photos")
    parser.add_argument("--questions", type=int, default=400, help="coco_vqa val questions")
    parser.add_argument("--clips", type=int, default=49)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--only", nargs="*", default=("captions", "vqa", "presence", "text", "clips", "bundled"))
    args = parser.parse_args()
    start = time.monotonic()
    model, processor = load(args.model)
    frames: dict[str, Image.Image] = {}

    def open_image(name: str) -> Image.Image:
        return frames[name] if name in frames else Image.open(args.data / name).convert("RGB")

    seeing = Seeing(model, processor, open_image, args.batch)
    captions = load_captions(args.data)
    rows = read_jsonl(args.data / "flickr8k" / "captions.jsonl")
    photos = sorted({r["image"] for r in rows if r["split"] == "val"})[: args.photos]
    report: Results = {"sizes": {"photos": len(photos), "clips": args.clips, "end_token": END}}
    parts = {
        "captions": lambda: captions_and_details(seeing, captions, photos, report),
        "vqa": lambda: questions(seeing, args.data, args.questions, report),
        "presence": lambda: presence(seeing, captions, photos, report),
        "text": lambda: text_only(seeing, args.texts, report),
        "clips": lambda: clips(seeing, args.data, captions, frames, report),
        "bundled": lambda: bundled(seeing, report),
    }
    for name in args.only:
        parts[name]()
        print(f"{name}: {time.monotonic() - start:.0f} s", flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / "evaluation.json", json.dumps(report, indent=1) + "\n")
    write_whole(args.out / "evaluation.md", markdown(report))
    print(json.dumps({k: v for k, v in report.items() if isinstance(v, dict)}, indent=1))


if __name__ == "__main__":
    main()
