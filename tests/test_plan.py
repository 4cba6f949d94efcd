"""Plan: it drafts the number of nodes that saves time, and pauses when drafting loses time."""

from __future__ import annotations

import random
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tiny
from msd.drafters.toolkit.selection import best_size
from msd.model import SpeculativeVLM
from msd.planning import costs as costs_module
from msd.planning.costs import Costs, costs, measure
from msd.planning.plan import CREDIT, LONGEST, PAUSE, Governor, Plan
from msd.targets import adapt

FLAT = Costs((1, 9, 33), (100, 200), ((1.0, 1.0, 4.0), (1.0, 1.0, 6.0)))


def test_costs_are_interpolated_and_extrapolated() -> None:
    assert FLAT.curve(9, 100) == [1.0] * 9
    assert FLAT.curve(33, 100)[20] == pytest.approx(1.0 + 3.0 * 12 / 24)
    assert FLAT.curve(33, 150)[-1] == pytest.approx(5.0)
    assert FLAT.curve(33, 300)[-1] == pytest.approx(8.0)
    assert FLAT.curve(65, 100)[-1] == pytest.approx(4.0 + 3.0 * 32 / 24)  # more rows than measured, as in large batches


def test_extrapolated_rows_are_not_free() -> None:
    """A batch of 16 with trees of 9 nodes has 144 rows; if clamped to 65, drafting would cost nothing."""
    known = Costs((1, 9, 65), (64, 512), ((0.030, 0.034, 0.124), (0.030, 0.038, 0.147)))
    curve = known.curve(144, 64)
    slope = curve[63] - curve[62]
    assert all(b - a == pytest.approx(slope) for a, b in pairwise(curve[64:]))


def test_costs_are_measured_once_per_machine_and_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def measured(target: Any) -> Costs:
        calls.append(target)
        return measure(target, (1, 3), (8, 16))

    monkeypatch.setattr(costs_module, "measure", measured)
    monkeypatch.setattr("msd.system.machine.quietly", lambda measure: (True, measure()))
    model = tiny.llava()
    first = costs(adapt(model), tmp_path)
    assert first.nodes == (1, 3) and all(s > 0 for row in first.seconds for s in row)
    assert costs(adapt(model), tmp_path) == first and len(calls) == 1
    costs(adapt(tiny.llava(seed=3)), tmp_path)
    assert len(calls) == 2
    for file in tmp_path.iterdir():
        file.write_text("{broken")
    costs(adapt(model), tmp_path)
    assert len(calls) == 3
    blocked = tmp_path / "file"
    blocked.write_text("")
    assert costs(adapt(model), blocked).nodes == (1, 3)


def test_measuring_fits_a_short_context() -> None:
    target = adapt(tiny.llava())
    target.text_config.max_position_embeddings = 40
    assert max(measure(target, (1, 8), (16, 500)).contexts) < 32


@given(
    st.lists(st.lists(st.floats(0.001, 1.0), min_size=6, max_size=6), min_size=1, max_size=3),
    st.lists(st.floats(0.1, 3.0), min_size=7, max_size=7),
)
def test_the_best_size_equals_that_of_exhaustive_search(chances: list[list[float]], seconds: list[float]) -> None:
    rates = [(len(chances) + sum(sum(sorted(row, reverse=True)[:n]) for row in chances)) / seconds[n] for n in range(7)]
    assert rates[best_size(chances, seconds)] == pytest.approx(max(rates))


@pytest.mark.parametrize("cost", [0.3, 0.5, 1.0])
def test_the_governor_pauses_longer_and_longer_while_drafting_loses(cost: float) -> None:
    governor, drafted = Governor(), []
    for _ in range(3000):
        drafts = governor.drafts()
        drafted.append(drafts)
        if drafts:
            governor.learn(-cost, cost)
    lost = 1 + int(CREDIT)
    assert all(drafted[:lost]) and not any(drafted[lost : lost + PAUSE]), "whatever a draft costs"
    assert sum(drafted[-1000:]) <= 1000 / LONGEST * 6
    for _ in range(LONGEST + 100):  # it drafts again when that saves time
        if governor.drafts():
            governor.learn(+1.0, cost)
    assert governor.drafts() and governor.pause == PAUSE


