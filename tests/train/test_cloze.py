"""Cloze questions from captions, and mirrored photos."""

import random
from collections import Counter
from collections.abc import Callable

import pytest
from recipes.reference_vlm.cloze import answer_words, balanced, clozes, draw
from recipes.reference_vlm.data import Mix, MixConfig

NOUNS = {"dog", "ball", "grass", "dogs", "beach", "bike"}


@pytest.mark.parametrize(
    ("caption", "expected"),
    [
        (
            "A brown dog is chasing a red ball through the tall grass .",
            {
                ("What is the color of the dog?", "brown"),
                ("What is the color of the ball?", "red"),
                ("What is chasing a red ball through the tall grass?", "dog"),
                ("What is the brown dog chasing through the tall grass?", "ball"),
                ("A brown dog is chasing a red ball through what?", "grass"),
            },
        ),
        ("A man rides a bike", {("A man rides what?", "bike")}),
        (
            "Two dogs running on a beach .",
            {
                ("How many dogs are running on a beach?", "two"),
                ("What are running on a beach?", "dogs"),
                ("Two dogs running on what?", "beach"),
            },
        ),
        ("A dog house stands there .", set()),  # the dog is no thing of its own here
        ("They play ball", set()),
        ("", set()),
    ],
)
def test_questions_about_nouns_colours_and_numbers(caption: str, expected: set[tuple[str, str]]) -> None:
    assert set(clozes(caption, NOUNS)) == expected


def test_answers_are_nouns_not_colours_numbers_or_phrases() -> None:
    assert answer_words(["dog", "red", "two", "10", "hot dog", "outside"]) == {"dog"}


def test_rare_answers_are_preferred_and_no_question_is_drawn_twice() -> None:
    found = {str(i): [("What runs?", "dog"), ("What is it?", "cat" if i else "emu")] for i in range(100)}
    weights = balanced(found)
    assert weights["dog"] == pytest.approx(0.1)
    assert weights["emu"] == 1.0
    first = Counter(draw(found["0"], weights, 1, random.Random(i))[0][1] for i in range(200))
    assert first["emu"] > 150
    twice = [("What runs?", "dog"), ("What runs?", "cat"), ("What runs?", "dog")]
    assert len(draw(twice, {"dog": 1.0, "cat": 1.0}, 5, random.Random(0))) == 1


def test_late_phases_have_cloze_questions_and_mirrored_photos(mix: Callable[..., Mix]) -> None:
    train = mix(MixConfig(rows=9))
    train.clozes = {name: [("What runs?", "dog")] for name in train.clozes}
    train.rarity = {"dog": 1.0}
    drawn = [s for step in range(2110, 2130) for s in train.samples(step)]
    flickr = [s for s in drawn if s.pictures and s.pictures[0][0] == "flickr"]
    single = [s for s in flickr if [b.task for b in s.branches] == ["vqa"]]
    assert 0.2 < len(single) / len(flickr) < 0.4
    shown = Counter(s.pictures[0][0] for s in drawn if s.pictures)
    assert 0.4 < shown["mirrored"] / (shown["mirrored"] + shown["coco"]) < 0.6


def test_a_photo_with_questions_about_left_and_right_is_never_mirrored(mix: Callable[..., Mix]) -> None:
    train = mix(MixConfig(rows=9))
    train.questions = {name: [("What is on the left?", "cat")] for name in train.questions}
    drawn = [s for step in range(2110, 2130) for s in train.samples(step)]
    assert {s.pictures[0][0] for s in drawn if s.pictures} >= {"coco", "flickr"}
    assert not any(s.pictures[0][0] == "mirrored" for s in drawn if s.pictures)
