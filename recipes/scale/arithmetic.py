"""Reckons what training a drafter costs on 1, 8 and 64 GPUs: `python -m recipes.scale.arithmetic [--write]`.

Nothing here was measured on a GPU. Times are those of `msd estimate`'s roofline, bytes follow from the sizes. The draft
networks are built without weights, so their parameters are counted. `--write` puts the tables into docs/scale.md.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, Qwen3Config

from msd.drafters import registry
from msd.estimate.presets import preset
from msd.estimate.roofline import CARDS, Card, pass_seconds, prefill_seconds
from msd.estimate.sizes import Sizes
from msd.system.files import write_whole

PAGE = Path(__file__).parents[2] / "docs" / "scale.md"
GPUS = (1, 8, 64)
MACHINE = 8  # GPUs of one machine
INSIDE, BETWEEN = 450e9, 50e9  # bytes per second and direction of a GPU: NVLink 4 of an H100 SXM, 400 Gb/s InfiniBand
BYTES_TOKEN = 24  # of a line of captured answers: an id and a gain as text, and the text itself
BYTES_PHOTO = 14_000  # the mean of this project's photos is 13.6 kB (Flickr8k, 256 px) and 14.8 kB (COCO)
SERVED = 64  # requests that a server decodes at once


@dataclass(frozen=True)
class Run:
    """The work: answers to prompts with one image and `text` tokens, trained on for `epochs`, `batch` per step."""

    answers: int = 100_000
    text: int = 64
    tokens: int = 256
    epochs: int = 3
    batch: int = 64
    draft_vocabulary: int = 32_000

    @property
    def steps(self) -> int:
        """Steps of the optimisation."""
        return self.answers * self.epochs // self.batch


# a photo of 640 x 480: 40 x 30 patches of 16, merged by 2 x 2; sizes from the config.json of the checkpoint
QWEN = Sizes(
    "Qwen3-VL-8B", 36, 4096, 12288, 32, 8, 128, 151936, 300,
    vision_layers=27, vision_hidden=1152, vision_intermediate=4304, vision_patches=1200,
)  # fmt: skip
TARGETS: dict[str, tuple[Sizes, Any]] = {
    "LLaVA-1.5-7B": (preset("llava-1.5-7b"), LlamaConfig),
    "Qwen3-VL-8B": (QWEN, Qwen3Config),
}


def network(target: str, method: str, run: Run) -> Any:
    """Returns the draft network of a method for a target, without weights."""
    sizes, kind = TARGETS[target]
    config = kind(
        hidden_size=sizes.hidden, intermediate_size=sizes.intermediate, num_hidden_layers=sizes.layers,
        num_attention_heads=sizes.heads, num_key_value_heads=sizes.kv_heads, head_dim=sizes.head_dim,
        vocab_size=sizes.vocabulary,
    )  # fmt: skip
    made = registry.trainable(method)
    reduced = {"draft_vocabulary": min(run.draft_vocabulary, sizes.vocabulary)} if made.reduced else {}
    with torch.device("meta"):
        return made.for_target(config, **reduced)


def trained(net: Any) -> int:
    """Counts the parameters that are trained."""
    return sum(p.numel() for p in net.parameters() if p.requires_grad)


def draft_flops(net: Any, sizes: Sizes, run: Run) -> float:
    """Reckons the FLOPs of the draft network for one answer, forward and backward.

    Every token is context, whose keys and values are computed; every drafted position goes through all layers.
    """
    depth = net.reach if net.reach > 1 else net.config.depth
    return 3 * forward_flops(net, sizes.image_tokens + run.text + run.tokens, min(net.roots, run.tokens), depth)


def forward_flops(net: Any, context: int, roots: int, depth: int) -> float:
    """Reckons the FLOPs of `depth` levels of drafts below `roots` positions, after `context` tokens."""
    c, rows = net.config, roots * depth
    layers = sum(p.numel() for p in net.layers.parameters() if p.dim() > 1)
    keys = sum(p.numel() for name, p in net.layers.named_parameters() if ".k_proj.w" in name or ".v_proj.w" in name)
    attention = 2 * c.layers * c.heads * c.head_dim * rows * context
    maps = sum(p.numel() for name, p in net.named_parameters() if name in ("fc.weight", "fuse.weight"))
    return 2 * (context * (maps + keys) + rows * (layers + c.hidden * c.draft_vocabulary) + attention)


def teacher_seconds(sizes: Sizes, card: Card, run: Run, batch: int, images: int = 1) -> float:
    """Estimates the seconds in which the target reads one prompt and answer, with logits at the answer's tokens."""
    rows = run.text + run.tokens + images * sizes.image_tokens
    logits = 2 * sizes.head * run.tokens / card.reached().flops
    return prefill_seconds(sizes, card, rows, images, batch) / batch + logits


