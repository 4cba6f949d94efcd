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
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from statistics import median
from typing import Any

import torch
from transformers import PreTrainedModel

from msd.bench import modal
from msd.bench.conversation import Conversation
from msd.bench.data import Sample
from msd.bench.errors import pattern
from msd.bench.intervals import ratio_interval
from msd.bench.kernels import outside_kernels
from msd.bench.mass import mean_mass, top_mass
from msd.bench.repeats import tau_outside_repeats
from msd.bench.timing import LIBRARY, Run, library, ours
from msd.bench.words import kinds_of
from msd.config import SpeculativeConfig
from msd.cuts import ModalityCuts
from msd.drafters import recordings
from msd.model import SpeculativeVLM
from msd.statistics import Statistics
from msd.version import __version__

TRANSFORMERS, PLAIN = "transformers", "ar"
REFUSALS = (ValueError, RuntimeError, TypeError, AttributeError)  # some of the library's ways refuse some models


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
    batch: int = 1,
    baselines: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Results as in results.json: `environment`, a row per method and task (task "all" first), every sample's seconds.

    `ar` and the library's `baselines` (all of its ways by default; `transformers` among them) are measured too. At a
    temperature above 0 sample i is drawn with seed i. With `cuts`, and at
    temperature 0, rows of drafting methods have acceptance and coverage by modality (see `modal`). `warm`: our methods
    answer once more with the photos encoded, for a column of its own. `batch`: samples of a task answered together.
    """
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    settings = {**sampling, "max_new_tokens": max_new_tokens}
    ways, not_run = dict[str, Callable[..., Run]](), dict[str, str]()
    for name in LIBRARY if baselines is None else baselines:
        try:
            ways[name] = partial(library, model, settings={**settings, **LIBRARY[name](model)})
        except REFUSALS as error:
            not_run[name] = _refusal(error)
    names = list(dict.fromkeys([PLAIN, *methods]))
    engines = {name: SpeculativeVLM(model, processor, config, name) for name in names}
    ways |= {name: partial(ours, engine, settings=settings, warm=warm) for name, engine in engines.items()}
    ask = Conversation(engines[PLAIN])
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    groups = _grouped(samples, batch)
    for number, group in enumerate([groups[0], *groups]):  # the first pass warms up and is not counted
        inputs = ask(*(samples[i] for i in group))
        turn = number % len(ways)
        for name in [*list(ways)[turn:], *list(ways)[:turn]]:
            report(f"{'sample' if batch == 1 else 'batch'} {number} of {len(groups)}, {name}")
            try:
                seen = _seen(engines[name], [samples[i] for i in group]) if name in engines else {}
                answer = ways[name]({**inputs, **seen}, seed=group[0])
            except REFUSALS as error:
                if name not in LIBRARY or name == TRANSFORMERS:
                    raise
                not_run[name] = _refusal(error)
                del ways[name], runs[name]
                continue
            if number:
                runs[name].append(answer)
    tasks = ["all", *dict.fromkeys(sample.task for sample in samples)]
    chosen = {task: [i for i, g in enumerate(groups) if task in ("all", samples[g[0]].task)] for task in tasks}
    rows = [_row(name, task, chosen[task], runs, temperature == 0 or batch == 1) for task in tasks for name in ways]
    if cuts is not None and temperature == 0 and batch == 1:
        sight = _by_modality(engines, ask, samples, runs, settings, cuts, report)
        for row in rows:
            if row["method"] in sight:
                row |= sight[row["method"]](chosen[row["task"]])
    masses = []
    for group, run_ in zip(groups, runs[TRANSFORMERS], strict=True):
        report("the target's certainty")
        each = [
            top_mass(engines[PLAIN].target, ask(samples[i]), answer, temperature)
            for i, answer in zip(group, run_.answers, strict=True)
        ]
        masses.append(torch.cat(each))
    certainty = {task: mean_mass(masses[i] for i in chosen[task]) for task in tasks}
    known = None if cuts is None else cuts.model_dump()
    policy = {} if config is None else config.model_dump(include={"verifier", "thresholds", "epsilon"})
    curve = next((asdict(e.plan.costs) for e in engines.values() if e.plan.costs), None)
    backend = engines[PLAIN].target.backend
    told = {"backend": backend.name, "backend_lossy": backend.lossy, **policy, "modality_cuts": known, "costs": curve}
    told |= {"batch": batch, "outside_kernels": outside_kernels(engines[PLAIN].target), "not_run": not_run}
    return {
        "environment": {**environment(model, settings), **told},
        "target_top_mass": certainty,
        "rows": rows,
        "sample_tasks": [samples[group[0]].task for group in groups],
        "sample_seconds": {name: [round(run_.seconds, 4) for run_ in runs[name]] for name in ways},
    }


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
    words: list[list[str]] = []
    for i, sample in enumerate(samples):
        inputs = ask(sample)
        (answer,) = runs[TRANSFORMERS][i].answers
        report(f"sample {i + 1} of {len(samples)}, labels")
        labels = modal.label_answer(engines[PLAIN].target, cuts, inputs, answer, sample.events, len(sample.images))
        tokenizer = engines[PLAIN].processor.tokenizer
        words.append(kinds_of([tokenizer.decode([token], skip_special_tokens=True) for token in answer]))
        for name, engine in drafting.items():
            report(f"sample {i + 1} of {len(samples)}, {name} on chains")
            for kept, found in (
                (trees, runs[name][i]),
                (chains, ours(engine, {**inputs, **_seen(engine, [sample])}, settings, 0)),
            ):
                kept[name].append((found.statistics.steps, modal.shared(labels, answer, found.answers[0])))

    def columns(name: str, chosen: list[int]) -> dict[str, Any]:
        acceptance = modal.acceptance_by_modality(chains[name][i] for i in chosen)
        coverage = modal.coverage_by_modality(trees[name][i] for i in chosen)
        return {
            "acceptance_by_modality": acceptance.rates(),
            "coverage_by_modality": coverage.rates(),
            "acceptance_by_depth": acceptance.by_depth(),
            "positions_by_modality": {"acceptance": acceptance.counts(), "coverage": coverage.counts()},
            "errors": pattern((*chains[name][i], words[i]) for i in chosen),
        }

    return {name: partial(columns, name) for name in drafting}


def _seen(engine: SpeculativeVLM, samples: Sequence[Sample]) -> dict[str, Any]:
    """What only the engine's drafter sees of samples."""
    return recordings.argument(engine.drafter, [sample.events for sample in samples])


