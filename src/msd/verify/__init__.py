"""Verification policies: they decide which drafted tokens are emitted.

docs/verification.md proves that `lossless` is exact. docs/modality_verification.md derives the error of the others.
"""

from msd.verify.builtin.budget import Budget, calibrate
from msd.verify.builtin.lossless import Lossless
from msd.verify.builtin.threshold import Threshold
from msd.verify.chain import MSDVerification, Verified
from msd.verify.registry import Verifier, create, policies, policy, register

__all__ = [
    "Budget", "Lossless", "MSDVerification", "Threshold", "Verified", "Verifier", "calibrate", "create", "policies",
    "policy", "register",
]  # fmt: skip
