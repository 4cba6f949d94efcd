"""The training loop: an interrupted run gives the same result as an uninterrupted one."""

import itertools
import os
import signal
from pathlib import Path

import pytest
import torch
from torch import nn

from msd.errors import UserError
from msd.train.loop import Loop, LoopConfig, Schedule


def make(folder: Path, steps: int, stop_at: int | None = None, average: float = 0.0) -> tuple[Loop, nn.Module]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)

    def step_loss(step: int) -> tuple[torch.Tensor, dict[str, float]]:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        if step == stop_at:
            os.kill(os.getpid(), signal.SIGTERM)
        return loss, {"mse": loss.item()}

    config = LoopConfig(steps, warmup=3, log_every=5, save_seconds=1e9, average=average)
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


def test_fewer_steps_shorten_the_schedule(tmp_path: Path) -> None:
    first, _ = make(tmp_path, 100, stop_at=40)
    first.run()
    before = first.schedule.factor(first.step)
    second, _ = make(tmp_path, 60)
    assert second.schedule.factor(second.step) == pytest.approx(before)
    assert second.schedule.factor(60) == pytest.approx(0.03)
    assert second.run()
    assert second.step == 60
    with pytest.raises(UserError, match="cannot end at step 50"):
        make(tmp_path, 50)


def test_schedule_warms_up_and_decays() -> None:
    factors = [Schedule(100, warmup=10).factor(s) for s in range(101)]
    assert factors[0] == pytest.approx(0.1)
    assert max(factors) == factors[9] or max(factors) == factors[10]
    assert all(a >= b for a, b in itertools.pairwise(factors[10:]))
    assert factors[100] == pytest.approx(0.03)


def test_a_resumed_schedule_is_continuous_and_does_not_warm_up_again() -> None:
    before = Schedule(100, warmup=10)
    after = before.resumed(40, 60)
    assert after.factor(40) == pytest.approx(before.factor(40))
    assert after.factor(50) == pytest.approx((before.factor(40) + 0.03) / 2)
    assert after.factor(60) == pytest.approx(0.03)
    assert before.resumed(40, 100) is before
    rising = before.resumed(4, 60)
    assert rising.factor(4) == pytest.approx(before.factor(4), rel=0.05)
    assert [rising.factor(s) < rising.factor(s + 1) for s in range(4, 12)] == [True] * 5 + [False] * 3


def test_an_extended_run_warms_up_again() -> None:
    more = Schedule(100, warmup=10).resumed(100, 200)
    factors = [more.factor(s) for s in range(100, 201)]
    assert factors[0] == pytest.approx(0.1)
    assert all(a < b for a, b in itertools.pairwise(factors[:10]))
    assert factors[10] == pytest.approx(1.0, abs=0.03)
    assert all(a > b for a, b in itertools.pairwise(factors[10:]))
    assert factors[-1] == pytest.approx(0.03)
    assert more.resumed(130, 200) is more
    sooner = more.resumed(103, 150)
    assert sooner.factor(103) == pytest.approx(more.factor(103), rel=0.05)
    assert sooner.factor(150) == pytest.approx(0.03)


@pytest.mark.parametrize("stop_at", [21, 27])  # in the second warm-up, after it
def test_an_extended_run_can_be_interrupted(tmp_path: Path, stop_at: int) -> None:
    for folder in ("a", "b"):
        assert make(tmp_path / folder, 20)[0].run()
    whole, expected = make(tmp_path / "a", 32)
    assert whole.schedule.factor(20) < whole.schedule.factor(22) > whole.schedule.factor(31)
    assert whole.run()
    first, _ = make(tmp_path / "b", 32, stop_at)
    assert not first.run()
    second, resumed = make(tmp_path / "b", 32)
    assert second.step == stop_at + 1
    assert second.schedule == whole.schedule
    assert second.run()
    for a, b in zip(expected.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    assert second.running == whole.running


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, _ = make(tmp_path, 2)
    loop.run()
    before = loop.checkpoint.read_bytes()
    monkeypatch.setattr(torch, "save", lambda *_: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(UserError, match="disk full"):
        loop.save()
    assert loop.checkpoint.read_bytes() == before


def test_other_parameters_are_refused(tmp_path: Path) -> None:
    make(tmp_path, 2)[0].run()
    model = nn.Linear(2, 2)
    with pytest.raises(UserError, match="other parameters"):
        Loop(
            dict(model.named_parameters()),
            torch.optim.SGD(model.parameters(), lr=1.0),
            lambda s: (model(torch.ones(2)).sum(), {}),
            LoopConfig(2),
            tmp_path,
        )


def test_averaged_weights_follow_every_step_and_survive_an_interruption(tmp_path: Path) -> None:
    whole, model = make(tmp_path / "a", 12, average=0.9)
    by_hand = {n: p.detach().clone() for n, p in whole.params.items()}
    one_step = whole._one_step

    def watched() -> None:
        one_step()
        for n, p in whole.params.items():
            by_hand[n] = 0.9 * by_hand[n] + 0.1 * p.detach()

    whole._one_step = watched  # type: ignore[method-assign]
    assert whole.run()
    for n, value in by_hand.items():
        torch.testing.assert_close(whole.averaged[n], value)
    last = {n: p.detach().clone() for n, p in model.named_parameters()}
    with whole.using_average():
        assert all(torch.equal(p, whole.averaged[n]) for n, p in model.named_parameters())
    assert all(torch.equal(p, last[n]) for n, p in model.named_parameters())
    make(tmp_path / "b", 12, stop_at=5, average=0.9)[0].run()
    again, _ = make(tmp_path / "b", 12, average=0.9)
    again.run()
    assert all(torch.equal(again.averaged[n], v) for n, v in whole.averaged.items())
