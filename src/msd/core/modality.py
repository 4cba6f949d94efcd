"""The open registry of modalities: what a position holds, and how boldly drafts there may be verified.

Prompt positions carry the modality of what they hold (text is *language*, an image placeholder is *vision*). Output
positions carry the modality a router predicts for them. Both use the same ids, so a tensor of modalities is int64.
This module knows nothing of models, trees or verification; a new modality is one `register` call in any file.
"""

from __future__ import annotations

from dataclasses import dataclass

from msd.errors import UserError


@dataclass(frozen=True)
class Modality:
    """One kind of token. `id` is its value in modality tensors; `threshold` is θ of the `threshold` verifier."""

    name: str
    id: int
    threshold: float


_REGISTRY: dict[str, Modality] = {}


def register(name: str, threshold: float) -> Modality:
    """Adds a modality, or returns the registered one when `name` and `threshold` agree. θ is in [0, 1]."""
    if name in _REGISTRY:
        if _REGISTRY[name].threshold != threshold:
            raise UserError(
                f"modality '{name}' is registered with threshold {_REGISTRY[name].threshold}, not {threshold}"
            )
        return _REGISTRY[name]
    if not 0.0 <= threshold <= 1.0:
        raise UserError(f"modality '{name}': threshold {threshold} is outside [0, 1]")
    _REGISTRY[name] = Modality(name, len(_REGISTRY), threshold)
    return _REGISTRY[name]


def get(name: str) -> Modality:
    """The modality called `name`; UserError names the known ones."""
    if name not in _REGISTRY:
        raise UserError(f"unknown modality '{name}'; known: {', '.join(sorted(_REGISTRY))}")
    return _REGISTRY[name]


def known() -> tuple[Modality, ...]:
    """All registered modalities, by id."""
    return tuple(_REGISTRY.values())


LANGUAGE = register("language", 0.4)
VISION = register("vision", 0.6)
FUSION = register("fusion", 0.5)
AUDIO = register("audio", 0.5)
DEPTH = register("depth", 0.5)
