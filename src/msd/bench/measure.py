"""Timing methods against each other, honestly: one process, one run, interleaved, cold, end to end.

Every sample is answered by every method in turn, in an order that rotates from sample to sample, with empty vision
caches; all share prompts, generation settings, dtype and threads. `transformers` is the library's `generate()` as users
run it, `ar` our own loop without drafts. Times are wall times of the whole call, image encoding and prefill included;
decode-only leaves out the time to the first token. Acceptance by modality is measured afterwards, untimed.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.generation.streamers import BaseStreamer

from msd.bench import modal
from msd.bench.conversation import Conversation
from msd.bench.data import Sample
from msd.bench.intervals import ratio_interval
from msd.bench.mass import mean_mass, top_mass
from msd.bench.repeats import tau_outside_repeats
from msd.config import SpeculativeConfig
from msd.gain import ModalityCuts
from msd.model import SpeculativeVLM
from msd.statistics import Statistics
from msd.version import __version__

TRANSFORMERS, PLAIN = "transformers", "ar"


@dataclass(frozen=True)
class Run:
    """One answer and its times, in seconds. warm: of the same again, its photos being encoded already."""

    tokens: list[int]
    seconds: float
    prefill: float
    statistics: Statistics
    warm: float | None = None


def run(
    model: PreTrainedModel,
    processor: Any,
    samples: Sequence[Sample],
    methods: Sequence[str],
    max_new_tokens: int,
    temperature: float,
    report: Callable[[str], None],
    cuts: ModalityCuts | None = None,
    config: SpeculativeConfig | None = None,
    warm: bool = False,
) -> dict[str, Any]:
    """Results as in results.json: `environment` and a row per method and task, task "all" first.

    Both baselines are always measured. At a temperature above 0 sample i is drawn with seed i. With `cuts`, and at
    temperature 0, rows of drafting methods have acceptance and coverage by modality (see `modal`). `warm`: our methods
    answer once more with the photos encoded, for a column of its own.
    """
    names = list(dict.fromkeys([PLAIN, *methods]))
    engines = {name: SpeculativeVLM(model, processor, config, name) for name in names}
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    settings = {**sampling, "max_new_tokens": max_new_tokens}
    ways: dict[str, Callable[[dict[str, Any], int], Run]] = {
        TRANSFORMERS: lambda inputs, seed: _library(model, inputs, settings, seed),
        **{
            name: lambda inputs, seed, e=engine: _ours(e, inputs, settings, seed, warm)
            for name, engine in engines.items()
        },  # type: ignore[misc]
    }
    ask = Conversation(engines[PLAIN])
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for number, sample in enumerate([samples[0], *samples]):  # the first pass warms up and is not counted
        inputs = ask(sample)
        turn = number % len(ways)
        for name in [*list(ways)[turn:], *list(ways)[:turn]]:
            report(f"sample {number} of {len(samples)}, {name}")
            answer = ways[name](inputs, max(number - 1, 0))
            if number:
                runs[name].append(answer)
    tasks = ["all", *dict.fromkeys(sample.task for sample in samples)]
    chosen = {task: [i for i, s in enumerate(samples) if task in ("all", s.task)] for task in tasks}
    rows = [_row(name, task, chosen[task], runs) for task in tasks for name in ways]
    if cuts is not None and temperature == 0:
        sight = _by_modality(engines, ask, samples, runs, settings, cuts, report)
        for row in rows:
            if row["method"] in sight:
                row |= sight[row["method"]](chosen[row["task"]])
    masses = []
    for i, sample in enumerate(samples):
        report(f"sample {i + 1} of {len(samples)}, the target's certainty")
        inputs = ask(sample)
        masses.append(top_mass(engines[PLAIN].target, inputs, runs[TRANSFORMERS][i].tokens, temperature))
    certainty = {task: mean_mass(masses[i] for i in chosen[task]) for task in tasks}
    known = None if cuts is None else cuts.model_dump()
    policy = {} if config is None else config.model_dump(include={"verifier", "thresholds", "epsilon"})
    curve = next((asdict(e.plan.costs) for e in engines.values() if e.plan.costs), None)
    told = {"backend": engines[PLAIN].target.backend.name, **policy, "modality_cuts": known, "costs": curve}
    return {"environment": {**environment(model, settings), **told}, "target_top_mass": certainty, "rows": rows}


def _by_modality(
    engines: dict[str, SpeculativeVLM],
    ask: Conversation,
    samples: Sequence[Sample],
    runs: dict[str, list[Run]],
    settings: dict[str, Any],
    cuts: ModalityCuts,
    report: Callable[[str], None],
) -> dict[str, Callable[[list[int]], dict[str, Any]]]:
    """For each drafting method, a function from chosen samples to its columns by modality.

    Labels the library's answers, and decodes each sample once more on chains.
    """
    drafting = {
        name: SpeculativeVLM(e.model, e.processor, modal.CHAIN, e.drafter)
        for name, e in engines.items()
        if name != PLAIN
    }
    chains: dict[str, list[modal.Labelled]] = {name: [] for name in drafting}
    trees: dict[str, list[modal.Labelled]] = {name: [] for name in drafting}
    for i, sample in enumerate(samples):
        inputs = ask(sample)
        answer = runs[TRANSFORMERS][i].tokens
        report(f"sample {i + 1} of {len(samples)}, labels")
        labels = modal.label_answer(engines[PLAIN].target, cuts, inputs, answer)
        for name, engine in drafting.items():
            report(f"sample {i + 1} of {len(samples)}, {name} on chains")
            tree, chain = runs[name][i], _ours(engine, inputs, settings, 0)
            trees[name].append((tree.statistics.steps, modal.shared(labels, answer, tree.tokens)))
            chains[name].append((chain.statistics.steps, modal.shared(labels, answer, chain.tokens)))

    def columns(name: str, chosen: list[int]) -> dict[str, Any]:
        acceptance = modal.acceptance_by_modality(chains[name][i] for i in chosen)
        coverage = modal.coverage_by_modality(trees[name][i] for i in chosen)
        return {
            "acceptance_by_modality": acceptance.rates(),
            "coverage_by_modality": coverage.rates(),
            "acceptance_by_depth": acceptance.by_depth(),
            "positions_by_modality": {"acceptance": acceptance.counts(), "coverage": coverage.counts()},
        }

    return {name: partial(columns, name) for name in drafting}


class _FirstToken(BaseStreamer):
    """Notes when the first generated token comes."""

    def __init__(self) -> None:
        self.calls, self.at = 0, 0.0

    def put(self, value: Any) -> None:
        """The prompt comes first, then one call per token."""
        self.calls += 1
        if self.calls == 2:
            self.at = time.perf_counter()

    def end(self) -> None:
        """Nothing to flush."""


def _library(model: PreTrainedModel, inputs: dict[str, Any], settings: dict[str, Any], seed: int) -> Run:
    torch.manual_seed(seed)
    first = _FirstToken()
    begin = time.perf_counter()
    output = model.generate(**inputs, **settings, streamer=first)
    seconds = time.perf_counter() - begin
    tokens = output[0, inputs["input_ids"].shape[1] :].tolist()
    steps = Statistics(num_spec_steps=len(tokens) - 1, num_emitted_tokens=len(tokens) - 1)
    return Run(tokens, seconds, first.at - begin, steps)


def _ours(
    engine: SpeculativeVLM, inputs: dict[str, Any], settings: dict[str, Any], seed: int, warm: bool = False
) -> Run:
    engine.target.vision.clear()
    begin = time.perf_counter()
    answer = engine.generate(**inputs, **settings, seed=seed)
    seconds, again = time.perf_counter() - begin, None
    if warm:
        begin = time.perf_counter()
        engine.generate(**inputs, **settings, seed=seed)
        again = time.perf_counter() - begin
    return Run(answer.tokens, seconds, answer.statistics.seconds["prefill"], answer.statistics, again)


def _row(name: str, task: str, chosen: list[int], runs: dict[str, list[Run]]) -> dict[str, Any]:
    """One row of the table. Speedups are ratios of summed times over the same samples."""
    mine, library, plain = ([runs[n][i] for i in chosen] for n in (name, TRANSFORMERS, PLAIN))
    total = Statistics()
    for r in mine:
        total.add(r.statistics)

    def seconds(answers: list[Run]) -> float:
        return sum(r.seconds for r in answers)

    def decoding(answers: list[Run]) -> float:
        return sum(r.seconds - r.prefill for r in answers)

    # at temperature 0 every method must equal plain greedy decoding by the library
    same = [a.tokens == b.tokens for a, b in zip(mine, library, strict=True)]
    split = {part: total.seconds[part] for part in ("prefill", "draft", "verify", "host")} if total.seconds else {}
    return {
        "method": name,
        "task": task,
        "samples": len(chosen),
        "tokens": sum(len(r.tokens) for r in mine),
        "mean_answer_tokens": sum(len(r.tokens) for r in mine) / len(mine),
        "speedup_vs_transformers": seconds(library) / seconds(mine),
        "speedup_vs_ar": seconds(plain) / seconds(mine),
        "speedup_vs_ar_interval": ratio_interval([r.seconds for r in plain], [r.seconds for r in mine]),
        "speedup_vs_ar_paired_median": median(b.seconds / a.seconds for a, b in zip(mine, plain, strict=True)),
        "speedup_warm_vs_ar": _warm(plain, mine),
        "speedup_decode_only": decoding(plain) / max(decoding(mine), 1e-9),
        "tokens_per_second": sum(len(r.tokens) for r in mine) / seconds(mine),
        "mean_acceptance_length": total.mean_acceptance_length,
        "tau_outside_repeated_8grams": tau_outside_repeats((r.statistics.steps, r.tokens) for r in mine),
        "tau_without_bonus": total.tau_without_bonus,
        "draft_acceptance_rate": total.draft_acceptance_rate,
        "acceptance_by_modality": None,
        "coverage_by_modality": None,
        "acceptance_by_depth": None,
        "positions_by_modality": None,
        "divergence": total.as_dict()["divergence"],
        "identical": sum(same) / len(same),
        "seconds": seconds(mine),
        "prefill_s": split.get("prefill", sum(r.prefill for r in mine)),
        "draft_s": split.get("draft"),
        "verify_s": split.get("verify"),
        "host_s": split.get("host"),
    }


def _warm(plain: list[Run], mine: list[Run]) -> float | None:
    """The speedup over plain decoding when both have the photos encoded; None where it was not measured."""
    pairs = [(a.warm, b.warm) for a, b in zip(plain, mine, strict=True) if a.warm is not None and b.warm is not None]
    return sum(a for a, _ in pairs) / sum(b for _, b in pairs) if pairs else None


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
