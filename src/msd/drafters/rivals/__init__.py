"""Rivals: the published drafters that MSD is compared with (docs/comparison.md), each its idea and loss in a file.

All follow the `Drafter` protocol, reuse the target's embedding and head, and draft within the same plan.
"""

from __future__ import annotations

from pathlib import Path

import torch

from msd.drafters import stored
from msd.drafters.rivals.config import RivalConfig
from msd.drafters.rivals.dflash import DFlash
from msd.drafters.rivals.drafter import RivalDrafter
from msd.drafters.rivals.dspark import DSpark
from msd.drafters.rivals.eagle2 import Eagle2
from msd.drafters.rivals.eagle3 import Eagle3
from msd.drafters.rivals.hivis import HiViS
from msd.drafters.rivals.msd_published import MSDPublished
from msd.drafters.rivals.network import Rival
from msd.drafters.rivals.specvlm import SpecVLM
from msd.drafters.rivals.specvlm_video import SpecVLMVideo
from msd.drafters.rivals.text_only import TextOnly
from msd.drafters.rivals.vispec import ViSpec
from msd.errors import UserError

__all__ = ["RIVALS", "Eagle2", "Rival", "RivalConfig", "RivalDrafter", "SpecVLMVideo", "TextOnly", "load", "named"]

RIVALS: dict[str, type[Rival]] = {
    network.method: network
    for network in (
        TextOnly, Eagle2, Eagle3, MSDPublished, ViSpec, SpecVLM, SpecVLMVideo, DFlash, DSpark, HiViS,
    )
}  # fmt: skip


def named(method: str) -> type[Rival]:
    """The network of a method; UserError names the known ones."""
    if method not in RIVALS:
        raise UserError(f"method '{method}' cannot be trained; choose msd or one of {', '.join(RIVALS)}")
    return RIVALS[method]


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> Rival:
    """The network of a trained rival's folder, without a target (`Rival.attach`). UserError says what is wrong."""
    return stored.load(folder, _made, dtype)


def _made(text: str) -> Rival:
    config = RivalConfig.from_json(text)
    return named(config.method)(config)
