"""Tokens that only the drafter sees: they change its drafts, never the output; training and decoding see the same."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import tiny
from msd.config import SpeculativeConfig
from msd.core.tree import DraftTree
from msd.drafters.algorithms.msd import MSD, DraftObjective, MSDConfig, MSDNetwork
from msd.drafters.toolkit.drafter import Memory
from msd.errors import UserError
from msd.model import SpeculativeVLM
from msd.targets import adapt
from msd.targets.teacher import TeacherBatch, run_teacher
from msd.train.losses.msd import LossConfig

MODEL = tiny.llava()
GROUPS = ((3, 2), (4, 1))
GIVEN, KEPT = 7, 3


def network(**changes: Any) -> MSDNetwork:
    """Random in every part."""
    torch.manual_seed(1)
    config = MSDConfig.for_target(MODEL.config.text_config, 60, rank=4, parent_rank=8, beside=GROUPS, **changes)
    made = MSDNetwork(config)
    made.heads.ids = torch.arange(4, 64)
    for p in made.parameters():
        if not p.any():
            torch.nn.init.normal_(p, std=0.3)
    return made.attach(MODEL).eval()


def teacher_batch(made: MSDNetwork, rows: int = 3) -> TeacherBatch:
    inputs = tiny.batch(*(tiny.llava_inputs(s, images=s % 2, words=5 + s) for s in range(rows)))
    return run_teacher(adapt(MODEL, made.config.taps), inputs, [[5, 6, 7, 8]] * rows)


def some(rows: int, without: int | None = None) -> Tensor:
    torch.manual_seed(2)
    tokens = torch.randn(rows, GIVEN, MODEL.config.text_config.hidden_size)
    if without is not None:
        tokens[without] = 0
    return tokens


def root_law(made: MSDNetwork, taught: TeacherBatch, beside: Tensor | None) -> Tensor:
    assert taught.taps is not None
    L = taught.prompt
    layout = replace(taught.layout, end=[L + 1] * taught.layout.batch)
    memory = Memory.begin(made, layout, taught.taps[:, :L], beside)
    context, anchors = memory.upto(None)
    laws = made.levels(context, anchors, layout.newest())
    return laws.root(made.routed(memory.anchor)[:, None]).logits[:, 0]


@pytest.mark.parametrize("form", ["block", "ar"])
@pytest.mark.parametrize("vision", [True, False])
def test_training_sees_what_decoding_does(form: str, vision: bool) -> None:
    made = network(form=form, vision=vision)
    taught = replace(teacher_batch(made), beside=some(3, without=1))
    objective = DraftObjective(made, LossConfig())
    with torch.no_grad():
        drafts, states = objective.states(taught, torch.zeros(3, 1, dtype=torch.long))
        route = objective.routes(taught, drafts, states).exp()
        learnt, _ = objective.logits(taught, drafts, states, route)
        assert torch.allclose(root_law(made, taught, taught.beside), learnt[:, 0, 0], atol=1e-4)


def test_rows_see_their_own_tokens_and_rows_without_any_none() -> None:
    made = network()
    taught = teacher_batch(made)
    with torch.no_grad():
        nothing, all_, but_one = (root_law(made, taught, b) for b in (None, some(3), some(3, without=1)))
    for row in range(3):
        assert (all_[row] - nothing[row]).abs().max() > 1e-3
        other = nothing if row == 1 else all_
        assert torch.allclose(but_one[row], other[row], atol=1e-4)


def test_kept_tokens_stand_before_the_text() -> None:
    made = network()
    taught = teacher_batch(made)
    assert taught.taps is not None
    with torch.no_grad():
        plain, found = (made.read(taught.layout, taught.taps[:, :-1], None, b) for b in (None, some(3, without=1)))
    extra = found.present.sum(1) - plain.present.sum(1)
    assert extra.tolist() == [KEPT, 0, KEPT]
    for row in range(3):
        first = int(extra[row])
        n = int(plain.present[row].sum())
        assert torch.equal(found.embedding[row, first : first + n], plain.embedding[row, :n])
        assert torch.equal(found.slot[row], plain.slot[row] + first)


def test_a_group_is_read_by_its_own_queries() -> None:
    """The first group's tokens do not reach what is kept of the second, and all reach the global vector."""
    made = network()
    assert made.beside is not None
    one, two = some(1), some(1)
    two[:, :3] += 1
    with torch.no_grad():
        (kept, whole), (other, changed) = made.beside(one), made.beside(two)
    assert torch.equal(kept[:, 2:], other[:, 2:]) and not torch.allclose(kept[:, :2], other[:, :2])
    assert not torch.allclose(whole, changed)


def test_config_survives_and_other_counts_are_refused() -> None:
    made = network()
    assert MSDConfig.from_json(made.config.as_json()) == made.config
    assert made.beside is not None
    with pytest.raises(UserError, match="beside"):
        made.beside(torch.zeros(1, GIVEN + 1, made.config.hidden))


@pytest.mark.parametrize("form", ["block", "ar"])
def test_the_output_is_the_targets_whatever_stands_beside(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    trees: list[list[int]] = []
    propose = MSD.propose

    def noted(*arguments: Any) -> DraftTree:
        tree = propose(*arguments)
        trees[-1] += tree.tokens.flatten().tolist()
        return tree

    monkeypatch.setattr(MSD, "propose", noted)
    drafter = MSD(network(form=form))
    engine = SpeculativeVLM(MODEL, None, SpeculativeConfig(nodes=9, depth=4, adaptive=False), drafter)
    inputs = tiny.batch(*(tiny.llava_inputs(s, images=s % 2, words=5 + s) for s in range(3)))
    L = inputs["input_ids"].shape[1]
    plain = MODEL.generate(**inputs, max_new_tokens=16, do_sample=False)[:, L:].tolist()
    for beside in (None, some(3), some(3, without=2), lambda: some(3)):
        trees.append([])
        results = engine.generate(**inputs, beside=beside, max_new_tokens=16, do_sample=False)
        for row, result in enumerate(results):
            assert result.tokens == plain[row][: len(result.tokens)]
        seconds = results[0].statistics.seconds
        assert ("beside" in seconds) == ("beside_wait" in seconds) == callable(beside)
    assert trees[1] == trees[3] and trees[0] != trees[1] != trees[2]


def test_an_error_beside_reaches_the_caller() -> None:
    def broken() -> Tensor:
        raise UserError("no such recording")

    engine = SpeculativeVLM(MODEL, None, drafter=MSD(network()))
    with pytest.raises(UserError, match="no such recording"):
        engine.generate(**tiny.llava_inputs(1), beside=broken, max_new_tokens=4, do_sample=False)
