"""`msd estimate`: estimates the speedup of speculative decoding on a GPU, without the GPU and without weights."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from msd.cli.options import Json, Target, quiet
from msd.cli.terminal import table

if TYPE_CHECKING:
    from msd.estimate import Acceptance, Card, Sizes

WEIGHTS = {"own": None, "int8": 1.0, "int4": 0.5}  # bytes per weight


def estimate(
    target: Target = "llava-1.5-7b",
    gpu: Annotated[
        str, typer.Option("--gpu", help="A card, such as H100 or RTX-4090, or 'cpu': this machine.")
    ] = "H100",
    acceptance: Annotated[
        str,
        typer.Option(
            "--acceptance",
            help="Mean acceptance length with bonus token: 3.5; by tree size: 8=3.1,60=4.7; rates by level: 0.8,0.7.",
        ),
    ] = "3.5",
    drafter: Annotated[
        str,
        typer.Option(
            "--drafter-kind",
            help="'levels': a pass per tree level (EAGLE-2); 'block': one pass for all; 'mtp': the target's layers.",
        ),
    ] = "levels",
    draft_model: Annotated[
        str | None,
        typer.Option("--draft-model", help="A smaller model or assistant that drafts, named as a target."),
    ] = None,
    weights: Annotated[str, typer.Option("--weights", help="Of the target: 'own', 'int8' or 'int4'.")] = "own",
    prompt: Annotated[int, typer.Option("--prompt-tokens", min=1, help="Text tokens of the prompt.")] = 64,
    images: Annotated[int, typer.Option("--image-count", min=0, help="Images in the prompt.")] = 1,
    answer: Annotated[int, typer.Option("--answer-tokens", min=1, help="Tokens of the answer.")] = 256,
    depth: Annotated[int, typer.Option("--depth", min=1, help="Levels of a tree.")] = 5,
    as_json: Json = False,
) -> None:
    """Estimate the speedup for each tree size and batch, from sizes, bandwidth and FLOP/s (docs/estimate.md)."""
    quiet()
    from msd.errors import UserError
    from msd.estimate import Acceptance, Workload, card, plans, sizes

    if weights not in WEIGHTS:
        raise UserError(f"--weights '{weights}' is unknown; choose one of {', '.join(WEIGHTS)}")
    helper = None if draft_model is None else sizes(draft_model)
    work = Workload(prompt, images, answer, depth, drafter, WEIGHTS[weights], helper)
    accepted, model, device = Acceptance.parse(acceptance), sizes(target), card(gpu)
    if helper is not None and helper.shares_cache and helper.vocabulary != model.vocabulary:
        raise UserError(f"--draft-model '{draft_model}' reads the keys of its own target; '{target}' has other ones")
    rows = plans(model, device, accepted, work)
    if as_json:
        print(json.dumps({"target": model.as_dict(), "card": asdict(device), "workload": asdict(work), "rows": rows}))
        return
    _show(model, device, accepted, images, rows)


def _show(model: Sizes, device: Card, accepted: Acceptance, images: int, rows: list[dict[str, Any]]) -> None:
    """Prints a table of the rows, and notes."""
    shown = table("batch", "nodes", "τ", "prefill", "plain", "draft", "verify", "decode", "answer", "tokens/s")
    for row in rows:
        shown.add_row(
            str(row["batch"]), str(row["nodes"]), f"{row['acceptance_length']:.2f}",
            *(f"{1000 * row[key]:.1f}" for key in ("prefill_s", "plain_s", "draft_s", "verify_s")),
            f"{row['speedup_decode']:.2f}x", f"{row['speedup']:.2f}x",
            f"{row['tokens_per_second']:.0f}" if row["fits"] else "too big",
        )  # fmt: skip
    speed = f"{device.bandwidth / 1e9:.0f} GB/s, {device.flops / 1e12:.3g} TFLOP/s ({device.source})"
    smallest, largest = (rows[i]["memory_bytes"] / 1e9 for i in (0, -1))
    notes = [f"weights and cache: {smallest:.1f} GB in batch {rows[0]['batch']}, {largest:.1f} in {rows[-1]['batch']}"]
    notes += ["prefill, plain step, draft and verification in ms; speedup of decoding, and of a whole answer"]
    if accepted.length is not None:
        notes.append("τ is assumed equal for all tree sizes, although a smaller tree accepts less.")
    if images and not model.vision_layers:
        notes.append("The vision tower is unsupported, so prefill does not include it.")
    console = Console()
    console.print(f"{model.name} on {device.name}: {speed}", soft_wrap=True)
    console.print(shown)
    console.print("\n".join(notes), soft_wrap=True)
