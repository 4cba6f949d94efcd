"""Phases of the data mix: each starts at its step, and no photo is skipped or repeated at a border."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest
from recipes.reference_vlm.data import FIRST_RATES, LAST_RATES, LATE_WEIGHTS, PHASES, WEIGHTS, Mix, MixConfig
from recipes.reference_vlm.pack import Sample

QUICK = MixConfig(phases=tuple(replace(p, start=7 * i) for i, p in enumerate(PHASES)))
BORDERS = (232, 319, 432, 570, 1046, 1373, 2110)


def drawn(mix: Mix, source: str, steps: range) -> list[Sample]:
    name = lambda s: s.pictures[0][0].replace("mirrored", "coco") if s.pictures else "text"  # noqa: E731
    return [s for step in steps for s in mix.samples(step) if name(s) == source]


def tasks(sample: Sample) -> Counter[str]:
    return Counter(b.task for b in sample.branches)


@pytest.mark.parametrize("border", BORDERS)
def test_a_step_does_not_depend_on_earlier_draws(mix: Callable[..., Mix], border: int) -> None:
    steps = (border - 1, border, border + 1)
    walked = mix()
    onwards = [walked.samples(s) for s in steps]
    back = [walked.samples(s) for s in reversed(steps)]
    assert back[::-1] == onwards == [mix().samples(s) for s in steps]
    assert all(a != b for a, b in pairwise(onwards))


@pytest.mark.parametrize(("n", "border"), enumerate(BORDERS, 1))
def test_a_phase_changes_nothing_before_its_first_step(mix: Callable[..., Mix], n: int, border: int) -> None:
    now, without = mix(MixConfig(rows=40)), mix(MixConfig(rows=40, phases=PHASES[:n]))
    assert now.samples(border - 1) == without.samples(border - 1)
    what = lambda m: (m.samples(border), m._phase(border).whole_first)  # noqa: E731
    assert what(now) != what(without)


@pytest.mark.parametrize("source", ["flickr", "coco", "words"])
def test_no_photo_is_skipped_or_drawn_twice_at_a_border(mix: Callable[..., Mix], source: str) -> None:
    train = mix(QUICK)
    rows = [s.pictures[0][1] for s in drawn(train, source, range(120))]
    laps = [rows[i : i + 6] for i in range(0, len(rows), 6)]
    assert len(laps) > 3
    assert all(sorted(lap) == [2, 3, 4, 5, 6, 7] for lap in laps[:-1])
    assert len(set(laps[-1])) == len(laps[-1])


def test_each_source_is_drawn_at_the_rate_of_its_phase(mix: Callable[..., Mix]) -> None:
    train, wider = mix(), mix(MixConfig(rows=4))
    for source in FIRST_RATES:
        for first, rates in ((530, FIRST_RATES), (570, LAST_RATES)):
            steps = range(first, first + 40)
            assert len(drawn(train, source, steps)) == pytest.approx(40 * 0.75 * rates[source], abs=1)
            assert len(drawn(wider, source, steps)) == pytest.approx(40 * rates[source], abs=1)


@pytest.mark.parametrize(
    ("first", "last", "detail", "captions", "weights"),
    [
        (0, 231, 0.85, 1, WEIGHTS),
        (232, 318, 0.85, 1, WEIGHTS),
        (319, 431, 0.85, 1, LATE_WEIGHTS),
        (432, 569, 0.4, 2, LATE_WEIGHTS),
        (570, 1045, 0.3, 2, LATE_WEIGHTS),
        (1046, 1372, 0.3, 2, LATE_WEIGHTS),
    ],
)
def test_a_phase_applies_from_its_first_step_to_its_last(
    mix: Callable[..., Mix], first: int, last: int, detail: float, captions: int, weights: dict[str, float]
) -> None:
    train = mix()
    for step in (first, last):
        assert {b.weight == weights[b.task] for s in train.samples(step) for b in s.branches} == {True}
        assert {tasks(s)["caption"] for s in drawn(train, "flickr", range(step, step + 1))} <= {captions, 2 * captions}
    photos = drawn(train, "flickr", range(first, first + 60))
    long = [s for s in photos if tasks(s)["detail"]]
    assert len(long) / len(photos) == pytest.approx(detail, abs=0.1)  # 176 draws or more: 2.7 standard errors
    assert {tasks(s)["caption"] for s in long} == {captions}
    assert {tasks(s)["caption"] for s in photos if not tasks(s)["detail"]} == {2 * captions}


def test_repetition_is_trained_against_from_step_232_on(mix: Callable[..., Mix]) -> None:
    train = mix()
    against = [any(b.avoid for s in train.samples(step) for b in s.branches) for step in range(220, 244)]
    assert not any(against[:12])
    assert against[12]
    photos = drawn(train, "flickr", range(232, 292))
    for s in photos:
        assert tasks(s)["avoid"] == (tasks(s)["detail"] and s.pictures[0][1] % 2)
        assert all(b.avoid == (b.task == "avoid") for b in s.branches)


def test_validation_data_is_the_same_in_every_phase(mix: Callable[..., Mix]) -> None:
    val, never_changed = mix(split="val"), mix(MixConfig(phases=PHASES[:1]), split="val")
    for step in (0, *BORDERS, 1500):
        samples = val.samples(step)
        assert samples == never_changed.samples(step)
        assert {b.weight == WEIGHTS[b.task] and not b.avoid for s in samples for b in s.branches} == {True}


def test_the_last_phase_trains_most_photos_on_all_their_captions_at_once(mix: Callable[..., Mix]) -> None:
    photos = drawn(mix(), "flickr", range(1373, 1433))
    shared = [s for s in photos if all(not b.question for b in s.branches)]
    assert len(shared) / len(photos) == pytest.approx(0.8, abs=0.08)
    for sample in shared:
        assert tasks(sample) == Counter(caption=5)
        assert sample.prefix.count(-1) == 64  # the picture, then the question
        assert len(sample.prefix) > 64 + 8
    for sample in photos:
        if sample not in shared:
            assert all(b.question for b in sample.branches)
