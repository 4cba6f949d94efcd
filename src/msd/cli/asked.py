"""What `msd generate` and `msd inspect` are asked: what is shown, to whom, the prompt, and how to decode."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from msd.errors import UserError
from msd.files import as_text

if TYPE_CHECKING:
    from msd.drafters import Drafter
    from msd.events import Recording
    from msd.videos import Clip

ImageFiles = Annotated[list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Image files, in reading order.")]
VideoFiles = Annotated[
    list[Path] | None, typer.Option("--video", help="A video file, shown after the images; repeatable.")
]
Frames = Annotated[
    int | None,
    typer.Option(
        "--frames", min=1,
        help="Frames of a video, spread evenly over its time, or of a recording; 8, and 4 for 'reference-video'.",
    ),
]  # fmt: skip
AudioFiles = Annotated[
    list[Path] | None, typer.Option("--audio", help="A sound file, for models that hear; repeatable.")
]
EventFile = Annotated[
    Path | None,
    typer.Option(
        "--events",
        help="An event camera's recording, for drafters that see it; alone, the target is shown frames drawn from it.",
    ),
]
AskedTarget = Annotated[
    str | None,
    typer.Option(
        "--target",
        help="'reference' (default), 'reference-video' (default with --events), a checkpoint folder, or a hub id.",
    ),
]
Ask = Annotated[str, typer.Option("--prompt", "-p", callback=as_text, help="What to ask.")]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy decoding.")]
TopP = Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0)]
TopK = Annotated[int | None, typer.Option("--top-k", min=1)]
Seed = Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")]


@dataclass(frozen=True)
class Scene:
    """What is looked at. target: a name. shown: to the target, loaded, in reading order.

    recording: of an event camera, if there is one. drawn: whether what is shown are frames drawn from its events.
    """

    target: str
    shown: list[Any]
    recording: Recording | None = None
    drawn: bool = False

    def of(self, drafter: Drafter) -> dict[str, Any]:
        """The argument `events` of `SpeculativeVLM.generate`: left out where only the target sees the recording."""
        from msd.drafters import recordings

        hidden = self.recording is None or (self.drawn and recordings.encoder(drafter) is None)
        return {} if hidden else {"events": self.recording}

    def told(self, drafter: Drafter) -> str:
        """Who saw what of a recording whose frames were drawn, in a line."""
        also = "the drafter the events themselves" if self.of(drafter) else f"'{drafter.name}' sees no events"
        return f"the target saw {len(self.shown[0].frames)} frames drawn from the events; {also}"


def scene(
    target: str | None,
    images: list[str] | None,
    videos: list[Path] | None,
    frames: int | None,
    sounds: list[Path] | None,
    events: Path | None,
    prompt: str,
) -> Scene:
    """What the options name, loaded: bad input fails before any model loads. Events alone are shown as frames."""
    from msd import prompts
    from msd.sounds import Audio
    from msd.videos import CLIP_FRAMES, FRAMES, Video

    target = ("reference" if events is None else "reference-video") if target is None else target
    if frames is not None and not videos and (events is None or images or sounds):
        raise UserError("--frames is for a --video, or for a recording shown alone; leave it out")
    frames = frames or (CLIP_FRAMES if target == "reference-video" else FRAMES)
    heard = [Audio(path) for path in sounds or ()]
    sources = [*(images or ()), *(Video(path, frames) for path in videos or ()), *heard]
    loaded = [prompts.load(source) for source in sources]
    for sound in heard:
        sound.load()
    prompts.check_text(prompt)
    if events is None:
        return Scene(target, loaded)
    from msd.events import open_chunks

    recording = open_chunks(events)
    return Scene(target, loaded or [drawn(recording, frames)], recording, not loaded)


def drawn(recording: Recording, frames: int) -> Clip:
    """`frames` of equally many events each, as a video; UserError where there are none to draw."""
    from msd.events import event_frames
    from msd.videos import Clip

    made = event_frames(recording, frames)
    if not made.counts.any():
        raise UserError(f"'{recording.path}' holds no events; there is nothing to look at")
    seconds = (made.spans.max() - made.spans[made.counts > 0].min()) / 1e6
    return Clip(tuple(made.images()), tuple(range(frames)), frames, frames / seconds if seconds else 1.0)


def settings(
    max_new_tokens: int,
    temperature: float,
    top_p: float | None,
    top_k: int | None,
    seed: int | None,
) -> dict[str, Any]:
    """Arguments of `SpeculativeVLM.generate`; greedy at temperature 0. UserError for what only sampling has."""
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    elif top_p is not None or top_k is not None:
        name = "--top-k" if top_p is None else "--top-p"
        raise UserError(f"{name} limits what is sampled, and at --temperature 0 nothing is; raise the temperature")
    given = {**sampling, "max_new_tokens": max_new_tokens, "seed": seed}
    return {name: value for name, value in given.items() if value is not None or name == "seed"}
