"""The drafter in docs/add_a_drafter.md is trained and loaded, and its output is the target's."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path

import pytest

import tiny_checkpoint
from msd import drafters
from msd.drafters import registry
from training_command import FLOAT32, run, train

GUIDE = Path(__file__).parents[2] / "docs" / "add_a_drafter.md"


@pytest.fixture
def method(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Imports the guide's file like a file of the package."""
    drafters.catalogue()
    monkeypatch.setattr(registry, "_BUILT_IN", dict(registry._BUILT_IN))
    found = re.search(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert found and len(found[1].splitlines()) < 100
    path = tmp_path / "gated.py"
    path.write_text(found[1], encoding="utf-8")
    spec = importlib.util.spec_from_file_location("gated", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "gated", module)
    spec.loader.exec_module(module)
    return "gated"


def test_the_guides_drafter_is_trained_and_drafts(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, method: str
) -> None:
    assert method not in drafters.methods() and method in [m.name for m in drafters.catalogue()]
    place = tiny_checkpoint.captured(tmp_path / "target")
    capsys.readouterr()
    summary = train(capsys, place, tmp_path / "run", "--method", method, *FLOAT32)
    assert summary["finished"] and {"distance", "regression"} <= summary["losses"].keys()
    data = ["--data", place / "data.jsonl", "--images", place / "images", "--limit", 2, "--max-new-tokens", 10]
    code, out, err = run(
        capsys, "verify", "--target", place, "--method", method, "--drafter", summary["drafter"], *data, "--json"
    )
    assert code == 0, err
    row = json.loads(out)["rows"][0]
    assert row["method"] == method and row["passed"] and row["compared"] == 12
    arguments = [
        "generate",
        place / "images" / "0.png",
        "-p",
        "Describe it.",
        "--target",
        place,
        "--max-new-tokens",
        10,
    ]
    code, out, err = run(capsys, *arguments, "--drafter", summary["drafter"], "--json")
    assert code == 0, err
    assert json.loads(out)["method"] == method
