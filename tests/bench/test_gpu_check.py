"""The check of a machine with a GPU, on a tiny target and the CPU: its file says so, and a failed part is an error."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from tools import gpu_check

import tiny_checkpoint
from msd import drafters
from msd.bench.data import Sample
from msd.drafters.algorithms.prompt_lookup import PromptLookup
from msd.estimate.roofline import Card
from msd.loading import load_target


def checked(monkeypatch: pytest.MonkeyPatch, out: Path, *options: str) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "argv", ["gpu_check", str(out), *options])
    return gpu_check.main(), json.loads(out.read_text())


def test_every_part_runs_without_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tiny_checkpoint.write(tmp_path)
    tiny_checkpoint.photos(tmp_path / "images", 2)
    samples = [Sample((tmp_path / "images" / f"{i}.png",), "What is it?", None, "see") for i in range(2)]
    monkeypatch.setattr(gpu_check, "load_target", lambda _, device, dtype: load_target(tmp_path, device, dtype=dtype))
    monkeypatch.setattr(gpu_check, "load_data", lambda _: samples)
    monkeypatch.setattr(gpu_check, "QUICK", (2, 6))
    monkeypatch.setattr(gpu_check, "card", lambda name: Card(name, 1e9, 1e12, 1e9))
    monkeypatch.setattr(gpu_check, "device_name", lambda: ("cpu", "a processor"))
    drafters.register("msd", lambda: PromptLookup())
    code, report = checked(monkeypatch, tmp_path / "gpu.json", "--quick")
    assert code == 0 and report["left_out"] == []
    assert (report["device"], report["name"]) == ("cpu", "a processor") and "no GPU" in report["note"]
    for kind in ("float32", "bfloat16"):
        identity = report[f"identity_{kind}"]
        assert identity["passed"] and [row["compared"] > 0 for row in identity["rows"]] == [True] * 3
        assert report[f"drafting_{kind}"]["ar_tokens_per_second"] > 0
    whole, half = (report[f"step_time_{kind}"]["passes"][0]["roofline"] for kind in ("float32", "bfloat16"))
    assert half < whole, "half the bytes"

    monkeypatch.setattr(gpu_check, "card", lambda name: 1 / 0)
    for part in ("identity", "drafting"):
        monkeypatch.setattr(gpu_check, part, lambda *_: {"passed": True})
    code, report = checked(monkeypatch, tmp_path / "gpu.json", "--quick")
    assert code == 1 and "ZeroDivisionError" in report["step_time_float32"]["error"]
    assert report["identity_bfloat16"]["passed"], "the other parts still run"
