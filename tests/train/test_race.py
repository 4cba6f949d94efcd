"""The race: every run gets the same minutes, and a copy of its drafter at the same number of answers."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
from recipes.race import plan as race
from recipes.race.plan import ANSWERS, TIME
from recipes.race.tables import markdown

from msd.errors import UserError


def test_runs_have_equal_minutes_and_copies_of_equal_answers() -> None:
    times = race.step_times()
    runs = race.plan(times)
    assert len({run.answers(ANSWERS) for run in runs.values()}) == 1
    assert min(run.answers(TIME) for run in runs.values()) == next(iter(runs.values())).answers(ANSWERS)
    for name, run in runs.items():
        seconds = times["seconds"][run.method]
        assert abs(run.minutes_at(TIME) - 30) <= 10 * seconds / 60, "the steps are rounded to ten"
        assert run.minutes_at(ANSWERS) * 60 == pytest.approx(run.steps(ANSWERS) * seconds)
        assert (run.settings.precision, run.settings.anchors) == (race.PRECISION, times["roots"][run.method])
        assert run.settings.keep_at[0] <= run.settings.steps
        assert race.drafter_folder(Path("out"), name, run, ANSWERS) != race.drafter_folder(Path("out"), name, run, TIME)
    assert {runs[f"msd seed {seed}"].settings.seed for seed in range(race.SEEDS)} == {0, 1, 2}
    assert runs["eagle2 on text"].settings.text_only and not runs["eagle2"].settings.text_only
    folders = [race.drafter_folder(Path("out"), name, run, TIME) for name, run in runs.items()]
    assert len(set(folders)) == len(folders)


def test_some_runs_alone_are_the_same_runs() -> None:
    times = race.step_times()
    whole = race.plan(times)
    alone = race.plan(times, ["vispec", "msd seed 1"])
    assert list(alone) == ["vispec", "msd seed 1"] and all(run == whole[name] for name, run in alone.items())
    with pytest.raises(UserError, match="no run of this contest"):
        race.plan(times, ["msd"])


def test_a_contest_of_equal_steps() -> None:
    contest = race.OF_EVENTS
    seconds = dict.fromkeys(contest.methods, 0.5) | {"msd with events": 0.6, "standard": 0.4}
    times = {"seconds": seconds}
    runs = race.plan(times, contest=contest)
    assert {run.settings.steps for run in runs.values()} == {800}, "those of the slowest in its minutes"
    assert runs["standard seed 0"].minutes == pytest.approx(800 * 0.4 / 60)
    assert all(run.settings.events == ("with events" in name) for name, run in runs.items())


def test_step_times_of_all_methods_are_needed(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"seconds": {"msd": 0.5}}))
    with pytest.raises(UserError, match="lacks the step time"):
        race.step_times(path=path)
    path.write_text(json.dumps({"seconds": dict.fromkeys(race.RACE.methods, 0.5)}))
    with pytest.raises(UserError, match="had other numbers of roots"):
        race.step_times(path=path)


def test_both_tables_have_time_and_answers_in_every_row(tmp_path: Path) -> None:
    record = {
        "steps": 10, "roots": 24, "answers": 6560, "minutes": 19.6, "rate": 0.7, "digest": "a",
        "held_out": {"acceptance": 0.5},
    }  # fmt: skip
    document = {
        "step_times": {"cpu": "X", "threads": 1, "precision": "bf16"},
        TIME: {"msd seed 0": record | {"answers": 10040, "minutes": 30.0}},
        ANSWERS: {"msd seed 0": record},
    }
    rows = [
        {
            "method": "msd seed 0",
            "task": task,
            "speedup_vs_best_plain": speed,
            "speedup_vs_best_plain_interval": [1.5, 1.7],
            "speedup_vs_best_plain_paired_median": 1.55,
            "mean_acceptance_length": 2.0,
            "target_passes": 77,
        }
        for task, speed in (("all", 1.6), ("detail", 2.4))
    ]
    rows += [row | {"method": "msd seed 0+prompt-lookup"} for row in rows]
    environment = {"drafters": {"msd seed 0": "a"}}
    (tmp_path / "results.json").write_text(json.dumps({"environment": environment, "rows": rows}))
    text = markdown(document, {TIME: tmp_path / "results.json", ANSWERS: tmp_path / "none.json"})
    time, answers = (line for line in text.splitlines() if line.startswith("| msd seed 0 |"))
    assert time.startswith("| msd seed 0 | 30.0 | 0.70 | 24 | 10,040 | 0.500 | 1.60 ")
    assert time.endswith("| 1.60 | 1.50–1.70 | 1.55 | 2.00 | 77 | 2.40 |")
    assert answers == "| msd seed 0 | 19.6 | 0.70 | 24 | 6,560 | 0.500 |"
    assert "| msd seed 0+prompt-lookup | – | – | – | – | – | 1.60 |" in text, (
        "another way of decoding with the same drafter"
    )
    document[TIME]["msd seed 0"] |= {"digest": "b"}
    with pytest.raises(UserError, match="other weights of 'msd seed 0'"):
        markdown(document, {TIME: tmp_path / "results.json", ANSWERS: tmp_path / "none.json"})


def test_a_finished_run_is_the_planned_one(tmp_path: Path) -> None:
    name = "eagle3 seed 1"
    run = race.plan(race.step_times())[name]
    folder = race.drafter_folder(tmp_path, name, run, TIME)
    assert not run.finished(tmp_path, name)
    folder.mkdir(parents=True)
    record = {"finished": run.settings.steps, "settings": asdict(run.settings)}
    (folder / "training.json").write_text(json.dumps(record))
    assert run.finished(tmp_path, name)
    assert 0.03 <= run.rate(TIME) < 0.04 < run.rate(ANSWERS) < 1
    longer = replace(run, settings=replace(run.settings, steps=2 * run.settings.steps))
    with pytest.raises(UserError, match="steps"):
        longer.finished(tmp_path, name)
