"""An MSD drafter on disk (see `msd.drafters.stored`)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from msd.drafters import stored
from msd.drafters.msd.config import MSDConfig
from msd.drafters.msd.network import MSDNetwork


def save(network: MSDNetwork, folder: Path, training: dict[str, Any] | None = None) -> None:
    """Writes the drafter; `training` says where it comes from (target, data, thresholds, scores)."""
    stored.save(network, network.config, folder, training)


def load(folder: Path | str, dtype: torch.dtype = torch.float32) -> MSDNetwork:
    """The network of a folder, on the CPU, without an embedding (`MSDNetwork.attach`). UserError says what is wrong."""
    return stored.load(folder, lambda text: MSDNetwork(MSDConfig.from_json(text)), dtype)
