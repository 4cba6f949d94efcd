"""The noise of coming draws is that of the draws, and only drafts depend on it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LogitsProcessorList, StoppingCriteriaList

import tiny
from msd import SpeculativeConfig, SpeculativeVLM
from msd.core.foresight import Foresight
from msd.core.joined import JoinedSampler
from msd.core.layout import Layout
from msd.core.sampling import Sampler
from msd.drafters.toolkit.growth import _Growth

V = 300


def distribution(seed: int, rows: int = 1) -> torch.Tensor:
    return (3 * torch.randn(rows, V, generator=torch.Generator().manual_seed(seed))).softmax(-1)


def sampler(rows: int, randomness: Any, do_sample: bool = True) -> Sampler:
    layout = Layout.from_prompt(torch.ones(rows, 3, dtype=torch.long), 40)
    made = Sampler(layout, LogitsProcessorList(), StoppingCriteriaList(), do_sample, V, randomness)
    made.foresees = True
    return made


@pytest.mark.parametrize("looks", [(1,), (4, 1, 2), (0, 3, 0, 5), (2, 2, 7, 1)])
@pytest.mark.parametrize("rows", [1, 3])
def test_draws_are_those_of_multinomial_however_far_one_looks(looks: tuple[int, ...], rows: int) -> None:
    generators, same = ([torch.Generator().manual_seed(5 + r) for r in range(rows)] for _ in range(2))
    drawing, every = sampler(rows, generators), list(range(rows))
    for step in range(12):
        p = distribution(step, rows)
        levels = looks[step % len(looks)]
        if levels:
            outlook = drawing.outlook(every, levels)
            assert outlook is not None and outlook.noise is not None and outlook.noise.shape == (rows, levels, V)
            foreseen = (p / outlook.noise[:, 0]).argmax(-1)
        token = drawing.multinomial(p, every)
        expected = [torch.multinomial(p[r : r + 1], 1, generator=same[r]).item() for r in range(rows)]
        assert token.tolist() == expected
        assert not levels or foreseen.tolist() == expected
    assert all(torch.equal(a.get_state(), b.get_state()) for a, b in zip(generators, same, strict=True))


def test_another_use_of_the_generator_makes_it_look_again() -> None:
    generator, same = (torch.Generator().manual_seed(1) for _ in range(2))
    foresight, p = Foresight(generator, V), distribution(0)
    foresight.noise(3)
    torch.rand(5, generator=generator)
    assert foresight.take() is None
    torch.rand(5, generator=same)
    expected = torch.multinomial(p, 1, generator=same)
    assert (p / foresight.noise(2)[0]).argmax() == expected


def test_requests_that_join_keep_their_own_noise() -> None:
    parts = [sampler(1, [torch.Generator().manual_seed(9)]), sampler(1, None, False), sampler(1, None)]
    layout = Layout.from_prompt(torch.ones(3, 3, dtype=torch.long), 40)
    joined = JoinedSampler(layout, parts[0])
    for part in parts[1:]:
        joined.join(part)
    outlook = joined.outlook([0, 1, 2], 2)
    assert outlook is not None and outlook.noise is not None and bool((outlook.noise[1] == 1).all())
    for row in (0, 2):
        alone = parts[row].outlook([0], 2)
        assert alone is not None and torch.equal(alone.noise[0], outlook.noise[row])  # type: ignore[index]
    greedy = JoinedSampler(layout, parts[1])
    assert greedy.outlook([0], 2) is None


def test_the_noise_of_a_batch_with_one_generator_is_unknown() -> None:
    outlook = sampler(2, torch.Generator()).outlook([0, 1], 3)
    assert outlook is not None and outlook.noise is None


@pytest.mark.parametrize(
    ("settings", "knows"),
    [
        ({}, True),
        ({"foresight": False}, False),
        ({"verifier": "threshold", "thresholds": {"language": 0.5}}, False),
        ({"verifier": "budget"}, False),
    ],
    ids=["lossless", "switched off", "threshold", "budget"],
)
def test_only_drafts_that_change_no_answer_know_it(
    settings: dict[str, Any], knows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lossy policy decides by the drafts: with the draws known to them, its divergence would be another."""
    from msd.drafters.algorithms.draft_model import DraftModel

    seen: list[bool] = []
    begin = _Growth.__init__

    def noted(self: Any, vocabulary: Any, subtrees: Any, budget: Any, outlook: Any) -> None:
        seen.append(outlook.noise is not None)
        begin(self, vocabulary, subtrees, budget, outlook)

    monkeypatch.setattr(_Growth, "__init__", noted)
    model = tiny.llava()
    engine = SpeculativeVLM(model, None, SpeculativeConfig(**settings), DraftModel(tiny.llava(seed=1)))
    engine.generate(**tiny.llava_inputs(), max_new_tokens=8, do_sample=True, top_k=0, seed=3)
    assert seen and set(seen) == {knows}
