"""The reference model's data mix and packing, on invented captions."""

import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace

import pytest
from invented import PHOTOS
from recipes.reference_vlm.data import Mix
from recipes.reference_vlm.facts import extract, open_questions, yes_no
from recipes.reference_vlm.long_answers import long_answer, repeats
from recipes.reference_vlm.metrics import repeats_sentence
from recipes.reference_vlm.pack import IMAGE, Branch, Sample, pack, place
from recipes.reference_vlm.words import THINGS, absent, content, present


@pytest.mark.parametrize("captions", PHOTOS)
@pytest.mark.parametrize("seed", range(20))
def test_long_answers_do_not_repeat_themselves(captions: list[str], seed: int) -> None:
    facts = extract(captions)
    answer = long_answer(captions, facts, random.Random(seed))
    assert not repeats_sentence(answer)
    assert not repeats(answer)
    known: set[str] = set()
    for i, sentence in enumerate(re.split(r"(?<=\.) ", answer)[:2]):
        assert i == 0 or len(content(sentence) - known) >= 1
        known |= content(sentence)
    assert answer == long_answer(captions, facts, random.Random(seed))
    assert len({long_answer(captions, facts, random.Random(s)) for s in range(20)}) > 10


def test_a_synonym_is_neither_present_nor_absent() -> None:
    dog = extract(PHOTOS[0])
    assert {t.name for t in dog.present} >= {"dog", "ball", "beach"}
    assert not {t.name for t in dog.absent} & {"dog", "ball", "beach", "water", "boat"}
    person = extract(PHOTOS[2])
    assert not {"man", "woman", "boy", "girl", "child"} & {t.name for t in (*person.present, *person.absent)}
    assert "woman" in {t.name for t in absent({"man"})}
    assert "man" not in {t.name for t in absent({"person"})}
    for thing in THINGS:
        assert thing in present({thing.name})
        assert thing not in absent({thing.name})


def test_questions_are_answered_by_the_captions() -> None:
    facts = extract(PHOTOS[1])
    answers = dict(open_questions(facts, random.Random(0)))
    assert any(a == "Two." for q, a in answers.items() if q.startswith("How many men"))
    assert dict(open_questions(extract(PHOTOS[2]), random.Random(0)))["What color is the jacket?"] == "Yellow."
    weights = {t.name: 1.0 for t in THINGS}
    for there, start in ((True, "Yes, there"), (False, "No, there")):
        pair = yes_no(facts, weights, random.Random(1), there)
        assert pair and pair[1].startswith(start)


def sample(name: int, blind: bool = False, pictures: int = 1) -> Sample:
    prefix = (1, 4, *([IMAGE] * 64 + [5]) * pictures)
    branches = (Branch((10, 11), (12, 13, 2), "caption"), Branch((20,), (21, 2), "vqa", 3.0))
    return Sample(prefix, branches, tuple(("flickr", name) for _ in range(pictures)), blind)


def test_branches_see_their_prefix_and_themselves() -> None:
    batch = pack(
        place([sample(0), sample(1, blind=True), Sample((1, 4), (Branch((6,), (7, 2), "text"),))], 1, 160), 160, 2
    )
    mask = batch.mask()[0, 0]
    assert batch.pictures == [("flickr", 0), ("flickr", 1)]
    assert int(batch.is_image.sum()) == 128
    for q in range(160):
        for k in range(160):
            s, b = batch.sample[0], batch.branch[0]
            seen = k <= q and s[q] == s[k] and b[k] in (0, b[q])
            seen = bool(seen) and not (s[q] == 1 and batch.is_image[0, k] and not batch.is_image[0, q])
            assert bool(mask[q, k]) == (seen or q == k)
    n = len(sample(0).prefix)
    assert batch.positions[0, : n + 5].tolist() == list(range(n + 5))
    assert batch.positions[0, n + 5 : n + 8].tolist() == list(range(n, n + 3))
    assert batch.targets[:5].tolist() == [12, 13, 2, 21, 2]
    assert batch.ids[batch.rows, batch.columns].tolist()[:5] == [11, 12, 13, 20, 21]
    assert batch.weights[:5].tolist() == [1, 1, 1, 3, 3]


def test_a_sample_that_does_not_fit_loses_branches_before_it_is_left_out() -> None:
    placed = place([sample(i) for i in range(3)], 2, 74)
    assert [len(row) for row in placed] == [1, 1]
    assert all(len(s.branches) == 1 for row in placed for s in row)
    assert place([sample(0, pictures=4)], 1, 100) == [[]]


def test_samples_with_many_branches_lose_some_first() -> None:
    many = replace(sample(0), branches=sample(0).branches * 4)
    short = [Sample((1, 4), (Branch((6,) * 10, (7, 2), "text"),))]
    length = len(many)
    longest_first = [s for row in place([many, *short], 1, length) for s in row]
    assert longest_first == [many]
    whole_first = [s for row in place([many, *short], 1, length, whole_first=True) for s in row]
    assert whole_first[:1] == short
    assert 0 < len(whole_first[1].branches) < len(many.branches)


def test_the_mix_is_a_function_of_seed_and_step(mix: Callable[..., Mix]) -> None:
    first, again = mix(), mix()
    later = [first.samples(s) for s in range(12)][11]
    assert again.samples(11) == later
    assert mix(seed=1).samples(11) != later


def test_val_pictures_are_not_trained_on_and_train_pictures_equally_often(mix: Callable[..., Mix]) -> None:
    train = mix()
    seen = Counter(p for step in range(60) for s in train.samples(step) for p in set(s.pictures))
    assert not {p for p in seen if p[1] < 2}
    flickr = [n for (name, _), n in seen.items() if name == "flickr"]
    assert len(flickr) == 6
    assert max(flickr) - min(flickr) <= 1
    val = mix(split="val")
    assert {p[1] for step in range(20) for s in val.samples(step) for p in s.pictures} == {0, 1}


def test_a_tenth_of_the_samples_is_blind(mix: Callable[..., Mix]) -> None:
    train = mix()
    blind = [s.blind for step in range(200) for s in train.samples(step) if s.pictures]
    assert 0.07 < sum(blind) / len(blind) < 0.13  # about 1,800 draws: seven standard errors either side
    assert train.batch(0).features.shape[1:] == (64, 1328)
