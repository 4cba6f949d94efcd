"""The families under test: one tiny random model or more for every architecture.

What stands where is in `family_layouts`, what a family is in `family`, the models' sizes in `family_models`.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest

from families_classic import CLASSIC
from families_mrope import MROPE
from families_plain import PLAIN
from families_special import SPECIAL
from family import Family
from family_models import built, made
from recurrent_models import RECURRENT

HYBRIDS = [
    Family(
        r.name, made(partial(built, r.name, r.config), *r.weights), r.place, r.tensors, r.kinds, r.sizes,
        () if r.types is None else (r.types,), r.frame,
    )
    for r in RECURRENT
]  # fmt: skip
FAMILIES = [*CLASSIC, *MROPE, *PLAIN, *SPECIAL, *HYBRIDS]
BY_NAME = {family.name: family for family in FAMILIES}

# One family for each mechanism; tests of the others run with `--full` only.
SAMPLE = {
    "llava": "one position per token", "llava_onevision": "tiles by prompt, video", "gemma3": "images see both ways",
    "paligemma": "prompts see both ways", "idefics3": "nested tiles", "mistral3_window": "windows in all layers",
    "qwen2_5_vl": "M-RoPE", "qwen3_vl_moe": "M-RoPE, deepstack, experts", "qwen2_audio": "sounds",
    "glm4v": "videos in image tokens", "gemma4": "shared keys, head sizes by layer", "llama4": "chunks, scaled queries",
    "kimi_k25": "latent keys", "granite4_vision": "features by layer", "molmo2": "all images see each other",
    "exaone4_5": "positions count padding", "qwen3_5": "recurrent layers",
}  # fmt: skip


def named(kind: str | None = None) -> list[Any]:
    """The names of the families that take `kind`, as parameters of tests."""
    found = [family.name for family in FAMILIES if kind is None or kind in family.kinds]
    return [pytest.param(name, marks=[] if name in SAMPLE else pytest.mark.full) for name in found]


NAMES = named()
