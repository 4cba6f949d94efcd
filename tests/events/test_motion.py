"""The motion of the whole picture, estimated from events of simulated cameras with known motions."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from writers import scene

from msd.errors import UserError
from msd.events import EventStream, motion, open_chunks, simulate

SIZE, SECONDS, RATE = (64, 48), 0.8, 250


def seen(right: float, down: float, zoom: float) -> EventStream:
    """The events while a picture moves by widths and heights per second, and grows by `zoom` per second."""
    rng = np.random.default_rng(0)
    photo = Image.fromarray(rng.integers(0, 255, (24, 32), np.uint8)).resize((512, 384), Image.Resampling.BICUBIC)
    width, height = SIZE
    pictures, times = [], []
    for i in range(int(SECONDS * RATE) + 1):
        t = i / RATE
        scale = 2 * np.exp(-zoom * t)  # photo pixels per sensor pixel
        x, y = 256 - right * t * width * 2 - scale * width / 2, 192 - down * t * height * 2 - scale * height / 2
        view = photo.transform(SIZE, Image.Transform.AFFINE, (scale, 0, x, 0, scale, y), Image.Resampling.BILINEAR)
        pictures.append(np.asarray(view, np.float64) / 255)
        times.append(round(t * 1e6))
    return simulate(pictures, times)


@pytest.mark.parametrize(
    "moved", [(0.8, 0.0, 0.0), (0.0, -1.0, 0.0), (0.6, 0.5, 0.0), (0.0, 0.0, 1.2), (0.0, 0.0, -1.2)]
)
def test_the_motion_of_a_camera_is_found(moved: tuple[float, float, float]) -> None:
    """An edge must move some pixels within a span: near the centre of a zoom none does."""
    found = motion(seen(*moved), 2)
    assert found.shape == (2, 5) and found.dtype == np.float32
    right, down, zoom = found[:, :3].mean(0)
    assert (right, down) == pytest.approx(moved[:2], abs=0.15) and zoom == pytest.approx(moved[2], abs=0.4)
    assert found[:, 4] == pytest.approx(0.4, abs=0.02)


def test_a_recording_is_read_in_chunks(tmp_path: Path) -> None:
    stream, path = seen(0.8, 0.3, 0.0), tmp_path / "seen.npz"
    np.savez(path, t=stream.t, x=stream.x, y=stream.y, p=stream.p, size=stream.size)
    np.testing.assert_array_equal(motion(open_chunks(path, 997), 5), motion(stream, 5))


def test_few_events_have_no_motion() -> None:
    events = scene(12)
    found = motion(events, 2)
    assert not found[:, :3].any() and np.isfinite(found).all()
    rates = 10 ** found[:, 3].astype(float)
    assert (rates * found[:, 4] * np.prod(events.size) - 1).sum() == pytest.approx(len(events), abs=0.01)
    nothing = motion(events.part(0, 0), 2)
    assert not nothing[:, :3].any() and np.isfinite(nothing).all()
    with pytest.raises(UserError, match="0 frames"):
        motion(events, 0)
