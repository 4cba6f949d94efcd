"""Writes text-only training data: instructions answered by the pretrained language model, to keep its chat ability.

python -m recipes.reference_vlm.text_turns --data ../shared/data --out runs/reference/text.jsonl
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from msd.train.capture import Prompt, capture
from recipes.reference_vlm.features import read_jsonl
from recipes.reference_vlm.writer import GreedyWriter, left_padded

END = 2
TRAIN_FILES = ("alpaca_5000.jsonl", "llmsfromscratch_instruction_1100.jsonl")
VAL_FILES = ("vicuna_bench_questions.jsonl", "mt_bench_questions.jsonl")


def user_turn(question: str) -> str:
    """Returns the prompt of a text-only turn."""
    return f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"


def instructions(data: Path, n: int, longest: int = 240) -> list[str]:
    """Returns `n` distinct short instructions for training."""
    rows = [r for name in TRAIN_FILES for r in read_jsonl(data / "text" / name)]
    texts = [r["instruction"] + (f"\n{r['input']}" if r["input"] else "") for r in rows]
    short = sorted({t for t in texts if len(t) <= longest})
    return random.Random("text").sample(short, n)


def benchmark_prompts(data: Path, n: int, longest: int = 240) -> list[str]:
    """Returns the first turns of benchmark prompts, for evaluation."""
    turns = [r["turns"][0] for name in VAL_FILES for r in read_jsonl(data / "text" / name)]
    return [t for t in turns if len(t) <= longest][:n]


def text_encoder(tokenizer: Any) -> Any:
    """Returns a function from prompts to left-padded ids, in the model's chat format without a system turn."""

    def encode(prompts: Sequence[Prompt]) -> Any:
        return left_padded([tokenizer(user_turn(p.text), add_special_tokens=False).input_ids for p in prompts], END)

    return encode


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--out", type=Path, default=Path("runs/reference/text.jsonl"))
    parser.add_argument("--train", type=int, default=1000)
    parser.add_argument("--val", type=int, default=60)
    parser.add_argument("--max-new-tokens", type=int, default=80)
    parser.add_argument("--batch", type=int, default=32)
    args = parser.parse_args()
    from recipes.reference_vlm.base import language_model

    model, tokenizer = language_model()
    prompts = [Prompt(t, task="val") for t in benchmark_prompts(args.data, args.val)]
    prompts += [Prompt(t, task="train") for t in instructions(args.data, args.train)]
    writer = GreedyWriter(model, tokenizer, text_encoder(tokenizer), args.max_new_tokens, END)
    capture(prompts, writer, args.out, args.batch, lambda done, total: print(f"{done} of {total} answers", flush=True))


if __name__ == "__main__":
    main()