def _refusal(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _grouped(samples: Sequence[Sample], batch: int) -> list[list[int]]:
    """Indices of samples that are answered together: `batch` of a task, in their order, the last fewer."""
    groups = []
    for task in dict.fromkeys(sample.task for sample in samples):
        of_task = [i for i, sample in enumerate(samples) if sample.task == task]
        groups += [of_task[at : at + batch] for at in range(0, len(of_task), batch)]
    return sorted(groups)


def _row(name: str, task: str, chosen: list[int], runs: dict[str, list[Run]], comparable: bool) -> dict[str, Any]:
    """One row of the table. Speedups are ratios of summed times over the same samples.

    comparable: whether the library's answers must be the same; of a sampled batch it shares one generator.
    """
    mine, theirs, plain = ([runs[n][i] for i in chosen] for n in (name, TRANSFORMERS, PLAIN))
    total = Statistics()
    for r in mine:
        total.add(r.statistics)

    def seconds(answers: list[Run]) -> float:
        return sum(r.seconds for r in answers)

    def decoding(answers: list[Run]) -> float | None:
        """Without prefill; None where that is not known."""
        parts = [r.seconds - r.prefill for r in answers if r.prefill is not None]
        return sum(parts) if len(parts) == len(answers) else None

    base, own = decoding(plain), decoding(mine)
    # at temperature 0 every method must equal plain greedy decoding by the library
    pairs = [pair for a, b in zip(mine, theirs, strict=True) for pair in zip(a.answers, b.answers, strict=True)]
    answers = len(pairs)
    split = {part: total.seconds[part] for part in ("prefill", "draft", "verify", "host")} if total.seconds else {}
    return {
        "method": name,
        "task": task,
        "samples": answers,
        "tokens": sum(r.tokens for r in mine),
        "mean_answer_tokens": sum(r.tokens for r in mine) / answers,
        "speedup_vs_transformers": seconds(theirs) / seconds(mine),
        "speedup_vs_ar": seconds(plain) / seconds(mine),
        "speedup_vs_ar_interval": ratio_interval([r.seconds for r in plain], [r.seconds for r in mine]),
        "speedup_vs_ar_paired_median": median(b.seconds / a.seconds for a, b in zip(mine, plain, strict=True)),
        "speedup_warm_vs_ar": _warm(plain, mine),
        "speedup_decode_only": None if base is None or own is None else base / max(own, 1e-9),
        "tokens_per_second": sum(r.tokens for r in mine) / seconds(mine),
        "mean_acceptance_length": total.mean_acceptance_length if total.num_spec_steps else None,
        "tau_outside_repeated_8grams": tau_outside_repeats(row for r in mine for row in r.by_row()),
        "tau_without_bonus": total.tau_without_bonus if total.num_spec_steps else None,
        "draft_acceptance_rate": total.draft_acceptance_rate if total.num_spec_steps else None,
        "acceptance_by_modality": None,
        "coverage_by_modality": None,
        "acceptance_by_depth": None,
        "positions_by_modality": None,
        "errors": None,
        "divergence": total.as_dict()["divergence"],
        "identical": sum(a == b for a, b in pairs) / answers if comparable else None,
        "seconds": seconds(mine),
        "prefill_s": split.get("prefill", sum(r.prefill or 0.0 for r in mine)),
        "draft_s": split.get("draft"),
        "verify_s": split.get("verify"),
        "host_s": split.get("host"),
        "host_share": split["host"] / seconds(mine) if split else None,
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
