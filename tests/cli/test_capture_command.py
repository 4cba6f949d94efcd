"""`msd capture` on a tiny target: it resumes, keeps its label thresholds, and names a wrong line."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

import tiny_checkpoint
from msd.cli import main
from msd.labels.label_thresholds import ModalityThresholds
from msd.train.capture import Answer, Prompt
from msd.train.target_writer import TargetWriter


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target and a data file with 9 lines, one of them twice."""
    place = tmp_path_factory.mktemp("target")
    tiny_checkpoint.write(place)
    names = tiny_checkpoint.photos(place / "images", 3)
    lines = [{"image": n, "prompt": p, "task": p[:4]} for n in names for p in ("Describe it.", "What is it?")]
    lines += [{"prompt": "Say something.", "task": "text"}, lines[0]]
    lines += [{"image": [names[0]], "prompt": "Is it?", "split": "val"}]
    (place / "data.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return place


def run(capsys: pytest.CaptureFixture[str], folder: Path, out: Path, *more: str) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    own = ["--data", str(folder / "data.jsonl"), "--target", str(folder), "--out", str(out), "--max-new-tokens", "5"]
    with pytest.raises(SystemExit) as stop:
        main(["capture", *own, "--batch", "3", *more])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def records(out: Path) -> dict[tuple[str, str], dict[str, Any]]:
    found = [json.loads(line) for line in out.read_text().splitlines()]
    assert len({(*r["image"], r["prompt"]) for r in found}) == len(found)
    return {("".join(r["image"]), r["prompt"]): r for r in found}


def test_an_interrupted_capture_equals_an_uninterrupted_one(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole.jsonl", tmp_path / "parts.jsonl"
    code, out, _ = run(capsys, folder, whole, "--json")
    summary = json.loads(out)
    assert code == 0 and (summary["records"], summary["written"]) == (8, 8)

    write, calls = TargetWriter.__call__, []

    def interrupted(self: TargetWriter, prompts: Sequence[Prompt]) -> list[Answer]:
        calls.append(prompts)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return write(self, prompts)

    monkeypatch.setattr(TargetWriter, "__call__", interrupted)
    code, _, err = run(capsys, folder, parts)
    assert code == 130 and "interrupted" in err and len(records(parts)) == 3
    with parts.open("a") as file:
        file.write('{"image": ["0.p')
    code, out, _ = run(capsys, folder, parts, "--json")
    assert json.loads(out)["written"] == 5
    assert records(parts) == records(whole)
    assert parts.read_bytes() == whole.read_bytes()
    thresholds = [Path(f"{p}.cuts.json").read_text() for p in (whole, parts)]
    assert thresholds[0] == thresholds[1]
    found = records(whole)
    assert found["0.png", "Is it?"]["split"] == "val" and found["", "Say something."]["gain"] == [0.0] * 5
    gains = [r["gain"] for r in found.values() if r["image"] and r["split"] == "train"]
    assert ModalityThresholds.load(Path(f"{whole}.cuts.json")) == ModalityThresholds.fit(gains, summary["target"])


def test_thresholds_need_all_lines_and_are_not_refitted(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out.jsonl"
    frozen = Path(f"{out}.cuts.json")
    assert "no label thresholds" in run(capsys, folder, out, "--limit", "2")[1]
    assert len(records(out)) == 2 and not frozen.exists()
    run(capsys, folder, out)
    chosen = ModalityThresholds.load(frozen).model_copy(update={"vision_min": 99.0})
    chosen.save(frozen)
    run(capsys, folder, out)
    assert ModalityThresholds.load(frozen) == chosen
    chosen.model_copy(update={"target": "another"}).save(frozen)
    code, _, err = run(capsys, folder, out)
    assert code == 2 and "another" in err


@pytest.mark.parametrize(
    ("line", "more", "part"),
    [
        ({"image": "broken.png", "prompt": "What is it?"}, (), "bad.jsonl:2"),
        ({"image": "0.png", "prompt": "a <image> b"}, (), "bad.jsonl:2"),
        ({"image": "0.png", "prompt": "long " * 120}, (), "bad.jsonl:2"),
        ({"image": "0.png", "prompt": "What is it?"}, ("--max-new-tokens", "500"), "bad.jsonl:1"),
        ({"image": "9.png", "prompt": "What is it?"}, (), "bad.jsonl:2"),
    ],
)
def test_a_bad_line_is_named_before_any_answer(
    capsys: pytest.CaptureFixture[str],
    folder: Path,
    tmp_path: Path,
    line: dict[str, str],
    more: Sequence[str],
    part: str,
) -> None:
    (folder / "images" / "broken.png").write_bytes(b"no picture")
    (folder / "bad.jsonl").write_text("".join(json.dumps(x) + "\n" for x in ({"prompt": "Say something."}, line)))
    out = tmp_path / "out.jsonl"
    code, printed, err = run(capsys, folder, out, "--data", str(folder / "bad.jsonl"), *more)
    assert (code, printed) == (2, "")
    messages = [text for text in err.splitlines() if text.startswith("msd: ")]
    assert len(messages) == 1 and part in messages[0] and "Traceback" not in err
    assert not out.exists()


def test_an_out_file_of_another_kind_is_unchanged(
    capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path
) -> None:
    data = (folder / "data.jsonl").read_text()
    for out in (folder / "data.jsonl", tmp_path, folder / "data.jsonl" / "x"):
        code, _, err = run(capsys, folder, out)
        assert code == 2 and err.startswith("msd: ") and err.count("\n") == 1
    assert (folder / "data.jsonl").read_text() == data


def test_usage(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["capture"])
    assert stop.value.code == 2 and "--out" in capsys.readouterr().err
    out = tmp_path / "out.jsonl"
    assert run(capsys, folder, out, "--batch", "0")[0] == 2
    assert run(capsys, folder, out, "--target", "no/such/target")[0] == 2


def test_sampled_answers(capsys: pytest.CaptureFixture[str], folder: Path, tmp_path: Path) -> None:
    out = tmp_path / "out.jsonl"
    assert run(capsys, folder, out, "--temperature", "0.8", "--limit", "2")[0] == 0
    assert {(r["temperature"], r["seed"]) for r in records(out).values()} == {(0.8, 0)}
    code, _, err = run(capsys, folder, out)
    assert code == 2 and "captured with temperature 0.8" in err
    code, _, err = run(capsys, folder, tmp_path / "other.jsonl", "--seed", "1")
    assert code == 2 and "--seed has no effect on greedy answers" in err
    code, _, err = run(capsys, folder, tmp_path / "other.jsonl", "--temperature", "1", "--answers", str(out))
    assert code == 2 and "--answers labels answers" in err
