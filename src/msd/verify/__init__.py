"""Verification: which drafted tokens are emitted. docs/verification.md proves that `lossless` is;
docs/modality_verification.md derives what the other policies cost.
"""

from __future__ import annotations

from collections.abc import Mapping

from msd.errors import UserError
from msd.verify.api import MSDVerification, Verified
from msd.verify.base import Verifier
from msd.verify.budget import Budget
from msd.verify.calibrate import calibrate
from msd.verify.lossless import Lossless
from msd.verify.threshold import Threshold

__all__ = [
    "Budget", "Lossless", "MSDVerification", "Threshold", "Verified", "Verifier", "calibrate", "create", "policies",
]  # fmt: skip


def policies() -> list[str]:
    """Names of the verification policies, the default first."""
    return ["lossless", "threshold", "budget"]


def create(name: str, thresholds: Mapping[str, float] | None = None, epsilon: float = 0.0) -> Verifier:
    """The verifier of policy `name`.

    thresholds: modality name -> θ, for `threshold` and `budget`. epsilon: for `budget`. UserError for an unknown
    policy, for settings it does not have, and for numbers outside [0, 1].
    """
    if name not in policies():
        raise UserError(f"unknown verifier '{name}'; known: {', '.join(policies())}")
    if thresholds and name == "lossless":
        raise UserError("verifier 'lossless' has no thresholds; choose 'threshold' or 'budget' to use them")
    if epsilon and name != "budget":
        raise UserError(f"verifier '{name}' has no epsilon; choose 'budget' to use it")
    if name == "threshold":
        return Threshold(thresholds)
    return Budget(epsilon, thresholds) if name == "budget" else Lossless()
