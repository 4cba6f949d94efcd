"""`msd targets` lists the registry; every architecture it lists is tested."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from families import FAMILIES
from msd.cli import main
from msd.targets import supported


def output(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["targets", *arguments])
    assert stop.value.code == 0
    return capsys.readouterr().out


def test_json(capsys: pytest.CaptureFixture[str]) -> None:
    rows = {row["architecture"]: row for row in json.loads(output(capsys, "--json"))["targets"]}
    assert sorted(rows) == supported()
    assert rows["qwen2_5_vl"]["takes"] == ["image", "video"]
    assert rows["qwen2_5_vl"]["adapter"] == "MRope"
    assert rows["voxtral"]["takes"] == ["audio"] and not rows["voxtral"]["remembers"]
    assert all(row["tested"] and row["models"] for row in rows.values())


def test_every_architecture_has_a_tiny_model_that_shows_what_it_takes(capsys: pytest.CaptureFixture[str]) -> None:
    shown: dict[str, set[str]] = {}
    for family in FAMILIES:
        shown.setdefault(family.make().config.model_type, set()).update(family.kinds)
    rows = json.loads(output(capsys, "--json"))["targets"]
    assert {row["architecture"]: set(row["takes"]) for row in rows} == shown


def test_the_table_names_all(capsys: pytest.CaptureFixture[str]) -> None:
    text = output(capsys)
    assert all(name in text for name in supported())
    assert "docs/targets.md" in text


def test_the_readme_counts_them() -> None:
    readme = Path(__file__).parents[2] / "README.md"
    assert f"{len(supported())} model architectures" in readme.read_text()
