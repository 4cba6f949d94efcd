"""A recording as few tokens, which the drafter alone sees, by the target's own eye.

Event frames (EventGPT's: five of equally many events) go through the target's image encoder; of their F·P features are
kept the mean of each frame, F *temporal* tokens, and the mean over frames of each place, P *spatial* tokens (EventGPT,
Liu et al., 2024). A drafter reads them in two groups (`msd.drafters.toolkit.adaptors`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from msd import prompts
from msd.errors import UserError
from msd.events import frames
from msd.events.pieces import Events
from msd.events.pooling import pooled
from msd.targets.base import Target
from msd.targets.vision import VisionCache

FRAMES = 5


@torch.no_grad()
def event_tokens(target: Target, processor: Any, recording: Events, count: int = FRAMES) -> Tensor:
    """[F + P, H] tokens of `count` frames: temporal ones, then spatial ones.

    Safe beside a prefill of the target in another thread: it leaves the target's vision cache alone. UserError for a
    target that takes no images, or cuts them into tiles.
    """
    if not any(kind.modality == "image" for kind in target.pictures):
        raise UserError("the target takes no images, so it cannot look at event frames")
    inputs = prompts.prepare(processor, [frames(recording, count, "count")], ["."])
    encoded = VisionCache(limit=count).encode(target.model, inputs, target.pictures)
    states = encoded["mm_encoder_outputs"]["image"].pooler_output
    states = states if isinstance(states, Tensor) else torch.cat(list(states))
    if states.shape[:-1].numel() % count:
        raise UserError(
            f"the target sees {states.shape[:-1].numel()} tokens in {count} event frames, unequally many each"
        )
    return pooled(states.reshape(count, -1, states.shape[-1]))
