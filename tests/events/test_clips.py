"""Clips of the events suite: the path of the camera, the description of it, and files that are written once."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from recipes.events import clips

CAPTIONS = [
    "A brown dog runs through the high grass .", "A dog is running in a green field .", "A wet dog with a red collar .",
    "The dog chases a ball .", "Two people watch a brown dog run .",
]  # fmt: skip


@pytest.mark.parametrize("seed", range(20))
def test_the_camera_stays_on_the_photo_and_passes_every_frame(seed: int) -> None:
    motions, windows = clips.journey(random.Random(seed))
    assert len(motions) == 3 and len(windows) == 4
    assert all(a != b for a, b in itertools.pairwise(motions))
    for at, window in zip(clips.SHOWN, windows, strict=True):
        assert clips.window_at(windows, at) == pytest.approx(window)
    for time in range(0, clips.DURATION, 50_000):
        x, y, side = clips.window_at(windows, time)
        assert min(x, y) > -1e-9 and max(x, y) + side < 1 + 1e-9
    for motion, (x, _, side), (then, _, other) in zip(motions, windows, windows[1:], strict=False):
        assert (motion == "left") == (then < x and side == other)
        assert (motion == "in") == (other < side) and (motion == "out") == (other > side)


def test_a_description_tells_the_motions_in_their_order() -> None:
    text = clips.description(CAPTIONS, ["left", "in", "still"], random.Random(0)).lower()
    places = [text.index(clips.MOTION[m].rstrip(".").lower()) for m in ("left", "in", "still")]
    assert places == sorted(places) and "dog" in text


def test_a_clip_is_a_function_of_photo_and_number_and_made_once(tmp_path: Path) -> None:
    photo = tmp_path / "photo.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).resize((224, 224)).save(
        photo
    )
    line = clips.make(photo, CAPTIONS, 3, "val", tmp_path)
    recording = tmp_path / line["events"]
    events, made = np.load(recording), recording.stat().st_mtime_ns
    assert tuple(events["size"]) == clips.SENSOR and len(events["t"]) > 100
    assert bool((np.diff(events["t"]) >= 0).all()) and events["t"][-1] <= clips.DURATION
    assert [Image.open(tmp_path / name).size for name in line["image"]] == [(256, 256)] * 4
    assert clips.make(photo, CAPTIONS, 3, "val", tmp_path) == line and recording.stat().st_mtime_ns == made
