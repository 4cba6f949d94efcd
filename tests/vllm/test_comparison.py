"""The comparison of engines (`recipes.scale.engines`) keeps what it has measured, and its table says what it found.

vLLM is not needed: what an engine gives is made up here.
"""

from __future__ import annotations

import json
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path

import pytest
from recipes.scale import engines
from recipes.scale.engines import Measured, Setting
from tools import tables

from msd.bench.unfinished import Unfinished

WAYS = ("vllm", "vllm eagle3")
ARGS = Namespace(dtype=["float32", "bfloat16"], compile=True)
SECONDS = {"ar": 2.0, "msd": 1.0, "vllm": 4.0, "vllm eagle3": 2.5}


class Engines:
    """Measures from a table; fails for the settings in `broken`."""

    def __init__(self, *broken: Setting) -> None:
        self.broken, self.asked = broken, list[tuple[Setting, tuple[int, ...]]]()

    def __call__(self, setting: Setting, sizes: Sequence[int]) -> dict[int, Measured]:
        self.asked.append((setting, tuple(sizes)))
        if setting in self.broken:
            raise RuntimeError("vLLM ended with 1")
        seconds = SECONDS[setting.engine] / (1 + setting.compiled) / (1 + (setting.dtype == "bfloat16"))
        speculation = None if setting.engine in ("ar", "vllm") else {"mean_acceptance_length": 2.5}
        answers = [[1, 2, 3], [4, 5 + (setting.dtype == "bfloat16")]]
        return {size: Measured(answers, [9.0, seconds / size], speculation, 2, [0.1, 0.2]) for size in sizes}


def test_what_was_measured_is_kept_and_what_failed_is_tried_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    every = list(engines.settings(ARGS, WAYS))
    assert len(every) == 2 * 2 + 2 * 2 * 2 and every[0] == Setting("ar", "float32")
    kept, first = Unfinished(tmp_path), Engines(every[5])
    kept.resume({"prompts": "a"})
    results, failed = engines.measured(every, [1], kept, first)
    assert failed == [every[5].name] and len(results) == len(every) - 1 == len(first.asked) - 1
    assert "failed: vLLM ended with 1" in capsys.readouterr().err
    again, second = Unfinished(tmp_path), Engines()
    again.resume({"prompts": "a"})
    results, failed = engines.measured(every, [1, 8], again, second)
    assert not failed and len(results) == 2 * len(every)
    assert second.asked == [(s, (1, 8) if s == every[5] else (8,)) for s in every], "only what is missing"


def test_the_table_compares_with_the_fastest_way_of_vllm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = Unfinished(None)
    results, _ = engines.measured(list(engines.settings(ARGS, WAYS)), [1, 8], kept, Engines())
    greedy = next(iter(results.values())).answers
    rows = [engines.row(setting, size, found, greedy) for (setting, size), found in results.items()]
    (tmp_path / "engines.json").write_text(json.dumps({"rows": rows}))
    monkeypatch.setattr(tables, "ROOT", tmp_path)
    text = tables.engines_table("engines.json")
    assert "| `msd` | float32 | 5.0 | 40.0 | 2.50 | 2/2 | 2/2 |" in text, "5 tokens in 1 s, the fastest round"
    assert "| `vllm eagle3`, compiled | bfloat16 | 8.0 | 64.0 | 2.50 | 1/2 | 1/2 |" in text
    assert "- float32, batch 1: `msd` has 1.25 times the speed of `vllm eagle3, compiled`." in text
