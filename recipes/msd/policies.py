"""Measures the lossy policies: speed, exact total variation, agreement with lossless decoding, and caption quality.

python -m recipes.msd.policies --drafter DIR --photos 100

Every policy captions every photo with the same seed, at T = 1 and 0.7; the policies take turns. CIDEr compares with the
photo's five captions. Agreement is the share of answers equal to the lossless one of the same seed, and the mean share
of their tokens before the first difference.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from msd.bench.data import data_lines
from msd.config import SpeculativeConfig
from msd.core.statistics import Statistics
from msd.drafters import registry
from msd.drafters.algorithms.msd import MSD
from msd.inputs import prompts
from msd.loading import load_target
from msd.model import SpeculativeVLM
from msd.system.files import write_whole
from recipes.reference_vlm.metrics import caption_scores

PROMPT = "Write a short caption for this picture."
POLICIES: dict[str, dict[str, Any]] = {
    "lossless": {},
    "threshold": {"verifier": "threshold"},
    "budget 0": {"verifier": "budget", "epsilon": 0.0},
    "budget 0.01": {"verifier": "budget", "epsilon": 0.01},
    "budget 0.05": {"verifier": "budget", "epsilon": 0.05},
}


def captions(data: Path, photos: int) -> dict[str, list[str]]:
    """Returns the captions of the first val photos."""
    found: dict[str, list[str]] = defaultdict(list)
    for _, row in data_lines(data / "flickr8k" / "captions.jsonl"):
        if row["split"] == "val" and (row["image"] in found or len(found) < photos):
            found[row["image"]].append(row["text"])
    return found


def agreement(one: list[int], two: list[int]) -> tuple[float, float]:
    """Returns (1 if equal, share of tokens before the first difference)."""
    same = next((i for i, (a, b) in enumerate(zip(one, two, strict=False)) if a != b), min(len(one), len(two)))
    return float(one == two), same / max(len(one), len(two), 1)


def measure(args: argparse.Namespace, temperature: float) -> dict[str, dict[str, Any]]:
    """Returns policy -> measurements, over all photos."""
    model, processor = load_target(args.target)
    drafter = MSD(registry.load(args.drafter))
    engines = {name: SpeculativeVLM(model, processor, SpeculativeConfig(**s), drafter) for name, s in POLICIES.items()}
    engines = {"ar": SpeculativeVLM(model, processor, drafter="ar"), **engines}
    references = captions(args.data, args.photos)
    texts: dict[str, dict[str, str]] = defaultdict(dict)
    tokens: dict[str, list[list[int]]] = defaultdict(list)
    seconds: dict[str, float] = defaultdict(float)
    totals: dict[str, Statistics] = defaultdict(Statistics)
    for seed, name in enumerate(references):
        inputs = prompts.prepare(processor, [[args.data / "flickr8k" / "images" / name]], [PROMPT])
        turn = seed % len(engines)
        for policy in [*list(engines)[turn:], *list(engines)[:turn]]:
            engine = engines[policy]
            engine.target.vision.clear()
            begun = time.perf_counter()
            answer = engine.generate(
                **inputs, seed=seed, do_sample=True, temperature=temperature, top_k=0, max_new_tokens=64
            )
            seconds[policy] += time.perf_counter() - begun
            texts[policy][name] = answer.text
            tokens[policy].append(answer.tokens)
            totals[policy].add(answer.statistics)
    table = {}
    for policy in engines:
        same = [agreement(a, b) for a, b in zip(tokens["lossless"], tokens[policy], strict=True)]
        count = sum(map(len, tokens[policy]))
        table[policy] = {
            "tokens_per_second": count / seconds[policy],
            "speedup_vs_ar": (count / seconds[policy]) / (sum(map(len, tokens["ar"])) / seconds["ar"]),
            "mean_acceptance_length": totals[policy].mean_acceptance_length,
            "divergence": totals[policy].as_dict()["divergence"],
            "answers_equal_to_lossless": sum(e for e, _ in same) / len(same),
            "tokens_equal_to_lossless": sum(s for _, s in same) / len(same),
            "cider": caption_scores(references, texts[policy])["cider"],
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--drafter", type=Path, required=True)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--photos", type=int, default=100)
    parser.add_argument("--target", default="reference")
    parser.add_argument("--out", type=Path, default=Path("recipes/msd/results/policies.json"))
    args = parser.parse_args()
    results = {str(t): measure(args, t) for t in (1.0, 0.7)}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(args.out, json.dumps(results, indent=1) + "\n")
    for temperature, table in results.items():
        for policy, row in table.items():
            spent = (row["divergence"] or {}).get("per_token", 0.0)
            print(
                f"T={temperature} {policy}: {row['speedup_vs_ar']:.2f}x ar, τ {row['mean_acceptance_length']:.2f}, "
                f"TV {spent:.4f} per token, CIDEr {row['cider']:.3f}, equal {row['answers_equal_to_lossless']:.2f}"
            )


if __name__ == "__main__":
    main()
