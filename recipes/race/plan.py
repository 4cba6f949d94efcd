"""The runs of a contest, and how long each one trains: of the race, of `msd` with other parts, or with events.

All runs get the same minutes of one core, or in some contests the same number of steps. A run's number of steps is
these minutes divided by the seconds of one of its steps, which were measured on an idle machine (`step_times/`); so
neither what else the machine does while a run trains nor training on another one changes anything. A step trains on
the same number of answers in every run; from how many positions in each it drafts (roots) belongs to the method. The
run with the slowest steps sees the fewest answers; each other run also saves its drafter when it has seen as many.
That drafter is in the middle of its schedule: its learning rate has not decayed, as that of the slowest run has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from msd.backends.packed import multiplies_in_bf16
from msd.drafters import registry
from msd.drafters.algorithms.msd import CONTROL, SHIPPED, SWITCHES, MSDConfig
from msd.drafters.toolkit import checkpoint
from msd.errors import UserError
from msd.system.files import read_json
from msd.train.drafting import DraftTraining, step_folder
from msd.train.loop import Schedule
from msd.train.losses.msd import LossConfig

STEP_TIMES = Path(__file__).with_name("step_times")
TIME, ANSWERS = "equal-time", "equal-answers"  # the two states of a run that are compared
SEEDS = 3
EVALUATIONS = 4  # on held-out answers, in a run
PRECISION = "bf16" if multiplies_in_bf16() else "float32"  # of products in training; the same for all runs
WITH_EVENTS = "msd with events"
PARTS = tuple(part for part in SWITCHES if getattr(MSDConfig, part))  # of `msd` by default
DESCRIBED = (*PARTS, "experts", "transfer", "vision")  # all of the description of MSD
LEARNED = LossConfig(weighting="learned")  # a share of the loss per modality, the default when the race was trained
RECORDED = ("method", "steps", "batch", "anchors", "lr", "seed", "text_only", "text_share", "precision")
RECORDED_OF_MSD = ("form", "layers", "parts", "events", "weighting")


@dataclass(frozen=True)
class Data:
    """What a contest trains on and is measured with. All are defaults of options of the command line.

    captured: the target's answers to train on. held_out: those that calibrate trained drafters. root: of the target's
    stored outputs. prompts: of the benchmark.
    """

    target: str = "reference"
    captured: Path = Path("runs/msd/captured.jsonl")
    held_out: Path = Path("runs/msd/val_captured.jsonl")
    images: Path = Path("../shared/data")
    root: Path = Path("runs/race/outputs")
    prompts: Path = Path("runs/race/val.jsonl")
    max_new_tokens: int = 96


@dataclass(frozen=True)
class Contest:
    """What is compared. methods: name -> settings, those with several seeds first. minutes: of one core, for each run.

    anchor: the method whose stored step time those of others can be measured against. text: the name of a method that
    is also trained on text alone. equal_steps: all runs train as many steps as the slowest has in these minutes.
    """

    name: str
    minutes: float
    methods: Mapping[str, DraftTraining]
    seeded: tuple[str, ...]
    anchor: str
    text: str | None = None
    equal_steps: bool = False
    data: Data = Data()

    @property
    def step_times(self) -> Path:
        """The file of measured step times."""
        return STEP_TIMES / f"{self.name}.json"

    @property
    def remedy(self) -> str:
        """How to measure them."""
        return f"measure it again with `python -m recipes.race measure --contest {self.name}`"


RACE = Contest(
    "race",
    30.0,
    {
        SHIPPED: DraftTraining(loss=LEARNED),
        CONTROL: DraftTraining(parts=()),
        "eagle3": DraftTraining(method="eagle3"),
        "eagle2": DraftTraining(method="eagle2"),
        "vispec": DraftTraining(method="vispec"),
    },
    (SHIPPED, CONTROL, "eagle3"),
    "eagle3",
    "eagle2",
)
_parts = {
    SHIPPED: DraftTraining(),
    CONTROL: DraftTraining(parts=()),
    "level by level": DraftTraining(form="ar", anchors=24),
    "with learned shares of the loss": DraftTraining(loss=LEARNED),
    "with experts": DraftTraining(parts=(*PARTS, "experts")),
    "with experts and transfer": DraftTraining(parts=(*PARTS, "experts", "transfer")),
    "with a compressed image": DraftTraining(parts=(*PARTS, "vision")),
    "with a read-out": DraftTraining(parts=(*PARTS, "readout")),
    "as described": DraftTraining(parts=DESCRIBED),
    "two layers": DraftTraining(layers=2),
}
OF_PARTS = Contest("parts", 10.0, _parts, tuple(_parts), CONTROL)
_clips = Path("runs/events/clips")
_events = {  # and the parts that read the image: a clip has four times as many image tokens
    SHIPPED: DraftTraining(events=False),
    WITH_EVENTS: DraftTraining(),
    f"{WITH_EVENTS} and motion": DraftTraining(parts=(*PARTS, "motion")),
    CONTROL: DraftTraining(events=False, parts=()),
    "with a compressed image": DraftTraining(events=False, parts=(*PARTS, "vision")),
    "with a read-out": DraftTraining(events=False, parts=(*PARTS, "readout")),
}
OF_EVENTS = Contest(
    "events",
    8.0,
    _events,
    tuple(_events),
    CONTROL,
    equal_steps=True,
    data=Data(
        target="reference-video",
        captured=Path("runs/events/captured.jsonl"),
        held_out=Path("runs/events/val_captured.jsonl"),
        images=_clips,
        root=Path("runs/events/outputs"),
        prompts=_clips / "bench.jsonl",
        max_new_tokens=128,
    ),
)
CONTESTS = {contest.name: contest for contest in (RACE, OF_PARTS, OF_EVENTS)}


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

    def rate(self, state: str) -> float:
        """Returns the learning rate in a state, as a fraction of the highest: how far its schedule has decayed."""
        return Schedule(self.settings.steps).factor(self.steps(state))

    def finished(self, out: Path, name: str) -> bool:
        """Whether the run is finished in its folder below `out`; UserError if another run is."""
        folder = drafter_folder(out, name, self, TIME)
        record = checkpoint.training(folder)
        if not record.get("finished"):
            return False
        planned, own = ({**settings, **settings["loss"]} for settings in (asdict(self.settings), record["settings"]))
        names = (*RECORDED, *(RECORDED_OF_MSD if self.settings.method == SHIPPED else ()))
        for key in names:
            value = list(planned[key]) if isinstance(planned[key], tuple) else planned[key]
            if own.get(key) != value:
                raise UserError(
                    f"'{folder}' holds a run with {key} {own.get(key)!r}, not {value!r} as planned; delete its folder, "
                    "or name another one with --out"
                )
        return True


def step_times(contest: Contest = RACE, path: Path | None = None, changed: Sequence[str] = ()) -> dict[str, Any]:
    """Reads the measured step times: "seconds" and "roots" by method, "precision", "cpu" and "threads"; or UserError.

    changed: methods that are about to be measured.
    """
    path = path or contest.step_times
    times = read_json(path, contest.remedy)
    seconds, measured = times.get("seconds"), times.get("roots")
    roots = {method: roots_of(settings) for method, settings in contest.methods.items() if method not in changed}
    if not isinstance(seconds, dict) or not all(isinstance(seconds.get(method), float) for method in roots):
        raise UserError(f"'{path}' lacks the step time of a method; {contest.remedy}")
    if not isinstance(measured, dict) or any(measured.get(method) != n for method, n in roots.items()):
        raise UserError(f"the steps in '{path}' had other numbers of roots; {contest.remedy}")
    return times


def plan(
    times: Mapping[str, Any], only: Sequence[str] = (), contest: Contest = RACE, minutes: float | None = None
) -> dict[str, Run]:
    """Returns name -> run, the most important first; with `only`, those of these names, in their order.

    minutes: of one core, instead of the contest's. Raises UserError for an unknown name. Leaving runs out does not
    change the others.
    """
    methods, minutes = contest.methods, contest.minutes if minutes is None else minutes
    steps = {method: steps_for(minutes, times["seconds"][method]) for method in methods}
    if contest.equal_steps:
        steps = dict.fromkeys(steps, min(steps.values()))
    runs = {}
    for seed in range(SEEDS):
        for method, settings in methods.items():
            if method in contest.seeded:
                runs[f"{method} seed {seed}"] = _run(method, replace(settings, seed=seed), steps, times)
            elif seed == 0:
                runs[method] = _run(method, settings, steps, times)
        if seed == 0 and contest.text:  # as many steps as the same method about images
            settings = replace(methods[contest.text], text_only=True)
            runs[f"{contest.text} on text"] = _run(contest.text, settings, steps, times)
    for name in only:
        if name not in runs:
            raise UserError(f"--only '{name}' is no run of this contest; choose from {', '.join(runs)}")
    return {name: runs[name] for name in only or runs}


def roots_of(settings: DraftTraining) -> int:
    """Returns from how many positions of an answer a step drafts."""
    return settings.anchors or registry.trainable(settings.method).roots


def _run(method: str, settings: DraftTraining, steps: Mapping[str, int], times: Mapping[str, Any]) -> Run:
    own = steps[method]
    settings = replace(
        settings,
        steps=own,
        anchors=roots_of(settings),
        precision=PRECISION,
        stages=replace(settings.stages, text=own // 50, rise=own // 10),
        evaluate_every=own // EVALUATIONS,
        keep_at=(min(steps.values()),),
    )
    return Run(method, settings, own * times["seconds"][method] / 60)


def drafter_folder(out: Path, name: str, run: Run, state: str) -> Path:
    """Returns the folder of a run's drafter in a state."""
    folder = folder_of(out, name)
    return folder / "drafter" if state == TIME else step_folder(folder, run.steps(state))


def steps_for(minutes: float, seconds: float) -> int:
    """Returns how many steps of `seconds` each fit into `minutes`, rounded to ten."""
    return max(10, round(minutes * 60 / seconds / 10) * 10)


def folder_of(out: Path, name: str) -> Path:
    """Returns the folder of a training run."""
    return out / "".join("_" if c in " :" else c for c in name if c != ",")
