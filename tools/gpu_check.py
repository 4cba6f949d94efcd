"""Checks a machine with a GPU in minutes: identity, step time against the roofline, drafts per second.

    python tools/gpu_check.py [OUT.json] [--quick]

Decodes the bundled photos with the reference model in float32 and bfloat16 and compares with `generate()` (ties
counted), times target passes and compares them with what `msd estimate` predicts for this card, and counts drafted
tokens per second. Writes results/gpu.json by default. Without a GPU it runs on the CPU and says so in the file. After 7
minutes it starts no further part, and lists the parts that it left out. `--quick` answers fewer and shorter prompts.
The exit code is 1 if a part failed.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from msd import SpeculativeConfig, SpeculativeVLM, __version__
from msd.bench.data import load_data
from msd.certify.certificate import certify
from msd.errors import UserError
from msd.estimate import card, pass_seconds
from msd.estimate.sizes import of_config
from msd.loading import load_target
from msd.planning import costs
from msd.system import machine
from msd.system.files import write_whole
from msd.targets import adapt

LIMIT_SECONDS = 420.0
METHODS = ("ar", "prompt-lookup", "msd")
FULL, QUICK = (4, 48), (2, 16)  # samples, and tokens of each answer
CONTEXT = 128  # tokens before the passes that are compared with the roofline


def device_name() -> tuple[str, str]:
    """(torch device, name of the card or processor)."""
    if torch.cuda.is_available():
        return "cuda", torch.cuda.get_device_name()
    return "cpu", machine.processor()


def identity(device: str, dtype: torch.dtype, size: tuple[int, int]) -> dict[str, Any]:
    """The certificate of `METHODS` on bundled photos, as `msd verify --json` has it."""
    model, processor = load_target("reference", device, dtype=dtype)
    samples = load_data(None)[: size[0]]
    rows = certify(model, processor, samples, METHODS, size[1], 1000, lambda text: None)
    yardstick = rows[0].yardstick
    return {
        "rows": [row.as_dict() for row in rows],
        "yardstick": None if yardstick is None else yardstick.as_dict(),
        "passed": all(row.passed for row in rows),
    }


def step_time(device: str, name: str, dtype: torch.dtype) -> dict[str, Any]:
    """Seconds of target passes over n nodes, measured and as the roofline of the card has them.

    The roofline counts the bytes of `dtype`; a data sheet's FLOP/s are those of bfloat16, so for a GPU in float32 it is
    too short for passes over many nodes.
    """
    model, _ = load_target("reference", device, dtype=dtype)
    measured = costs.measure(adapt(model))
    try:
        sheet = card("cpu" if device == "cpu" else name.removeprefix("NVIDIA ").split()[0])
        sheet = replace(sheet, dtype_bytes=float(dtype.itemsize))
    except UserError as error:  # a card that `msd estimate` does not know
        return {"measured": dict(zip(measured.nodes, measured.seconds[0], strict=True)), "roofline": str(error)}
    sizes = of_config("reference", model.config)
    predicted = [pass_seconds(sizes, sheet, nodes, CONTEXT) for nodes in measured.nodes]
    curve = measured.curve(max(measured.nodes), CONTEXT)
    return {
        "card": sheet.name,
        "context": CONTEXT,
        "passes": [
            {"nodes": nodes, "seconds": curve[nodes - 1], "roofline": seconds, "ratio": curve[nodes - 1] / seconds}
            for nodes, seconds in zip(measured.nodes, predicted, strict=True)
        ],
    }


def drafting(device: str, dtype: torch.dtype, size: tuple[int, int]) -> dict[str, float]:
    """Best speeds on the bundled photos: of plain decoding, of `msd`, and of drafting (drafted tokens per second)."""
    model, processor = load_target("reference", device, dtype=dtype)
    samples = [s for s in load_data(None) if s.images][: size[0]]
    results: dict[str, float] = {}
    for method in ("ar", "msd"):
        vlm = SpeculativeVLM(model, processor, SpeculativeConfig(frozen_weights=True), method)
        for sample in (samples[0], *samples):  # the first one twice, since the first answer also warms up
            begin = time.perf_counter()
            answer = vlm.generate(list(sample.images), sample.prompt, max_new_tokens=size[1], do_sample=False)
            seconds = time.perf_counter() - begin
            rates = {f"{method}_tokens_per_second": len(answer.tokens) / seconds}
            if method == "msd" and answer.statistics.seconds["draft"]:
                drafted = answer.statistics.num_draft_tokens
                rates["drafted_tokens_per_second"] = drafted / answer.statistics.seconds["draft"]
            results |= {key: max(rate, results.get(key, 0.0)) for key, rate in rates.items()}
    return results


def main() -> int:
    """Runs the parts that fit into the time limit, writes the file after each of them, and returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", nargs="?", type=Path, default=Path(__file__).parents[1] / "results" / "gpu.json")
    parser.add_argument("--quick", action="store_true")
    args = parser.parse_args()
    begin, size = time.monotonic(), QUICK if args.quick else FULL
    device, name = device_name()
    report: dict[str, Any] = {
        "device": device,
        "name": name,
        "cpu": machine.processor(),
        "threads": torch.get_num_threads(),
        "note": "" if device == "cuda" else "no GPU was found: these are figures of the CPU",
        "msd": __version__,
        "torch": torch.__version__,
        "samples": size[0],
        "tokens": size[1],
        "left_out": [],
    }
    print(f"{device}: {name}", flush=True)
    parts: dict[str, Callable[[], Any]] = {}
    for dtype in (torch.float32, torch.bfloat16):
        kind = str(dtype).removeprefix("torch.")
        parts[f"identity_{kind}"] = partial(identity, device, dtype, size)
        parts[f"step_time_{kind}"] = partial(step_time, device, name, dtype)
        parts[f"drafting_{kind}"] = partial(drafting, device, dtype, size)
    failed = False
    for part, run in parts.items():
        if time.monotonic() - begin > LIMIT_SECONDS:
            report["left_out"].append(part)
            continue
        start = time.monotonic()
        try:
            report[part] = run()
        except Exception as error:  # one part must not cost the others, since the device is lent for minutes
            report[part] = {"error": f"{type(error).__name__}: {error}"}
        failed |= "error" in report[part] or not report[part].get("passed", True)
        print(f"{part}: {time.monotonic() - start:.0f} s, {json.dumps(report[part])[:160]}", flush=True)
        report["seconds"] = round(time.monotonic() - begin, 1)
        write_whole(args.out, json.dumps(report, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
