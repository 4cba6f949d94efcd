"""Layout: tokens, modalities, rotary positions and slots of a left-padded batch; the registry of modalities."""

from __future__ import annotations

import pytest
import torch

from msd.core import modality
from msd.core.layout import Layout
from msd.core.modality import LANGUAGE, VISION
from msd.errors import UserError


def two_rows() -> Layout:
    ids = torch.tensor([[9, 9, 5, 3, 6], [7, 3, 3, 8, 4]])
    mask = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    return Layout.from_prompt(ids, 12, mask, placeholders={3: VISION.id})


def test_a_left_padded_prompt() -> None:
    layout = two_rows()
    assert (layout.batch, layout.capacity) == (2, 12)
    assert (layout.start, layout.end) == ([2, 0], [5, 5])
    assert layout.history(0).tolist() == [5, 5, 5, 3, 6], "padding repeats the first real token"
    assert layout.history(1).tolist() == [7, 3, 3, 8, 4]
    assert layout.modality[0, 2:5].tolist() == [LANGUAGE.id, VISION.id, LANGUAGE.id]
    assert layout.modality[1, :5].tolist() == [LANGUAGE.id, VISION.id, VISION.id, LANGUAGE.id, LANGUAGE.id]
    assert layout.positions[0, :, :5].tolist() == [[0, 0, 0, 1, 2], [0, 1, 2, 3, 4]]
    assert layout.newest().tolist() == [6, 4]


def test_append_changes_one_row_only() -> None:
    layout = two_rows()
    layout.append(0, [11, 12])
    assert layout.end == [7, 5]
    assert layout.newest().tolist() == [12, 4]
    assert layout.history(0).tolist() == [5, 5, 5, 3, 6, 11, 12]
    assert layout.positions[0, 0, 5:7].tolist() == [3, 4]
    assert layout.next_positions(torch.tensor([[0, 1, 2], [0, 1, 1]])).tolist() == [[[4, 5, 6], [4, 5, 5]]]


def test_every_rotary_axis_continues_from_the_newest_token() -> None:
    positions = torch.tensor([[[0, 1, 1, 3]], [[0, 1, 2, 3]], [[0, 2, 1, 3]]])  # [3, 1, 4], as M-RoPE gives them
    layout = Layout.from_prompt(torch.tensor([[4, 3, 3, 5]]), 8, position_ids=positions)
    layout.append(0, [6])
    assert layout.positions[:, 0, 4].tolist() == [4, 4, 4]
    assert layout.next_positions(torch.tensor([[0, 1]])).tolist() == [[[4, 5]]] * 3


def test_positions_on_a_single_axis() -> None:
    positions = torch.tensor([[[0, 1, 1, 3]], [[0, 1, 2, 3]], [[0, 2, 1, 3]]])
    layout = Layout.from_prompt(torch.tensor([[4, 3, 3, 5]]), 8, position_ids=positions)
    layout.append(0, [6])
    assert layout.positions_1d()[0, :5].tolist() == [0, 2, 2, 3, 4]


def test_positions_may_differ_from_slots() -> None:
    layout = Layout.from_prompt(torch.tensor([[4, 3, 3, 5]]), 8, position_ids=torch.tensor([0, 1, 1, 2]))
    assert layout.next_positions(torch.tensor([[0, 1]])).tolist() == [[[2, 3]]]


def test_modalities_are_an_open_registry(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(modality, "_REGISTRY", dict(modality._REGISTRY))
    before = len(modality.known())
    event = modality.register("event", 0.7)
    assert modality.register("event", 0.7) is event
    assert modality.get("event") is event
    assert [m.id for m in modality.known()] == list(range(before + 1))


@pytest.mark.parametrize("name, threshold", [("language", 0.9), ("other", 1.5), ("other", -0.1)])
def test_wrong_modalities_are_refused(name: str, threshold: float) -> None:
    with pytest.raises(UserError, match=name):
        modality.register(name, threshold)


def test_an_unknown_modality_names_the_known_ones() -> None:
    with pytest.raises(UserError, match="language"):
        modality.get("smell")


@pytest.mark.parametrize("mask", [[1, 1, 1, 0], [0, 1, 0, 1], [0, 0, 0, 0]])
def test_padding_anywhere_but_on_the_left_is_refused(mask: list[int]) -> None:
    with pytest.raises(UserError, match="left"):
        Layout.from_prompt(torch.tensor([[4, 5, 6, 7]]), 8, torch.tensor([mask]))
