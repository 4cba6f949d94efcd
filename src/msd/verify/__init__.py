"""Verification: which drafted tokens are emitted. docs/verification.md proves that `lossless` is;
docs/modality_verification.md derives what the other policies cost.
"""

from msd.verify.builtin.budget import Budget
from msd.verify.builtin.lossless import Lossless
from msd.verify.builtin.threshold import Threshold
from msd.verify.calibrate import calibrate
from msd.verify.chain import MSDVerification, Verified
from msd.verify.registry import Verifier, create, policies, policy, register

__all__ = [
    "Budget", "Lossless", "MSDVerification", "Threshold", "Verified", "Verifier", "calibrate", "create", "policies",
    "policy", "register",
]  # fmt: skip
