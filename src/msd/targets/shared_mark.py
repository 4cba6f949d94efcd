"""Families whose images and videos stand in one placeholder token, so that a prompt has either images or videos."""

from __future__ import annotations

from typing import Any

from msd.errors import UserError
from msd.targets.base import Target
from msd.targets.mrope import MRope


class SharedMark(Target):
    """UserError for images and videos in one call: the models' own `forward` accepts one kind at a time."""

    @property
    def placeholder_ids(self) -> dict[str, int]:
        """The image token for both kinds."""
        return dict.fromkeys(("image", "video"), self.model.config.image_token_id)

    def encode_images(self, inputs: dict[str, Any]) -> dict[str, Any]:
        """See `Target`."""
        if all(inputs.get(kind.pixels) is not None for kind in self.pictures):
            name = self.model.config.model_type
            raise UserError(f"'{name}' does not accept images and videos in one call; give it one kind at a time")
        return super().encode_images(inputs)


class Glm(SharedMark, MRope):
    """GLM-4.1V and later."""
