"""Simulates an event camera: for a video, or for a photo under a moving camera.

Each pixel keeps a reference: the log brightness at its last event. Between two frames, log brightness is linear in
time. When it differs from the reference by a threshold, the pixel emits an event at the moment of crossing, and the
reference moves by the threshold. Noise is modelled too:

- thresholds differ from pixel to pixel;
- for a refractory time after an event, crossings move the reference but emit no event, as in ESIM;
- leakage lowers the reference steadily, which causes slow events of polarity 1;
- shot noise adds random events.

Frames are processed one at a time, so a video may have any length. Sources: Rebecq et al., "ESIM: an Open Event Camera
Simulator", 2018; Hu et al., "v2e: From Video Frames to Realistic DVS Events", 2021.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from itertools import zip_longest

import numpy as np
from numpy.typing import ArrayLike, NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from msd.errors import UserError
from msd.events.stream import EventStream, join

LUMA = np.array([0.299, 0.587, 0.114], np.float64)  # of R, G, B (ITU-R BT.601)
LEAST_THRESHOLD = 0.01
Crossings = tuple[NDArray[np.float64], NDArray[np.int64], NDArray[np.int64]]  # (time in µs, pixel, polarity), each [N]


class SimulatorSettings(BaseModel):
    """The camera's properties. The defaults have the noise of a quiet camera."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    threshold_on: float = Field(default=0.2, gt=0, description="rise of log brightness that causes an event")
    threshold_off: float = Field(default=0.2, gt=0, description="fall of log brightness that causes an event")
    mismatch: float = Field(default=0.03, ge=0, description="standard deviation of the thresholds over pixels")
    refractory: float = Field(default=100.0, ge=0, description="µs without events after an event")
    leak_rate: float = Field(default=0.1, ge=0, description="leak events per second and pixel")
    shot_rate: float = Field(default=0.1, ge=0, description="shot noise events per second and pixel")
    dark: float = Field(default=0.02, gt=0, description="added to brightness (0 to 1) before the logarithm")