def writing_seconds(sizes: Sizes, card: Card, run: Run) -> float:
    """Estimates the seconds of a server for one answer, with `SERVED` requests at once."""
    prompt = run.text + sizes.image_tokens
    decoding = run.tokens * pass_seconds(sizes, card, 1, prompt + run.tokens // 2, SERVED)
    return (prefill_seconds(sizes, card, prompt, 1, SERVED) + decoding) / SERVED


def exchange_seconds(parameters: int, gpus: int) -> float:
    """Reckons the seconds in which a step's gradients (float32) are summed over the GPUs, by a ring."""
    speed = INSIDE if gpus <= MACHINE else BETWEEN
    return 2 * (gpus - 1) / gpus * 4 * parameters / speed


def hours(target: str, method: str, gpus: int, run: Run, card: Card) -> dict[str, float]:
    """Reckons the hours of each part of the work on `gpus` GPUs; the gradients' exchange hides behind nothing."""
    sizes, net = TARGETS[target][0], network(target, method, run)
    share = max(1, run.batch // gpus)  # answers of a step on each GPU
    step = share * (teacher_seconds(sizes, card, run, share) + draft_flops(net, sizes, run) / card.reached().flops)
    gains = teacher_seconds(sizes, card, run, 8) + teacher_seconds(sizes, card, run, 8, images=0)
    return {
        "writing": run.answers * writing_seconds(sizes, card, run) / gpus / 3600,
        "gains": run.answers * gains / gpus / 3600,
        "training": run.steps * step / 3600,
        "exchange": run.steps * exchange_seconds(trained(net), gpus) / 3600,
    }


def memory(target: str, method: str, run: Run) -> tuple[float, float]:
    """Reckons the gigabytes of (the target in bfloat16; the drafter with gradients and AdamW in float32)."""
    return 2 * TARGETS[target][0].model / 1e9, 16 * trained(network(target, method, run)) / 1e9


def table_of_hours(run: Run, card: Card) -> str:
    """Returns the table of hours as Markdown."""
    lines = [
        "| target | method | GPUs | answers written | gains | training | of it exchange | all | GPU hours |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for target in TARGETS:
        for method in ("eagle3", "dflash"):
            for gpus in GPUS:
                h = hours(target, method, gpus, run, card)
                training = h["training"] + h["exchange"]
                whole = h["writing"] + h["gains"] + training
                cells = (h["writing"], h["gains"], training, h["exchange"], whole, whole * gpus)
                lines.append(f"| {target} | `{method}` | {gpus} | " + " | ".join(f"{x:.2f}" for x in cells) + " |")
    return "\n".join(lines)


def table_of_bytes(run: Run) -> str:
    """Returns the table of memory, storage and traffic as Markdown."""
    lines = [
        "| target | method | trained parameters | target, GB | drafter, GB | gradients, GB | all states, TB |",
        "|---|---|---|---|---|---|---|",
    ]
    for target, (sizes, _) in TARGETS.items():
        for method in ("eagle3", "dflash"):
            net = network(target, method, run)
            model, drafter = memory(target, method, run)
            tokens = run.answers * (sizes.image_tokens + run.text + run.tokens)
            states = tokens * len(net.config.taps) * sizes.hidden * 2 / 1e12
            cells = (f"{trained(net) / 1e6:.0f} M", f"{model:.1f}", f"{drafter:.1f}", f"{4 * trained(net) / 1e9:.1f}")
            lines.append(f"| {target} | `{method}` | " + " | ".join(cells) + f" | {states:.1f} |")
    answers, photos = run.answers * run.tokens * BYTES_TOKEN / 1e9, run.answers * BYTES_PHOTO / 1e9
    return "\n".join([
        *lines, "",
        f"Captured answers take {answers:.1f} GB. With a photo of {BYTES_PHOTO / 1000:.0f} kB for each answer, photos",
        f"take {photos:.1f} GB, and the requests to the server send {photos * 4 / 3:.1f} GB.",
    ])  # fmt: skip


def written(text: str, run: Run, card: Card) -> str:
    """Returns the page with fresh tables between its marks."""
    for name, table in {"hours": table_of_hours(run, card), "bytes": table_of_bytes(run)}.items():
        block = f"<!-- {name} -->\n{table}\n<!-- /{name} -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- /{name} -->", lambda _, b=block: b, text, count=1, flags=re.S)
    return text


def main() -> None:
    """Prints the tables, or writes them."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--card", default="h100", choices=sorted(CARDS))
    parser.add_argument("--write", action="store_true")
    for name, value in vars(Run()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=value)
    args = parser.parse_args()
    run, card = Run(**{name: getattr(args, name) for name in vars(Run())}), CARDS[args.card]
    if args.write:
        write_whole(PAGE, written(PAGE.read_text(encoding="utf-8"), run, card))
        return
    print(table_of_hours(run, card), table_of_bytes(run), sep="\n\n")


if __name__ == "__main__":
    main()
