"""Every option that commands share, declared once, in groups that a command takes as one parameter each.

A group is a frozen dataclass whose fields are options; `grouped` turns a function of groups into one that typer reads.
"""

from __future__ import annotations

import inspect
import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import MISSING, dataclass, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from msd.errors import UserError
from msd.system.files import as_text

if TYPE_CHECKING:
    from msd.drafters import Drafter as DrafterObject
    from msd.events import Recording
    from msd.inputs.media import Clip

Target = Annotated[
    str, typer.Option("--target", help="'reference', 'reference-video' (of clips), a checkpoint folder, or a hub id.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Data = Annotated[Path | None, typer.Option("--data", help="Data lines (jsonl); the bundled photos by default.")]
Images = Annotated[
    Path | None, typer.Option("--images", help="Folder of the data's images; the data's own by default.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Most tokens of an answer.")]
Limit = Annotated[int | None, typer.Option("--limit", min=1, help="Use only the first N data lines.")]
DrafterFolder = Annotated[
    Path | None,
    typer.Option(
        "--drafter", help="Folder of a trained drafter, used as the method it is of: 'msd', a rival or 'eventgpt'."
    ),
]
Verifier = Annotated[
    str,
    typer.Option(
        "--verifier", help="'lossless', or the lossy 'threshold' or 'budget' (docs/modality_verification.md)."
    ),
]
Epsilon = Annotated[
    float, typer.Option("--epsilon", min=0.0, max=1.0, help="Mean total variation per token that 'budget' may spend.")
]
Thresholds = Annotated[
    list[str] | None,
    typer.Option("--threshold", help="NAME=θ of a modality, for 'threshold' and 'budget'; repeatable."),
]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        help="Target passes: 'plain', by the model's own code; 'fused'; 'measure': the faster; 'bf16': rounded, lossy.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option("--device", help="Where the model runs, as torch calls it: 'cpu' (default), 'cuda', 'cuda:1'."),
]
Method = Annotated[
    str | None,
    typer.Option("--method", help="How to draft: a method's name; by default what was trained for the target."),
]
Methods = Annotated[str, typer.Option("--method", help="Method names, separated by commas, or 'all'.")]
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
class Model:
    """A target, and how its passes are computed."""

    target: Target = "reference"
    backend: Backend = "measure"
    device: Device = None


@dataclass(frozen=True)
class Lines:
    """Data lines, or some of them."""

    data: Data = None
    images: Images = None
    limit: Limit = None


@dataclass(frozen=True)
class Shown:
    """What an answer is about."""

    images: ImageFiles = None
    video: VideoFiles = None
    frames: Frames = None
    events: EventFile = None
    prompt: Ask = ""


@dataclass(frozen=True)
class Drafting:
    """Who answers, and how it drafts."""

    target: AskedTarget = None
    method: Method = None
    drafter: DrafterFolder = None
    backend: Backend = "measure"
    device: Device = None

    def chosen(self, target: str) -> str | None:
        """The method's name, None for the target's own; UserError for an unknown one."""
        trained = use_drafter(self.drafter)
        method = trained if self.method is None else self.method
        if method is not None:
            chosen_methods(method, target)
        return method


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; greedy at temperature 0."""

    temperature: Temperature = 0.0
    top_p: TopP = None
    top_k: TopK = None
    seed: Seed = None

    def settings(self, max_new_tokens: int) -> dict[str, Any]:
        """Arguments of `SpeculativeVLM.generate`; UserError for what only sampling has."""
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature == 0 and (self.top_p is not None or self.top_k is not None):
            name = "--top-k" if self.top_p is None else "--top-p"
            raise UserError(f"{name} limits what is sampled, and at --temperature 0 nothing is; raise the temperature")
        if self.temperature > 0:
            sampling = {
                "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k
            }  # fmt: skip
        given = {**sampling, "max_new_tokens": max_new_tokens, "seed": self.seed}
        return {name: value for name, value in given.items() if value is not None or name == "seed"}


@dataclass(frozen=True)
class Policy:
    """Which drafts are accepted."""

    verifier: Verifier = "lossless"
    epsilon: Epsilon = 0.0
    threshold: Thresholds = None

    def checked(self) -> dict[str, Any]:
        """The verification fields of a `SpeculativeConfig`; UserError for what no policy takes."""
        from msd import verify

        table: dict[str, float] = {}
        for entry in self.threshold or ():
            name, _, number = entry.partition("=")
            if name in table:
                raise UserError(f"--threshold '{name}' is given twice; give it once")
            try:
                table[name] = float(number)
            except ValueError as error:
                raise UserError(f"--threshold '{entry}' is not NAME=NUMBER, as in vision=0.6") from error
        verify.create(self.verifier, table, self.epsilon)
        return {"verifier": self.verifier, "thresholds": table, "epsilon": self.epsilon}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """`command` as typer takes it: parameters that are groups are replaced by their fields."""
    hints, parameters = get_type_hints(command, include_extras=True), []
    groups: dict[str, tuple[type, list[str]]] = {}
    for name, parameter in inspect.signature(command).parameters.items():
        kind = hints[name]
        if not is_dataclass(kind):
            parameters.append(parameter.replace(annotation=kind, kind=inspect.Parameter.KEYWORD_ONLY))
            continue
        assert isinstance(kind, type)
        options = get_type_hints(kind, include_extras=True)
        groups[name] = kind, [field.name for field in fields(kind)]
        for field in fields(kind):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            option = options[field.name]
            parameters.append(
                inspect.Parameter(field.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=option)
            )

    def run(**given: Any) -> None:
        taken = {name: kind(**{field: given.pop(field) for field in own}) for name, (kind, own) in groups.items()}
        command(**taken, **given)

    run.__doc__, run.__name__ = command.__doc__, command.__name__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@dataclass(frozen=True)
class Scene:
    """What is looked at. target: a name. shown: to the target, loaded, in reading order.

    recording: of an event camera, if there is one. drawn: whether what is shown are frames drawn from its events.
    """

    target: str
    shown: list[Any]
    recording: Recording | None = None
    drawn: bool = False

    def of(self, drafter: DrafterObject) -> dict[str, Any]:
        """The argument `events` of `SpeculativeVLM.generate`: left out where only the target sees the recording."""
        from msd.drafters import auxiliary

        hidden = self.recording is None or (self.drawn and auxiliary.encoder(drafter, "events") is None)
        return {} if hidden else {"events": self.recording}

    def told(self, drafter: DrafterObject) -> str:
        """Who saw what of a recording whose frames were drawn, in a line."""
        also = "the drafter the events themselves" if self.of(drafter) else f"'{drafter.name}' sees no events"
        return f"the target saw {len(self.shown[0].frames)} frames drawn from the events; {also}"


def scene(asked: Shown, target: str | None, sounds: list[Path] | None = None) -> Scene:
    """What the options name, loaded: bad input fails before any model loads. Events alone are shown as frames."""
    from msd.inputs import prompts
    from msd.inputs.media import CLIP_FRAMES, FRAMES, Audio, Video

    target = ("reference" if asked.events is None else "reference-video") if target is None else target
    if asked.frames is not None and not asked.video and (asked.events is None or asked.images or sounds):
        raise UserError("--frames is for a --video, or for a recording shown alone; leave it out")
    frames = asked.frames or (CLIP_FRAMES if target == "reference-video" else FRAMES)
    heard = [Audio(path) for path in sounds or ()]
    sources = [*(asked.images or ()), *(Video(path, frames) for path in asked.video or ()), *heard]
    loaded = [prompts.load(source) for source in sources]
    for sound in heard:
        sound.load()
    prompts.check_text(asked.prompt)
    if asked.events is None:
        return Scene(target, loaded)
    from msd.events import open_chunks

    recording = open_chunks(asked.events)
    return Scene(target, loaded or [drawn(recording, frames)], recording, not loaded)


def drawn(recording: Recording, frames: int) -> Clip:
    """`frames` of equally many events each, as a video; UserError where there are none to draw."""
    from msd.events import event_frames
    from msd.inputs.media import Clip

    made = event_frames(recording, frames)
    if not made.counts.any():
        raise UserError(f"'{recording.path}' holds no events; there is nothing to look at")
    seconds = (made.spans.max() - made.spans[made.counts > 0].min()) / 1e6
    return Clip(tuple(made.images()), tuple(range(frames)), frames, frames / seconds if seconds else 1.0)


def use_drafter(folder: Path | None) -> str | None:
    """Makes the drafter of a `--drafter` folder a method and names it; UserError when there is none."""
    if folder is None:
        return None
    from msd import drafters

    return drafters.register_folder(folder)


def quiet() -> None:
    """Silences the libraries' progress bars and warnings, which are not for users of a command line."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as library

    library.set_verbosity_error()
    library.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def share_cores() -> None:
    """Passes use fewer threads while other processes keep the cores busy; not for commands that time anything."""
    from msd.system import machine

    machine.share_cores()


def chosen_methods(names: str, target: str, greedy: bool = False) -> list[str]:
    """Method names of a `--method` value, "all" being all for that target; UserError for an unknown one.

    greedy: all but those that sample their drafts, since without sampling they draft as their other form does.
    """
    from msd import drafters

    if names == "all":
        return [name for name in drafters.methods(target) if not (greedy and name.endswith(":sampled"))]
    listed = [name.strip() for name in names.split(",") if name.strip()]
    for name in listed or [""]:
        drafters.ready(name)
    return listed
