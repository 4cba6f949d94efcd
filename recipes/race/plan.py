"""The runs of the race, and how long each one trains.

All runs get the same minutes of one core. A run's number of steps is these minutes divided by the seconds of one of its
steps, which were measured on an idle machine (`step_times.json`); so what else the machine does while a run trains
changes nothing. A step trains on the same number of answers in every run, and drafts from the same number of positions
in each (roots). The run with the slowest steps sees the fewest answers; each other run also saves its drafter when it
has seen as many. That drafter is in the middle of its schedule: its learning rate has not decayed, as that of the
slowest run has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from msd.drafters.algorithms.msd import CONTROL, SHIPPED
from msd.errors import UserError
from msd.system.files import read_json
from msd.train.drafting import DraftTraining, step_folder
from recipes.msd.rows import folder_of, steps_for

STEP_TIMES = Path(__file__).with_name("step_times.json")
REMEDY = "measure it again with `python -m recipes.race measure`"
TIME, ANSWERS = "equal-time", "equal-answers"  # the two states of a run that are compared
SEEDS = 3
MINUTES = 30.0
ROOTS = DraftTraining().anchors  # positions per answer that drafts start from
EVALUATIONS = 4  # on held-out answers, in a run
ON_TEXT = "eagle2 on text"
METHODS: dict[str, DraftTraining] = {  # those with several seeds first
    SHIPPED: DraftTraining(),
    CONTROL: DraftTraining(parts=()),
    "eagle3": DraftTraining(method="eagle3"),
    "eagle2": DraftTraining(method="eagle2"),
    "vispec": DraftTraining(method="vispec"),
}
SEEDED = (SHIPPED, CONTROL, "eagle3")


@dataclass(frozen=True)
class Run:
    """One training run: its method (a key of the step times) and its settings. minutes: of one core, by step time."""

    method: str
    settings: DraftTraining
    minutes: float

    def answers(self, state: str) -> int:
        """Returns how many answers the run has seen in a state; an answer seen twice counts twice."""
        return self.steps(state) * self.settings.batch

    def steps(self, state: str) -> int:
        """Returns the number of steps in a state."""
        return self.settings.steps if state == TIME else self.settings.keep_at[0]

    def minutes_at(self, state: str) -> float:
        """Returns the minutes of one core in a state."""
        return self.minutes * self.steps(state) / self.settings.steps


def step_times(path: Path = STEP_TIMES) -> dict[str, Any]:
    """Reads the measured step times: "seconds" by method, "roots", "precision", "cpu" and "threads"; or UserError."""
    times = read_json(path, REMEDY)
    seconds = times.get("seconds")
    if not isinstance(seconds, dict) or not all(isinstance(seconds.get(m), float) for m in METHODS):
        raise UserError(f"'{path}' lacks the step time of a method of the race; {REMEDY}")
    if not isinstance(times.get("roots"), int):
        raise UserError(f"'{path}' lacks the number of roots that a step drafts from; {REMEDY}")
    return times


def plan(minutes: float, times: Mapping[str, Any], only: Sequence[str] = ()) -> dict[str, Run]:
    """Returns name -> run, the most important first; with `only`, those of these names, in their order.

    Raises UserError for an unknown name. Leaving runs out does not change the others.
    """
    steps = {method: steps_for(minutes, times["seconds"][method]) for method in METHODS}
    runs = {}
    for seed in range(SEEDS):
        for method, settings in METHODS.items():
            if method in SEEDED:
                runs[f"{method} seed {seed}"] = _run(method, replace(settings, seed=seed), steps, times)
            elif seed == 0:
                runs[method] = _run(method, settings, steps, times)
        if seed == 0:  # a step on text takes no longer than one about images
            runs[ON_TEXT] = _run("eagle2", replace(METHODS["eagle2"], text_only=True), steps, times)
    for name in only:
        if name not in runs:
            raise UserError(f"--only '{name}' is no run of the race; choose from {', '.join(runs)}")
    return {name: runs[name] for name in only or runs}


def _run(method: str, settings: DraftTraining, steps: Mapping[str, int], times: Mapping[str, Any]) -> Run:
    own = steps[method]
    settings = replace(
        settings,
        steps=own,
        anchors=times["roots"],
        precision=times["precision"],
        stages=replace(settings.stages, text=own // 50, rise=own // 10),
        evaluate_every=own // EVALUATIONS,
        keep_at=(min(steps.values()),),
    )
    return Run(method, settings, own * times["seconds"][method] / 60)


def drafter_folder(out: Path, name: str, run: Run, state: str) -> Path:
    """Returns the folder of a run's drafter in a state."""
    folder = folder_of(out, name)
    return folder / "drafter" if state == TIME else step_folder(folder, run.steps(state))
