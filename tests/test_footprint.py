"""Our plain loop costs no more memory than `transformers` `generate()`: peak resident size of a process each."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import resource, sys, torch
from msd import SpeculativeVLM, prompts
from msd.bench.data import load_data
vlm = SpeculativeVLM.from_pretrained("reference", sys.argv[1].removeprefix("transformers") or "ar")
for sample in load_data(None)[7:9]:
    inputs = prompts.prepare(vlm.processor, [list(sample.images)], [sample.prompt])
    (vlm.model if sys.argv[1] == "transformers" else vlm).generate(**inputs, max_new_tokens=48, do_sample=False)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ar", "prompt-lookup"])
def test_peak_memory_is_within_1_3x(method: str) -> None:
    peak = {
        way: int(subprocess.run([sys.executable, "-c", SCRIPT, way], capture_output=True, check=True, text=True).stdout)
        for way in (method, "transformers")
    }
    assert peak[method] <= 1.3 * peak["transformers"], peak
