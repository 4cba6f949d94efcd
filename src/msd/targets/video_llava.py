"""Video-LLaVA: its image processor names the pixels as the model does not, `pixel_values_images`."""

from __future__ import annotations

from typing import Any

from msd.targets.base import Target

THEIRS, OURS = "pixel_values_images", "pixel_values"


class VideoLlava(Target):
    """See the module."""

    @property
    def raw(self) -> tuple[str, ...]:
        """See `Target`; under either name."""
        return (*super().raw, THEIRS)

    def encode_images(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """See `Target`."""
        return super().encode_images({OURS if name == THEIRS else name: value for name, value in inputs.items()})
