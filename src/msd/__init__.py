"""MSD: modality-aware speculative decoding for multimodal language models. The same output, sooner.

    from msd import SpeculativeVLM
    vlm = SpeculativeVLM.from_pretrained("reference")
    print(vlm.generate("photo.jpg", "Describe the image.").text)

`import msd` is fast: it imports the modules of its public names, and torch, when a name is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from msd import labels as _labels  # noqa: F401 -- registers the modalities of its labels
from msd.errors import UserError

__version__ = "0.1.0"

if TYPE_CHECKING:
    from msd.config import SpeculativeConfig
    from msd.core.modality import Modality
    from msd.inputs.media import Audio, Video
    from msd.model import SpeculativeVLM
    from msd.result import Result
    from msd.system.machine import share_cores
    from msd.train.losses.msd import msd_draft_loss
    from msd.verify import MSDVerification

__all__ = [
    "Audio",
    "MSDVerification",
    "Modality",
    "Result",
    "SpeculativeConfig",
    "SpeculativeVLM",
    "UserError",
    "Video",
    "__version__",
    "msd_draft_loss",
    "share_cores",
]

_HOMES = {
    "Audio": "msd.inputs.media",
    "MSDVerification": "msd.verify",
    "Modality": "msd.core.modality",
    "Result": "msd.result",
    "SpeculativeConfig": "msd.config",
    "SpeculativeVLM": "msd.model",
    "Video": "msd.inputs.media",
    "msd_draft_loss": "msd.train.losses.msd",
    "share_cores": "msd.system.machine",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'msd' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
