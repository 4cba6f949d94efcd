"""Which architectures have an adapter, and which adapter a model gets."""

from __future__ import annotations

from transformers import PreTrainedModel

from msd.errors import UserError
from msd.targets.base import Target
from msd.targets.vision import VisionCache

_ADAPTERS: dict[str, type[Target]] = {
    "llava": Target,
    "llava_next": Target,
}


def supported() -> list[str]:
    """`model_type`s with an adapter."""
    return sorted(_ADAPTERS)


def adapt(
    model: PreTrainedModel,
    taps: tuple[int, ...] = (),
    vision_cache: VisionCache | None = None,
    backend: str = "measure",
) -> Target:
    """The adapter of `model`; UserError names the missing one."""
    kind = model.config.model_type
    if kind not in _ADAPTERS:
        raise UserError(
            f"no adapter for architecture '{kind}' (supported: {', '.join(supported())}); "
            "add one to msd/targets and register it in msd/targets/registry.py"
        )
    return _ADAPTERS[kind](model, taps, vision_cache, backend)
