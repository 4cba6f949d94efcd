"""Timing methods against each other, honestly: one process, one run, interleaved, cold, end to end.

Every sample is answered by every method in turn, in an order that rotates from sample to sample, with empty vision
caches; all share prompts, generation settings, dtype and threads. `transformers` is the library's `generate()` as users
run it, `transformers:…` its own drafting where that works, `ar` our own loop without drafts. Times are wall times of
the whole call, image encoding and prefill included; decode-only leaves out the time to the first token. Acceptance by
modality is measured afterwards, untimed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from msd import __version__
from msd.bench.conversation import Conversation, check_prompts, digest
from msd.bench.data import Sample
from msd.bench.modality import SIZES, LabelledSample, Labeller, columns, mean_mass, top_mass
from msd.bench.rows import row
from msd.bench.timing import LIBRARY, PLAIN, TRANSFORMERS, Run, library, ours, outside_kernels
from msd.bench.unfinished import Unfinished, made_of
from msd.config import SpeculativeConfig
from msd.drafters import auxiliary
from msd.labels.label_thresholds import ModalityThresholds
from msd.model import SpeculativeVLM
from msd.targets.registry import fingerprint

REFUSALS = (ValueError, RuntimeError, TypeError, AttributeError)  # some of the library's ways refuse some models


def run(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Sample],
    methods: Sequence[str],
    max_new_tokens: int,
    temperature: float,
    report: Callable[[str], None],
    cuts: ModalityThresholds | None = None,
    config: SpeculativeConfig | None = None,
    warm: bool = False,
    batch: int = 1,
    baselines: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Results of a whole run, as `Bench.results` gives them; the arguments are those of `Asked` and `Bench`."""
    asked = Asked(tuple(methods), max_new_tokens, temperature, cuts, config, warm, batch, baselines)
    bench = Bench(model, processor, samples, asked)
    bench.measure(report)
    found = bench.results()
    assert found is not None
    return found


@dataclass(frozen=True)
class Asked:
    """What is measured. `ar` and the library's `baselines` (all of its ways by default) are measured too.

    At a temperature above 0 sample i is drawn with seed i. With `cuts`, and at temperature 0, rows of drafting methods
    have acceptance and coverage by modality (see `modal`). `warm`: our methods answer once more with the photos
    encoded, for a column of its own. `batch`: samples of a task answered together. about: more that a run is made of,
    which one that goes on from it must share.
    """

    methods: tuple[str, ...]
    max_new_tokens: int
    temperature: float = 0.0
    cuts: ModalityThresholds | None = None
    config: SpeculativeConfig | None = None
    warm: bool = False
    batch: int = 1
    baselines: Sequence[str] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        """Of `generate()`."""
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0}
        chosen = sampling if self.temperature > 0 else {"do_sample": False}
        return {**chosen, "max_new_tokens": self.max_new_tokens}


@dataclass(frozen=True)
class Answers:
    """Of a group of samples, by way. not_run: ways of the library that do not run here, and why."""

    runs: dict[str, Run]
    not_run: dict[str, str]


@dataclass(frozen=True)
class Mass:
    """Of a group of samples: mass of the likeliest tokens at every answer token, [T][3] (see `mass`)."""

    likeliest: list[list[float]]


