"""Measures what drafts gain by the noise of the coming draws: `python -m recipes.floors.foresight results`.

Each sample is answered by plain decoding and by a method with and without foresight (`msd.core.foresight`), in turn, at
each temperature, with one seed. All must emit the same tokens.
"""

from __future__ import annotations

import json
from statistics import median
from typing import Any

import torch

from msd.bench.data import Sample, load_data
from msd.bench.pairwise import ratio_interval
from msd.bench.timing import Run, time_engine
from msd.config import SpeculativeConfig
from msd.inputs import prompts
from msd.loading import load_target
from msd.model import SpeculativeVLM
from msd.system import machine
from msd.system.files import write_whole
from recipes.floors.arguments import about_photos


def answered(engine: SpeculativeVLM, processor: Any, sample: Sample, temperature: float, seed: int) -> Run:
    """Answers one sample, of at most 96 tokens, with an empty vision cache."""
    inputs = prompts.prepare(processor, [list(sample.images)], [sample.prompt])
    settings = {"do_sample": True, "temperature": temperature, "top_k": 0, "max_new_tokens": 96}
    return time_engine(engine, inputs, settings, seed)


def row(temperature: float, name: str, runs: list[Run], plain: list[Run]) -> dict[str, Any]:
    """The figures of one engine over all samples, beside those of plain decoding."""
    base, own = [run.seconds for run in plain], [run.seconds for run in runs]
    passes = sum(run.statistics.num_spec_steps for run in runs)
    return {
        "temperature": temperature, "engine": name, "speedup_vs_ar": sum(base) / sum(own),
        "interval": ratio_interval(base, own), "paired_median": median(a / b for a, b in zip(base, own, strict=True)),
        "mean_acceptance_length": sum(run.statistics.num_emitted_tokens for run in runs) / passes,
        "tokens": sum(run.tokens for run in runs),
        "identical": all(a.answers == b.answers for a, b in zip(runs, plain, strict=True)),
    }  # fmt: skip


def main() -> None:
    parser = about_photos(__doc__)
    parser.add_argument("--limit", type=int, default=60)
    parser.add_argument("--temperature", type=float, nargs="+", default=[1.0])
    args = parser.parse_args()
    model, processor = load_target("reference")
    configs = {"without": SpeculativeConfig(foresight=False, frozen_weights=True)}
    configs["with"] = configs["without"].model_copy(update={"foresight": True})
    engines = {"ar": SpeculativeVLM(model, processor, configs["with"], "ar")}
    engines |= {name: SpeculativeVLM(model, processor, config, args.method) for name, config in configs.items()}
    samples, rows = load_data(args.data, args.images)[: args.limit], []
    for engine in engines.values():
        answered(engine, processor, samples[0], 1.0, 0)
    for temperature in args.temperature:
        runs: dict[str, list[Run]] = {name: [] for name in engines}
        for number, sample in enumerate(samples):
            first = number % len(engines)
            for name in (*list(engines)[first:], *list(engines)[:first]):
                runs[name].append(answered(engines[name], processor, sample, temperature, number))
        for name in configs:
            rows.append(row(temperature, name, runs[name], runs["ar"]))
            print(rows[-1], flush=True)
    found = {
        "cpu": machine.processor(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "torch": torch.__version__, "method": args.method,
        "samples": len(samples), "rows": rows,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    write_whole(args.out / "foresight.json", json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
