"""A busy neighbour: fewer threads while it is there, and drafting goes on; answers stay the same."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import msd
import tiny
from msd.model import SpeculativeVLM
from msd.planning.costs import Costs, costs
from msd.planning.plan import Plan
from msd.system import machine, measurements
from msd.system.machine import LONGEST, PAUSE, Cores, share_cores, watched
from msd.targets import adapt

pytestmark = pytest.mark.alone

COSTS = Costs((1, 9, 33), (100, 200), ((1.0, 1.1, 4.0), (1.0, 1.1, 6.0)))


class Machine:
    """A clock, preemptions, and a neighbour that disturbs whoever uses all the cores."""

    def __init__(self, cores: int) -> None:
        self.time, self.preempted, self.cores, self.busy, self.probes = 0.0, 0.0, cores, 0, 0

    def cores_of_ours(self) -> Cores:
        return Cores(self.cores, lambda: int(self.preempted), self.free, now=lambda: self.time)

    def free(self, number: int) -> bool:
        self.time, self.probes = self.time + 0.01, self.probes + 1
        return number + self.busy <= self.cores

    def passes(self, ours: Cores, seconds: float, count: int) -> None:
        for _ in range(count):
            self.time += seconds
            if ours.threads + self.busy > self.cores:
                self.time += 9 * seconds
                self.preempted += 180 * 10 * seconds
            ours.check()


@pytest.mark.parametrize("cores", [2, 4, 16])
def test_fewer_threads_while_a_neighbour_is_there_and_all_of_them_after(cores: int) -> None:
    machine = Machine(cores)
    ours = machine.cores_of_ours()
    machine.passes(ours, 0.03, 20)
    assert ours.threads == cores
    machine.busy = 1
    machine.passes(ours, 0.03, 2)
    assert ours.threads < cores
    machine.passes(ours, 0.03, 2000)
    assert ours.threads < cores
    assert machine.probes < 12, "probing costs time, too"
    machine.busy = 0
    machine.passes(ours, 0.03, int(LONGEST / 0.03) + 2)
    assert ours.threads == cores


def test_a_quiet_machine_is_left_as_it_is() -> None:
    """A few preemptions happen everywhere."""
    machine = Machine(2)
    ours = machine.cores_of_ours()
    for _ in range(500):
        machine.preempted += 1
        machine.passes(ours, 0.04, 1)
    assert (ours.threads, machine.probes) == (2, 0)


def test_preemptions_of_one_pass_are_chance() -> None:
    """A quiet machine has 30 in a second, but at times 6 in one pass of 50 ms, as many as beside a neighbour."""
    machine, rng = Machine(2), random.Random(0)
    ours = machine.cores_of_ours()
    for _ in range(2000):
        machine.preempted += 6 * (rng.random() < 0.25)
        machine.passes(ours, 0.05, 1)
    assert (ours.threads, machine.probes) == (2, 0)


def test_short_answers_count_together() -> None:
    """No answer lasts as long as the window; together they do."""
    machine = Machine(2)
    machine.busy = 1
    ours = machine.cores_of_ours()
    for _ in range(4):
        machine.preempted += 1000  # between answers
        ours.resume()
        machine.passes(ours, 0.02, 1)
    assert ours.threads == 1


def test_what_happened_between_requests_says_nothing_of_passes() -> None:
    machine = Machine(2)
    ours = machine.cores_of_ours()
    machine.preempted, machine.time = 5000, 1.0
    ours.resume()
    machine.passes(ours, 0.03, 3)
    assert ours.threads == 2


def test_a_neighbour_that_comes_and_goes_is_tried_less_and_less_often() -> None:
    machine = Machine(2)
    machine.busy = 1
    ours = machine.cores_of_ours()
    machine.free = lambda number: True  # type: ignore[method-assign]  # never there when we look
    raised = 0
    for _ in range(3000):
        before = ours.threads
        machine.passes(ours, 0.03, 1)
        raised += ours.threads > before
    assert raised < 3000 * 0.03 / PAUSE / 3


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    share_cores(False)
    torch.set_num_threads(before)


def test_answers_stay_the_same_when_the_number_changes_in_the_middle(
    two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, inputs = tiny.llava(), tiny.llava_inputs()
    expected = model.generate(**inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False)
    preempted = 0
    monkeypatch.setattr(machine, "_preemptions", lambda: preempted)
    monkeypatch.setattr(machine, "_free", lambda number: False)
    monkeypatch.setattr(machine, "WINDOW", 0.0)  # each pass counts
    msd.share_cores()
    seen = []

    def criterion(input_ids: Any, scores: Any, **kwargs: Any) -> Any:
        nonlocal preempted
        seen.append(torch.get_num_threads())
        preempted += 100 * (len(seen) == 8)
        return torch.zeros(1, dtype=torch.bool)

    result = SpeculativeVLM(model, None, drafter="ar").generate(
        **inputs, max_new_tokens=24, min_new_tokens=24, do_sample=False, stopping_criteria=[criterion]
    )
    assert result.tokens == expected[0, inputs["input_ids"].shape[1] :].tolist()
    assert seen == [2] * 8 + [1] * 16
    assert torch.get_num_threads() == 2, "the number is the program's own between requests"


def test_without_the_call_nothing_is_touched(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "_preemptions", lambda: 10**9)
    with watched() as cores:
        cores.check()
        assert torch.get_num_threads() == 2


def test_the_number_is_given_back_when_an_answer_fails(two_threads: None, monkeypatch: pytest.MonkeyPatch) -> None:
    counts = iter(range(0, 10**6, 1000))
    monkeypatch.setattr(machine, "_preemptions", lambda: next(counts))
    monkeypatch.setattr(machine, "WINDOW", 0.0)
    share_cores()
    with pytest.raises(RuntimeError), watched() as cores:
        cores.check()
        assert torch.get_num_threads() == 1
        raise RuntimeError
    assert torch.get_num_threads() == 2


def steps(plan: Plan, count: int, emitted: float, noise: random.Random | None) -> int:
    """How many of `count` steps drafted, where passes take what was measured, or up to 20 times that by chance."""
    from test_plan import fake

    drafted = 0
    for _ in range(count):
        budget = plan.budget(fake())
        n = budget.nodes
        drafted += n > 0
        slow = 1.0 if noise is None else noise.choice([1.0, 1.0, 2.0, 5.0, 20.0])
        plan.learn(budget, n, emitted if n else 1.0, 0.2 if n else 0.0, slow * budget.passes[n])  # type: ignore[index]
    return drafted


def test_noise_from_outside_does_not_stop_drafting_that_gains() -> None:
    assert steps(Plan(nodes=8, costs=COSTS), 500, 3.0, random.Random(0)) == 500


def test_drafting_that_loses_is_stopped_in_noise_and_in_quiet() -> None:
    quiet = steps(Plan(nodes=8, costs=COSTS), 500, 1.0, None)
    noisy = steps(Plan(nodes=8, costs=COSTS), 500, 1.0, random.Random(0))
    assert quiet < 100 and noisy < 150


def test_drafting_that_loses_is_stopped_after_a_slow_time_too() -> None:
    """What plain passes took while a neighbour was there is no measure for what they take now."""
    plan = Plan(nodes=8, costs=COSTS)
    steps(plan, 200, 1.0, random.Random(1))
    plan._governors.clear()
    assert steps(plan, 1000, 3.0, None) == 1000
    assert steps(plan, 500, 1.0, None) < 150


def test_costs_that_were_measured_beside_a_neighbour_are_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A curve of a disturbed moment made drafting seem free, for ever: noise at T = 1.5 was at 0.94x."""
    counts = iter(range(0, 10**6, 1000))
    target = adapt(tiny.llava())
    with monkeypatch.context() as patch:
        patch.setattr(machine, "_preemptions", lambda: next(counts))
        assert costs(target, tmp_path).seconds and not list(tmp_path.iterdir())
    monkeypatch.setattr(machine, "_preemptions", lambda: 0)
    monkeypatch.setattr(measurements, "RECENT", 0.0)  # the process uses the first one for this long
    assert costs(target, tmp_path).seconds and len(list(tmp_path.iterdir())) == 1
