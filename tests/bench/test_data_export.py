"""`msd bench --export`: MMSpec's and Spec-Bench's data lines, which read back as the same samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from msd.bench.data import BUNDLED, load_data
from training_command import run

DOG = str(BUNDLED / "dog.jpg")


def test_lines_of_both_kinds_read_back(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data, out = tmp_path / "own.jsonl", tmp_path / "other" / "out.jsonl"
    out.parent.mkdir()
    lines = [
        {"image": DOG, "prompt": "What is it?", "task": "vqa"},
        {"image": DOG, "turns": ["What is it?", "Where is „it“?"], "category": "chat"},
        {"turns": ["Write.", "Again."], "category": "writing"},
        {"turns": ["Write.", "Again."], "category": "writing"},
    ]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, told, err = run(capsys, "bench", "--data", data, "--export", out, "--json")
    assert code == 0, err
    assert json.loads(told) == {"export": str(out), "lines": 4}
    written = [json.loads(line) for line in out.read_text().splitlines()]
    assert [sorted(line) for line in written[1:3]] == [
        ["category", "id", "image", "topic", "turns"], ["category", "question_id", "turns"],
    ]  # fmt: skip
    assert [len(line["turns"]) for line in written] == [1, 2, 2, 2]
    expected, found = ([replace(s, where="") for s in load_data(path)] for path in (data, out))
    assert [(s.prompt, s.before, s.task) for s in found] == [(s.prompt, s.before, s.task) for s in expected]
    assert [[Path(str(i)).resolve() for i in s.images] for s in found] == [list(s.images) for s in expected]


def test_what_the_formats_have_no_place_for_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    data = tmp_path / "own.jsonl"
    data.write_text(json.dumps({"image": [DOG, DOG], "prompt": "Compare."}) + "\n")
    code, _, err = run(capsys, "bench", "--data", data, "--export", tmp_path / "out.jsonl")
    assert code == 2 and "own.jsonl:1" in err and "one image, not 2" in err
    assert not (tmp_path / "out.jsonl").exists()
