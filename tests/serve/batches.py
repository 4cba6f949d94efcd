"""Runs requests that join and leave a batch, and what they would get alone."""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from msd.model import SpeculativeVLM
from msd.planning.plan import Plan
from msd.serve.batch import Batch

Request = tuple[dict[str, Tensor], dict[str, Any]]
Requests = list[Request]


def alone(model: Any, inputs: dict[str, Tensor], seed: int, options: dict[str, Any]) -> list[int]:
    """What `transformers` answers."""
    torch.manual_seed(seed)
    return model.generate(**inputs, **options)[0, inputs["input_ids"].shape[1] :].tolist()


def served(vlm: SpeculativeVLM, requests: Requests, order: random.Random, most: int = 3) -> tuple[list[list[int]], int]:
    """(the answers of requests that join at random steps, at most `most` at a time; the accepted drafts)."""
    batch: Batch[int] = Batch(vlm.engine)
    answers: list[list[int]] = [[] for _ in requests]
    waiting, accepted = list(range(len(requests))), 0
    while waiting or batch.members:
        while waiting and batch.open and len(batch.members) < most and (not batch.members or order.random() < 0.4):
            number = waiting.pop(0)
            inputs, options = requests[number]
            answers[number] += batch.join(number, vlm.prefill(inputs, seed=number, **options)).tokens
        if batch.members:
            for number, emission in batch.step():
                answers[number] += emission.tokens
                accepted += emission.accepted.total()
    return answers, accepted


def drafts(
    vlm: SpeculativeVLM, requests: Requests, most: int
) -> tuple[dict[tuple[int, ...], list[int]], list[list[int]]]:
    """(the tokens of the tree below each text that was drafted from, the answers)."""
    found: dict[tuple[int, ...], list[int]] = {}
    propose = vlm.drafter.propose

    def noted(state: Any, budget: Any, *others: Any) -> Any:
        tree = propose(state, budget, *others)
        for row, end in enumerate(state.layout.end):
            if budget.nodes and budget.depth[row]:
                text = tuple(state.layout.tokens[row, state.layout.start[row] : end].tolist())
                found[text] = tree.tokens[row, tree.valid[row]].tolist()
        return tree

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vlm.drafter, "propose", noted)
        return found, served(vlm, requests, random.Random(1), most)[0]


def check_joining(vlm: SpeculativeVLM, requests: Requests) -> list[int]:
    """Returns the number of nodes of each tree that was drafted both in a batch and alone.

    Answers are those of `transformers`, and drafts those that a request gets alone.

    The batch drafts nothing in two of three steps and in long pauses, in which its rows come to differ in what the
    drafter has read of them.
    """
    assert vlm.engine.joins
    (single, wanted), steps, budget = drafts(vlm, requests, 1), 0, Plan.budget

    def pausing(plan: Plan, *arguments: Any) -> Any:
        nonlocal steps
        steps += 1
        whole = budget(plan, *arguments)
        return whole if steps % 3 == 0 and steps % 24 < 12 else replace(whole, nodes=0, depth=[0] * len(whole.depth))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "budget", pausing)
        common, answers = drafts(vlm, requests, 4)
    assert answers == wanted
    assert answers[0] == alone(vlm.model, requests[0][0], 0, requests[0][1])
    both = common.keys() & single.keys()
    for text in both:
        assert common[text] == single[text]
    sizes = [len(common[text]) for text in both]
    assert len(both) > 5 and max(sizes) > 2
    return sizes


def check_a_late_join(vlm: SpeculativeVLM, first: Request, late: Request) -> None:
    """A short prompt is decoded for 60 steps without drafts; then a long one joins, and both are drafted for.

    The drafter has then to read 60 tokens of the first row, behind a prompt of the second that fills its memory.
    """
    budget = Plan.budget

    def none(plan: Plan, *arguments: Any) -> Any:
        whole = budget(plan, *arguments)
        return replace(whole, nodes=0, depth=[0] * len(whole.depth))

    batch: Batch[int] = Batch(vlm.engine)
    answers: list[list[int]] = []
    drafted = 0

    def join(inputs: dict[str, Tensor], options: dict[str, Any]) -> None:
        answers.append(list(batch.join(len(answers), vlm.prefill(inputs, seed=0, **options)).tokens))

    def step() -> None:
        nonlocal drafted
        for number, emission in batch.step():
            answers[number] += emission.tokens
            drafted += emission.drafted.total()

    join(*first)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Plan, "budget", none)
        for _ in range(60):
            step()
    join(*late)
    while batch.members:
        step()
    assert answers == [alone(vlm.model, inputs, 0, options) for inputs, options in (first, late)]
    assert drafted > 0
