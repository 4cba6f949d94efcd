"""The MSD drafter: router, experts, decoupled vision path and modality-aware trees over one light trunk."""

from msd.drafters.msd.config import SWITCHES, MSDConfig, Shape
from msd.drafters.msd.drafter import MSD
from msd.drafters.msd.network import MSDNetwork

__all__ = ["MSD", "SWITCHES", "MSDConfig", "MSDNetwork", "Shape"]
