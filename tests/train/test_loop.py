"""An interrupted run ends where an uninterrupted one does."""

import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from msd.train.loop import Loop, LoopConfig, Schedule


def make(folder: Path, steps: int, stop_at: int | None = None) -> tuple[Loop, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss, {"mse": loss.item()}

    config = LoopConfig(steps, warmup=3, log_every=5, save_seconds=1e9)
    return Loop(dict(model.named_parameters()), optimizer, step_loss, config, folder), model


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    whole, expected = make(tmp_path / "a", 20)
    assert whole.run()
    first, _ = make(tmp_path / "b", 20, stop_at=8)
    assert not first.run()
    assert first.step == 9
    second, resumed = make(tmp_path / "b", 20)
    assert second.step == 9
    assert second.run()
    for a, b in zip(expected.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert second.running == whole.running


def test_lowering_the_steps_lands_the_schedule(tmp_path: Path) -> None:
    first, _ = make(tmp_path, 100, stop_at=40)
    first.run()
    before = first.schedule.factor(first.step)
    second, _ = make(tmp_path, 60)
    assert second.schedule.factor(second.step) == pytest.approx(before)
    assert second.schedule.factor(60) == pytest.approx(0.03)
    assert second.run()
    assert second.step == 60
    with pytest.raises(ValueError, match="cannot end at step 50"):
        make(tmp_path, 50)


def test_schedule_warms_up_and_decays() -> None:
    factors = [Schedule(100, warmup=10).factor(s) for s in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] or max(factors) == factors[10]
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert factors[100] == pytest.approx(0.03)


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = make(tmp_path, 2)
    loop.run()
    before = loop.checkpoint.read_bytes()
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        loop.save()
    assert loop.checkpoint.read_bytes() == before


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    make(tmp_path, 2)[0].run()
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="other parameters"):
        Loop(
            dict(model.named_parameters()),
            torch.optim.SGD(model.parameters(), lr=1.0),
            lambda s: (model(torch.ones(2)).sum(), {}),
            LoopConfig(2),
            tmp_path,
        )