class Simulator:
    """Turns frames into events. The first frame sets the references and causes no events."""

    def __init__(self, size: tuple[int, int], settings: SimulatorSettings | None = None, seed: int = 0) -> None:
        """size: (width, height) of the frames. seed: of mismatch and noise; the same seed gives the same events."""
        self.settings = settings or SimulatorSettings()
        self.size = size
        self.draw = np.random.default_rng(seed)
        pixels = size[0] * size[1]
        self.on, self.off = (
            np.maximum(self.draw.normal(level, self.settings.mismatch, pixels), min(LEAST_THRESHOLD, level))
            for level in (self.settings.threshold_on, self.settings.threshold_off)
        )
        self.time: int | None = None
        self.level = np.zeros(pixels)  # log brightness at `time`, plus leakage
        self.leakage = np.zeros(pixels)  # in total; added to the level, which equals lowering the reference
        self.reference = np.zeros(pixels)
        self.last = np.full(pixels, -np.inf)  # time of the last event, µs, not rounded

    def feed(self, frame: ArrayLike, time: int) -> EventStream:
        """Returns the events since the previous frame.

        Args:
            frame: [H, W] or [H, W, 3] of uint8, or of floats from 0 to 1.
            time: µs, later than that of the previous frame.

        Raises:
            UserError: the frame has another size, type or range, or its time is not later.
        """
        level = np.log(self.settings.dark + _brightness(frame, self.size)).ravel()
        if self.time is None:
            self.time, self.level, self.reference = int(time), level, level.copy()
            return join([], self.size)
        if time <= self.time:
            raise UserError(f"a frame at {time} µs follows one at {self.time} µs; times must rise")
        begin, duration = self.time, int(time) - self.time
        self.leakage += self.settings.leak_rate * self.on * (duration / 1e6)
        crossings = self._crossings(level + self.leakage, begin, duration)
        at, pixel, polarity = map(np.concatenate, zip(crossings, self._noise(begin, duration), strict=True))
        t = np.floor(at + 0.5).astype(np.int64)
        order = np.argsort(t, kind="stable")
        self.time = int(time)
        y, x = (part.astype(np.uint16) for part in np.divmod(pixel[order], self.size[0]))
        return EventStream(t[order], x, y, polarity[order].astype(np.uint8), self.size)

    def _crossings(self, level: NDArray[np.float64], begin: int, duration: int) -> Crossings:
        """Returns the crossings between the previous levels and these, outside refractory times."""
        before, moved = self.level, level - self.reference
        rising = moved >= 0
        threshold = np.where(rising, self.on, self.off)
        count = np.floor(np.abs(moved) / threshold + 1e-9).astype(np.int64)
        active = np.flatnonzero(count)
        step = np.where(rising, threshold, -threshold)[active]
        change = (level - before)[active]
        first = begin + (self.reference[active] + step - before[active]) / change * duration
        spacing = step / change * duration  # between the crossings of a pixel, µs
        number = count[active]
        self.level = level
        self.reference[active] += step * number

        # the crossings of a pixel are evenly spaced, so those it emits are every stride-th from the first one that is
        # a refractory time after its last event
        refractory = self.settings.refractory
        wait = np.maximum(self.last[active] + refractory - first, 0)
        start = np.ceil(wait / spacing - 1e-9).astype(np.int64)
        stride = np.maximum(np.ceil(refractory / spacing - 1e-9), 1).astype(np.int64)
        emitted = np.maximum((number - start + stride - 1) // stride, 0)
        some = emitted > 0
        self.last[active[some]] = (first + (start + (emitted - 1) * stride) * spacing)[some]
        pixel = np.repeat(np.arange(len(active)), emitted)
        index = np.arange(len(pixel)) - np.repeat(np.cumsum(emitted) - emitted, emitted)
        at = first[pixel] + (start[pixel] + index * stride[pixel]) * spacing[pixel]
        return at, active[pixel], rising[active[pixel]].astype(np.int64)

    def _noise(self, begin: int, duration: int) -> Crossings:
        """Draws shot noise, uniform in time, pixel and polarity; references do not move."""
        pixels = self.size[0] * self.size[1]
        count = self.draw.poisson(self.settings.shot_rate * pixels * duration / 1e6)
        at = begin + self.draw.random(count) * duration
        return at, self.draw.integers(0, pixels, count), self.draw.integers(0, 2, count)


def simulate(
    frames: Iterable[ArrayLike], times: Iterable[int], settings: SimulatorSettings | None = None, seed: int = 0
) -> EventStream:
    """Simulates the events of a video.

    Args:
        frames: at least one frame as for `Simulator.feed`; any iterable, read one frame at a time.
        times: of the frames, µs, rising.
        seed: of mismatch and noise.

    Raises:
        UserError: there are no frames, or not as many as times; and as in `Simulator.feed`.
    """
    parts: list[EventStream] = []
    simulator: Simulator | None = None
    for frame, time in zip_longest(frames, times):
        if frame is None or time is None:
            raise UserError("there are not as many frames as times; give each frame its time")
        if simulator is None:
            shape = np.shape(frame)
            if len(shape) < 2:
                raise UserError(f"a frame of shape {shape}; give [height, width] or [height, width, 3]")
            simulator = Simulator((shape[1], shape[0]), settings, seed)
        parts.append(simulator.feed(frame, time))
    if simulator is None:
        raise UserError("there are no frames; give at least one")
    return join(parts, simulator.size)


class Motion(BaseModel):
    """How far and how fast the camera moves. Every movement is a sum of sine waves."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    pan: float = Field(default=1.0, ge=0, le=1, description="share of the free way to the photo's edges")
    zoom: tuple[float, float] = Field(
        default=(0.8, 0.95), description="least and largest visible part of the photo, 0 to 1"
    )
    roll: float = Field(default=5.0, ge=0, le=45, description="largest rotation to either side, degrees")
    period: float = Field(default=2.0, gt=0, description="seconds of the slowest wave")
    waves: int = Field(
        default=3, ge=1, le=8, description="waves per movement; wave k is k times faster and 1/k² as high"
    )


class Camera:
    """A camera that moves over a photo. The same seed gives the same path."""

    def __init__(self, photo: Image.Image, size: tuple[int, int], motion: Motion | None = None, seed: int = 0) -> None:
        """photo: any mode. size: (width, height) of the views. UserError for an impossible zoom."""
        self.motion = motion or Motion()
        low, high = self.motion.zoom
        if not 0 < low <= high <= 1:
            raise UserError(f"zoom from {low} to {high}; give parts of the photo, above 0 and at most 1, rising")
        self.photo = photo.convert("RGB")
        # in floating point: steps between 8-bit values would cause spurious events
        grey = (np.asarray(self.photo, np.float64) @ LUMA / 255).astype(np.float32)
        self.grey = Image.fromarray(grey)
        self.size = size
        self.phases = np.random.default_rng(seed).random((4, self.motion.waves)) * 2 * math.pi

    def frame(self, time: int) -> NDArray[np.float32]:
        """Returns brightness [H, W] from 0 to 1 at a time in µs."""
        return np.clip(np.asarray(self._view(self.grey, time), np.float32), 0, 1)

    def picture(self, time: int) -> Image.Image:
        """Returns the RGB view at a time in µs."""
        return self._view(self.photo, time)

    def _view(self, image: Image.Image, time: int) -> Image.Image:
        pan_x, pan_y, zoom, roll = (self._wave(row, time) for row in range(4))
        low, high = self.motion.zoom
        angle = math.radians(self.motion.roll) * roll
        cos, sin = math.cos(angle), math.sin(angle)
        width, height = self.size
        # photo pixels per view pixel: the largest view inside the photo at this angle, times the zoom
        reach_x, reach_y = abs(cos) * width + abs(sin) * height, abs(sin) * width + abs(cos) * height
        scale = min(image.width / reach_x, image.height / reach_y) * (low + (high - low) * (zoom + 1) / 2)
        free_x, free_y = (image.width - scale * reach_x) / 2, (image.height - scale * reach_y) / 2
        middle_x = image.width / 2 + self.motion.pan * pan_x * free_x
        middle_y = image.height / 2 + self.motion.pan * pan_y * free_y
        a, b = scale * cos, -scale * sin
        d, e = scale * sin, scale * cos
        c = middle_x - a * width / 2 - b * height / 2
        f = middle_y - d * width / 2 - e * height / 2
        return image.transform(self.size, Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BILINEAR)

    def _wave(self, row: int, time: int) -> float:
        """Returns the state of one movement, from -1 to 1."""
        k = np.arange(1, self.motion.waves + 1)
        waves = np.sin(2 * math.pi * k * time / (self.motion.period * 1e6) + self.phases[row]) / k**2
        return float(waves.sum() / (1 / k**2).sum())


def events_of_photo(
    photo: Image.Image,
    size: tuple[int, int] = (256, 256),
    duration: int = 500_000,
    rate: float = 500.0,
    motion: Motion | None = None,
    settings: SimulatorSettings | None = None,
    seed: int = 0,
) -> EventStream:
    """Simulates the events of a moving camera over a photo.

    `Camera(photo, size, motion, seed).picture(t)` is the matching RGB video.

    Args:
        photo: any mode. size: (width, height) of the sensor. duration: µs.
        rate: simulated frames per second, from time 0 to `duration`; an edge should move at most a pixel between two.
        seed: of the path, the mismatch and the noise.

    Raises:
        UserError: there is no time for two frames.
    """
    if not 0 < rate <= 1e6 or duration < 1e6 / rate:
        raise UserError(
            f"{rate} frames a second for {duration} µs; give time for two frames, at most a million a second"
        )
    camera = Camera(photo, size, motion, seed)
    times = [round(i * 1e6 / rate) for i in range(int(duration * rate / 1e6) + 1)]
    return simulate((camera.frame(time) for time in times), times, settings, seed)


def _brightness(frame: ArrayLike, size: tuple[int, int]) -> NDArray[np.float64]:
    """Returns the brightness [H, W] of a frame, from 0 to 1; UserError for another size, type or range."""
    values = np.asarray(frame)
    if values.ndim == 3 and values.shape[2] == 3:
        values = values @ LUMA / (255 if values.dtype == np.uint8 else 1)
    elif values.dtype == np.uint8:
        values = values / 255
    if values.shape != (size[1], size[0]):
        raise UserError(f"a frame of shape {np.shape(frame)}; the first was {size[0]} wide and {size[1]} high")
    if values.dtype.kind != "f" or not (values.min() >= 0 and values.max() <= 1 + 1e-6):
        raise UserError(f"a frame of type {values.dtype} from {values.min()} to {values.max()}; give uint8, or 0 to 1")
    return values.astype(np.float64, copy=False)
