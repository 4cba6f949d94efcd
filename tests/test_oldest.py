"""The lower bounds in pyproject.toml are versions with which tests ran: `tools/check_oldest.py` recorded them."""

from __future__ import annotations

import json

import pytest
from packaging.version import Version
from tools.check_oldest import RECORD, oldest

RUNS = json.loads(RECORD.read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", oldest())
def test_a_lower_bound_was_tested(name: str) -> None:
    bound = Version(oldest()[name])
    having = [run for run in RUNS if name in run["versions"]]  # those before a dependency was added lack it
    found = [run for run in having if Version(Version(run["versions"][name]).base_version) == bound]
    assert found, f"run: python tools/check_oldest.py --record, with {name} {bound}"
    for run in found:
        assert run["failures"] == run["errors"] == 0 and run["tests"] > run["skipped"]
