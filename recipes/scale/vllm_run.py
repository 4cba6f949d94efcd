"""Answers prompts with vLLM's engine in this process, once for each way of speculating.

Run by the Python of `.venv-vllm` (`make vllm-env`), so it imports nothing of this project:

    .venv-vllm/bin/python recipes/scale/vllm_run.py < job.json > answers.json

job.json: {"engine": arguments of `vllm.LLM`, "speculative": [null, {"method": …}, …], "tokens": most tokens of an
answer, "batches": prompts at a time, in turn (default [1]), "rounds": how often all prompts are answered (default 1),
"modules": to import first (default none), "prompts": [{"ids", "image", "embeddings"}, …]}. `image`: a file, or none.
`embeddings`: in its place a safetensors file with the projector's output, a tensor `image` [tokens, hidden]. The ids
name an image once.

answers.json: {"version", "threads" of torch, "runs": [[{"rounds": [[{"ids", "seconds"}, …], …], "counts"}, …], …]}: for
each way of speculating, and each number of prompts at a time. seconds: of the batch that the answer is part of. counts:
vLLM's counters of speculation in the last round, as `msd bench --server` names them.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from typing import Any

os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # no process outlives this one
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}
COUNTERS = "vllm:spec_decode_num_"


def prompt(part: dict[str, Any]) -> dict[str, Any]:
    """Returns a prompt as vLLM reads it."""
    data: dict[str, Any] = {}
    if "embeddings" in part:
        from safetensors.torch import load_file

        data["image"] = load_file(part["embeddings"])["image"][None]  # three dimensions: two would be pixels
    elif "image" in part:
        from PIL import Image

        data["image"] = Image.open(part["image"]).convert("RGB")
    return {"prompt_token_ids": part["ids"]} | ({"multi_modal_data": data} if data else {})


def counters(engine: Any) -> dict[str, float]:
    """Returns the counters of speculation; those by position are `accepted_tokens_per_pos 0`, …."""
    found: dict[str, float] = {}
    for metric in engine.get_metrics():
        if metric.name.startswith(COUNTERS):
            name = metric.name.removeprefix(COUNTERS)
            by_position = getattr(metric, "values", None)
            found |= (
                {name: metric.value} if by_position is None else {f"{name} {i}": n for i, n in enumerate(by_position)}
            )
    return found


def answer(engine: Any, prompts: list[dict[str, Any]], tokens: int, batch: int) -> list[dict[str, Any]]:
    """Answers all prompts greedily, `batch` at a time."""
    import vllm

    settings = vllm.SamplingParams(temperature=0, max_tokens=tokens)
    answers = []
    for first in range(0, len(prompts), batch):
        started = time.perf_counter()
        made = engine.generate(prompts[first : first + batch], settings, use_tqdm=False)
        seconds = time.perf_counter() - started
        answers += [{"ids": list(output.outputs[0].token_ids), "seconds": seconds} for output in made]
    return answers


def run(job: dict[str, Any], speculative: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Starts an engine and answers the prompts of a job in all rounds, for each number of prompts at a time."""
    import vllm

    engine = vllm.LLM(disable_log_stats=False, speculative_config=speculative, **job["engine"])
    prompts = [prompt(part) for part in job["prompts"]]
    found = []
    for batch in job.get("batches", [1]):
        counts: dict[str, float] = {}
        rounds = []
        for _ in range(job.get("rounds", 1)):
            before = counters(engine)
            rounds.append(answer(engine, prompts, job["tokens"], batch))
            counts = {name: count - before.get(name, 0) for name, count in counters(engine).items()}
        found.append({"rounds": rounds, "counts": counts})
    return found


def main() -> None:
    """Reads a job from standard input, and writes the answers to standard output."""
    job = json.load(sys.stdin)
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # vLLM logs to standard output
    import torch
    from vllm.distributed import cleanup_dist_env_and_memory

    import vllm

    for name in job.get("modules", ()):
        importlib.import_module(name)
    runs = []
    for speculative in job["speculative"]:
        runs.append(run(job, speculative))
        cleanup_dist_env_and_memory()
    with out:
        json.dump({"version": vllm.__version__, "threads": torch.get_num_threads(), "runs": runs}, out)


if __name__ == "__main__":
    main()
