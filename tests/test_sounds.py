"""Sound files become one channel at the sampling rate of the model."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from clips import write_clip, write_sound
from msd.errors import UserError
from msd.inputs.media import Audio


def loudest(samples: np.ndarray, rate: int) -> float:
    """The frequency of most power, in Hz."""
    power = np.abs(np.fft.rfft(samples)) ** 2
    return float(np.fft.rfftfreq(len(samples), 1 / rate)[power.argmax()])


@pytest.mark.parametrize("suffix", ["wav", "flac", "m4a", "mp3"])
@pytest.mark.parametrize("rate", [8_000, 44_100])
def test_any_rate_and_format_becomes_the_models(tmp_path: Path, suffix: str, rate: int) -> None:
    path = write_sound(tmp_path / f"a.{suffix}", 0.5, rate)
    for wanted in (16_000, 24_000):
        samples = Audio(path).load(wanted)
        assert samples.dtype == np.float32 and samples.ndim == 1
        assert len(samples) / wanted == pytest.approx(0.5, abs=0.15)  # MP3 and AAC pad to whole blocks
        assert loudest(samples, wanted) == pytest.approx(440, abs=6)
        assert np.abs(samples).max() == pytest.approx(0.5, abs=0.06)


def test_channels_are_mixed(tmp_path: Path) -> None:
    left = Audio(write_sound(tmp_path / "a.wav", stereo=True)).load()
    assert loudest(left, 16_000) == pytest.approx(440, abs=3)
    assert np.abs(left).max() == pytest.approx(0.25, abs=0.03)


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "text.wav").write_text("not a sound")
    for path, said in (
        (tmp_path / "none.wav", "there is no file"),
        (tmp_path / "text.wav", "not a readable audio file"),
        (write_clip(tmp_path / "a.mp4", range(3)), "no audio stream"),
    ):
        with pytest.raises(UserError, match=said):
            Audio(path).load()
    monkeypatch.setattr("msd.inputs.media.MOST_SECONDS", 1.0)
    with pytest.raises(UserError, match="longer than 1 s"):
        Audio(write_sound(tmp_path / "long.wav", 1.5)).load()
