"""Generates clips with event recordings: a camera moves over a photo, three motions per clip.

python -m recipes.events.clips --data ../shared/data --out runs/events/clips

A clip has four frames of a Flickr8k photo, at the middle of each quarter of two seconds. Between two frames the camera
moves left, right, up or down, zooms in or out, or rests. The recording is simulated from the same path (`msd.events`),
so only the events show what happens between the frames. Each line of `train.jsonl` and `val.jsonl` has a clip's frames,
its recording, a prompt, and an answer of at least 96 tokens, composed from the photo's captions and the camera's
motions. A clip depends only on its photo and number, and existing files are kept.
"""

from __future__ import annotations

import argparse
import json
import math
import random
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from msd.events import SimulatorSettings, simulate
from msd.system.files import write_whole
from recipes.reference_vlm.data import MOTION, load_captions
from recipes.reference_vlm.facts import extract, tidy
from recipes.reference_vlm.features import read_jsonl
from recipes.reference_vlm.long_answers import least_overlapping, long_answer

FRAMES, SENSOR, DURATION = 4, (96, 96), 2_000_000  # sensor pixels; µs
SHOWN = tuple((2 * i + 1) * DURATION // (2 * FRAMES) for i in range(FRAMES))  # times of the frames, µs
RATE = 80  # simulated frames a second
PROMPTS = (
    "Describe the video in detail.",
    "Tell in detail what the clip shows and how the camera moves.",
    "Give a full account of this clip.",
    "What does the camera see, and how does it move? Describe everything.",
)
OPENINGS = ("The clip begins with this: ", "At first, ", "The video opens here: ", "In the beginning, ")
THEN = ("Then {m}", "After that, {m}", "Next, {m}", "In the second part, {m}", "Now {m}")
LAST = ("At the end, {m}", "Finally, {m}", "In the last part, {m}", "To close, {m}")
Window = tuple[float, float, float]  # x, y and side of the visible square, as shares of the photo


def journey(rng: random.Random) -> tuple[list[str], list[Window]]:
    """Draws three motions, no two in a row alike, and the windows of the four frames."""
    side = rng.uniform(0.4, 0.7)
    windows: list[Window] = [(rng.uniform(0, 1 - side), rng.uniform(0, 1 - side), side)]
    motions: list[str] = []
    for _ in range(FRAMES - 1):
        possible = {m: _moved(windows[-1], m, rng) for m in MOTION if m not in motions[-1:]}
        open_to = [m for m, moved in possible.items() if moved is not None]
        motion = rng.choices(open_to, [0.5 if m == "still" else 1.0 for m in open_to])[0]
        motions.append(motion)
        windows.append(possible[motion] or windows[-1])
    return motions, windows


def _moved(window: Window, motion: str, rng: random.Random) -> Window | None:
    """Returns the window after a motion, or None if it would leave the photo."""
    x, y, side = window
    if motion == "still":
        return window
    if motion in ("in", "out"):
        factor = rng.uniform(0.6, 0.75)
        other = side * factor if motion == "in" else side / factor
        if not 0.35 <= other <= 1:
            return None
        shift = (side - other) / 2
        return _clamp(x + shift, other), _clamp(y + shift, other), other
    far = rng.uniform(0.18, 0.35)
    x += {"left": -far, "right": far}.get(motion, 0.0)
    y += {"up": -far, "down": far}.get(motion, 0.0)
    return (x, y, side) if min(x, y) >= 0 and max(x, y) + side <= 1 else None


def _clamp(start: float, side: float) -> float:
    return min(max(start, 0.0), 1 - side)


def window_at(windows: Sequence[Window], time: int) -> Window:
    """Returns the window at a time in µs: constant before the first and after the last frame, eased in between."""
    at = (time - SHOWN[0]) / (SHOWN[1] - SHOWN[0])
    before = min(max(int(at), 0), FRAMES - 2)
    part = min(max(at - before, 0.0), 1.0)
    eased = 0.5 - 0.5 * math.cos(math.pi * part)
    one, two = windows[before], windows[before + 1]
    x, y, side = (a + (b - a) * eased for a, b in zip(one, two, strict=True))
    return x, y, side


def view(photo: Image.Image, window: Window, size: tuple[int, int]) -> Image.Image:
    """Renders a window of the photo at a size in pixels."""
    (x, y, side), (w, h) = window, photo.size
    return photo.resize(size, Image.Resampling.BICUBIC, box=(x * w, y * h, (x + side) * w, (y + side) * h))


def description(captions: Sequence[str], motions: Sequence[str], rng: random.Random) -> str:
    """Composes a description: sentences about the photo, with the motions in between."""
    first = rng.choice(OPENINGS)
    chosen = least_overlapping(captions, rng)
    rest = [s for s in map(tidy, captions) if s not in chosen and len(s.split()) > 4]
    chosen += rest[: FRAMES - len(chosen)]
    facts = long_answer([chosen[0]], extract(captions), rng, sentences=7).split(". ")[1:]
    moves = [MOTION[m][0].lower() + MOTION[m][1:] for m in motions]
    links = [THEN[0], rng.choice(THEN[1:]), rng.choice(LAST)]
    sentences = [first + chosen[0][0].lower() + chosen[0][1:]]
    for i, (link, move) in enumerate(zip(links, moves, strict=True), 1):
        sentences.append(link.format(m=move))
        sentences += chosen[i : i + 1]
    return " ".join([*sentences, *(f"{s.rstrip('.')}." for s in facts)])


def make(photo: Path, captions: Sequence[str], number: int, split: str, out: Path) -> dict[str, object]:
    """Writes the files of one clip and returns its data line."""
    rng = random.Random(f"events-{number}")
    motions, windows = journey(rng)
    names = [f"{number:05d}_{i}.jpg" for i in range(FRAMES)]
    recording = f"{number:05d}.npz"
    image = Image.open(photo).convert("RGB")
    if not (out / recording).exists():
        for name, window in zip(names, windows, strict=True):
            view(image, window, (256, 256)).save(out / name, quality=92)
        grey = image.convert("F")
        times = [round(i * 1e6 / RATE) for i in range(DURATION * RATE // 1_000_000 + 1)]
        levels = (np.clip(np.asarray(view(grey, window_at(windows, t), SENSOR)) / 255, 0, 1) for t in times)
        stream = simulate(levels, times, SimulatorSettings(threshold_on=0.25, threshold_off=0.25), number)
        partial = out / f"{recording}.tmp.npz"
        np.savez_compressed(partial, t=stream.t, x=stream.x, y=stream.y, p=stream.p, size=SENSOR)
        partial.replace(out / recording)
    return {
        "image": names,
        "events": recording,
        "prompt": rng.choice(PROMPTS),
        "answer": description(captions, motions, rng),
        "task": "events",
        "split": split,
        "photo": photo.name,
        "motions": motions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/events/clips"))
    parser.add_argument("--train", type=int, default=1200)
    parser.add_argument("--val", type=int, default=120)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    captions = load_captions(args.data)
    split_of = {row["image"]: row["split"] for row in read_jsonl(args.data / "flickr8k" / "captions.jsonl")}
    by_split: dict[str, list[str]] = defaultdict(list)
    for name, split in sorted(split_of.items()):
        by_split[split].append(name)
    number = 0
    for split, count in (("val", args.val), ("train", args.train)):
        lines = []
        for name in random.Random(f"events {split}").choices(by_split[split], k=count):
            lines.append(make(args.data / "flickr8k" / "images" / name, captions[name], number, split, args.out))
            number += 1
            if number % 100 == 0:
                print(f"{number} clips", flush=True)
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_whole(args.out / f"{split}.jsonl", text)


if __name__ == "__main__":
    main()
