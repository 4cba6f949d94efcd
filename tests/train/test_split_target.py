"""A target that FSDP splits over two processes: what each holds of it, and which settings of FSDP are refused."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlavaForConditionalGeneration

import tiny
import tiny_checkpoint
from msd.errors import UserError
from msd.train import launched, split_target
from msd.train.teacher_batches import TeacherCache
from training_command import FSDP, run

LAYERS = 8


def deep(place: Path, tied: bool) -> Path:
    """A target of `LAYERS` layers in the folder `place`; tied: its output layer is its embedding."""
    tiny_checkpoint.write(place)
    config = tiny.llava(260).config
    config.text_config = LlamaConfig(**config.text_config.to_dict() | {"num_hidden_layers": LAYERS})
    config.tie_word_embeddings = config.text_config.tie_word_embeddings = tied
    LlavaForConditionalGeneration(config).save_pretrained(place)
    return place


@pytest.mark.slow
def test_each_process_holds_half_of_the_layers_and_gathers_one_at_a_time(tmp_path: Path) -> None:
    places = [deep(tmp_path / str(tied), tied) for tied in (False, True)]
    worker = Path(__file__).with_name("split_target_worker.py")
    done = subprocess.run([*FSDP, worker, *places], capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stderr.count("the target is split") == len(places), "one process reports"
    for file in [place / f"{rank}.json" for place in places for rank in range(2)]:
        found = json.loads(file.read_text())
        assert found["difference"] < 1e-5 and len(set(found["prints"])) == 1
        assert found["here"] == found["layers"] / 2
        assert found["all"][0] - found["all"][1] == found["layers"] / 2, "all else is whole"
        assert found["peaks"] == [found["layers"] / 2 + found["layer"] / 2] * LAYERS, "one layer is whole at a time"


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("FSDP_VERSION", "1", "set it to 2"),
        ("FSDP_OFFLOAD_PARAMS", "true", "set it to false"),
        ("FSDP_RESHARD_AFTER_FORWARD", "false", "set it to true"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "set it to transformer_based_wrap"),
        ("FSDP_TRANSFORMER_CLS_TO_WRAP", "LlamaDecoderLayer", "leave it out"),
    ],
)
def test_settings_of_fsdp_without_a_meaning_here_are_refused(
    name: str, value: str, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not launched.splits_target()
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert launched.splits_target()
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=rf"{name.lower()} '{value}' is not supported, .*; {remedy}"):
        launched.launched(torch.device("cpu"), 4)


def test_what_needs_the_whole_target_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    place = tiny_checkpoint.captured(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(split_target, "is_split", lambda model: True)
    common = ("--images", place / "images", "--target", place)
    code, _, err = run(capsys, "capture", "--data", place / "data.jsonl", *common, "--out", tmp_path / "other.jsonl")
    assert code == 2 and "let a server write them, and give --answers" in err
    captured = ("--captured", place / "captured.jsonl", "--out", tmp_path / "run")
    code, _, err = run(capsys, "train", *captured, *common, "--calibrate", 2)
    assert code == 2 and "--calibrate answers prompts with a whole target" in err


def test_one_process_splits_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    model, _ = split_target.load(tiny_checkpoint.write(tmp_path), None)
    assert not split_target.is_split(model)


@pytest.mark.parametrize("full", [False, True])
def test_a_batch_is_kept_by_all_processes_or_by_none(full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other process is full or not; this one has room."""
    from msd.targets import adapt
    from msd.targets.teacher import run_teacher
    from msd.train import teacher_batches

    model = tiny.llava()
    target, told = adapt(model, (1, 3)), list[bool]()

    def anywhere(flag: bool, device: torch.device) -> bool:
        told.append(flag)
        return flag or (full and len(told) == 2)

    monkeypatch.setattr(teacher_batches, "anywhere", anywhere)
    ids = torch.arange(4, 12)[None]
    batch = run_teacher(target, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, [[5, 6, 7]])
    cache = TeacherCache(model.get_output_embeddings(), torch.arange(64), (1, 3), 1.0, torch.float32, together=True)
    passes = []

    def compute() -> teacher_batches.LabelledBatch:
        passes.append(1)
        return batch, torch.zeros(1, 3)

    for _ in range(2):
        cache.get("key", compute)
    assert told[:2] == [False, False], "whether the output layer is linear, and whether there is room"
    assert len(passes) == 1 + full


@pytest.mark.slow
def test_answers_that_a_server_wrote_are_labelled_alike(tmp_path: Path) -> None:
    """The same file as from one process; what was labelled before is kept."""
    place = tiny_checkpoint.captured(tmp_path)
    whole, split = place / "captured.jsonl", tmp_path / "split.jsonl"
    common = ("--data", place / "data.jsonl", "--images", place / "images", "--target", place, "--max-new-tokens", "12")
    command = [*FSDP, "-m", "msd", "capture", *common, "--answers", whole, "--out", split, "--batch", "2", "--json"]
    split.write_text("".join(whole.read_text().splitlines(keepends=True)[:3]))
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    summary = json.loads(done.stdout)  # one process reports
    assert summary["written"] == summary["records"] - 3 and summary["greedy"] == 1.0
    records = [[json.loads(line) for line in file.read_text().splitlines()] for file in (whole, split)]
    assert sorted(map(str, records[0])) == sorted(map(str, records[1]))
    cuts = [file.with_name(f"{file.name}.cuts.json").read_text() for file in (whole, split)]
    assert cuts[0] == cuts[1]
