"""Compares this engine with vLLM on one machine: the same model, prompts and greedy answers, one or several at a time.

    python -m recipes.scale.engines --compile --dtype float32 bfloat16 --out results/engines.json

Rows: this engine without drafts (`ar`) and with its own method; vLLM plain, with its n-gram lookup, with the repeats of
`msd.serve.vllm_proposer`, and with our EAGLE-3 and DFlash heads, exported for it. Every engine answers all prompts once
to warm up and `--rounds` times for the clock; the fastest round counts. vLLM has no tower for the reference model, so
its photos come as the projector's output; this engine has encoded them in the warm-up. Neither reuses the prefix of a
prompt, since the rounds repeat the prompts. vLLM's threads are bound to all cores, as its own binding does in a server.
With bfloat16, vLLM computes all in it, and this engine its products (backend "bf16"). `same` counts the answers that
equal those of `ar` in float32, token by token; two that differ may be a tie (docs/verification.md).

Every row is kept as it is measured; the same command resumes an interrupted run, and tries again what has failed.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from msd import SpeculativeConfig, SpeculativeVLM, formats
from msd.bench.data import Sample, load_data
from msd.bench.measure import environment
from msd.bench.served import speculation
from msd.bench.unfinished import Unfinished
from msd.core.statistics import Statistics
from msd.errors import UserError
from msd.loading import load_target
from msd.system.files import write_whole
from recipes.scale import vllm_checkpoints, vllm_process

WEIGHTS = vllm_process.ROOT / "weights"
OURS = ("ar", "msd")
NGRAM = {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 5, "num_speculative_tokens": 4}
REPEATS = {"method": "custom_class", "model": "msd.serve.vllm_proposer.RepeatProposer", "num_speculative_tokens": 8}
BACKENDS = {"float32": "measure", "bfloat16": "bf16"}  # precision -> that of this engine


@dataclass(frozen=True)
class Setting:
    """How an engine runs. compiled: vLLM compiles the model."""

    engine: str
    dtype: str
    compiled: bool = False

    @property
    def name(self) -> str:
        """For messages and kept rows."""
        return f"{self.engine}, {self.dtype}" + (", compiled" if self.compiled else "")


@dataclass(frozen=True)
class Measured:
    """What one engine needed for all prompts. load: of the machine before and after, over one minute."""

    answers: list[list[int]]
    seconds_of_rounds: list[float]
    speculation: dict[str, Any] | None
    threads: int
    load: list[float]


def batches(samples: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [samples[first : first + size] for first in range(0, len(samples), size)]


def ours(
    target: tuple[Any, Any], setting: Setting, samples: Sequence[Sample], batch: int, rounds: int, tokens: int
) -> Measured:
    """Measures this engine."""
    config = SpeculativeConfig(frozen_weights=True, backend=BACKENDS[setting.dtype])
    engine, seconds, load = SpeculativeVLM(*target, config, drafter=setting.engine), list[float](), os.getloadavg()[0]
    total, results = Statistics(), list[Any]()
    for _ in range(rounds + 1):
        results, started, total = [], time.perf_counter(), Statistics()
        for some in batches(samples, batch):
            images = [list(sample.images) for sample in some]
            results += engine.generate(images, [s.prompt for s in some], max_new_tokens=tokens, do_sample=False)
        seconds.append(time.perf_counter() - started)
        for result in results:
            total.add(result.statistics)
    names = [
        "mean_acceptance_length", "draft_acceptance_rate", "num_spec_steps", "num_draft_tokens",
        "num_accepted_draft_tokens", "num_spec_tokens",
    ]  # fmt: skip
    figures = {name: getattr(total, name) for name in names} if total.num_draft_tokens else None
    answers = [result.tokens for result in results]
    return Measured(answers, seconds[1:], figures, torch.get_num_threads(), [load, os.getloadavg()[0]])


def bound() -> dict[str, str]:
    """Returns vLLM's environment with a thread on each core.

    vLLM binds them like this in a server, with `VLLM_CPU_OMP_THREADS_BIND`. In one process it does not, and without
    `OMP_NUM_THREADS` it computes with a single thread.
    """
    cores = sorted(os.sched_getaffinity(0))
    listed = ",".join(map(str, cores))
    return {
        "OMP_NUM_THREADS": str(len(cores)), "KMP_AFFINITY": f"granularity=fine,explicit,proclist=[{listed}]",
        "KMP_BLOCKTIME": "5", "KMP_TPAUSE": "0",
    }  # fmt: skip


class VLLM:
    """Measures vLLM. Its checkpoint, prompts and heads are written to `folder`."""

    def __init__(self, target: tuple[Any, Any], samples: Sequence[Sample], folder: Path, args: Any) -> None:
        self.args, self.model = args, vllm_checkpoints.vision_language_model(folder / "model")
        self.prompts = []
        for number, sample in enumerate(samples):
            if len(sample.images) != 1 or not isinstance(sample.images[0], Path):
                raise UserError(f"{sample.where}: the comparison takes prompts with one photo each")
            file = folder / f"{number}.safetensors"
            self.prompts.append(vllm_checkpoints.photo_prompt(*target, sample.images[0], sample.prompt, file))
        self.ways: dict[str, dict[str, Any] | None] = {"vllm": None, "vllm ngram": NGRAM, "vllm repeats": REPEATS}
        for method, head, drafted in (("eagle3", args.eagle3, args.chain), ("dflash", args.dflash, args.block)):
            formats.export(head, "speculators", folder / method)
            own = {"method": method, "model": str(folder / method), "num_speculative_tokens": drafted}
            self.ways[f"vllm {method}"] = own

    def measure(self, setting: Setting, sizes: Sequence[int]) -> dict[int, Measured]:
        """Measures one way of speculating, for each number of prompts at a time. RuntimeError if vLLM fails."""
        engine = vllm_process.SETTINGS | vllm_checkpoints.EMBEDDINGS
        engine |= {"model": str(self.model), "enable_prefix_caching": False, "max_num_seqs": max(self.args.batch)}
        engine |= {"enforce_eager": not setting.compiled, "dtype": setting.dtype}
        job = {
            "engine": engine, "prompts": self.prompts, "tokens": self.args.tokens, "batches": list(sizes),
            "rounds": self.args.rounds + 1, "speculative": [self.ways[setting.engine]],
        }  # fmt: skip
        load = os.getloadavg()[0]
        done = vllm_process.answers(job, str(vllm_process.ROOT / "src"), self.args.patience, bound())
        found = {}
        for size, run in zip(sizes, done["runs"][0], strict=True):
            rounds = run["rounds"][1:]
            seconds = [sum(some[0]["seconds"] for some in batches(answers, size)) for answers in rounds]
            fastest = rounds[seconds.index(min(seconds))]
            answers = [answer["ids"] for answer in fastest]
            loads = [load, os.getloadavg()[0]]
            found[size] = Measured(answers, seconds, speculation(run["counts"]), done["threads"], loads)
        return found


def settings(args: Any, ways: Sequence[str]) -> Iterator[Setting]:
    """Yields what is measured: this engine first, whose greedy answers the others are compared with."""
    for dtype in args.dtype:
        yield from (Setting(method, dtype) for method in OURS)
    for compiled in (False, True)[: 1 + args.compile]:
        yield from (Setting(way, dtype, compiled) for dtype in args.dtype for way in ways)


def row(setting: Setting, batch: int, found: Measured, greedy: Sequence[Sequence[int]]) -> dict[str, Any]:
    """Returns a row of the results."""
    tokens, seconds = sum(map(len, found.answers)), min(found.seconds_of_rounds)
    same = sum(a == b for a, b in zip(found.answers, greedy, strict=True))
    figures = {name: value for name, value in dataclasses.asdict(found).items() if name != "answers"}
    return dataclasses.asdict(setting) | figures | {
        "batch": batch, "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds, "same": same,
        "samples": len(found.answers),
    }  # fmt: skip


def show(number: int, count: int, setting: Setting, batch: int, found: Measured) -> None:
    speed = sum(map(len, found.answers)) / min(found.seconds_of_rounds)
    length = (found.speculation or {}).get("mean_acceptance_length")
    tau = f"  τ {length:.2f}" if length else ""
    at = time.strftime("%H:%M:%S")
    print(f"{at} {number}/{count} {setting.name}, batch {batch}: {speed:.1f} tokens/s{tau}", flush=True)


def measured(
    every: Sequence[Setting], sizes: Sequence[int], kept: Unfinished, measure: Callable[[Setting, Sequence[int]], Any]
) -> tuple[dict[tuple[Setting, int], Measured], list[str]]:
    """Measures what is not kept yet. Returns (the results, the names of what failed)."""
    results, failed, count = {}, [], len(every)
    for number, setting in enumerate(every, 1):
        found = {size: part for size in sizes if (part := kept.get(setting.name, Measured, size))}
        missing = [size for size in sizes if size not in found]
        try:
            for size, part in measure(setting, missing).items() if missing else ():
                found[size] = kept.put(setting.name, size, part)
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            print(f"{number}/{count} {setting.name} failed: {error}", file=sys.stderr, flush=True)
            failed.append(setting.name)
        for size, part in found.items():
            show(number, count, setting, size, part)
            results[setting, size] = part
    return results, failed


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares this engine with vLLM.")
    parser.add_argument("--data", type=Path, help="data lines with one photo each; by default the bundled prompts")
    parser.add_argument("--images", type=Path, help="folder of the photos")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--dtype", nargs="+", choices=list(BACKENDS), default=["float32"])
    parser.add_argument("--eagle3", type=Path, default=WEIGHTS / "eagle3")
    parser.add_argument("--dflash", type=Path, default=WEIGHTS / "dflash")
    parser.add_argument("--chain", type=int, default=4, help="tokens that EAGLE-3 drafts in vLLM")
    parser.add_argument("--block", type=int, default=7, help="tokens that DFlash drafts in vLLM")
    parser.add_argument("--compile", action="store_true", help="measure vLLM compiled, too; it starts minutes later")
    parser.add_argument("--patience", type=float, default=3600, help="seconds that a run of vLLM may take")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not vllm_process.INSTALLED.exists():
        raise SystemExit(vllm_process.MISSING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # vLLM ends with this command
    samples = load_data(args.data, args.images)[: args.limit]
    target = load_target("reference")
    names = ("tokens", "rounds", "chain", "block", "limit")
    chosen = {name: getattr(args, name) for name in names} | {"vllm": "vllm-cpu 0.32.0"}
    made_of = environment(target[0], chosen)
    place = args.out.with_suffix("")  # a folder, for the time of the run
    place.mkdir(parents=True, exist_ok=True)
    kept = Unfinished(place)
    prompts = repr([(sample.prompt, sample.images) for sample in samples])
    kept.resume(made_of | {"prompts": hashlib.sha256(prompts.encode()).hexdigest()[:16]})
    with tempfile.TemporaryDirectory() as folder:
        vllm = VLLM(target, samples, Path(folder), args)

        def measure(setting: Setting, sizes: Sequence[int]) -> dict[int, Measured]:
            if setting.engine in vllm.ways:
                return vllm.measure(setting, sizes)
            return {size: ours(target, setting, samples, size, args.rounds, args.tokens) for size in sizes}

        results, failed = measured(list(settings(args, list(vllm.ways))), args.batch, kept, measure)
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}. The others are kept; the same command tries these again.")
    greedy = next(iter(results.values())).answers
    rows = [row(setting, batch, found, greedy) for (setting, batch), found in results.items()]
    write_whole(args.out, json.dumps({"environment": made_of, "rows": rows}, indent=1) + "\n")
    kept.remove()
    place.rmdir()


if __name__ == "__main__":
    main()
