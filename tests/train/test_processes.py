"""`accelerate launch` with two processes: the losses are those of one process, and a stopped run resumes."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

import tiny_checkpoint
from msd.train.loop import read_checkpoint
from training_command import DDP, FLOAT32, FSDP, run, vocabulary

STEPS = 50
OWN = ("answer_tokens_per_second", "peak_gb", "seconds")  # figures of the machine


def command(place: Path, out: Path, *more: object) -> list[str]:
    """Batches of three answers, so that two processes have unequal shares."""
    arguments = (
        "train", "--captured", place / "captured.jsonl", "--images", place / "images", "--target", place, "--out", out,
        "--steps", STEPS, "--batch", 3, *vocabulary(*more), "--json", *FLOAT32, *more,
    )  # fmt: skip
    return [str(a) for a in arguments]


def rows(out: Path) -> list[dict[str, Any]]:
    log = out / "log.jsonl"
    return [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []


def stop_one(process: subprocess.Popen[str], out: Path) -> None:
    """Asks one of the two processes to stop, once the log has a row."""
    deadline = time.monotonic() + 120
    while not rows(out) and time.monotonic() < deadline:
        assert process.poll() is None, "the run ended before its tenth step"
        time.sleep(0.02)
    trained = [p for p in psutil.Process(process.pid).children() if p.is_running()]
    assert len(trained) == 2
    trained[1].send_signal(signal.SIGTERM)


@pytest.mark.slow
@pytest.mark.parametrize(("launch", "method"), [(DDP, "msd"), (FSDP, "eagle2")], ids=["ddp", "fsdp"])
def test_two_processes_give_the_losses_of_one(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, launch: tuple[str, ...], method: str
) -> None:
    place = tiny_checkpoint.captured(tmp_path / "place")
    lines = (place / "captured.jsonl").read_text().splitlines(keepends=True)
    about_images = [line for line in lines if json.loads(line)["image"]]  # without others, stage 1 has nothing to train
    (place / "captured.jsonl").write_text("".join(about_images))
    capsys.readouterr()
    one, two = tmp_path / "one", tmp_path / "two"
    code, _, err = run(capsys, *command(place, one, "--method", method))
    assert code == 0, err
    # a signal to one of them stops both after the same step; the same command goes on
    shared = [*launch, "-m", "msd", *command(place, two, "--method", method)]
    first = subprocess.Popen(shared, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    stop_one(first, two)
    out, err = first.communicate(timeout=240)
    assert first.returncode == 0, err[-2000:]
    stopped = json.loads(out)
    assert not stopped["finished"] and 10 <= stopped["steps"] < STEPS
    again = subprocess.run(shared, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr[-2000:]
    assert json.loads(again.stdout)["steps"] == STEPS, "one process reports"
    assert [json.loads((o / "drafter" / "training.json").read_text())["processes"] for o in (one, two)] == [1, 2]

    for mine, theirs in zip(rows(one), rows(two), strict=True):
        assert {k: v for k, v in mine.items() if k not in OWN} == pytest.approx(
            {k: v for k, v in theirs.items() if k not in OWN}, abs=1.01e-4
        )
    exact = [read_checkpoint(o / "checkpoint.pt") for o in (one, two)]
    for name, value in exact[0]["running"].items():
        assert name in OWN or exact[1]["running"][name] == pytest.approx(value, abs=1e-5)


def test_a_batch_too_small_to_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from msd.errors import UserError
    from msd.train import launched

    monkeypatch.setattr(launched.Accelerator, "num_processes", 4)
    with pytest.raises(UserError, match="4 processes cannot share a batch of 3; give --batch 4 or more"):
        launched.launched(torch.device("cpu"), 3)


@pytest.mark.parametrize(("asked", "kind"), [("launch", "DEEPSPEED"), ("script", "DEEPSPEED"), ("script", "FSDP")])
def test_what_splits_the_drafter_is_refused_in_one_line(kind: str, asked: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from accelerate.utils import DistributedType

    from msd.errors import UserError
    from msd.train import launched

    if asked == "launch":  # as 'accelerate launch --use_deepspeed' sets it
        monkeypatch.setenv(f"ACCELERATE_USE_{kind}", "true")
    else:
        monkeypatch.setattr(launched.Accelerator, "distributed_type", DistributedType[kind])
    with pytest.raises(
        UserError, match=rf"training with {kind} is not supported, as the drafter fits one GPU; .*ddp\.yaml"
    ):
        launched.launched(torch.device("cpu"), 4)


@pytest.mark.parametrize("fails", [False, True])
def test_processes_end_after_the_last_one_and_after_their_communication(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: bool
) -> None:
    """A process that fails waits for no other."""
    import torch.distributed as dist

    from msd.train import launched

    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'meeting'}", rank=0, world_size=1)
    events: list[str] = []
    destroy = dist.destroy_process_group
    monkeypatch.setattr(launched.processes, "place", lambda: (0, 2))
    monkeypatch.setattr(launched.PartialState, "wait_for_everyone", lambda self: events.append("waits"))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: (events.append("ends"), destroy()))
    try:
        with launched.ending_together():
            events.append("works")
            assert not fails
    except AssertionError:
        assert fails
    assert events == (["works", "ends"] if fails else ["works", "waits", "ends"])
    assert not dist.is_initialized()


def test_each_row_has_the_noise_that_it_has_in_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from msd.drafters.toolkit import processes

    widths = (4, 6)  # the longest row of each of two processes, which hold rows 0 and 2, and row 1
    torch.manual_seed(5)
    alone, longest = processes.uniform(torch.empty(3, 6, 2))
    assert longest == 6
    for rank, rows in enumerate((2, 1)):
        monkeypatch.setattr(processes, "place", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(processes, "summed", lambda values: torch.tensor(3))
        monkeypatch.setattr(processes, "largest", lambda values: torch.tensor(6))
        torch.manual_seed(5)
        drawn, longest = processes.uniform(torch.empty(rows, widths[rank], 2))
        assert longest == 6 and torch.equal(drawn, alone[rank::2, : widths[rank]])
