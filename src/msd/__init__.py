"""MSD: modality-aware speculative decoding for multimodal language models."""

from msd.version import __version__

__all__ = ["__version__"]
