"""`msd demo`: describes a bundled photo or an event camera's clip, and compares with plain decoding."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from msd.cli import terminal
from msd.cli.options import Json, MaxNewTokens, Method, method_names, quiet

if TYPE_CHECKING:
    from msd import SpeculativeVLM
    from msd.bench.data import Sample

PHOTO, PROMPT, CLIP_PROMPT = "surfer.jpg", "Describe the image in detail.", "Describe the video in detail."
# the recording of a camera that moves over the photo, simulated as in the drafter's training data
SENSOR, DURATION, RATE, THRESHOLD = (96, 96), 2_000_000, 80, 0.25  # pixels, µs, simulated frames per second
VIEW = (256, 256)  # pixels of the frames for the target


def demo(
    method: Method = None,
    events: Annotated[
        bool, typer.Option("--events", help="Describe a clip, with a drafter that reads an event recording of it.")
    ] = False,
    max_new_tokens: MaxNewTokens = 96,
    runs: Annotated[int, typer.Option("--runs", min=1, help="Timed runs of each method, in turn.")] = 3,
    as_json: Json = False,
) -> None:
    """Describe a bundled photo, streaming, and compare with plain decoding."""
    if method:
        method_names(method, "reference")
    quiet()
    from msd import SpeculativeVLM, reference
    from msd.bench.data import Sample

    console = Console(file=sys.stderr if as_json else sys.stdout)
    with terminal.loading():
        vlm = SpeculativeVLM.from_pretrained(reference.VIDEO_NAME if events else reference.NAME, method)
    photo = next(p for p in reference.sample_photos() if p.name == PHOTO)
    with TemporaryDirectory() as folder:
        sample, title = _clip(photo, Path(folder)) if events else (Sample((photo,), PROMPT, None, "demo"), photo.name)
        console.print(f"[bold]{title}[/bold]  {sample.prompt}\n", highlight=False, soft_wrap=True)
        results = _compare(vlm, sample, max_new_tokens, runs, console)
    if as_json:
        print(json.dumps(results))
    else:
        _show(results, console)


def _compare(vlm: SpeculativeVLM, sample: Sample, max_new_tokens: int, runs: int, console: Console) -> dict[str, Any]:
    """Streams the answer to `console`, then times the method, plain decoding and the library's `generate()`."""
    from msd.bench import measure
    from msd.drafters import auxiliary

    events = auxiliary.argument(vlm.drafter, "events", [sample.events])
    for piece in vlm.stream(list(sample.images), sample.prompt, max_new_tokens=max_new_tokens, **events):
        console.out(piece, end="", highlight=False)
        console.file.flush()
    console.print("\n")
    with terminal.status("comparing with plain decoding…") as progress:
        return measure.run(
            vlm.model, vlm.processor, [sample] * runs, [vlm.drafter.name], max_new_tokens, 0.0, progress.update,
            baselines=(measure.TRANSFORMERS,),
        )  # fmt: skip


def _clip(photo: Path, folder: Path) -> tuple[Sample, str]:
    """Returns a prompt about frames of the photo under a moving camera, with its event recording, and a title."""
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
    stream = events_of_photo(picture, SENSOR, DURATION, RATE, settings=settings)
    recording = folder / "recording.npz"
    np.savez(recording, t=stream.t, x=stream.x, y=stream.y, p=stream.p, size=SENSOR)
    title = (
        f"{photo.name} under a moving camera: the target sees {CLIP_FRAMES} frames, the drafter also {len(stream):,} "
        "simulated events"
    )
    return Sample(tuple(frames), CLIP_PROMPT, None, "demo", events=recording), title


def _show(results: dict[str, Any], console: Console) -> None:
    """Prints a table of the methods."""
    table = terminal.table("", "tokens/s", "vs\ntransformers", "mean acceptance\nlength", "same\ntokens")
    for row in results["rows"]:
        if row["task"] == "all":
            table.add_row(
                row["method"], f"{row['tokens_per_second']:.1f}", f"{row['speedup_vs_transformers']:.2f}x",
                f"{row['mean_acceptance_length']:.2f}", "yes" if row["identical"] == 1.0 else "NO",
            )  # fmt: skip
    console.print(table)
