"""What `msd generate` and `msd inspect` are asked: what is shown, the prompt, and how to decode."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

ImageFiles = Annotated[list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Image files, in reading order.")]
VideoFiles = Annotated[
    list[Path] | None, typer.Option("--video", help="A video file, shown after the images; repeatable.")
]
Frames = Annotated[int, typer.Option("--frames", min=1, help="Frames of a video, spread evenly over its time.")]
AudioFiles = Annotated[
    list[Path] | None, typer.Option("--audio", help="A sound file, for models that hear; repeatable.")
]
EventFile = Annotated[
    Path | None, typer.Option("--events", help="An event camera's recording, for drafters that see it.")
]
Ask = Annotated[str, typer.Option("--prompt", "-p", help="What to ask.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy decoding.")]
TopP = Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0)]
TopK = Annotated[int | None, typer.Option("--top-k", min=1)]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]


def shown(
    images: list[str] | None, videos: list[Path] | None, frames: int, sounds: list[Path] | None, prompt: str
) -> list[Any]:
    """What stands in the prompt, loaded: bad input fails before any model loads."""
    from msd import prompts
    from msd.sounds import Audio
    from msd.videos import Video

    heard = [Audio(path) for path in sounds or ()]
    sources = [*(images or ()), *(Video(path, frames) for path in videos or ()), *heard]
    loaded = [prompts.load(source) for source in sources]
    for sound in heard:
        sound.load()
    prompts.check_text(prompt)
    return loaded


def settings(
    max_new_tokens: int,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
    recording: Any = None,
) -> dict[str, Any]:
    """Arguments of `SpeculativeVLM.generate`; greedy at temperature 0."""
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    given = {**sampling, "max_new_tokens": max_new_tokens, "seed": seed, "events": recording}
    return {name: value for name, value in given.items() if value is not None or name == "seed"}
