"""Trains the reference model to describe clips at length: the video target of the events suite.

python -m recipes.events.target train                    # from the shipped weights; run again to continue
python -m recipes.events.target export --weights weights/video/target.safetensors
python -m recipes.events.target build --weights weights/video/target.safetensors --out runs/events/target

It trains the same parts as `recipes/reference_vlm`: projector, positions, low-rank updates. `export` also records the
checksum of the weights. `build` assembles a checkpoint folder for `--target`; for the committed weights, `--target
reference-video` does the same.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from msd.backends.packed import faster_in_bf16
from msd.reference.assemble import assemble
from msd.reference.folder import CHECKSUMS, fingerprint, locate
from msd.train.loop import Loop, LoopConfig
from recipes.reference_vlm.base import language_model, load_encoder
from recipes.reference_vlm.features import FeatureSet, Frames, Row, encode_set, read_jsonl
from recipes.reference_vlm.model import ModelConfig, TrainableVLM, load_weights, save_weights, widths
from recipes.reference_vlm.pack import CELLS, IMAGE, Batch, Branch, Sample, pack
from recipes.reference_vlm.train import optimizer, weighted_loss

END = 2
FRAMES = 4
LENGTH = 448  # most tokens of a clip with its answer


class Clips:
    """Batches of `rows` clips with their answers; each clip occurs once per epoch, in random order."""

    def __init__(self, features: Path, tokenizer: object, split: str, rows: int, seed: int = 0) -> None:
        self.set = FeatureSet(features, "clips")
        self.pool = [i for i, row in enumerate(self.set.rows) if row["split"] == split]
        self.tokenizer, self.rows, self.seed = tokenizer, rows, seed

    def batch(self, step: int) -> Batch:
        """Returns the clips of a step."""
        chosen = [self._row(step * self.rows + i) for i in range(self.rows)]
        batch = pack([[self._sample(i)] for i in chosen], LENGTH, END)
        features = torch.cat([self.set.features(i) for i in chosen]).reshape(-1, CELLS, 1328)
        return replace(batch, features=features)

    def _row(self, number: int) -> int:
        epoch, at = divmod(number, len(self.pool))
        return random.Random(f"{self.seed}-{epoch}").sample(self.pool, len(self.pool))[at]

    def _sample(self, row: int) -> Sample:
        line = self.set.rows[row]
        prefix = self._ids("<|im_start|>user\n") + (*([IMAGE] * CELLS), *self._ids("\n")) * FRAMES
        prompt = self._ids(f"{line['prompt']}<|im_end|>\n<|im_start|>assistant\n")
        room = LENGTH - len(prefix) - len(prompt)
        answer = (*self._ids(line["answer"]), END)[:room]
        return Sample(prefix, (Branch(prompt, answer, "clip"),), (("clips", row),))

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)  # type: ignore[operator]


def make_features(clips: Path, out: Path) -> None:
    """Encodes all frames with the frozen encoder, unless the features exist."""
    if (out / "clips.json").exists():
        return
    out.mkdir(parents=True, exist_ok=True)

    def rows() -> Iterator[tuple[Row, Frames]]:
        for split in ("train", "val"):
            for line in read_jsonl(clips / f"{split}.jsonl"):
                yield line, [Image.open(clips / name).convert("RGB") for name in line["image"]]

    encode_set(load_encoder().features, rows(), FRAMES, out / "clips", 16)


def train(args: argparse.Namespace) -> None:
    make_features(args.clips, args.out / "features")
    bf16 = faster_in_bf16(torch.device("cpu"))
    start = load_weights(args.start)
    lm, tokenizer = language_model()
    torch.manual_seed(0)
    model = TrainableVLM(lm.eval(), ModelConfig(widths(start).rank, widths(start).layers, bf16))
    model.load(start)
    clips, val = (Clips(args.out / "features", tokenizer, split, args.rows) for split in ("train", "val"))

    def step_loss(step: int) -> tuple[Tensor, dict[str, float]]:
        batch = clips.batch(step)
        return weighted_loss(model.losses(batch), batch)

    @torch.no_grad()
    def evaluate() -> dict[str, float]:
        losses = torch.cat([model.losses(val.batch(step)) for step in range(8)])
        return {"clip": float(losses.mean())}

    params = {n: p for n, p in model.named_parameters() if p.requires_grad}
    config = LoopConfig(args.steps, warmup=30, evaluate_every=100, average=0.98)
    loop = Loop(params, optimizer(params, args.lr), step_loss, config, args.out / "run", evaluate)
    print("finished" if loop.run() else "stopped; run again to continue", loop.step, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("train", "export", "build"))
    parser.add_argument("--clips", type=Path, default=Path("runs/events/clips"))
    parser.add_argument("--start", type=Path, default=locate().vlm)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--rows", type=int, default=3)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--weights", type=Path, default=Path("weights/video/target.safetensors"))
    parser.add_argument("--out", type=Path, default=Path("runs/events/target"))
    args = parser.parse_args()
    if args.what == "train":
        train(args)
    elif args.what == "export":
        args.weights.parent.mkdir(parents=True, exist_ok=True)
        save_weights(load_weights(args.out / "run" / "checkpoint.pt"), args.weights)
        record = {args.weights.name: fingerprint(args.weights)}
        args.weights.with_name(CHECKSUMS.name).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    else:
        folder = args.out / "model"
        folder.mkdir(parents=True, exist_ok=True)
        assemble(replace(locate(), vlm=args.weights), folder)
        print(json.dumps({"target": str(folder)}))


if __name__ == "__main__":
    main()
