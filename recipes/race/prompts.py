"""The prompts on which the race is measured: those of the comparison, twice as many, and no photo of a held-out answer.

Held-out answers calibrate the trained drafters, so their photos and texts are left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from msd.system.files import write_whole
from msd.train.capture import Captured
from recipes.comparison.suites import COUNTS, build

CALIBRATING = 120  # held-out answers that drafters are calibrated on, of the race or trained for hours
# 160 prompts with all turns of the conversations; of short answers (VQA, COCO-QA) the same share as in the comparison
RACE = {kind: 2 * count for kind, count in COUNTS.items()} | {"detail": 38, "caption": 42}


def write_prompts(path: Path, data: Path, held_out: Iterable[Captured]) -> None:
    """Writes the data lines to `path`. Raises SystemExit if the data has too few."""
    images, texts = set(), set()
    for answer in held_out:
        images |= {image.name for image in answer.images}
        texts |= set() if answer.images else {answer.prompt}
    lines = build(data, RACE, 0, images | texts)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
