"""The map between two vocabularies: what is shared, what is masked, and maps for other tables are refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import tiny_checkpoint
from msd.drafters.algorithms.eventgpt import Pieces, VocabularyMap
from msd.errors import UserError

LLAMA = ("<unk>", "<s>", "</s>", "▁a", "▁b", "c")
TARGET = Pieces((*LLAMA, "<image>", "<video>"), frozenset({0, 1, 2, 6, 7}))
DRAFTER = Pieces((*LLAMA, "<event>"), frozenset({0, 1, 2, 6}))


def test_two_that_extend_the_same_pieces() -> None:
    words = VocabularyMap.between(DRAFTER, TARGET)
    assert words.to_target.tolist() == [0, 1, 2, 3, 4, 5, -1]
    assert words.to_drafter.tolist() == [0, 1, 2, 3, 4, 5, -1, -1]
    assert words.read(torch.tensor([[5, 6], [7, 90]])).tolist() == [[5, 0], [0, 0]], "unknown is the drafter's <unk>"
    logits = torch.arange(7.0)
    logits[6] = 100.0  # a piece that the target does not have
    law = words.shared(logits).softmax(-1)
    assert words.ids.tolist() == [0, 1, 2, 3, 4, 5] and torch.isclose(law.sum(), torch.ones(()))
    assert torch.allclose(law, logits[:6].softmax(-1))


def test_pieces_decide_and_kinds_must_agree() -> None:
    drafter = Pieces(("c", "▁a", "<s>", "only", None, "</s>"), frozenset({2}), unknown=3)  # </s> is a normal piece here
    words = VocabularyMap.between(drafter, TARGET)
    assert words.to_target.tolist() == [5, 3, 1, -1, -1, -1]
    assert words.drafter_ids.tolist() == [0, 1, 2] and words.ids.tolist() == [5, 3, 1]
    assert words.read(torch.tensor([1, 2, 3, 5])).tolist() == [2, 3, 1, 0]
    assert words.shared(torch.arange(6.0)).tolist() == [0, 1, 2]


def test_models_with_more_or_fewer_rows_than_pieces() -> None:
    words = VocabularyMap.between(DRAFTER, TARGET).sized(10, 4)
    assert words.to_target.tolist() == [0, 1, 2, 3, -1, -1, -1, -1, -1, -1]
    assert words.to_drafter.tolist() == [0, 1, 2, 3]
    assert words.shared(torch.arange(10.0)).tolist() == [0, 1, 2, 3]


def test_nothing_shared() -> None:
    with pytest.raises(UserError, match="share no piece"):
        VocabularyMap.between(Pieces(("x", "y"), frozenset()), TARGET)


@pytest.mark.parametrize("drafter", [DRAFTER, Pieces(("c", "▁a", "▁b", "<s>"), frozenset({3}), unknown=2)])
def test_a_saved_map_is_for_its_tables_alone(drafter: Pieces, tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    words = VocabularyMap.between(drafter, TARGET)
    words.save(path)
    again = VocabularyMap.load(path)
    assert torch.equal(again.pairs, words.pairs) and again.unknown == words.unknown
    assert torch.equal(again.to_drafter, words.to_drafter) and torch.equal(again.to_target, words.to_target)
    again.check(drafter, TARGET)
    renamed = Pieces((*TARGET.names[:-1], "<clip>"), TARGET.special)
    with pytest.raises(UserError, match=r"for a target whose piece table has hash \w{12}, not \w{12}"):
        again.check(drafter, renamed)
    normal = Pieces(drafter.names, frozenset(), drafter.unknown)  # same pieces, another kind
    with pytest.raises(UserError, match="for a drafter whose piece table"):
        again.check(normal, TARGET)


def test_damaged_maps_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "vocabulary.json"
    for text in ("", "[]", json.dumps({"format": 2}), json.dumps({"format": 1, "runs": [[0]]})):
        path.write_text(text)
        with pytest.raises(UserError, match="vocabulary map"):
            VocabularyMap.load(path)
    with pytest.raises(UserError, match="bare ids"):
        VocabularyMap.identity(4).save(path)


def test_the_table_of_a_tokenizer() -> None:
    tokenizer = tiny_checkpoint.processor().tokenizer
    table = Pieces.of(tokenizer)
    assert table.names[:4] == tuple(tiny_checkpoint.SPECIAL) and table.special == {0, 1, 2, 3}
    assert Pieces.from_json(table.as_json()) == table and len(table.digest) == 64
    assert table.digest == Pieces.of(tiny_checkpoint.processor().tokenizer).digest
    with pytest.raises(UserError, match="piece table"):
        Pieces.from_json("{}")
