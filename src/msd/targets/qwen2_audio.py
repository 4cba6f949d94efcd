"""Qwen2-Audio and Qwen-Omni: the number of placeholders of a sound follows from its mask of mel frames.

Every prefill encodes its sounds: the model's `forward` has no argument for audio features.
"""

from __future__ import annotations

from typing import Any

from msd.targets.base import Target
from msd.targets.mrope import MRope
from msd.targets.state import AUDIO_TENSORS, MediaItem


class Qwen2Audio(Target):
    """Counts the placeholders of each sound separately."""

    def audio_items(self, model_kwargs: dict[str, Any]) -> list[MediaItem]:
        """Mel frames [bins, n] of each sound, without padding."""
        features, mask = (model_kwargs.get(name) for name in AUDIO_TENSORS)
        if features is None or mask is None:
            return []
        frames = mask.sum(-1)
        _, columns = self.model.base_model.audio_tower._get_feat_extract_output_lengths(frames)
        return [
            MediaItem(sound[:, :n], count)
            for sound, n, count in zip(features, frames.tolist(), columns.tolist(), strict=True)
        ]


class Omni(MRope, Qwen2Audio):
    """The thinkers of Qwen2.5-Omni and Qwen3-Omni."""