@pytest.mark.parametrize("cost", [0.4, 0.9])
def test_useless_drafts_by_chance_do_not_stop_drafting_that_gains(cost: float) -> None:
    """Sampled answers: nothing is accepted in 45% of the steps, and 2.5 nodes on average in the others."""
    rng, governor, paused = random.Random(0), Governor(), 0
    for _ in range(5000):
        if governor.drafts():
            governor.learn((0.0 if rng.random() < 0.45 else rng.choice((1, 2, 3, 4))) - cost, cost)
        else:
            paused += 1
    assert paused < 5000 * 0.05


def test_a_large_batch_tries_less_often_and_forgets_nothing_for_a_small_one() -> None:
    plan = Plan(nodes=4, costs=FLAT)
    tries: dict[int, list[bool]] = {32: [], 1: []}
    for _ in range(3000):
        for rows in tries:
            budget = plan.budget(fake(rows))
            tries[rows].append(budget.nodes > 0)
            passes = budget.passes
            assert passes is not None
            right = 5.0 if rows == 1 else 1.0  # at 32 rows every draft is wrong
            plan.learn(budget, budget.nodes, right if budget.nodes else 1.0, 0.1, passes[budget.nodes])
    assert all(tries[1]), "what was lost at 32 rows stops nobody who is alone"
    begun = [at for at, (before, now) in enumerate(pairwise([False, *tries[32]])) if now and not before]
    assert len(begun) == 4 and begun[1] > 16 * 32 and begun[2] > 2 * begun[1] - 16


def fake(batch: int = 1, end: int = 100) -> Any:
    return SimpleNamespace(
        alive=list(range(batch)),
        tokens_left=lambda row: 50,
        may_draft=lambda _: True,
        layout=SimpleNamespace(batch=batch, end=[end] * batch),
    )


def test_budgets_have_the_seconds_of_a_step() -> None:
    plan = Plan(nodes=4, costs=FLAT)
    assert plan.budget(fake()).seconds == (1.0,) * 5
    plan.learn(plan.budget(fake()), 4, 3.0, 0.5, 1.0)
    assert plan.budget(fake()).seconds == (1.5,) * 5
    assert plan.budget(fake(batch=8)).seconds == pytest.approx(
        (0.5 + 1.0, *(0.5 + FLAT.curve(40, 100)[8 * n + 7] for n in (1, 2, 3, 4)))
    )
    assert Plan(nodes=4).budget(fake()).seconds is None


def test_slow_passes_are_not_attributed_to_drafting() -> None:
    plan = Plan(nodes=4, costs=FLAT)
    for _ in range(50):  # all passes are three times slower than measured; drafting still saves time
        plan.learn(plan.budget(fake()), 4, 2.0, 0.3, 3.0)
    assert plan.slowness == pytest.approx(3.0, rel=0.01)
    assert plan.budget(fake()).nodes == 4


def test_a_drafter_that_is_never_right_is_paused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.llava()
    engine = SpeculativeVLM(model, None, drafter="prompt-lookup")
    engine.plan = Plan(costs=FLAT)
    asked = []
    propose = engine.drafter.propose

    def watched(state: Any, budget: Any, sampler: Any) -> Any:
        asked.append(budget.nodes)
        return propose(state, budget, sampler)

    monkeypatch.setattr(engine.drafter, "propose", watched)
    monkeypatch.setattr(Plan, "learn", lambda self, *a: self.governor(1).learn(-1.0, 1.0) if a[0].nodes else None)
    inputs = tiny.llava_inputs()
    result = engine.generate(**inputs, max_new_tokens=60, min_new_tokens=60, do_sample=False)
    useless = 1 + int(CREDIT)
    assert asked[:useless] == [8] * useless and asked[useless : useless + PAUSE] == [0] * PAUSE
    expected = model.generate(**inputs, max_new_tokens=60, min_new_tokens=60, do_sample=False)
    assert result.tokens == expected[0, inputs["input_ids"].shape[1] :].tolist()
