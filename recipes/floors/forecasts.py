"""Compares the accepted nodes that drafts expect with those that are accepted, with trust and without.

python -m recipes.floors.forecasts results       # results/forecasts.json; ten minutes

Trees depend on the measured costs of target passes, not on the clock: the plan learns nothing from the times of this
run, the governor never stops drafting, and every draft has all levels.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

import torch

from msd import SpeculativeVLM
from msd.bench import unseen
from msd.bench.data import Sample, load_data
from msd.core.tree import Step
from msd.loading import load_target
from msd.planning.plan import Budget
from msd.system import machine
from msd.system.files import write_whole
from recipes.floors.arguments import about_photos
from recipes.floors.drafts import engine

PHOTOS, TOKENS = 16, 64


class Forecasts:
    """The sums of expected and accepted nodes over the steps that drafted."""

    def __init__(self) -> None:
        self.steps, self.nodes, self.expected, self.accepted = 0, 0, 0.0, 0

    def read(self, step: Step) -> None:
        """Adds a step of one row."""
        forecast = (step.tree.forecast or [[]])[0]
        if forecast:
            paths = [1.0]
            for parent, chance in forecast:
                paths.append(paths[parent] * chance)
            self.steps += 1
            self.nodes += len(forecast)
            self.expected += sum(paths[1:])
            self.accepted += len(step.accepted.nodes[0])

    def means(self) -> dict[str, float]:
        """Means over the steps."""
        found = {"nodes": self.nodes, "expected": self.expected, "accepted": self.accepted}
        return {"steps": self.steps} | {name: round(value / max(1, self.steps), 3) for name, value in found.items()}


def without_trust(vlm: SpeculativeVLM) -> SpeculativeVLM:
    """The engine, which now takes all chances as they are."""
    budget = vlm.plan.budget

    def uncorrected(*arguments: Any) -> Budget:
        return replace(budget(*arguments), shift=None)

    vlm.plan.budget = uncorrected  # type: ignore[method-assign]
    return vlm


def measure(vlm: SpeculativeVLM, samples: Iterable[Sample], temperature: float) -> dict[str, float]:
    """Answers prompts one after another; the first ones teach the engine what is usual for the later ones."""
    found = Forecasts()
    drawing: dict[str, Any] = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    for seed, sample in enumerate(samples):
        vlm.generate(
            list(sample.images), sample.prompt, seed=seed, max_new_tokens=TOKENS, on_step=found.read, **drawing
        )
    return found.means()


def main() -> None:
    args = about_photos(__doc__).parse_args()
    photos = [s for s in load_data(args.data, args.images) if s.task == "detail"][:PHOTOS]
    others = unseen.requested(["unseen"])[0]
    sets: dict[str, tuple[list[Sample], float]] = {
        "descriptions of photos": (photos, 0.0),
        "the same at T = 0.5": (photos, 0.5),
        "the same at T = 1": (photos, 1.0),
        "drawings, charts, screens, receipts, noise": ([s for s in others if s.images], 0.0),
        "texts": ([s for s in others if not s.images], 0.0),
        "texts at T = 1": ([s for s in others if not s.images], 1.0),
    }
    model, processor = load_target("reference")
    found: dict[str, dict[str, Any]] = {}
    for name, (samples, temperature) in sets.items():
        engines = {key: engine(model, processor, args.method) for key in ("without", "with")}
        without_trust(engines["without"])
        found[name] = {key: measure(vlm, samples, temperature) for key, vlm in engines.items()}
        print(name, found[name], flush=True)
    environment = {"cpu": machine.processor(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    report = {"environment": environment, "method": args.method, "sets": found}
    write_whole(args.out / "forecasts.json", json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
