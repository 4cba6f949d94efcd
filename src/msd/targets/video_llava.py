"""Video-LLaVA: its processor calls image pixels `pixel_values_images`, its model `pixel_values`."""

from __future__ import annotations

from typing import Any

from msd.targets.base import Target

PROCESSOR_NAME, MODEL_NAME = "pixel_values_images", "pixel_values"


class VideoLlava(Target):
    """Accepts image pixels under either name."""

    @property
    def media_tensors(self) -> tuple[str, ...]:
        """Those of `Target`, and the processor's name of image pixels."""
        return (*super().media_tensors, PROCESSOR_NAME)

    def encode_images(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """As in `Target`, after renaming the processor's tensor."""
        return super().encode_images({MODEL_NAME if k == PROCESSOR_NAME else k: v for k, v in inputs.items()})
