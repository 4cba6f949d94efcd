"""Shared by all tests: the reference model, loaded once."""

from __future__ import annotations

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from typing import Any

import pytest


@pytest.fixture(scope="session")
def reference_model() -> tuple[Any, Any]:
    """(model, processor) of the assembled reference model, float32."""
    from msd.loading import load_target

    return load_target("reference")
