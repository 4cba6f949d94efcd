"""Sounds: a file as one channel at the rate that a model hears."""

from __future__ import annotations

import os
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from msd.errors import UserError
from msd.inputs.containers import decoded, opened

MOST_SECONDS = 600.0  # of a sound: 38 MB at 16 kHz


@dataclass(frozen=True)
class Audio:
    """A sound file, or the sound of a video file."""

    path: str | os.PathLike[str]

    def load(self, rate: int = 16_000) -> NDArray[np.float32]:
        """Samples [n] in [-1, 1], `rate` of them a second, the mean of all channels.

        UserError: the file is missing, broken, has no sound, or one longer than 10 minutes.
        """
        with opened(self.path, "audio") as (container, stream, name):
            from av import AudioResampler

            resampler = AudioResampler(format="fltp", rate=rate)
            pieces: list[NDArray[np.float32]] = []
            count = 0
            for frame in decoded(container, stream):
                pieces += [piece.to_ndarray().mean(0) for piece in resampler.resample(frame)]
                count += frame.samples
                if count > MOST_SECONDS * frame.sample_rate:
                    raise UserError(f"{name} is longer than {MOST_SECONDS:.0f} s; cut out the part that matters")
            if not pieces:
                raise UserError(f"{name} is broken: none of its sound can be decoded; save or download it again")
            pieces += [piece.to_ndarray().mean(0) for piece in resampler.resample(None)]
        return np.concatenate(pieces)
