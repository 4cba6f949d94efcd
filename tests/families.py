"""The families under test: one tiny random model or more for every architecture.

What stands where is in `family_layouts`, what a family is in `family`, the models' sizes in `family_models`.
"""

from __future__ import annotations

from families_classic import CLASSIC

FAMILIES = CLASSIC
BY_NAME = {family.name: family for family in FAMILIES}
