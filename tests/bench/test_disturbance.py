"""Disturbed samples are measured again: a spike is, a method that is always slow or drafts much is not."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import tiny_checkpoint
from msd.bench import measure, report
from msd.bench.data import Sample
from msd.bench.disturbance import REPEATS, disturbed, line
from msd.bench.timing import Run
from msd.core.statistics import Statistics
from msd.loading import load_target

COUNT = 6
Slower = Callable[[str, int, int], float]  # (method, sample, times it was timed before) -> factor


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Any]:
    place = tmp_path_factory.mktemp("target")
    tiny_checkpoint.write(place)
    return load_target(place)


def bench(target: tuple[Any, Any], slower: Slower, folder: Path | None = None) -> measure.Bench:
    """A benchmark whose clock is made: a prefill of 0.2 s and 0.01 s for each further token, times `slower`."""
    samples = [Sample((), "What is it? " * (1 + i), None, "say") for i in range(COUNT)]
    settings = measure.BenchSettings(("prompt-lookup",), 6, baselines=["transformers"])
    made, timed = measure.Bench(*target, samples, settings, folder), Counter[tuple[str, int]]()

    def clock(name: str, timer: Callable[..., Run]) -> Callable[..., Run]:
        def timed_by_it(inputs: dict[str, Any], seed: int) -> Run:
            run, factor = timer(inputs, seed=seed), slower(name, seed, timed[name, seed])
            timed[name, seed] += 1
            usual = 0.2 + 0.01 * max(0, run.tokens - 1)
            return replace(run, seconds=usual * factor, prefill=0.2 * factor)

        return timed_by_it

    made.timers = {name: clock(name, timer) for name, timer in made.timers.items()}
    return made


def results(made: measure.Bench) -> dict[str, Any]:
    made.measure(lambda text: None)
    found = made.results()
    assert found is not None
    return found


def test_a_spike_is_measured_again_and_a_slow_method_is_not(target: tuple[Any, Any]) -> None:
    calm = results(bench(target, lambda name, *_: 8.0 if name == "prompt-lookup" else 1.0))
    assert calm["environment"]["remeasured"] == {"samples": 0, "still_disturbed": 0}
    assert calm["sample_remeasured"] == [[]] * COUNT
    assert "No method took more than 3 times its usual time" in report.markdown(calm)

    def spike(name: str, sample: int, before: int) -> float:
        return (8.0 if name == "prompt-lookup" else 1.0) * (9.0 if (name, sample, before) == ("ar", 3, 0) else 1.0)

    found = results(bench(target, spike))
    assert found["sample_remeasured"] == [[], [], [], ["ar took 9.0 times its usual time"], [], []]
    assert found["sample_seconds"] == calm["sample_seconds"]  # the new measurement counts
    assert "measured again, with all methods: 1, of which 0 still take that long" in report.markdown(found)


def test_a_sample_that_stays_slow_is_measured_twice_more(target: tuple[Any, Any]) -> None:
    calls: list[int] = []

    def slow(name: str, sample: int, before: int) -> float:
        calls.append(before)
        return 5.0 if (name, sample) == ("ar", 2) else 1.0

    found = results(bench(target, slow))
    assert [len(reasons) for reasons in found["sample_remeasured"]] == [0, 0, REPEATS, 0, 0, 0]
    assert max(calls) == REPEATS
    assert found["environment"]["remeasured"] == {"samples": 1, "still_disturbed": 1}


def test_a_resumed_run_keeps_the_repetitions(target: tuple[Any, Any], tmp_path: Path) -> None:
    class StopError(Exception):
        pass

    def stopped_in_its_second_repetition(name: str, sample: int, before: int) -> float:
        if before == REPEATS:
            raise StopError
        return 5.0 if (name, sample) == ("ar", 2) else 1.0

    first = bench(target, stopped_in_its_second_repetition, tmp_path)
    with pytest.raises(StopError):
        first.measure(lambda text: None)
    asked: list[tuple[str, int]] = []

    def calm(name: str, sample: int, before: int) -> float:
        asked.append((name, sample))
        return 1.0

    found = results(bench(target, calm, tmp_path))
    reasons = found["sample_remeasured"][2]
    assert len(reasons) == REPEATS and found["environment"]["remeasured"] == {"samples": 1, "still_disturbed": 0}
    assert {sample for _, sample in asked} == {2}, "only that sample, after a warm-up"
    again = results(bench(target, calm, tmp_path))
    assert again["sample_seconds"] == found["sample_seconds"] and again["sample_remeasured"][2] == reasons


def made_run(passes: int, drafts: int, seconds: float) -> Run:
    """An answer after a prefill of 0.3 s. drafts: in each pass."""
    counts = Statistics(num_spec_steps=passes, num_draft_tokens=passes * drafts)
    return Run([[5] * (passes + 1)], 0.3 + passes * seconds, 0.3, counts)


def test_passes_with_many_drafts_are_no_disturbance() -> None:
    plain = [made_run(n, 0, 0.03) for n in (4, 20, 40, 41, 42, 43, 44)]
    paused = [made_run(run.tokens - 1, 0, 0.03) for run in plain[:-1]]
    exploring = made_run(43, 60, 0.15)  # five times as long per pass, for a tree of 60 drafts
    assert disturbed({"ar": plain, "msd": [*paused, exploring]}) == {}
    spiked = made_run(43, 0, 0.15)
    assert list(disturbed({"ar": plain, "msd": [*paused, spiked]})) == [6]
    assert disturbed({"ar": plain[:4], "msd": [*paused[:3], spiked]}) == {}, "too few samples to know what is usual"
    assert disturbed({"transformers:prompt-lookup": [*paused, spiked], "ar": plain}) == {}, "it counts no passes"


def test_the_line_ignores_outliers() -> None:
    rng = random.Random(0)
    points = [(x, 0.03 + 0.002 * x) for x in (rng.uniform(0, 60) for _ in range(40))]
    assert line(points) == pytest.approx((0.03, 0.002))
    assert line([*points, *((x, 9.0) for x in (1.0, 30.0, 59.0))]) == pytest.approx((0.03, 0.002), rel=0.05)
    assert line([(2.0, 0.5), (2.0, 0.7), (2.0, 0.6)]) == (0.6, 0.0)
    assert line([(0.0, 3.0), (1.0, 2.0)]) == (2.5, 0.0), "more drafts never make a pass faster"
    assert line([]) == (0.0, 0.0)
