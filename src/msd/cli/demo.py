"""`msd demo`: the main job on a bundled photo, or on a recording of an event camera, and what it saved."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from msd.cli import terminal
from msd.cli.options import Json, MaxNewTokens, quiet
from msd.cli.terminal import table

if TYPE_CHECKING:
    from msd import SpeculativeVLM
    from msd.bench.data import Sample

PHOTO, PROMPT, ASKED_OF_CLIP = "surfer.jpg", "Describe the image in detail.", "Describe the video in detail."
# the recording: of a camera that moves over the photo, as those that the drafter learnt from
SENSOR, DURATION, RATE, THRESHOLD = (96, 96), 2_000_000, 80, 0.25  # pixels, µs, simulated frames a second
VIEW = (256, 256)  # pixels of the frames that the camera sees beside


def demo(
    method: Annotated[
        str | None, typer.Option("--method", help="How to draft: a method's name; by default what was trained for it.")
    ] = None,
    events: Annotated[
        bool,
        typer.Option("--events", help="A clip instead, and a drafter that sees an event camera's recording of it."),
    ] = False,
    max_new_tokens: MaxNewTokens = 96,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Timed runs of each way, in turn.")] = 3,
    as_json: Json = False,
) -> None:
    """Describe a bundled photo, streaming, and compare with plain decoding."""
    if method:
        from msd.cli.options import chosen_methods

        chosen_methods(method, "reference")
    quiet()
    from msd import SpeculativeVLM, reference

    console = Console(file=sys.stderr if as_json else sys.stdout)
    with terminal.loading():
        vlm = SpeculativeVLM.from_pretrained(reference.VIDEO_NAME if events else reference.NAME, method)
    photo = next(p for p in reference.sample_photos() if p.name == PHOTO)
    with TemporaryDirectory() as folder:
        sample, told = _clip(photo, Path(folder)) if events else _photo(photo)
        console.print(f"[bold]{told}[/bold]  {sample.prompt}\n", highlight=False, soft_wrap=True)
        results = _compared(vlm, sample, max_new_tokens, runs, console)
    if as_json:
        print(json.dumps(results))
    else:
        _show(results, console)


def _compared(vlm: SpeculativeVLM, sample: Sample, max_new_tokens: int, runs: int, console: Console) -> dict[str, Any]:
    """Streams the answer to `console`, then times every way of giving it."""
    from msd.bench import measure
    from msd.drafters import auxiliary

    seen = auxiliary.argument(vlm.drafter, "events", [sample.events])
    for piece in vlm.stream(list(sample.images), sample.prompt, max_new_tokens=max_new_tokens, **seen):
        console.out(piece, end="", highlight=False)
        console.file.flush()
    console.print("\n")
    with terminal.status("comparing with plain decoding…") as progress:
        return measure.run(
            vlm.model, vlm.processor, [sample] * runs, [vlm.drafter.name], max_new_tokens, 0.0, progress.update,
            baselines=(measure.TRANSFORMERS,),
        )  # fmt: skip


def _photo(photo: Path) -> tuple[Sample, str]:
    """A question about a photo, and what it is about in words."""
    from msd.bench.data import Sample

    return Sample((photo,), PROMPT, None, "demo"), photo.name


def _clip(photo: Path, folder: Path) -> tuple[Sample, str]:
    """Likewise, about frames of the photo under a moving camera, with what an event camera records meanwhile."""
    import numpy as np
    from PIL import Image

    from msd.bench.data import Sample
    from msd.events import Camera, SimulatorSettings, events_of_photo
    from msd.inputs.media import CLIP_FRAMES

    picture = Image.open(photo)
    camera = Camera(picture, VIEW)
    frames = [folder / f"{i}.png" for i in range(CLIP_FRAMES)]
    for i, path in enumerate(frames):
        camera.picture((2 * i + 1) * DURATION // (2 * CLIP_FRAMES)).save(path)
    settings = SimulatorSettings(threshold_on=THRESHOLD, threshold_off=THRESHOLD)
    made = events_of_photo(picture, SENSOR, DURATION, RATE, settings=settings)
    recording = folder / "recording.npz"
    np.savez(recording, t=made.t, x=made.x, y=made.y, p=made.p, size=SENSOR)
    told = (
        f"{photo.name} under a moving camera: the target sees {CLIP_FRAMES} frames, the drafter also {len(made):,} "
        "simulated events"
    )
    return Sample(tuple(frames), ASKED_OF_CLIP, None, "demo", events=recording), told


def _show(results: dict[str, Any], console: Console) -> None:
    """How fast each way was."""
    shown = table("", "tokens/s", "vs\ntransformers", "mean acceptance\nlength", "same\ntokens")
    for row in results["rows"]:
        if row["task"] == "all":
            shown.add_row(
                row["method"], f"{row['tokens_per_second']:.1f}", f"{row['speedup_vs_transformers']:.2f}x",
                f"{row['mean_acceptance_length']:.2f}", "yes" if row["identical"] == 1.0 else "NO",
            )  # fmt: skip
    console.print(shown)
