"""Measures the kernels of the reference model's products, passes and `ar`: `python -m recipes.floors.kernels results`.

With `--bfloat16` its weights are rounded first, as those of nearly all checkpoints; products stay float32.

Three codes run in turn: the library's own, the fused pass with packed products only, and the measured choice. Times of
products and passes are processor time of the calling thread; those of answers are real time. About three minutes; the
machine should do nothing else.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest.mock import patch

import torch

from msd import SpeculativeConfig, SpeculativeVLM
from msd.backends import Backend, fused
from msd.backends.kernels import PACKED, ROWS, measure
from msd.inputs import prompts
from msd.loading import load_target
from msd.planning.costs import measure as pass_times
from msd.reference import sample_photos
from msd.system import machine
from msd.system.files import write_whole

PROMPT = "Describe the image in detail."
NODES, CONTEXTS = ROWS[:-1], (64, 128)
LIBRARY = "transformers"


def smallest(measured: list[Any]) -> Any:
    """The smallest of each number of several measurements, in nested dictionaries and sequences of the same form."""
    first = measured[0]
    if isinstance(first, dict):
        return {key: smallest([each[key] for each in measured]) for key in first}
    if isinstance(first, list | tuple):
        return [smallest(list(each)) for each in zip(*measured, strict=True)]
    return round(1000 * min(measured), 3)


def products(model: Any, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Milliseconds of each product by kernel, for each number of `ROWS`, in the samples that `measure` reads."""
    layers = [fused.layer_products(layer) for layer in fused.active_layers(model.get_decoder())]
    groups: dict[str, Any] = {name: [layer[name] for layer in layers] for name in layers[0]}
    groups["output"] = [[(model.get_output_embeddings().weight, None)]]
    found: dict[str, dict[str, list[float]]] = smallest([measure(groups) for _ in range(rounds)])
    return found


def engines(model: Any, processor: Any) -> dict[str, SpeculativeVLM]:
    """Name -> an engine without drafts on the library's own code, on packed products, and on the measured choice."""

    def engine(backend: str) -> SpeculativeVLM:
        return SpeculativeVLM(model, processor, SpeculativeConfig(frozen_weights=True, backend=backend), "ar")

    packed = dict.fromkeys(("qkv", "out", "gate_up", "down", "output"), PACKED)
    with patch.object(fused, "kernel_choice", lambda decoder, output: packed):
        found = {"own": engine("plain"), "packed": engine("fused")}
    return found | {"measured": engine("measure")}


def answers(model: Any, processor: Any, ways: dict[str, SpeculativeVLM], photos: int, rounds: int) -> dict[str, Any]:
    """Tokens, the fastest seconds by way of all answers, and the speed over `generate()`. The ways take turns."""
    seconds, tokens, identical = dict.fromkeys((LIBRARY, *ways), 0.0), 0, True
    for photo in sample_photos()[:photos]:
        inputs = prompts.prepare(processor, [[photo]], [PROMPT])
        settings = {"max_new_tokens": 64, "do_sample": False}
        times: dict[str, list[float]] = {name: [] for name in seconds}
        for _ in range(rounds):
            start = time.perf_counter()
            whole = model.generate(**inputs, **settings)[0, inputs["input_ids"].shape[1] :].tolist()
            times[LIBRARY].append(time.perf_counter() - start)
            for name, engine in ways.items():
                engine.target.vision.clear()
                start = time.perf_counter()
                result = engine.generate(**inputs, **settings)
                times[name].append(time.perf_counter() - start)
                identical &= result.tokens == whole
        tokens += len(whole)
        seconds = {name: seconds[name] + min(times[name]) for name in seconds}
    speed = {name: seconds[LIBRARY] / seconds[name] for name in ways}
    return {"tokens": tokens, "identical": identical, "seconds": seconds, "ar_over_transformers": speed}


@torch.no_grad()
def run(rounds: int, photos: int, bfloat16: bool) -> dict[str, Any]:
    """All measurements."""
    model, processor = load_target("reference")
    for parameter in model.parameters() if bfloat16 else ():
        parameter.copy_(parameter.bfloat16())
    with TemporaryDirectory() as empty, patch.object(fused, "FOLDER", Path(empty)):
        start = time.perf_counter()
        backend = Backend(model, "measure")
        first_load = time.perf_counter() - start
        ways = engines(model, processor)
    choice = ways["measured"].target.backend.choice
    passes = {
        name: smallest(
            [pass_times(way.target, NODES, CONTEXTS, machine.thread_clock).seconds[1] for _ in range(rounds)]
        )
        for name, way in ways.items()
    }
    return {
        "rows": ROWS, "first_load_seconds": first_load, "choice": choice, "choice_of_first_load": backend.choice,
        "products": products(model, rounds), "nodes": NODES, "context": CONTEXTS[1], "passes": passes,
        "answers": answers(model, processor, ways, photos, rounds),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--photos", type=int, default=4)
    parser.add_argument("--bfloat16", action="store_true", help="round the weights; writes kernels-bfloat16.json")
    args = parser.parse_args()
    quiet, found = machine.quietly(lambda: run(args.rounds, args.photos, args.bfloat16))
    environment = {
        "cpu": machine.processor(), "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(), "torch": torch.__version__,
        "transformers": importlib.metadata.version("transformers"), "quiet": quiet,
    }  # fmt: skip
    args.out.mkdir(parents=True, exist_ok=True)
    name = "kernels-bfloat16.json" if args.bfloat16 else "kernels.json"
    write_whole(args.out / name, json.dumps({"environment": environment, **found}, indent=1) + "\n")
    for name, times in found["products"].items():
        for kernel, ms in times.items():
            print(f"{name:8} {kernel:11}", *(f"{each:8.2f}" for each in ms))
    for name, each in found["passes"].items():
        print(f"pass     {name:11}", *(f"{ms:8.2f}" for ms in each))
    print({"quiet": quiet, **found["answers"]}, found["choice"])


if __name__ == "__main__":
    main()
