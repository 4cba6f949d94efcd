"""Families whose processor calls image pixels by another name than their model."""

from __future__ import annotations

from typing import Any, ClassVar

from msd.targets.base import Target

MODEL_NAME = "pixel_values"


class VideoLlava(Target):
    """Accepts image pixels under either name."""

    processor_name: ClassVar[str] = "pixel_values_images"

    @property
    def media_tensors(self) -> tuple[str, ...]:
        """Those of `Target`, and the processor's name of image pixels."""
        return (*super().media_tensors, self.processor_name)

    def encode_images(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As in `Target`, after renaming the processor's tensor."""
        return super().encode_images({MODEL_NAME if k == self.processor_name else k: v for k, v in inputs.items()})


class Fuyu(VideoLlava):
    """Fuyu's processor has the patches of all images in one tensor, under an older name by default."""

    processor_name = "image_patches"
