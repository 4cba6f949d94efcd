"""`msd demo`: the main job on a bundled photo, and what it saved."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from msd.cli import terminal
from msd.cli.options import Json, MaxNewTokens, quiet

PHOTO, PROMPT = "surfer.jpg", "Describe the image in detail."


def demo(
    method: Annotated[
        str | None, typer.Option("--method", help="How to draft: a method's name; by default what was trained for it.")
    ] = None,
    max_new_tokens: MaxNewTokens = 96,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Timed runs of each way, in turn.")] = 3,
    as_json: Json = False,
) -> None:
    """Describe a bundled photo, streaming, and compare with plain decoding."""
    quiet()
    from msd import SpeculativeVLM, reference
    from msd.bench import measure
    from msd.bench.data import Sample

    console = Console(file=sys.stderr if as_json else sys.stdout)
    with terminal.status("loading the reference model (assembled on first use)…"):
        vlm = SpeculativeVLM.from_pretrained("reference", method)
    photo = next(p for p in reference.sample_photos() if p.name == PHOTO)
    console.print(f"[bold]{photo.name}[/bold]  {PROMPT}\n")
    for piece in vlm.stream(photo, PROMPT, max_new_tokens=max_new_tokens):
        console.out(piece, end="", highlight=False)
        console.file.flush()
    console.print("\n")
    sample = Sample((photo,), PROMPT, None, "demo")
    results = measure.run(
        vlm.model, vlm.processor, [sample] * runs, [vlm.drafter.name], max_new_tokens, 0.0, lambda _: None,
        baselines=(measure.TRANSFORMERS,),
    )  # fmt: skip
    if as_json:
        print(json.dumps(results))
        return
    table = Table("", "tokens/s", "vs transformers", "mean acceptance length", "same tokens")
    for row in results["rows"]:
        if row["task"] == "all":
            table.add_row(
                row["method"], f"{row['tokens_per_second']:.1f}", f"{row['speedup_vs_transformers']:.2f}x",
                f"{row['mean_acceptance_length']:.2f}", "yes" if row["identical"] == 1.0 else "NO",
            )  # fmt: skip
    console.print(table)
