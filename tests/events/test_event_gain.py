"""Costs of masking cells and frames equal runs without these columns; labels follow from costs."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import tiny
from msd.core.modality import LANGUAGE
from msd.errors import UserError
from msd.events import EventStream
from msd.events.cells import cell_kinds
from msd.labels import EVENT_DENSE, EVENT_SPARSE, VIDEO_REASONING
from msd.labels.gain import event_costs
from msd.labels.label_thresholds import EventThresholds
from msd.targets import adapt

MODEL = tiny.llava(sharpness=5.0)
PROMPTS = [tiny.llava_inputs(seed=1, images=2, words=6), tiny.llava_inputs(seed=2, images=2, words=9)]
ANSWERS = [[5, 9, 11, 2], [8, 40, 17]]
S, D = EVENT_SPARSE.id, EVENT_DENSE.id
KINDS = [
    np.array([[S, D, D, S], [S, S, D, D]]),
    np.array([[D, D, D, D], [D, D, D, D]]),
]  # the second has no sparse cell


@torch.no_grad()
def law_without(inputs: dict[str, Tensor], answer: list[int], gone: list[int]) -> Tensor:
    """Returns logits [T, V] of the language model without some image columns, at unchanged positions."""
    ids = torch.cat([inputs["input_ids"], torch.tensor([answer])], 1)
    images = MODEL.model.get_image_features(inputs["pixel_values"])
    features: Any = getattr(images, "pooler_output", images)
    words = MODEL.get_input_embeddings()(ids)
    shown = (ids == tiny.IMAGE)[..., None].expand_as(words)
    words = words.masked_scatter(shown, torch.cat(list(features)).to(words.dtype))
    kept = torch.tensor([i for i in range(ids.shape[1]) if i not in gone])
    hidden = MODEL.model.language_model(inputs_embeds=words[:, kept], position_ids=kept[None]).last_hidden_state
    return MODEL.lm_head(hidden)[0, -len(answer) - 1 : -1].double().log_softmax(-1)


def test_costs_equal_those_of_removed_cells() -> None:
    costs = event_costs(adapt(MODEL), tiny.batch(*PROMPTS), ANSWERS, KINDS)
    for inputs, answer, kinds, found in zip(PROMPTS, ANSWERS, KINDS, costs, strict=True):
        places = (inputs["input_ids"][0] == tiny.IMAGE).nonzero()[:, 0].tolist()
        flat = kinds.flatten().tolist()
        groups = [[p for p, k in zip(places, flat, strict=True) if k == kind] for kind in (S, D)]
        groups += [places[:4], places[4:]]
        p = law_without(inputs, answer, [])
        assert found.shape == (len(answer), 4) and found.dtype == torch.float64
        for column, gone in enumerate(groups):
            expected = (p.exp() * (p - law_without(inputs, answer, gone))).sum(-1)
            torch.testing.assert_close(found[:, column], expected, atol=1e-5, rtol=1e-4)
    assert costs[1][:, 0].tolist() == [0.0] * 3 and costs[1][:, 1].min() > 1e-4


def test_labels_follow_the_most_expensive_kind_and_the_spread_over_frames() -> None:
    thresholds = EventThresholds(least=0.1, tokens=1)
    costs = [
        [0.05, 0.1, 9.0, 9.0],  # neither kind costs enough, whatever frames do
        [0.5, 0.2, 1.0, 0.4],  # sparse cells, one frame
        [0.2, 0.5, 0.4, 1.0],  # dense cells, one frame
        [0.2, 0.5, 0.6, 1.0],  # two frames
        [0.2, 0.5, 0.0, 0.0],  # no single frame is missed
    ]
    expected = [LANGUAGE, EVENT_SPARSE, EVENT_DENSE, VIDEO_REASONING, EVENT_DENSE]
    assert thresholds.labels(costs).tolist() == [kind.id for kind in expected]
    assert thresholds.labels([row[:3] for row in costs]).tolist()[3] == EVENT_DENSE.id  # one frame cannot be two


def test_half_of_the_tokens_that_thresholds_were_fitted_on_are_language() -> None:
    costs = [torch.rand(50, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(s)) for s in range(4)]
    thresholds = EventThresholds.fit(costs)
    labels = torch.cat([thresholds.labels(c) for c in costs])
    assert int((labels == LANGUAGE.id).sum()) == 100 and thresholds.tokens == 200
    with pytest.raises(UserError, match="lines with events"):
        EventThresholds.fit([])


def test_cells_of_a_recording_match_the_image_tokens_of_its_frames() -> None:
    """All events in the right half, in the last quarter of the time."""
    t = np.concatenate([[0], np.linspace(750_000, 999_999, 400).astype(np.int64)])
    x = np.concatenate([[0], np.tile(np.arange(8, 16), 50)]).astype(np.uint16)
    stream = EventStream(t, x, (np.arange(401) % 16).astype(np.uint16), np.ones(401, np.uint8), (16, 16))
    kinds = cell_kinds(stream, 4, 16)
    assert kinds.shape == (4, 16)
    assert (kinds[3].reshape(4, 4)[:, 2:] == D).all() and (kinds[1:3] == S).all()
    with_class_token = cell_kinds(stream, 4, 17)
    assert (with_class_token[:, 0] == -1).all() and (with_class_token[:, 1:] == kinds).all()
    with pytest.raises(UserError, match="no square grid"):
        cell_kinds(stream, 4, 15)


def test_other_numbers_of_image_tokens_are_refused() -> None:
    with pytest.raises(UserError, match="8 image tokens for 4 cells"):
        event_costs(adapt(MODEL), PROMPTS[0], ANSWERS[:1], [KINDS[0][:1]])
