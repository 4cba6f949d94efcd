"""A camera that moves smoothly over a photo: pan, zoom and roll, so that a still picture gives a video, and events.

Each of the four movements is a sum of slow sine waves with random phases, so that it has no jumps, never leaves its
range and can be asked for any moment. The view always lies inside the photo.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from msd.errors import UserError
from msd.events.simulator import LUMA, SimulatorSettings, simulate
from msd.events.stream import EventStream


class Motion(BaseModel):
    """How far and how fast the camera moves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pan: float = Field(default=1.0, ge=0, le=1, description="share of the free way to the photo's edges")
    zoom: tuple[float, float] = Field(
        default=(0.8, 0.95), description="least and largest part of the photo that is seen, 0 to 1"
    )
    roll: float = Field(default=5.0, ge=0, le=45, description="largest turn to either side, degrees")
    period: float = Field(default=2.0, gt=0, description="seconds of the slowest wave")
    waves: int = Field(
        default=3, ge=1, le=8, description="waves of each movement; wave k is k times faster and 1/k² as high"
    )


class Camera:
    """A path over a photo. The same seed gives the same path."""

    def __init__(self, photo: Image.Image, size: tuple[int, int], motion: Motion | None = None, seed: int = 0) -> None:
        """photo: any mode. size: (width, height) of the views. UserError for an impossible zoom."""
        self.motion = motion or Motion()
        low, high = self.motion.zoom
        if not 0 < low <= high <= 1:
            raise UserError(f"zoom from {low} to {high}; give parts of the photo, above 0 and at most 1, rising")
        self.photo = photo.convert("RGB")
        # in floating point, since steps of eight bits would give events of their own
        grey = (np.asarray(self.photo, np.float64) @ LUMA / 255).astype(np.float32)
        self.grey = Image.fromarray(grey)
        self.size = size
        self.phases = np.random.default_rng(seed).random((4, self.motion.waves)) * 2 * math.pi

    def frame(self, time: int) -> NDArray[np.float32]:
        """Brightness [H, W] from 0 to 1 at a time in µs."""
        return np.clip(np.asarray(self._view(self.grey, time), np.float32), 0, 1)

    def picture(self, time: int) -> Image.Image:
        """The RGB view at a time in µs."""
        return self._view(self.photo, time)

    def frames(self, duration: int, rate: float = 500.0) -> Iterator[tuple[int, NDArray[np.float32]]]:
        """(time in µs, brightness) from 0 to `duration` µs, `rate` frames a second, one at a time."""
        for time in times(duration, rate):
            yield time, self.frame(time)

    def _view(self, image: Image.Image, time: int) -> Image.Image:
        sway_x, sway_y, breath, turn = (self._wave(row, time) for row in range(4))
        low, high = self.motion.zoom
        angle = math.radians(self.motion.roll) * turn
        cos, sin = math.cos(angle), math.sin(angle)
        width, height = self.size
        # photo pixels per view pixel: the largest view inside the photo at this angle, times the zoom
        reach_x, reach_y = abs(cos) * width + abs(sin) * height, abs(sin) * width + abs(cos) * height
        scale = min(image.width / reach_x, image.height / reach_y) * (low + (high - low) * (breath + 1) / 2)
        free_x, free_y = (image.width - scale * reach_x) / 2, (image.height - scale * reach_y) / 2
        middle_x = image.width / 2 + self.motion.pan * sway_x * free_x
        middle_y = image.height / 2 + self.motion.pan * sway_y * free_y
        a, b = scale * cos, -scale * sin
        d, e = scale * sin, scale * cos
        c = middle_x - a * width / 2 - b * height / 2
        f = middle_y - d * width / 2 - e * height / 2
        return image.transform(self.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR)

    def _wave(self, row: int, time: int) -> float:
        """From -1 to 1."""
        k = np.arange(1, self.motion.waves + 1)
        waves = np.sin(2 * math.pi * k * time / (self.motion.period * 1e6) + self.phases[row]) / k**2
        return float(waves.sum() / (1 / k**2).sum())


def times(duration: int, rate: float) -> list[int]:
    """Times of frames from 0 to `duration` µs at `rate` a second, the end too; UserError for less than one step."""
    if not 0 < rate <= 1e6 or duration < 1e6 / rate:
        raise UserError(
            f"{rate} frames a second for {duration} µs; give time for two frames, at most a million a second"
        )
    return [round(i * 1e6 / rate) for i in range(int(duration * rate / 1e6) + 1)]


def events_of_photo(
    photo: Image.Image,
    size: tuple[int, int] = (256, 256),
    duration: int = 500_000,
    rate: float = 500.0,
    motion: Motion | None = None,
    settings: SimulatorSettings | None = None,
    seed: int = 0,
) -> EventStream:
    """Events of a photo under a moving camera; `Camera(photo, size, motion, seed).picture(t)` is the video beside them.

    Args:
        size: (width, height) of the sensor. duration: µs. rate: simulated frames a second; an edge should not move more
            than a pixel between two. seed: of the path, the mismatch and the noise.
    """
    camera = Camera(photo, size, motion, seed)
    moments = times(duration, rate)
    return simulate((camera.frame(time) for time in moments), moments, settings, seed)
