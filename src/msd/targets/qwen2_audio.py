"""Qwen2-Audio and Qwen-Omni: the number of placeholders of a sound follows from its mask of mel frames.

Every prefill encodes its sounds: the model's `forward` has no argument for audio features.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import _get_feat_extract_output_lengths

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
        columns = self.audio_columns(frames)
        return [
            MediaItem(sound[:, :n], count)
            for sound, n, count in zip(features, frames.tolist(), columns.tolist(), strict=True)
        ]

    def audio_columns(self, frames: Tensor) -> Tensor:
        """The number of placeholders of each sound, from its number of mel frames."""
        columns: Tensor = self.model.base_model.audio_tower._get_feat_extract_output_lengths(frames)[1]
        return columns


class Omni(MRope, Qwen2Audio):
    """The thinker of Qwen2.5-Omni."""


class Qwen3Omni(Omni):
    """Qwen3-Omni's encoder cuts sounds into chunks."""

    def audio_columns(self, frames: Tensor) -> Tensor:
        """See `Qwen2Audio`."""
        columns: Tensor = _get_feat_extract_output_lengths(frames)
        return columns