class Bench:
    """A benchmark that can be broken off: `results` are of what has been measured so far.

    With `folder` every part is kept there as soon as it is measured, and a run that was broken off goes on.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        samples: Sequence[Sample],
        asked: Asked,
        folder: Path | None = None,
    ) -> None:
        self.model, self.samples, self.asked = model, samples, asked
        self.ways, self.not_run = dict[str, Callable[..., Run]](), dict[str, str]()
        for name in LIBRARY if asked.baselines is None else asked.baselines:
            try:
                self.ways[name] = partial(library, model, settings={**asked.settings, **LIBRARY[name](model)})
            except REFUSALS as error:
                self.not_run[name] = _refusal(error)
        names = list(dict.fromkeys([PLAIN, *asked.methods]))
        config = _config(asked.config or SpeculativeConfig(), folder)
        self.engines = {name: SpeculativeVLM(model, processor, config, name) for name in names}
        self.ways |= {
            name: partial(ours, engine, settings=asked.settings, warm=asked.warm)
            for name, engine in self.engines.items()
        }
        self.ask = Conversation(self.engines[PLAIN])
        check_prompts(self.ask, samples, asked.max_new_tokens)
        self.groups = _grouped(samples, asked.batch)
        self.runs: dict[str, list[Run]] = {name: [] for name in self.ways}
        self.labels: list[LabelledSample] = []
        self.masses: list[Tensor] = []
        self.outside: dict[str, float] | None = {}
        self.kept = Unfinished(folder, {} if folder is None else self._made_of())

    @property
    def answered(self) -> list[list[int]]:
        """The groups of samples that every method has answered."""
        return self.groups[: min(map(len, self.runs.values()))]

    @property
    def done(self) -> str:
        """How far the answers are, such as "5 of 20 samples"."""
        return f"{sum(map(len, self.answered))} of {len(self.samples)} samples"

    def measure(self, report: Callable[[str], None]) -> None:
        """Everything that is still to be measured. What it raises leaves what came before in place."""
        self._answer(report)
        if self.asked.cuts is not None and self.asked.temperature == 0 and self.asked.batch == 1:
            self._label(self.asked.cuts, report)
        for number, group in enumerate(self.groups):
            report("the target's certainty")
            self.masses.append(self._mass(number, group))
        self.outside = outside_kernels(self.engines[PLAIN].target)

    def _answer(self, report: Callable[[str], None]) -> None:
        todo = [number for number in range(len(self.groups)) if self.kept.get(Answers, number) is None]
        if todo:  # a pass that warms up and is not counted
            self._ask_all(todo[0], f"warming up with sample {self.groups[todo[0]][0] + 1}", report)
        unit = "sample" if self.asked.batch == 1 else "batch"
        for number in range(len(self.groups)):
            part = self.kept.get(Answers, number)
            if part is None or not part.runs.keys() | part.not_run.keys() >= self.ways.keys():
                found = self._ask_all(number, f"{unit} {number + 1} of {len(self.groups)}", report)
                part = self.kept.put(number, Answers(found, self.not_run))
            self._leave_out(part.not_run)
            for name in self.ways:
                self.runs[name].append(part.runs[name])

    def _ask_all(self, number: int, place: str, report: Callable[[str], None]) -> dict[str, Run]:
        """The answers of every way to a group of samples, in an order that rotates."""
        group = self.groups[number]
        inputs, found = self.ask(*(self.samples[i] for i in group)), {}
        turn = (number + 1) % len(self.ways)
        for name in [*list(self.ways)[turn:], *list(self.ways)[:turn]]:
            report(f"{place}, {name}")
            try:
                seen = _seen(self.engines[name], [self.samples[i] for i in group]) if name in self.engines else {}
                found[name] = self.ways[name]({**inputs, **seen}, seed=group[0])
            except REFUSALS as error:
                if name not in LIBRARY or name == TRANSFORMERS:
                    raise
                self._leave_out({name: _refusal(error)})
        return found

    def _leave_out(self, refused: Mapping[str, str]) -> None:
        """Ways of the library that do not run here, and why."""
        for name in refused.keys() & self.ways.keys():
            del self.ways[name], self.runs[name]
        self.not_run |= refused

    def _label(self, cuts: ModalityThresholds, report: Callable[[str], None]) -> None:
        labeller = Labeller(self.engines, cuts, self.asked.settings)
        for i, sample in enumerate(self.samples):
            part = self.kept.get(LabelledSample, i)
            if part is None:
                report(f"sample {i + 1} of {len(self.samples)}, labels")
                (answer,) = self.runs[TRANSFORMERS][i].answers
                trees = {name: self.runs[name][i] for name in self.engines if name != PLAIN}
                part = self.kept.put(i, labeller(self.ask(sample), sample, answer, trees))
            self.labels.append(part)

    def _mass(self, number: int, group: Sequence[int]) -> Tensor:
        """[T, 3], of all answers of a group (see `mass`)."""
        part = self.kept.get(Mass, number)
        if part is None:
            target, answers = self.engines[PLAIN].target, self.runs[TRANSFORMERS][number].answers
            each = [
                top_mass(target, self.ask(self.samples[i]), answer, self.asked.temperature)
                for i, answer in zip(group, answers, strict=True)
            ]
            part = self.kept.put(number, Mass(torch.cat(each).tolist()))
        return torch.tensor(part.likeliest).reshape(-1, len(SIZES))

    def results(self) -> dict[str, Any] | None:
        """As in results.json: `environment`, a row per method and task (task "all" first), every sample's seconds.

        None before every method has answered a sample. Of a broken-off run `environment` says so, and what was to be
        measured after the answers is empty unless it is there for all of them.
        """
        groups = self.answered
        if not groups:
            return None
        first = [self.samples[group[0]].task for group in groups]
        chosen = {task: [i for i, own in enumerate(first) if task in ("all", own)] for task in ("all", *first)}
        comparable = self.asked.temperature == 0 or self.asked.batch == 1
        rows = [row(name, task, chosen[task], self.runs, comparable) for task in chosen for name in self.ways]
        if self.labels and len(self.labels) >= len(groups):
            for each in rows:
                if each["method"] in self.labels[0].chains:
                    each |= columns(self.labels, self.runs, each["method"], chosen[each["task"]])
        whole = len(self.masses) == len(self.groups)
        return {
            "environment": {**environment(self.model, self.asked.settings), **self._told(whole)},
            "target_top_mass": {t: mean_mass(self.masses[i] for i in chosen[t]) for t in chosen} if whole else None,
            "rows": rows,
            "sample_tasks": first,
            "sample_seconds": {name: [round(run_.seconds, 4) for run_ in self.runs[name]] for name in self.ways},
        }

    def _told(self, whole: bool) -> dict[str, Any]:
        """What the environment of these results tells besides the machine."""
        asked, backend = self.asked, self.engines[PLAIN].target.backend
        known = None if asked.cuts is None else asked.cuts.model_dump()
        policy = {} if asked.config is None else asked.config.model_dump(include={"verifier", "thresholds", "epsilon"})
        curve = next((asdict(e.plan.costs) for e in self.engines.values() if e.plan.costs), None)
        told = {"backend": backend.name, "backend_lossy": backend.lossy, **policy, "modality_cuts": known}
        told |= {"costs": curve, "batch": asked.batch, "outside_kernels": self.outside, "not_run": self.not_run}
        return told if whole else {**told, "broken_off": self.done}

    def _made_of(self) -> dict[str, Any]:
        """What a run that goes on from this one must share."""
        asked = self.asked
        own: dict[str, Any] = {"methods": list(self.engines), "backend": self.engines[PLAIN].target.backend.name}
        own |= {"baselines": [n for n in LIBRARY if n in {*self.ways, *self.not_run}]}
        own |= {"temperature": asked.temperature, "batch": asked.batch, "warm": asked.warm, **asked.about}
        own |= {"policy": None if asked.config is None else asked.config.model_dump(mode="json")}
        own |= {"cuts": None if asked.cuts is None else asked.cuts.model_dump(), "data": digest(self.samples)}
        return {**own, "target": fingerprint(self.model), **environment(self.model, asked.settings)}


def _seen(engine: SpeculativeVLM, samples: Sequence[Sample]) -> dict[str, Any]:
    """What only the engine's drafter sees of samples."""
    return auxiliary.argument(engine.drafter, "events", [sample.events for sample in samples])


def _config(config: SpeculativeConfig, folder: Path | None) -> SpeculativeConfig:
    """With the backend that a broken-off run in `folder` measured to be the faster, for a run that would measure it."""
    begun = made_of(folder).get("backend")
    known = config.backend == "measure" and begun in ("plain", "fused")
    return config.model_copy(update={"backend": begun}) if known else config


def _refusal(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _grouped(samples: Sequence[Sample], batch: int) -> list[list[int]]:
    """Indices of samples that are answered together: `batch` of a task, in their order, the last fewer."""
    groups = []
    for task in dict.fromkeys(sample.task for sample in samples):
        of_task = [i for i, sample in enumerate(samples) if sample.task == task]
        groups += [of_task[at : at + batch] for at in range(0, len(of_task), batch)]
    return sorted(groups)


def environment(model: PreTrainedModel, settings: dict[str, Any]) -> dict[str, Any]:
    """What a figure depends on besides the method."""
    return {
        "msd": __version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "dtype": str(model.dtype),
        "settings": settings,
    }
