"""Runs a benchmark: times several methods in one process, interleaved, cold and end to end.

Every sample is answered by every method in turn, in an order drawn for the sample, with an empty vision cache. All
methods share prompts, generation settings, dtype and threads. `transformers` is the library's `generate()` as users
call it, `transformers:…` the library's own drafting where it supports the model, `ar` our loop without drafts. Times
are wall times of the whole call, image encoding and prefill included; decode-only times start at the first token. A
sample on which something else disturbed a method is measured again, with all methods (`msd.bench.disturbance`).
Acceptance by modality is measured afterwards, untimed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import random
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
from msd.bench.disturbance import REPEATS, disturbed
from msd.bench.modality import TOP, LabelledSample, Labeller, columns, mean_top_probabilities, top_probabilities
from msd.bench.rows import row
from msd.bench.timing import LIBRARY, PLAIN, TRANSFORMERS, Run, outside_kernels, time_engine, time_library
from msd.bench.unfinished import Unfinished
from msd.config import SpeculativeConfig
from msd.drafters import auxiliary
from msd.labels.label_thresholds import ModalityThresholds
from msd.model import SpeculativeVLM
from msd.system import machine
from msd.targets.registry import fingerprint

REFUSALS = (ValueError, RuntimeError, TypeError, AttributeError)  # of the library's drafting, for models it cannot run


def run(
    model: PreTrainedModel, processor: Any, samples: Sequence[Sample], methods: Sequence[str], max_new_tokens: int,
    temperature: float, report: Callable[[str], None], label_thresholds: ModalityThresholds | None = None,
    **options: Any,
) -> dict[str, Any]:  # fmt: skip
    """Runs a whole benchmark and returns `Bench.results`.

    report: receives progress messages. label_thresholds, options: see `BenchSettings`.
    """
    settings = BenchSettings(tuple(methods), max_new_tokens, temperature, label_thresholds, **options)
    bench = Bench(model, processor, samples, settings)
    bench.measure(report)
    results = bench.results()
    assert results is not None
    return results


@dataclass(frozen=True)
class BenchSettings:
    """What a benchmark measures.

    methods: besides `ar` and `baselines`, which are the library's decoding methods (all by default). temperature: above
    0, sample i is decoded with seed i. label_thresholds: at temperature 0 and batch 1, they add acceptance and coverage
    by modality (`msd.bench.modality`). warm: our methods answer a second time with the images encoded. batch: samples
    of one task that are answered together. about: further JSON-ready facts that a resumed run must share.
    """

    methods: tuple[str, ...]
    max_new_tokens: int
    temperature: float = 0.0
    label_thresholds: ModalityThresholds | None = None
    config: SpeculativeConfig | None = None
    warm: bool = False
    batch: int = 1
    baselines: Sequence[str] | None = None
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def generation(self) -> dict[str, Any]:
        """Arguments of `generate()`."""
        sampling = {"do_sample": True, "temperature": self.temperature, "top_k": 0}
        return {**(sampling if self.temperature > 0 else {"do_sample": False}), "max_new_tokens": self.max_new_tokens}


@dataclass(frozen=True)
class GroupAnswers:
    """The timed answers to one group of samples, by method.

    not_run: the library's methods that do not run here, with the reason. remeasured: the reason of each repetition.
    """

    runs: dict[str, Run]
    not_run: dict[str, str]
    remeasured: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class GroupTopProbabilities:
    """likeliest: `top_probabilities` of all answers to one group of samples, [T][3]."""

    likeliest: list[list[float]]


class Bench:
    """A benchmark that can be interrupted: `results` covers what has been measured so far.

    With `folder`, each part is saved there as soon as it is measured, and an interrupted run is resumed.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        samples: Sequence[Sample],
        settings: BenchSettings,
        folder: Path | None = None,
    ) -> None:
        self.model, self.samples, self.settings = model, samples, settings
        self.timers, self.not_run = dict[str, Callable[..., Run]](), dict[str, str]()
        generation = settings.generation
        for name in LIBRARY if settings.baselines is None else settings.baselines:
            try:
                self.timers[name] = partial(time_library, model, settings={**generation, **LIBRARY[name](model)})
            except REFUSALS as error:
                self.not_run[name] = _reason(error)
        names = list(dict.fromkeys([PLAIN, *settings.methods]))
        self.unfinished, config = Unfinished(folder), settings.config or SpeculativeConfig(frozen_weights=True)
        backend = self.unfinished.saved.get("backend")
        if config.backend == "measure" and backend in ("plain", "fused"):  # the interrupted run has measured it
            config = config.model_copy(update={"backend": backend})
        self.engines = {name: SpeculativeVLM(model, processor, config, name) for name in names}
        self.timers |= {
            name: partial(time_engine, engine, settings=generation, warm=settings.warm)
            for name, engine in self.engines.items()
        }
        self.conversation = Conversation(self.engines[PLAIN])
        check_prompts(self.conversation, samples, settings.max_new_tokens)
        self.groups = _grouped(samples, settings.batch)
        # what is measured, besides the methods' names
        self.subject = {"data": digest(samples), "target": fingerprint(model), **settings.about}
        self.runs: dict[str, list[Run]] = {name: [] for name in self.timers}
        self.remeasured: list[list[str]] = []
        self._warm = False
        self.labels: list[LabelledSample] = []
        self.top_probabilities: list[Tensor] = []
        self.outside: dict[str, float] | None = {}
        if folder is not None:
            self.unfinished.resume(self._identity())

    @property
    def answered(self) -> list[list[int]]:
        """The groups of samples that every method has answered."""
        return self.groups[: min(map(len, self.runs.values()))]

    @property
    def done(self) -> str:
        """The progress of the answers, such as "5 of 20 samples"."""
        return f"{sum(map(len, self.answered))} of {len(self.samples)} samples"

    def measure(self, report: Callable[[str], None]) -> None:
        """Measures everything that is still missing. After an error the parts measured so far remain valid."""
        self._answer(report)
        self._repeat_disturbed(report)
        if self.settings.label_thresholds is not None and self.settings.temperature == 0 and self.settings.batch == 1:
            self._label(self.settings.label_thresholds, report)
        for number, group in enumerate(self.groups):
            report("the target's probabilities")
            self.top_probabilities.append(self._top_probabilities(number, group))
        self.outside = outside_kernels(self.engines[PLAIN].target)

    def _answer(self, report: Callable[[str], None]) -> None:
        unit = "sample" if self.settings.batch == 1 else "batch"
        for number in range(len(self.groups)):
            part = self.unfinished.get("Answers", GroupAnswers, number)
            if part is None or not part.runs.keys() | part.not_run.keys() >= self.timers.keys():
                runs = self._ask_all(number, f"{unit} {number + 1} of {len(self.groups)}", report)
                part = self.unfinished.put("Answers", number, GroupAnswers(runs, self.not_run))
            self._leave_out(part.not_run)
            self.remeasured.append(part.remeasured)
            for name in self.timers:
                self.runs[name].append(part.runs[name])

    def _repeat_disturbed(self, report: Callable[[str], None]) -> None:
        """Measures disturbed groups again, up to `REPEATS` times each; the last measurement counts."""
        for _ in range(REPEATS):
            for number, reason in disturbed(self.runs).items():
                if len(self.remeasured[number]) < REPEATS:
                    runs = self._ask_all(number, f"again: {reason}", report)
                    reasons = [*self.remeasured[number], reason]
                    self.unfinished.put("Answers", number, GroupAnswers(runs, self.not_run, reasons))
                    self.remeasured[number] = reasons
                    for name in self.timers:
                        self.runs[name][number] = runs[name]

    def _ask_all(self, number: int, progress: str, report: Callable[[str], None]) -> dict[str, Run]:
        """Times all methods on one group of samples, in an order drawn for its `number`; warms up first."""
        if not self._warm:  # the first answers are not counted
            self._warm = True
            self._ask_all(number, f"warming up with sample {self.groups[number][0] + 1}", report)
        group = self.groups[number]
        events = [self.samples[i].events for i in group]
        request = self.conversation.request(*(self.samples[i] for i in group))
        inputs, runs = request.inputs(), {}
        for name in random.Random(number).sample(list(self.timers), len(self.timers)):
            report(f"{progress}, {name}")
            try:
                extra: dict[str, Any] = {}
                if name in self.engines:
                    extra = {"request": request, **auxiliary.argument(self.engines[name].drafter, "events", events)}
                runs[name] = self.timers[name]({**inputs, **extra}, seed=group[0])
            except REFUSALS as error:
                if name not in LIBRARY or name == TRANSFORMERS:
                    raise
                self._leave_out({name: _reason(error)})
        return runs

    def _leave_out(self, refused: Mapping[str, str]) -> None:
        """Removes methods of the library that do not run here. refused: name -> reason."""
        for name in refused.keys() & self.timers.keys():
            del self.timers[name], self.runs[name]
        self.not_run |= refused

    def _label(self, label_thresholds: ModalityThresholds, report: Callable[[str], None]) -> None:
        labeller = Labeller(self.engines, label_thresholds, self.settings.generation)
        for i, sample in enumerate(self.samples):
            part = self.unfinished.get("LabelledSample", LabelledSample, i)
            if part is None:
                report(f"sample {i + 1} of {len(self.samples)}, labels")
                (answer,) = self.runs[TRANSFORMERS][i].answers
                trees = {name: self.runs[name][i] for name in self.engines if name != PLAIN}
                part = labeller(self.conversation(sample), sample, answer, trees)
                self.unfinished.put("LabelledSample", i, part)
            self.labels.append(part)

    def _top_probabilities(self, number: int, group: Sequence[int]) -> Tensor:
        """Returns `top_probabilities` [T, 3] of all answers to a group of samples."""
        part = self.unfinished.get("Mass", GroupTopProbabilities, number)
        if part is None:
            target, answers = self.engines[PLAIN].target, self.runs[TRANSFORMERS][number].answers
            by_answer = [
                top_probabilities(target, self.conversation(self.samples[i]), answer, self.settings.temperature)
                for i, answer in zip(group, answers, strict=True)
            ]
            part = self.unfinished.put("Mass", number, GroupTopProbabilities(torch.cat(by_answer).tolist()))
        return torch.tensor(part.likeliest).reshape(-1, len(TOP))

    def results(self) -> dict[str, Any] | None:
        """Returns the content of results.json; None before every method has answered a sample.

        It has the environment, a row per method and task (task "all" first), and the seconds of each sample. For an
        interrupted run, `environment` says so, and labels and top probabilities count only if all answers have them.
        """
        groups = self.answered
        if not groups:
            return None
        tasks = [self.samples[group[0]].task for group in groups]
        members = {task: [i for i, own in enumerate(tasks) if task in ("all", own)] for task in ("all", *tasks)}
        comparable = self.settings.temperature == 0 or self.settings.batch == 1
        rows = [row(name, task, members[task], self.runs, comparable) for task in members for name in self.timers]
        if self.labels and len(self.labels) >= len(groups):
            for each in rows:
                if each["method"] in self.labels[0].chains:
                    each |= columns(self.labels, self.runs, each["method"], members[each["task"]])
        complete = len(self.top_probabilities) == len(self.groups)
        top = {t: mean_top_probabilities(self.top_probabilities[i] for i in members[t]) for t in members if complete}
        return {
            "environment": {**environment(self.model, self.settings.generation), **self._conditions(complete)},
            "target_top_mass": top or None,
            "rows": rows,
            "sample_tasks": tasks,
            "sample_remeasured": self.remeasured[: len(groups)],
            "sample_seconds": {name: [round(run_.seconds, 4) for run_ in self.runs[name]] for name in self.timers},
        }

    def _conditions(self, complete: bool) -> dict[str, Any]:
        """Returns what `environment` of the results holds in addition to the machine and the versions."""
        settings, backend = self.settings, self.engines[PLAIN].target.backend
        config = settings.config
        repeated = {number for number, reasons in enumerate(self.remeasured) if reasons}
        return {
            "backend": backend.name,
            "backend_lossy": backend.lossy,
            "kernels": backend.choice,
            **({} if config is None else config.model_dump(include={"verifier", "thresholds", "epsilon"})),
            "modality_cuts": None if settings.label_thresholds is None else settings.label_thresholds.model_dump(),
            "costs": next((asdict(e.plan.costs) for e in self.engines.values() if e.plan.costs), None),
            "batch": settings.batch,
            "outside_kernels": self.outside,
            "not_run": self.not_run,
            "remeasured": {"samples": len(repeated), "still_disturbed": len(repeated & disturbed(self.runs).keys())},
            **self.subject,
            **({} if complete else {"broken_off": self.done}),
        }

    def _identity(self) -> dict[str, Any]:
        """Returns what a run must share with an interrupted one to resume it."""
        settings = self.settings
        return {
            "methods": list(self.engines),
            "backend": self.engines[PLAIN].target.backend.name,
            "baselines": [n for n in LIBRARY if n in {*self.timers, *self.not_run}],
            "temperature": settings.temperature,
            "batch": settings.batch,
            "warm": settings.warm,
            **self.subject,
            "policy": None if settings.config is None else settings.config.model_dump(mode="json"),
            "cuts": None if settings.label_thresholds is None else settings.label_thresholds.model_dump(),
            **environment(self.model, settings.generation),
        }


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _grouped(samples: Sequence[Sample], batch: int) -> list[list[int]]:
    """Returns the indices of samples that are answered together: up to `batch` of one task, in order."""
    groups = []
    for task in dict.fromkeys(sample.task for sample in samples):
        of_task = [i for i, sample in enumerate(samples) if sample.task == task]
        groups += [of_task[at : at + batch] for at in range(0, len(of_task), batch)]
    return sorted(groups)


def environment(model: PreTrainedModel, settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the conditions that every method shares: versions, machine, dtype and generation settings."""
    return {
        "msd": __version__,
        "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"),
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cpu": machine.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "device": str(model.device),
        "dtype": str(model.dtype),
        "settings": settings,
    }
