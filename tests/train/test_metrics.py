"""Scores, compared with cases computed by hand."""

import math

import pytest
from recipes.reference_vlm import metrics


def test_vqa_normalisation() -> None:
    assert metrics.vqa_normalised(" The Cats.") == "cats"
    assert metrics.vqa_normalised("Two") == "2"
    assert metrics.vqa_normalised("1,000") == "1000"
    assert metrics.vqa_normalised("3.5") == "3.5"
    assert metrics.exact_match(["Yes.", "a dog", "red", "none"], ["yes", "dog", "blue", "0"]) == 0.75


def test_yes_no() -> None:
    scores = metrics.yes_no_scores(["Yes, there is.", "No.", "yes", "Nothing"], ["yes", "no", "no", "no"])
    assert scores == {
        "accuracy": 0.5,
        "accuracy_yes": 1.0,
        "accuracy_no": pytest.approx(1 / 3),
        "said_yes": 0.5,
        "neither": 0.25,
    }


def test_repetition() -> None:
    eight = "a b c d e f g h"
    assert metrics.ngram_repetition(eight) == 0.0
    assert metrics.ngram_repetition(f"{eight} {eight}") == pytest.approx(1 / 9)  # 9 runs, the last one seen before
    assert metrics.repeats_sentence("A dog runs. It is brown. a dog runs!")
    assert not metrics.repeats_sentence("A dog runs. A dog runs fast.")
    scores = metrics.repetition_scores([f"{eight} {eight}", "x. y. x."], [16, 6])
    assert scores == {
        "repeated_8grams": pytest.approx(1 / 9),
        "repeated_sentence": 0.5,
        "mean_tokens": 11.0,
        "distinct": 1.0,
    }


def test_bleu_of_a_perfect_and_a_foreign_caption() -> None:
    pytest.importorskip("pycocoevalcap")
    references = {
        "1": ["A dog runs on the green grass .", "a brown dog"],
        "2": ["Two men sit at a table ."],
        "3": ["snow falls on hills"],
    }
    perfect = metrics.caption_scores(
        references, {"1": "A dog runs on the green grass.", "2": "two men sit at a table", "3": "Snow falls on hills!"}
    )
    assert perfect["bleu4"] == pytest.approx(1.0, abs=1e-6)
    assert perfect["cider"] > 5
    foreign = metrics.caption_scores(references, {"1": "blue car", "2": "one cat here", "3": "zebra"})
    assert foreign["cider"] == 0.0
    # BLEU-1 by hand: 3 of 4 words match, no brevity penalty
    assert metrics.caption_scores({"1": ["a b c d"]}, {"1": "a b c x"})["bleu1"] == pytest.approx(0.75, abs=1e-6)
    assert math.isfinite(foreign["bleu4"])
    with pytest.raises(ValueError, match="no references"):
        metrics.caption_scores({}, {"1": "a"})
