"""`msd generate`: an answer about images, videos or sounds, streamed."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from msd.cli.options import (
    Backend,
    Device,
    Drafter,
    Epsilon,
    Json,
    MaxNewTokens,
    Target,
    Thresholds,
    Verifier,
    policy,
    quiet,
)


def generate(
    images: Annotated[
        list[str] | None, typer.Argument(metavar="[IMAGE]...", help="Image files, in reading order.")
    ] = None,
    video: Annotated[
        list[Path] | None, typer.Option("--video", help="A video file, shown after the images; repeatable.")
    ] = None,
    frames: Annotated[int, typer.Option("--frames", min=1, help="Frames of a video, spread evenly over its time.")] = 8,
    audio: Annotated[
        list[Path] | None, typer.Option("--audio", help="A sound file, for models that hear; repeatable.")
    ] = None,
    events: Annotated[
        Path | None, typer.Option("--events", help="An event camera's recording, for drafters that see it.")
    ] = None,
    prompt: Annotated[str, typer.Option("--prompt", "-p", help="What to ask.")] = "",
    target: Target = "reference",
    method: Annotated[
        str | None,
        typer.Option("--method", help="How to draft: a method's name; by default what was trained for the target."),
    ] = None,
    drafter: Drafter = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy decoding.")] = 0.0,
    top_p: Annotated[float | None, typer.Option("--top-p", min=0.0, max=1.0)] = None,
    top_k: Annotated[int | None, typer.Option("--top-k", min=1)] = None,
    seed: Annotated[int | None, typer.Option("--seed", help="Makes sampling repeatable.")] = None,
    verifier: Verifier = "lossless",
    epsilon: Epsilon = 0.0,
    threshold: Thresholds = None,
    backend: Backend = "measure",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Answer PROMPT about what is shown; the text appears as it is made."""
    from msd import prompts
    from msd.cli.options import chosen_methods, use_drafter
    from msd.events import open_chunks
    from msd.sounds import Audio
    from msd.videos import Video

    sounds = [Audio(path) for path in audio or ()]
    sources = [*map(Path, images or ()), *(Video(path, frames) for path in video or ()), *sounds]
    loaded = [prompts.load(source) for source in sources]  # bad input fails before any model loads
    for sound in sounds:
        sound.load()
    prompts.check_text(prompt)
    recording = None if events is None else open_chunks(events)
    checked = policy(verifier, threshold, epsilon)
    trained = use_drafter(drafter)
    method = method or trained
    if method:
        chosen_methods(method, target)
    quiet()
    from msd import SpeculativeConfig, SpeculativeVLM

    vlm = SpeculativeVLM.from_pretrained(
        target, method, SpeculativeConfig(label=True, backend=backend, **checked), device=device
    )
    sampling: dict[str, Any] = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    settings: dict[str, Any] = {"max_new_tokens": max_new_tokens, "seed": seed}
    settings |= {k: v for k, v in sampling.items() if v is not None}
    if recording is not None:
        settings["events"] = recording
    if as_json:
        print(json.dumps(vlm.generate(loaded, prompt, **settings).as_dict()))
        return
    stream = vlm.stream(loaded, prompt, **settings)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    answer = stream.result
    Console(file=sys.stderr).print(
        f"[dim]{len(answer.tokens)} tokens in {answer.seconds:.2f} s, {answer.tokens_per_second:.1f} tokens/s, "
        f"mean acceptance length {answer.statistics.mean_acceptance_length:.2f}, method {answer.method}[/dim]"
    )
    hidden = answer.statistics.seconds
    if "beside" in hidden:
        Console(file=sys.stderr).print(
            f"[dim]the drafter's own input: {1000 * hidden['beside']:.1f} ms, "
            f"{1000 * hidden['beside_overlap']:.1f} of them while the target encoded and prefilled[/dim]"
        )
    if answer.predicted_modality:
        counts = Counter(name for name in answer.predicted_modality if name)
        told = ", ".join(f"{name} {n}" for name, n in counts.most_common())
        Console(file=sys.stderr).print(f"[dim]tokens by modality, as the router predicts it: {told}[/dim]")
    if vlm.target.backend.lossy:
        Console(file=sys.stderr).print(f"[dim]backend '{backend}' is lossy: its products are rounded[/dim]")
    spent = answer.as_dict()["divergence"]
    if spent:
        Console(file=sys.stderr).print(
            f"[dim]'{verifier}' is lossy: total variation {spent['per_token']:.4f} a token, at most "
            f"{min(1.0, spent['total']):.2f} for the whole answer[/dim]"
        )
