"""Qwen2-Audio: each sound fills as many placeholders as it is long, which its mask of mel frames tells.

Sounds are encoded at every prefill: the model's `forward` takes no features that were made before.
"""

from __future__ import annotations

from typing import Any

from msd.targets.base import Target
from msd.targets.state import AUDIO_TENSORS, Piece


class Qwen2Audio(Target):
    """See the module."""

    def heard(self, model_kwargs: dict[str, Any]) -> list[Piece]:
        """Mel frames [bins, n] of each sound, without padding."""
        features, mask = (model_kwargs.get(name) for name in AUDIO_TENSORS)
        if features is None or mask is None:
            return []
        frames = mask.sum(-1)
        _, columns = self.model.base_model.audio_tower._get_feat_extract_output_lengths(frames)
        return [
            Piece(sound[:, :n], count)
            for sound, n, count in zip(features, frames.tolist(), columns.tolist(), strict=True)
        ]
