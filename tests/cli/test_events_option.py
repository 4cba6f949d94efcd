"""Recordings on the command line: `--events`, `"events"` in data lines, and another model's folder as the drafter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import tiny_checkpoint
from clips import write_clip
from families import BY_NAME
from family_processor import FamilyProcessor, Letters
from msd import loading
from msd.cli import main
from msd.drafters.algorithms.eventgpt import EventGPT, Pieces, VocabularyMap, save

FAMILY = BY_NAME["video_llava"]


def call(capsys: pytest.CaptureFixture[str], *arguments: object, code: int = 0) -> tuple[str, str]:
    """(stdout, stderr)."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    assert (stop.value.code or 0) == code, captured.err
    return captured.out, captured.err


def recording(path: Path, seed: int = 0) -> Path:
    draw = np.random.default_rng(seed)
    t = np.sort(draw.integers(0, 9000, 300))
    rows = zip(t, draw.integers(0, 20, 300), draw.integers(0, 16, 300), draw.integers(0, 2, 300), strict=True)
    path.write_text("".join(f"{a},{b},{c},{d}\n" for a, b, c, d in rows))
    return path


def folder(path: Path, theirs: Pieces, text_config: Any, tied: bool = False) -> Path:
    """Saves a random drafter with a vocabulary that overlaps the target's; tied: with its vocabulary map."""
    torch.manual_seed(1)
    own = Pieces((*theirs.names, "<ev_start>", "own"), theirs.special | {len(theirs.names)})
    network = EventGPT.for_text(text_config, vocabulary=len(own.names))
    save(network, own, path, VocabularyMap.between(own, theirs) if tied else None)
    return path


def data(path: Path, *lines: dict[str, str]) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_video_model_passes_verify(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another processor replaces Video-LLaVA's, which needs torchvision."""
    target = tmp_path / "target"
    FAMILY.make().save_pretrained(target)
    monkeypatch.setattr(loading, "_processor", lambda *_: FamilyProcessor(FAMILY))
    drafter = folder(tmp_path / "drafter", Pieces.of(Letters()), FAMILY.make().config.text_config, tied=True)
    write_clip(tmp_path / "clip.mp4", range(8))
    recording(tmp_path / "seen.csv")
    lines = data(
        tmp_path / "data.jsonl",
        {"video": "clip.mp4", "events": "seen.csv", "prompt": "What happens?"},
        {"video": "clip.mp4", "prompt": "What is it?"},
    )
    out, _ = call(
        capsys, "verify", "--target", target, "--drafter", drafter, "--method", "ar,eventgpt", "--data", lines,
        "--max-new-tokens", 8, "--backend", "plain", "--json",
    )  # fmt: skip
    for row in json.loads(out)["rows"]:
        assert row["passed"] and row["compared"] == row["identical"] == 12, row


def test_generate_reads_a_recording(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tiny_checkpoint.write(tmp_path / "target")
    config = loading.load_config(target).text_config
    drafter = folder(tmp_path / "drafter", Pieces.of(tiny_checkpoint.processor().tokenizer), config)
    name = tiny_checkpoint.photos(tmp_path, 1)[0]
    seen = recording(tmp_path / "seen.csv")
    asked = ("generate", tmp_path / name, "-p", "What is it?", "--target", target, "--max-new-tokens", 8)
    plain = json.loads(call(capsys, *asked, "--method", "ar", "--json")[0])
    answer = json.loads(call(capsys, *asked, "--drafter", drafter, "--events", seen, "--json")[0])
    assert answer["tokens"] == plain["tokens"] and answer["method"] == "eventgpt"
    assert 0 <= answer["time"]["beside_overlap"] <= answer["time"]["beside"] > 0  # the overlap is up to the scheduler
    _, told = call(capsys, *asked, "--drafter", drafter, "--events", seen)
    assert "of them while the target encoded and prefilled" in " ".join(told.split())
    _, refused = call(capsys, *asked, "--method", "prompt-lookup", "--events", seen, code=2)
    assert "'prompt-lookup' sees no events; 'eventgpt' does" in refused and len(refused.splitlines()) == 1
    _, refused = call(capsys, *asked, "--drafter", drafter, "--events", tmp_path / "none.csv", code=2)
    assert "there is no file" in refused
    two = data(tmp_path / "two.jsonl", {"events": ["seen.csv", "seen.csv"], "prompt": "What?"})  # type: ignore[dict-item]
    _, refused = call(capsys, "verify", "--target", target, "--data", two, "--method", "ar", code=2)
    assert "2 'events'; a line has one recording" in refused


def test_bench_gives_recordings_to_drafters_that_read_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tiny_checkpoint.write(tmp_path / "target")
    config = loading.load_config(target).text_config
    drafter = folder(tmp_path / "drafter", Pieces.of(tiny_checkpoint.processor().tokenizer), config)
    name = tiny_checkpoint.photos(tmp_path, 1)[0]
    recording(tmp_path / "seen.csv")
    lines = data(tmp_path / "data.jsonl", {"image": name, "events": "seen.csv", "prompt": "What is it?"})
    out, _ = call(
        capsys, "bench", "--target", target, "--drafter", drafter, "--method", "eventgpt", "--data", lines, "--json",
        "--max-new-tokens", 6,
    )  # fmt: skip
    rows = {row["method"]: row for row in json.loads(out)["rows"]}
    assert rows["eventgpt"]["identical"] == rows["ar"]["identical"] == 1.0


def test_a_map_for_another_target_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tiny_checkpoint.write(tmp_path / "target")
    drafter = folder(
        tmp_path / "drafter", Pieces.of(Letters()), loading.load_config(target).text_config, tied=True
    )  # fmt: skip
    _, refused = call(capsys, "generate", "-p", "What?", "--target", target, "--drafter", drafter, code=2)
    assert "the saved vocabulary map is for a target whose piece table has hash" in refused
    assert len(refused.splitlines()) == 1
