"""Declares the options that commands share. Each option is declared once, as the field of a group.

A group is a frozen dataclass. `grouped` makes a typer command of a function whose parameters are groups.
"""

from __future__ import annotations

import inspect
import logging
import mimetypes
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from msd.cli import speculative_config, terminal
from msd.errors import UserError
from msd.system.files import as_text
from msd.system.machine import share_cores

if TYPE_CHECKING:
    from msd import SpeculativeVLM
    from msd.drafters import Drafter
    from msd.events import Recording

DRAFT_MODEL = "draft-model"  # the method of `--draft-model`

Target = Annotated[
    str,
    typer.Option("--target", help="'reference', 'reference-video' (for clips), a checkpoint folder, or a hub id."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Images = Annotated[
    Path | None, typer.Option("--images", help="Folder of the images; by default that of the data file.")
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Maximum length of an answer.")]
DrafterFolder = Annotated[
    Path | None,
    typer.Option(
        "--drafter",
        help="Folder or hub id of a trained or published draft head; it determines the method unless --method does.",
    ),
]
DraftModel = Annotated[
    str | None,
    typer.Option("--draft-model", help="Folder or hub id of a smaller model that drafts (method 'draft-model')."),
]
DraftSees = Annotated[
    str | None,
    typer.Option(
        "--draft-sees",
        help="What the draft model sees of an image: 'image' (the default if it can), 'caption' or 'nothing'; several "
        "with commas mix their drafts.",
    ),
]
Backend = Annotated[
    str,
    typer.Option(
        "--backend",
        help="Target passes: 'plain' (the model's code), 'fused', 'measure' (the faster of both), or 'bf16' (lossy).",
    ),
]
Device = Annotated[
    str | None, typer.Option("--device", help="Torch device of the model: 'cpu' (default), 'cuda', 'cuda:1'.")
]
Method = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="Drafting method; NAME+prompt-lookup adds lookup of long repeats. By default the drafter trained for the "
        "target with that lookup: 'msd+prompt-lookup' for 'reference'.",
    ),
]
Methods = Annotated[
    str | None,
    typer.Option(
        "--method",
        help="Method names, separated by commas, or 'all'; NAME+prompt-lookup adds lookup of long repeats. By default "
        "that of --drafter, else all.",
    ),
]
LabelThresholds = Annotated[
    Path | None, typer.Option("--cuts", help="Label thresholds; by default those next to the captured answers.")
]
Temperature = Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy decoding.")]


@dataclass(frozen=True)
class Model:
    """A target, and the backend and device of its passes."""

    target: Target = "reference"
    backend: Backend = "measure"
    device: Device = None


@dataclass(frozen=True)
class DataLines:
    """A data file, or its first lines."""

    data: Annotated[Path | None, typer.Option("--data", help="Data file (jsonl); by default the bundled one.")] = None
    images: Images = None
    limit: Annotated[int | None, typer.Option("--limit", min=1, help="Use only the first N data lines.")] = None


@dataclass(frozen=True)
class PromptInputs:
    """A prompt and the files it refers to."""

    images: Annotated[list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Image files, in reading order.")] = (
        None
    )
    video: Annotated[
        list[Path] | None, typer.Option("--video", help="A video file, placed after the images; repeatable.")
    ] = None
    frames: Annotated[
        int | None,
        typer.Option(
            "--frames", min=1, help="Evenly spaced frames of a video or recording; 8, or 4 for 'reference-video'."
        ),
    ] = None
    events: Annotated[
        Path | None,
        typer.Option(
            "--events",
            help="An event camera's recording, for drafters that read events; alone, the target gets frames of it.",
        ),
    ] = None
    prompt: Annotated[str, typer.Option("--prompt", "-p", callback=as_text, help="The question.")] = ""


@dataclass(frozen=True)
class Drafting:
    """A target and a drafting method."""

    target: Annotated[
        str | None,
        typer.Option(
            "--target",
            help="'reference' (default), 'reference-video' (default for a recording of events), a checkpoint folder, "
            "or a hub id.",
        ),
    ] = None
    method: Method = None
    drafter: DrafterFolder = None
    draft_model: DraftModel = None
    draft_sees: DraftSees = None
    calibrate: Annotated[
        bool,
        typer.Option(
            help="Improve the trees of the target's own layers, a published head, an assistant or a draft model by "
            "what was accepted, and remember it."
        ),
    ] = True
    backend: Backend = "measure"
    device: Device = None
    speculative_config: Annotated[
        str | None,
        typer.Option(
            "--speculative-config",
            help="vLLM's JSON instead of these options: method, model, num_speculative_tokens (a tree's most levels).",
        ),
    ] = None

    def configured(self) -> tuple[Drafting, dict[str, Any]]:
        """Returns the options with those of `--speculative-config` in their place, and the limit on the tree."""
        if self.speculative_config is None:
            return self, {}
        if self.method is not None or self.drafter is not None or self.draft_model is not None:
            raise UserError("--speculative-config replaces --method, --drafter and --draft-model; leave them out")
        given = speculative_config.read(self.speculative_config)
        own = replace(self, method=given.method, drafter=given.drafter, draft_model=given.draft_model)
        return own, {} if given.depth is None else {"depth": given.depth}

    def method_name(self, target: str) -> str | None:
        """Returns the chosen method, or None if the user chose none. Raises UserError for an unknown method.

        target: the name of the resolved target; some methods exist for certain targets only.
        """
        trained = use_drafter(self.drafter)
        method = trained if self.method is None else self.method
        if use_draft_model(self.draft_model, self.draft_sees, method, self.device):
            return DRAFT_MODEL
        if method is not None:
            method_names(method, target)
            check_used(trained, [method])
        return method


@dataclass(frozen=True)
class Compared:
    """The methods that a command compares."""

    method: Methods = None
    drafter: DrafterFolder = None
    draft_model: DraftModel = None
    draft_sees: DraftSees = None

    def names(self, model: Model, greedy: bool = False, **kwargs: Any) -> list[str]:
        """Returns the names of the methods, a draft model's among them. Raises UserError for an unknown one.

        greedy: see `method_names`. kwargs: of `load_draft_model`.
        """
        trained = use_drafter(self.drafter)
        chosen = self.method or trained or "all"
        method = None if self.draft_model else chosen
        added = use_draft_model(self.draft_model, self.draft_sees, method, model.device, **kwargs)
        names = method_names(chosen, model.target, greedy, added)
        check_used(trained, names)
        return names


@dataclass(frozen=True)
class Sampling:
    """Sampling options; greedy decoding at temperature 0."""

    temperature: Temperature = 0.0
    top_p: Annotated[
        float | None,
        typer.Option("--top-p", min=0.0, max=1.0, help="Sample from the fewest tokens with this total probability."),
    ] = None
    top_k: Annotated[int | None, typer.Option("--top-k", min=1, help="Sample from the K most probable tokens.")] = None
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling reproducible.")] = None

    def settings(self, max_new_tokens: int) -> dict[str, Any]:
        """Returns arguments of `SpeculativeVLM.generate`. Raises UserError for sampling options at temperature 0."""
        sampling: dict[str, Any] = {"do_sample": False}
        if self.temperature == 0 and (self.top_p is not None or self.top_k is not None):
            name = "--top-k" if self.top_p is None else "--top-p"
            raise UserError(f"{name} has no effect on greedy decoding; set --temperature above 0")
        if self.temperature == 0 and self.seed is not None:
            raise UserError("--seed has no effect on greedy decoding; set --temperature above 0")
        if self.temperature > 0:
            sampling = {
                "do_sample": True, "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k
            }  # fmt: skip
        settings = {**sampling, "max_new_tokens": max_new_tokens, "seed": self.seed}
        return {name: value for name, value in settings.items() if value is not None or name == "seed"}


@dataclass(frozen=True)
class Policy:
    """The verification policy."""

    verifier: Annotated[
        str,
        typer.Option(
            "--verifier", help="'lossless', or the lossy 'threshold' or 'budget' (docs/modality_verification.md)."
        ),
    ] = "lossless"
    epsilon: Annotated[
        float,
        typer.Option("--epsilon", min=0.0, max=1.0, help="Mean total variation per token that 'budget' may spend."),
    ] = 0.0
    threshold: Annotated[
        list[str] | None,
        typer.Option("--threshold", help="NAME=θ of a modality, for 'threshold' and 'budget'; repeatable."),
    ] = None

    def checked(self) -> dict[str, Any]:
        """Returns the verification fields of a `SpeculativeConfig`. Raises UserError for invalid ones."""
        from msd import verify

        thresholds: dict[str, float] = {}
        for entry in self.threshold or ():
            name, _, number = entry.partition("=")
            if name in thresholds:
                raise UserError(f"--threshold '{name}' is given twice; give it once")
            try:
                thresholds[name] = float(number)
            except ValueError as error:
                raise UserError(f"--threshold '{entry}' is not NAME=NUMBER, as in vision=0.6") from error
        verify.create(self.verifier, thresholds, self.epsilon)
        return {"verifier": self.verifier, "thresholds": thresholds, "epsilon": self.epsilon}


def grouped(command: Callable[..., None]) -> Callable[..., None]:
    """Returns `command` as a function for typer: each parameter that is a group is replaced by its fields."""
    keyword, hints = inspect.Parameter.KEYWORD_ONLY, get_type_hints(command, include_extras=True)
    groups = {name: kind for name, kind in hints.items() if isinstance(kind, type) and is_dataclass(kind)}
    parameters = []
    for name, parameter in inspect.signature(command).parameters.items():
        if name not in groups:
            parameters.append(parameter.replace(annotation=hints[name], kind=keyword))
            continue
        options = get_type_hints(groups[name], include_extras=True)
        for field in fields(groups[name]):
            default = inspect.Parameter.empty if field.default is MISSING else field.default
            parameters.append(inspect.Parameter(field.name, keyword, default=default, annotation=options[field.name]))

    def run(**values: Any) -> None:
        arguments = {name: kind(**{f.name: values.pop(f.name) for f in fields(kind)}) for name, kind in groups.items()}
        command(**arguments, **values)

    run.__doc__, run.__name__ = command.__doc__, command.__name__
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return run


@dataclass(frozen=True)
class LoadedInputs:
    """The loaded files of a prompt.

    target: name of the target. media: images, videos and sounds for the target, in reading order. recording: an event
    camera's, if given. from_events: whether `media` is a clip of frames drawn from the recording.
    """

    target: str
    media: list[Any]
    recording: Recording | None = None
    from_events: bool = False

    def arguments(self, drafter: Drafter) -> dict[str, Any]:
        """Returns the argument `events` of `SpeculativeVLM.generate`; nothing if only the target uses the recording."""
        from msd.events.clip import events_argument

        return events_argument(drafter, self.recording, self.from_events)

    def description(self, drafter: Drafter) -> str:
        """Returns one line on how target and drafter use a recording whose frames were drawn."""
        use = "the drafter the events themselves" if self.arguments(drafter) else f"'{drafter.name}' sees no events"
        return f"the target saw {len(self.media[0].frames)} frames drawn from the events; {use}"


def load_inputs(inputs: PromptInputs, target: str | None, sounds: list[Path] | None = None) -> LoadedInputs:
    """Loads the files of a prompt before any model. Events without other media become a clip of frames.

    Raises UserError for an unreadable file or an invalid prompt.
    """
    from msd.inputs import prompts
    from msd.inputs.media import Audio, Video

    target = ("reference" if inputs.events is None else "reference-video") if target is None else target
    if inputs.frames is not None and not inputs.video and (inputs.events is None or inputs.images or sounds):
        raise UserError("--frames is for a --video, or for --events without other media; leave it out")
    _check_prompt(inputs)
    frames = inputs.frames or frames_for(target)
    audio = [Audio(path) for path in sounds or ()]
    for path in inputs.images or ():
        kind = (mimetypes.guess_type(path)[0] or "").split("/")[0]
        if kind in ("video", "audio"):
            raise UserError(f"'{path}' looks like {kind}, not an image; give it with --{kind}")
    sources = [*(inputs.images or ()), *(Video(path, frames) for path in inputs.video or ()), *audio]
    media = [prompts.load(source) for source in sources]
    for sound in audio:
        sound.load()
    prompts.check_text(inputs.prompt)
    if inputs.events is None:
        return LoadedInputs(target, media)
    from msd.events import open_chunks
    from msd.events.clip import event_clip

    recording = open_chunks(inputs.events)
    return LoadedInputs(target, media or [event_clip(recording, frames)], recording, not media)


def _check_prompt(inputs: PromptInputs) -> None:
    """Raises UserError without a prompt; it names a text that stands where a file is expected."""
    if inputs.prompt.strip():
        return
    stray = next((text for text in inputs.images or () if " " in text.strip() and not Path(text).exists()), None)
    raise UserError(f"the prompt is empty; give one with -p, for example: -p '{stray or 'Describe the image.'}'")


def frames_for(target: str) -> int:
    """Returns the number of frames that a target sees of a video or a recording, unless the user says another."""
    from msd.inputs.media import CLIP_FRAMES, FRAMES

    return CLIP_FRAMES if target == "reference-video" else FRAMES


def load_engine(
    inputs: LoadedInputs, drafting: Drafting, settings: dict[str, Any], **config: Any
) -> tuple[SpeculativeVLM, dict[str, Any]]:
    """Returns the engine for one prompt, and `settings` with the inputs for its drafter.

    config: fields of `SpeculativeConfig`.
    """
    vlm = load_vlm(inputs.target, drafting, **config)
    return vlm, {**settings, **inputs.arguments(vlm.drafter)}


def load_vlm(target: str, drafting: Drafting, **config: Any) -> SpeculativeVLM:
    """Returns the engine for a target. config: fields of `SpeculativeConfig`."""
    drafting, limit = drafting.configured()
    method = drafting.method_name(target)
    quiet()
    share_cores()
    from msd import SpeculativeConfig, SpeculativeVLM

    speculative = SpeculativeConfig(
        label=True, frozen_weights=True, backend=drafting.backend, calibrate=drafting.calibrate, **limit, **config
    )
    with terminal.loading():
        return SpeculativeVLM.from_pretrained(target, method, speculative, device=drafting.device)


def use_drafter(folder: Path | None) -> str | None:
    """Registers the drafter in a `--drafter` folder as a method, and returns its name. Raises UserError for none."""
    if folder is None:
        return None
    from msd import formats

    return formats.register_folder(folder)


def changed(*groups: Any) -> str | None:
    """Returns the name, without dashes, of the first option in `groups` that is not at its default; else None."""
    for group in groups:
        default = type(group)()
        for field in fields(group):
            if getattr(group, field.name) != getattr(default, field.name):
                return field.name.replace("_", "-")
    return None


def check_used(head: str | None, methods: Sequence[str]) -> None:
    """Raises UserError if `--drafter` has a head that no method in `methods` uses. head: the name of its method."""
    from msd.drafters import registry

    names = [name for name in methods if name != DRAFT_MODEL]
    if head is not None and not any(head == name or head in registry.get(name).weights for name in names):
        raise UserError(f"--drafter has a head of method '{head}', which --method does not name; leave one of them out")


def use_draft_model(model: str | None, sees: str | None, method: str | None, device: str | None, **kwargs: Any) -> bool:
    """Registers a `--draft-model` as the method `draft-model`; returns whether there is one.

    method: the other choice of the user, None for none. kwargs: of `load_draft_model`. Raises UserError for options
    that do not belong together.
    """
    from msd import drafters
    from msd.config import check_draft_model

    check_draft_model(model, sees, method)
    if model is None:
        return False

    @cache
    def make() -> Drafter:
        from msd.loading import load_draft_model

        return load_draft_model(model, sees, device, **kwargs)

    drafters.register(DRAFT_MODEL, make)
    return True


def quiet() -> None:
    """Silences progress bars and warnings of the libraries."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as library

    library.set_verbosity_error()
    library.disable_progress_bar()
    logging.getLogger("torch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")


def method_names(names: str, target: str, greedy: bool = False, added: bool = False) -> list[str]:
    """Parses a `--method` value: names, or "all" for all methods of that target; UserError for an unknown method.

    greedy: "all" leaves out methods that sample their drafts, which equal their deterministic forms at temperature 0.
    added: whether the method of a `--draft-model` is added.
    """
    from msd import drafters

    every = [name for name in drafters.methods(target) if not (greedy and name.endswith(":sampled"))]
    parts = [name.strip() for name in names.split(",") if name.strip()]
    listed = list(dict.fromkeys(name for part in parts for name in (every if part == "all" else [part])))
    if added and DRAFT_MODEL not in listed:
        listed.append(DRAFT_MODEL)
    for name in listed or [""]:
        drafters.ready(name)
    return listed
