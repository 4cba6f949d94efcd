"""The families under test: one tiny random model or more for every architecture.

What stands where is in `family_layouts`, what a family is in `family`, the models' sizes in `family_models`.
"""

from __future__ import annotations

from functools import partial

from families_classic import CLASSIC
from families_mrope import MROPE
from families_plain import PLAIN
from families_special import SPECIAL
from family import Family
from family_models import made
from recurrent_models import RECURRENT

HYBRIDS = [
    Family(
        r.name, made(partial(r.model, r.config), *r.weights), r.place, r.tensors, r.kinds, r.sizes,
        () if r.types is None else (r.types,), r.frame,
    )
    for r in RECURRENT
]  # fmt: skip
FAMILIES = [*CLASSIC, *MROPE, *PLAIN, *SPECIAL, *HYBRIDS]
BY_NAME = {family.name: family for family in FAMILIES}
