"""What memory ways of decoding cost: peak resident size of a process each."""

from __future__ import annotations

import subprocess
import sys

import pytest

pytestmark = pytest.mark.alone

SCRIPT = """
import resource, sys, torch
from msd import SpeculativeVLM
from msd.inputs import prompts
from msd.bench.data import load_data

vlm = SpeculativeVLM.from_pretrained("reference", sys.argv[1].removeprefix("transformers") or "ar")
for sample in load_data(None)[7:9]:
    inputs = prompts.prepare(vlm.processor, [list(sample.images)], [sample.prompt])
    (vlm.model if sys.argv[1] == "transformers" else vlm).generate(**inputs, max_new_tokens=48, do_sample=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def peak(way: str) -> int:
    """Peak resident size of a process that decodes by `way`."""
    return int(subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, check=True, text=True).stdout)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "base", "most"),
    [("ar", "transformers", 1.3), ("prompt-lookup", "transformers", 1.3), ("msd", "ar", 1.6)],
)
def test_peak_memory_stays_near(method: str, base: str, most: float) -> None:
    found = {way: peak(way) for way in (method, base)}
    assert found[method] <= most * found[base], found
