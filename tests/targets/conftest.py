"""Of the hybrid families, two run in every test session; the others run with the slow tests."""

from __future__ import annotations

import pytest

from recurrent_models import RECURRENT

SLOW = {r.name for r in RECURRENT} - {"qwen3_5", "lfm2_vl"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks tests of a family in `SLOW`, whose parameter is called "name"."""
    for item in items:
        if isinstance(item, pytest.Function) and hasattr(item, "callspec") and item.callspec.params.get("name") in SLOW:
            item.add_marker(pytest.mark.slow)
