"""The simulator against its definition: ramps with known crossings, a loop over events, statistics of noise."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from msd.errors import UserError
from msd.events import Camera, Motion, Simulator, SimulatorSettings, events_of_photo, simulate

DARK = 0.02
quick = settings(deadline=None, max_examples=40)


def ideal(threshold: float = 0.2, dark: float = 0.02) -> SimulatorSettings:
    """Returns the settings of a camera without noise, mismatch and refractory time."""
    noise = {"mismatch": 0, "refractory": 0, "leak_rate": 0, "shot_rate": 0}
    return SimulatorSettings(threshold_on=threshold, threshold_off=threshold, dark=dark, **noise)


def from_log(levels: np.ndarray) -> np.ndarray:
    """Returns brightness whose logarithm, with the dark level, equals `levels`."""
    return np.exp(levels) - DARK


def ramp(rates: list[float], seconds: float, steps: int, start: float = -2.0) -> tuple[list[np.ndarray], list[int]]:
    """Returns frames [1, W] in which the log brightness of pixel i changes by rates[i] per second."""
    times = [round(i * seconds * 1e6 / steps) for i in range(steps + 1)]
    return [from_log(start + np.array([rates]) * t / 1e6) for t in times], times


@quick
@given(
    rate=st.floats(0.3, 1.9), threshold=st.floats(0.05, 0.5), steps=st.integers(1, 50), sign=st.sampled_from([-1, 1])
)
def test_a_ramp_gives_evenly_spaced_events(rate: float, threshold: float, steps: int, sign: int) -> None:
    """Log brightness of slope r crosses threshold k·C at time k·C/r, for any number of frames."""
    frames, times = ramp([sign * rate], 1.0, steps, start=-2.0 if sign > 0 else -0.1)
    stream = simulate(frames, times, ideal(threshold, DARK))
    count = rate / threshold
    if abs(count - round(count)) > 1e-6:
        assert len(stream) == int(count)
    np.testing.assert_allclose(stream.t, np.arange(1, len(stream) + 1) * threshold / rate * 1e6, atol=1)
    assert (stream.p == (sign > 0)).all()


def test_pixels_have_their_own_events() -> None:
    frames, times = ramp([1.0, 0.0, -0.55, 0.39], 1.0, 10, start=-1.5)
    stream = simulate(frames, times, ideal(0.2, DARK))
    assert stream.size == (4, 1)
    assert [int((stream.x == i).sum()) for i in range(4)] == [4, 0, 2, 1] or [
        int((stream.x == i).sum()) for i in range(4)
    ] == [5, 0, 2, 1]  # the fifth crossing is at the very end
    assert set(stream.p[stream.x == 2]) == {0}


def test_two_thresholds() -> None:
    settings = SimulatorSettings(
        threshold_on=0.1, threshold_off=0.3, mismatch=0, refractory=0, leak_rate=0, shot_rate=0, dark=DARK
    )
    frames = [from_log(np.array([[v]])) for v in (-2.0, -1.35, -2.01)]  # up 0.65, then down 0.66
    stream = simulate(frames, [0, 1000, 2000], settings)
    assert stream.p.tolist() == [1] * 6 + [0] * 2  # references -1.4, then -1.7 and -2.0


def loop(levels: np.ndarray, times: np.ndarray, on: float, off: float, blind: float) -> list[tuple[int, int]]:
    """Returns (time, polarity) of one pixel, crossing by crossing, as in ESIM."""
    reference, last, events = levels[0], -np.inf, []
    for a, b, s, e in zip(levels, levels[1:], times, times[1:], strict=False):
        while True:
            if b >= reference + on - 1e-9:
                reference, p = reference + on, 1
            elif b <= reference - off + 1e-9:
                reference, p = reference - off, 0
            else:
                break
            t = s + (reference - a) / (b - a) * (e - s)
            if t - last >= blind - 1e-6:
                events.append((int(np.floor(t + 0.5)), p))
                last = t
    return events


@quick
@given(
    seed=st.integers(0, 10_000),
    on=st.floats(0.05, 0.4),
    off=st.floats(0.05, 0.4),
    blind=st.sampled_from([0, 37.0, 400.0]),
)
def test_random_signals_equal_a_loop(seed: int, on: float, off: float, blind: float) -> None:
    draw = np.random.default_rng(seed)
    levels = draw.uniform(-3.0, 0.0, 12)
    times = np.cumsum(draw.integers(200, 900, 12))
    settings = SimulatorSettings(
        threshold_on=on, threshold_off=off, mismatch=0, refractory=blind, leak_rate=0, shot_rate=0, dark=DARK
    )
    stream = simulate([from_log(np.array([[v]])) for v in levels], times, settings)
    wanted = loop(levels, times.astype(float), on, off, blind)
    assert abs(len(stream) - len(wanted)) == 0
    np.testing.assert_allclose(stream.t, [t for t, _ in wanted], atol=1)
    assert stream.p.tolist() == [p for _, p in wanted]


def test_a_refractory_time_drops_events_of_a_fast_ramp() -> None:
    frames, times = ramp([1.9], 1.0, 7)
    settings = ideal(0.01, DARK).model_copy(update={"refractory": 20_000.0})
    stream = simulate(frames, times, settings)  # a crossing each 5,263 µs: every fourth is seen
    assert set(np.diff(stream.t)) <= {21_052, 21_053}
    assert len(stream) == (190 + 3) // 4


def test_leakage_gives_slow_events_of_polarity_one() -> None:
    still = np.full((4, 5), 0.5)
    settings = ideal().model_copy(update={"leak_rate": 3.0})
    stream = simulate([still] * 21, range(0, 1_050_000, 50_000), settings)
    assert (stream.p == 1).all() and len(stream) == 3 * 20  # at 1/3, 2/3 and 1 s
    np.testing.assert_allclose(np.unique(stream.t), [333_333, 666_667, 1_000_000], atol=1)


def test_shot_noise_has_its_rate() -> None:
    """Poisson with mean 20,000: five standard deviations are wrong once in 1.7 million seeds, and this one is fixed."""
    still = np.full((50, 40), 0.5)
    settings = ideal().model_copy(update={"shot_rate": 10.0})
    stream = simulate([still] * 11, range(0, 1_100_000, 100_000), settings, seed=1)
    assert abs(len(stream) - 20_000) < 5 * 20_000**0.5
    assert abs(float(stream.p.mean()) - 0.5) < 0.02 and (np.diff(stream.t) >= 0).all()


def test_mismatch_spreads_the_thresholds() -> None:
    settings = ideal(0.2, DARK).model_copy(update={"mismatch": 0.03})
    frames = [from_log(np.full((40, 50), v)) for v in (-2.0, -2.0 + 0.39)]
    stream = simulate(frames, [0, 1000], settings, seed=2)
    first = 0.39 * stream.t[np.unique(stream.y.astype(int) * 50 + stream.x, return_index=True)[1]] / 1000
    assert abs(first.mean() - 0.2) < 0.005 and abs(first.std() - 0.03) < 0.003


def test_the_same_seed_gives_the_same_events_fed_or_whole() -> None:
    camera = Camera(Image.effect_noise((90, 70), 60), (24, 20), seed=5)
    moments = range(0, 20_001, 2000)
    frames = [camera.frame(time) for time in moments]
    whole, again, other = (simulate(frames, moments, seed=seed) for seed in (1, 1, 2))
    simulator = Simulator((24, 20), seed=1)
    fed = [simulator.feed(frame, time) for time, frame in zip(moments, frames, strict=True)]
    for name in "txyp":
        np.testing.assert_array_equal(getattr(whole, name), getattr(again, name))
        np.testing.assert_array_equal(getattr(whole, name), np.concatenate([getattr(part, name) for part in fed]))
    assert len(whole) and (len(other) != len(whole) or (other.t != whole.t).any())


def test_colours_and_bytes_are_brightness() -> None:
    frames = np.random.default_rng(0).integers(0, 256, (3, 6, 7, 3), dtype=np.uint8)
    a = simulate(frames, [0, 10, 20], ideal())
    b = simulate(frames / 255, [0, 10, 20], ideal())
    np.testing.assert_array_equal(a.t, b.t)


def test_a_moving_camera_shows_the_photo_without_edges() -> None:
    photo = Image.new("RGB", (120, 90), (200, 100, 50))
    camera = Camera(photo, (32, 32), Motion(roll=30), seed=1)
    for time in range(0, 100_001, 10_000):
        assert np.ptp(camera.frame(time)) < 1e-5, "the view stays inside the photo"
        assert np.asarray(camera.picture(time)).min() == 50
    assert len(events_of_photo(photo, (32, 32), 50_000, settings=ideal())) == 0
    still = Motion(pan=0, roll=0, zoom=(0.9, 0.9))
    assert len(events_of_photo(Image.effect_noise((90, 90), 60), (32, 32), 50_000, 500, still, ideal())) == 0


def test_motion_is_smooth() -> None:
    gradient = Image.fromarray(np.tile(np.linspace(0, 255, 200).astype(np.uint8), (200, 1)))
    camera = Camera(gradient, (32, 32), seed=3)
    frames = [camera.frame(time).mean() for time in range(0, 400_001, 2000)]
    assert np.abs(np.diff(frames)).max() < 0.01 < np.ptp(frames)


@pytest.mark.parametrize(
    ("frames", "times"),
    [
        ([], []),
        ([np.zeros((2, 2))], []),
        ([np.zeros((2, 2))], [0, 1]),
        ([np.zeros((2, 2)), np.zeros((3, 2))], [0, 1]),
        ([np.zeros((2, 2))] * 2, [5, 5]),
        ([np.full((2, 2), 3.0)], [0]),
        ([np.full((2, 2), np.nan)], [0]),
        ([np.zeros((2, 2), np.int32)], [0]),
        ([np.zeros(4)], [0]),
    ],
)
def test_invalid_videos_are_refused(frames: list[np.ndarray], times: list[int]) -> None:
    with pytest.raises(UserError):
        simulate(frames, times)


def test_invalid_motions_are_refused() -> None:
    with pytest.raises(UserError, match="zoom"):
        Camera(Image.new("L", (9, 9)), (4, 4), Motion(zoom=(0.9, 0.2)))
    with pytest.raises(UserError, match="frames a second"):
        events_of_photo(Image.new("L", (9, 9)), (4, 4), duration=10)
