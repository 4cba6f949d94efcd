"""Tiny video and sound files, written with PyAV."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

LEVELS = 10  # of brightness from one frame's number to the next


def write_clip(
    path: Path, frames: Iterable[int | np.ndarray], at: Sequence[int] | None = None, degrees: int = 0, rate: int = 10
) -> Path:
    """Frames of 64x32 pixels, number n being grey of brightness `LEVELS` n; or pictures [h, w, 3] of bytes.

    at: when each is shown, in units of 1 / `rate` seconds; one after the other without it. degrees: the turn that the
    file asks for.
    """
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt = 64, 32, "yuv420p"
        stream.bit_rate = 2_000_000
        stream.time_base = stream.codec_context.time_base = Fraction(1, rate)
        if degrees:
            stream.set_display_rotation(degrees)
        for i, frame in enumerate(frames):
            pixels = np.full((32, 64, 3), LEVELS * frame, np.uint8) if isinstance(frame, int) else frame
            picture = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            picture.pts, picture.time_base = (i if at is None else at[i]), Fraction(1, rate)
            container.mux(stream.encode(picture))
        container.mux(stream.encode(None))
    return path


def write_sound(
    path: Path,
    seconds: float = 0.5,
    rate: int = 8000,
    hertz: float = 440.0,
    stereo: bool = False,
    loudness: float = 0.5,
) -> Path:
    """A tone in WAV, FLAC, M4A or MP3; in stereo on the left alone."""
    tone = np.sin(2 * np.pi * hertz * np.arange(int(seconds * rate)) / rate)
    samples = np.rint(32767 * loudness * np.stack([tone, 0 * tone] if stereo else [tone])).astype(np.int16)
    with av.open(str(path), "w") as container:
        codec = {".wav": "pcm_s16le", ".flac": "flac", ".m4a": "aac", ".mp3": "libmp3lame"}[path.suffix]
        stream = container.add_stream(codec, rate=rate, layout="stereo" if stereo else "mono")
        frame = av.AudioFrame.from_ndarray(samples.T.reshape(1, -1), format="s16", layout=stream.layout.name)
        frame.sample_rate = rate
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path
