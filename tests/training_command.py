"""`msd train` on a tiny target, for tests: short runs, and one that is interrupted."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from msd.cli import main
from msd.drafters import registry

STEPS = 6
LAUNCH = (sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2", "--main_process_port", "0")
# with --cpu, accelerate starts one process unless it has mpirun; --multi_gpu starts both, and msd keeps to the CPU
DDP = (*LAUNCH, "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no")
FSDP = (*LAUNCH, "--config_file", str(Path(__file__).parents[1] / "recipes" / "scale" / "fsdp.yaml"))
FLOAT32 = ("--precision", "float32")  # what is measured to be faster may differ from run to run


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """(exit code, stdout, stderr)."""
    with pytest.raises(SystemExit) as stop:
        main([str(a) for a in arguments])
    captured = capsys.readouterr()
    return int(stop.value.code or 0), captured.out, captured.err


def vocabulary(*more: object) -> tuple[object, ...]:
    """The option of a small draft vocabulary, if a run with the options `more` chooses one."""
    method = more[more.index("--method") + 1] if "--method" in more else registry.DEFAULT
    chooses = "--start" not in more and registry.trainable(str(method)).reduced
    return ("--draft-vocabulary", 100) if chooses else ()


def train(capsys: pytest.CaptureFixture[str], place: Path, out: Path, *more: object) -> dict[str, Any]:
    """The summary of a run of `STEPS` steps on the answers captured in `place`."""
    code, told, err = run(
        capsys, "train", "--captured", place / "captured.jsonl", "--images", place / "images", "--target", place,
        "--out", out, "--steps", STEPS, "--batch", 3, *vocabulary(*more), "--json", *more,
    )  # fmt: skip
    assert code == 0, err
    summary: dict[str, Any] = json.loads(told)
    return summary


def interrupt(monkeypatch: pytest.MonkeyPatch, objective: type[nn.Module]) -> None:
    """Has the process asked to stop in its fourth step from now on."""
    forward, calls = objective.forward, []

    def interrupted(self: nn.Module, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, *args)

    monkeypatch.setattr(objective, "forward", interrupted)
