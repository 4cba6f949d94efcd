"""MSD: modality-aware speculative decoding for multimodal language models. The same output, sooner.

    from msd import SpeculativeVLM as SpeculativeVLM
    vlm = SpeculativeVLM.from_pretrained("reference")
    print(vlm.generate("photo.jpg", "Describe the image.").text)

`import msd` is fast: it imports the modules of its public names, and torch, when a name is first used. Import it before
the first tensor is made: then the target's weights are in huge pages, and a pass takes about 10% less.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from msd import labels as _labels  # noqa: F401 -- registers the modalities of its labels
from msd.errors import UserError as UserError

__version__ = "0.1.0"

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # huge pages: torch's CPU allocator reads it at its first allocation

if TYPE_CHECKING:
    from msd.config import SpeculativeConfig as SpeculativeConfig
    from msd.core.modality import Modality as Modality
    from msd.inputs.media import Audio as Audio
    from msd.inputs.media import Video as Video
    from msd.model import SpeculativeVLM as SpeculativeVLM
    from msd.result import Result as Result
    from msd.system.machine import share_cores as share_cores
    from msd.train.losses.msd import msd_draft_loss as msd_draft_loss
    from msd.verify import MSDVerification as MSDVerification

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

__all__ = ["UserError", "__version__", *_HOMES]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'msd' has no attribute '{name}'")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
