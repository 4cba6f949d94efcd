"""Trust: the chances of drafts follow what the target accepts, in this answer and in answers of its kind."""

from __future__ import annotations

import math
import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import rivals
import tiny
from msd.config import SpeculativeConfig
from msd.core.modality import LANGUAGE
from msd.core.tree import Accepted, DraftTree
from msd.core.trust import HIGHEST, LOWEST, Trust, Usual, learn, scale
from msd.decode import Engine
from msd.drafters.toolkit.chance import Correction, NodeFeatures, log_odds
from msd.drafters.toolkit.selection import Candidates, best_size, choose
from msd.model import SpeculativeVLM
from msd.planning.costs import Costs
from msd.planning.plan import Budget, Plan
from msd.targets.state import State


def odds(p: float) -> float:
    return math.log(p / (1 - p))


def answer(trust: Trust, off: float, passes: int = 20, seed: int = 0) -> list[float]:
    """An answer whose nodes are accepted with their chances, shifted by `off`; returns the shift after each pass."""
    rng, shifts = random.Random(seed), []
    for _ in range(passes):
        outcomes = []
        for _ in range(4):
            given = odds(rng.uniform(0.2, 0.95))
            accepted = rng.random() < 1 / (1 + math.exp(-given * scale(off) - off))
            outcomes.append((1 / (1 + math.exp(-given * scale(trust.shift) - trust.shift)), accepted))
        trust.learn(outcomes)
        shifts.append(trust.shift)
    return shifts


@pytest.mark.parametrize("off", [-3.0, -1.0, 0.0, 1.0])
def test_the_shift_becomes_that_of_the_answer(off: float) -> None:
    final = [answer(Trust(Usual()), off, seed=seed)[-1] for seed in range(40)]
    assert sum(final) / len(final) == pytest.approx(off, abs=0.8)  # the prior holds large ones back
    assert abs(answer(Trust(Usual()), off, 300)[-1] - off) < 0.4


def test_an_answer_begins_as_others_of_its_kind_ended() -> None:
    usual = Usual()
    for seed in range(10):
        answer(Trust(usual), -2.0, seed=seed)
    assert Trust(usual).shift == pytest.approx(-2.0, abs=0.5)
    for seed in range(10):
        answer(Trust(usual), 0.0, seed=seed)
    assert Trust(usual).shift == pytest.approx(0.0, abs=0.5)


@given(st.lists(st.tuples(st.floats(0, 1), st.booleans()), max_size=30))
def test_shifts_stay_within_bounds(outcomes: list[tuple[float, bool]]) -> None:
    trust = Trust(Usual())
    for outcome in outcomes:
        trust.learn([outcome] * 9)
        assert LOWEST <= trust.shift <= HIGHEST and LOWEST <= trust.usual.shift <= HIGHEST


def test_only_nodes_below_accepted_ones_are_observed() -> None:
    """The tree 1-(2-(4), 3), 5 with forecasts: below a rejected node, and below a stop, nothing is known."""
    forecast = [(0, 0.9), (1, 0.8), (1, 0.1), (2, 0.5), (0, 0.05)]
    tree = DraftTree.from_lists(torch.tensor([0]), [[1, 2, 3, 4, 5]], [[p for p, _ in forecast]])
    tree.forecast = [forecast]
    seen: list[list[tuple[float, bool]]] = []
    row: Any = SimpleNamespace(learn=seen.append)
    learn([row], tree, Accepted([[1, 2]], [[1, 2, 7]]))  # 7 is the recovered token below node 2
    learn([row], tree, Accepted([[1, 2]], [[1, 2]]))  # the row has stopped on node 2
    learn([row], tree, Accepted([[]], [[9]]))
    learn([row], tree, Accepted([[]], [[]]))  # had finished before
    learn([row], tree, Accepted([[]], [[0]], padded=frozenset({0})))  # the same in lockstep
    assert seen == [
        [(0.9, True), (0.8, True), (0.1, False), (0.5, False), (0.05, False)],
        [(0.9, True), (0.8, True), (0.1, False), (0.05, False)],
        [(0.9, False), (0.05, False)],
    ]


def test_forecasts_and_trust_follow_their_rows() -> None:
    newest = torch.tensor([0, 0, 0])
    part = DraftTree.from_lists(newest[:2], [[3], [4]], [[0], [0]])
    part.forecast = [[(0, 0.3)], [(0, 0.4)]]
    whole = part.scatter([0, 2], newest)
    assert whole.forecast == [[(0, 0.3)], [], [(0, 0.4)]]
    assert whole.select([2, 1]).forecast == [[(0, 0.4)], []]
    looked_up = DraftTree.from_lists(newest, [[], [], [8]], [[], [], [0]])
    assert whole.replace_rows([2], looked_up).forecast == [[(0, 0.3)], [], []]
    a, b, c = (Trust(Usual()) for _ in range(3))
    parts: Any = SimpleNamespace(select=lambda *_: None, join=lambda *_: None)
    states = [State(parts, parts, trust=rows) for rows in ([a, b], [c])]
    engine = Engine(parts, parts, parts, Plan())
    engine.join(*states)
    engine.select(states[0], [2, 0])
    assert states[0].trust[0] is c and states[0].trust[1] is a
    second = State(parts, parts)  # of a draft model, which has no trust
    second.select([0])
    assert not second.trust


