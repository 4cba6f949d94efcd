"""Writes noise images, the hardest case for drafting: `python -m recipes.floors.noise --out runs/val/noise`.

At a high temperature the target's answers to them are unpredictable; the best plan drafts nothing.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

from msd.system.files import write_whole

PROMPTS = ("Describe the image in detail.", "What is in the picture?", "Write a caption for the image.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/val/noise"))
    parser.add_argument("--count", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    random, lines = np.random.default_rng(args.seed), []
    for i in range(args.count):
        name = f"noise_{i:02}.png"
        Image.fromarray(random.integers(0, 256, (256, 256, 3), dtype=np.uint8)).save(args.out / name)
        lines.append({"image": name, "prompt": PROMPTS[i % len(PROMPTS)], "task": "noise", "split": "val"})
    write_whole(args.out / "noise.jsonl", "".join(json.dumps(line) + "\n" for line in lines))


if __name__ == "__main__":
    main()
