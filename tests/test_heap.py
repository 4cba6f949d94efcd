"""Large tensors come in huge pages."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FAULTS = """
import resource
{call}
import torch
for _ in range(2):
    torch.ones(30_000_000)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones(30_000_000)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(call: str) -> int:
    """Page faults of five tensors of 120 MB, in a process of its own."""
    script = FAULTS.format(call=call)
    clean = {k: v for k, v in os.environ.items() if k != "THP_MEM_ALLOC_ENABLE"}  # `msd` has set it in this process
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=clean)
    return int(run.stdout)


HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not HUGE.exists() or "[never]" in HUGE.read_text(), reason="no huge pages")
def test_large_tensors_come_in_few_pages() -> None:
    assert faults("import msd") < faults("") / 10