@pytest.mark.parametrize("method", ["eagle2", "dspark"])
@pytest.mark.parametrize("calibrated", [False, True])
def test_a_correction_is_made_to_the_log_odds_of_every_chance(method: str, calibrated: bool) -> None:
    net = rivals.network(tiny.llava(), method)
    net.calibration = {"log_odds": 0.8, "confidence": 0.3, "bias": -0.2} if calibrated else None
    log_q, confidence = torch.tensor([[0.6, 0.3]]).log(), torch.tensor([[0.4, 0.4]])
    correction = Correction(torch.tensor(0.5), torch.tensor(-1.5))
    before = net.log_acceptance(NodeFeatures(log_q, confidence))
    after = net.log_acceptance(NodeFeatures(log_q, confidence, correction=correction))
    torch.testing.assert_close(log_odds(after), 0.5 * log_odds(before) - 1.5, rtol=1e-4, atol=1e-4)


def test_odds_are_flattened_only_where_the_drafter_is_wrong() -> None:
    assert scale(0.0) == scale(1.0) == 1.0 and scale(-1.0) == pytest.approx(2**-0.5) and scale(-4.0) < 0.25


def test_a_draft_that_was_made_is_tried_where_that_is_cheap() -> None:
    assert best_size([[0.01, 0.01]], [1.0, 1.05, 1.1]) == 1
    assert best_size([[0.01, 0.01]], [1.0, 1.5, 2.0]) == 0
    assert best_size([[0.9, 0.8]], [1.0, 1.05, 1.1]) == 2


def test_a_nodes_chance_is_that_of_its_own_subtree() -> None:
    """Two subtrees propose 5 below the root; the first is surer of it, and the second proposes 6 below it."""
    found = Candidates(1, [2, 2], [-0.2, -1.0, -5.0, -1.1], [0.0] * 4, [5, 5, 7, 6], [1.0] * 4, [0, 1])
    chosen = choose(found, [0.5, 0.5], 4)
    assert {n.token: round(n.chance, 3) for n in chosen} == {
        5: round(math.exp(-0.2), 3), 6: round(math.exp(-0.1), 3), 7: round(math.exp(-4.8), 3),
    }  # fmt: skip


def test_a_budget_gives_each_row_its_shift() -> None:
    assert Budget(4, [3, 3], shift=(0.5, -1.0)).select([1]).shift == (-1.0,)
    plan = Plan()
    layout: Any = SimpleNamespace(modality=torch.tensor([[LANGUAGE.id, 1], [LANGUAGE.id, LANGUAGE.id]]))
    about, text = plan.trust(layout, sampled=False)
    about.usual.shift = -1.0
    assert [row.shift for row in plan.trust(layout, sampled=False)] == [-1.0, 0.0] and text.usual is not about.usual
    assert [row.shift for row in plan.trust(layout, sampled=True)] == [0.0, 0.0]


def test_the_reference_model_drafts_less_where_drafts_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """On texts the shipped drafter expects several times too much; after a few passes it expects what it gets."""
    from msd.loading import load_target

    model, processor = load_target("reference")
    engine = SpeculativeVLM(model, processor, SpeculativeConfig(backend="plain", adaptive=False), "msd")
    engine.plan = Plan(costs=Costs((1, 9), (64, 512), ((1.0, 1.2), (1.0, 1.2))))
    monkeypatch.setattr(engine.plan, "learn", lambda *_: None)  # neither times nor the governor have a say
    expected, accepted = [0.0, 0.0], [0, 0]

    def watch(step: Any) -> None:
        if step.tree.forecast and step.tree.forecast[0]:
            paths = [1.0]
            for parent, chance in step.tree.forecast[0]:
                paths.append(paths[parent] * chance)
            late = int(len(steps) >= 8)
            expected[late] += sum(paths[1:])
            accepted[late] += len(step.accepted.nodes[0])
        steps.append(step)

    for prompt in ("Tell me about the weather in autumn.", "What should one know about volcanoes?"):
        steps: list[Any] = []
        engine.generate([], prompt, max_new_tokens=48, do_sample=False, on_step=watch)
    assert expected[0] > 1.5 * accepted[0]
    assert expected[1] < 2.0 * max(1, accepted[1])
