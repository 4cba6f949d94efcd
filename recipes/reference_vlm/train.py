"""Trains the reference model's projector, positions and low-rank updates. Run it again to resume.

python -m recipes.reference_vlm.train --start ../shared/reference_vlm/weights.safetensors --steps 1500
python -m recipes.reference_vlm.train --steps 1200        # resume, with the end of the schedule at step 1200
python -m recipes.reference_vlm.train --export weights.safetensors
"""

from __future__ import annotations

import argparse
import os
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from msd.backends.packed import faster_in_bf16
from msd.bench.data import data_lines
from msd.train.loop import Loop, LoopConfig
from recipes.reference_vlm.base import language_model
from recipes.reference_vlm.data import Mix, MixConfig
from recipes.reference_vlm.model import ALL, QVO, ModelConfig, TrainableVLM, load_weights, save_weights
from recipes.reference_vlm.pack import Batch

COLOUR = "tower.colour"
LAYERS = {"all": ALL, "qvo": QVO}


def weighted_loss(losses: Tensor, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """Returns the mean over answer tokens, weighted by task, and the unweighted mean of each task."""
    loss = (losses * batch.weights).sum() / batch.weights.sum()
    by_task: dict[str, list[float]] = defaultdict(list)
    for task, value in zip(batch.tasks, losses.tolist(), strict=True):
        by_task[task].append(value)
    return loss, {task: sum(v) / len(v) for task, v in by_task.items()}


@torch.no_grad()
def validation(model: TrainableVLM, mix: Mix, steps: int) -> dict[str, float]:
    """Returns the loss per task over `steps` fixed val batches, with visible images; "all" is the weighted mean."""
    totals: dict[str, list[float]] = defaultdict(list)
    weighted, weight = 0.0, 0.0
    for step in range(steps):
        batch = mix.batch(step).to(model.device)
        losses = model.losses(batch)
        weighted += float((losses * batch.weights).sum())
        weight += float(batch.weights.sum())
        for task, value in zip(batch.tasks, losses.tolist(), strict=True):
            totals[task].append(value)
    return {"all": weighted / weight} | {task: sum(v) / len(v) for task, v in sorted(totals.items())}


def optimizer(params: Mapping[str, torch.nn.Parameter], lr: float) -> torch.optim.AdamW:
    """Returns AdamW: half the rate for the projector, which starts trained, and 5 times the rate for the colour map."""
    low_rank = [p for n, p in params.items() if n.startswith("lm.")]
    rest = [p for n, p in params.items() if not n.startswith("lm.") and n != COLOUR]
    groups = [
        {"params": low_rank, "lr": lr},
        {"params": rest, "lr": lr / 2},
        {"params": [params[COLOUR]], "lr": 5 * lr},
    ]
    return torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01, fused=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--features", type=Path, default=Path("runs/reference/features"))
    parser.add_argument("--texts", type=Path, default=Path("runs/reference/text.jsonl"))
    parser.add_argument("--out", type=Path, default=Path("runs/reference/train"))
    parser.add_argument("--start", type=Path, help="weights to start from (fresh run only)")
    parser.add_argument(
        "--behind", type=int, default=0, help="steps of training in those weights; the data continues there"
    )
    parser.add_argument("--steps", type=int, default=960)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--rank", type=int, default=32)
    parser.add_argument("--layers", choices=LAYERS, default="all")
    parser.add_argument("--precision", choices=("measure", "bf16", "float32"), default="measure")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--length", type=int, default=384)
    parser.add_argument("--evaluate-every", type=int, default=120)
    parser.add_argument("--validation-steps", type=int, default=6)
    parser.add_argument("--average", type=float, default=0.995, help="decay of the averaged weights per step; 0: off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--export", type=Path, help="write the checkpoint's weights as a shipped file, and exit")
    return parser.parse_args()


def main() -> None:
    args = parse()
    if args.export:
        save_weights(load_weights(args.out / "checkpoint.pt"), args.export)
        return
    device = torch.device(args.device)
    bf16 = args.precision == "bf16" or (args.precision == "measure" and faster_in_bf16(device))
    print(f"pid {os.getpid()}, {device}, frozen weights in {'bf16' if bf16 else 'float32'}", flush=True)
    torch.manual_seed(args.seed)
    lm, tokenizer = language_model()
    model = TrainableVLM(lm.eval(), ModelConfig(args.rank, LAYERS[args.layers], bf16)).to(device)
    if args.start and not (args.out / "checkpoint.pt").exists():
        model.load(load_weights(args.start))
    if args.compile:
        model.compile_layers()
    texts = [line for _, line in data_lines(args.texts)]
    config = MixConfig(args.rows, args.length)
    mix = Mix(args.data, args.features, texts, tokenizer, config, args.seed)
    val = Mix(args.data, args.features, texts, tokenizer, replace(config, blind=0.0), args.seed, "val")

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        batch = mix.batch(args.behind + step).to(device)
        return weighted_loss(model.losses(batch), batch)

    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    warmup = min(50, 1 + args.steps // 5)
    settings = LoopConfig(
        args.steps, args.seed, warmup=warmup, evaluate_every=args.evaluate_every, average=args.average
    )
    loop = Loop(
        params,
        optimizer(params, args.lr),
        step_loss,
        settings,
        args.out,
        lambda: validation(model, val, args.validation_steps),
    )
    print(
        f"{sum(p.numel() for p in params.values()) / 1e6:.1f} M parameters,",
        f"from step {loop.step} to {loop.schedule.steps}",
        flush=True,
    )
    finished = loop.run()
    print("finished" if finished else "stopped; run again to resume", loop.step, flush=True)


if __name__ == "__main__":
    main()
