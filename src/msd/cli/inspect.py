"""`msd inspect`: what was drafted for an answer, by modality, accepted and rejected, step by step, as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from PIL.Image import Image

from msd.cli.asked import (
    Ask,
    EventFile,
    Frames,
    ImageFiles,
    Seed,
    Temperature,
    TopK,
    TopP,
    VideoFiles,
    settings,
    shown,
)
from msd.cli.options import Backend, Device, Drafter, Json, MaxNewTokens, Method, Target, quiet
from msd.errors import UserError
from msd.files import check_place, write_whole


def inspect(
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write, such as trace.html.")],
    images: ImageFiles = None,
    video: VideoFiles = None,
    frames: Frames = 8,
    events: EventFile = None,
    prompt: Ask = "",
    target: Target = "reference",
    method: Method = None,
    drafter: Drafter = None,
    max_new_tokens: MaxNewTokens = 96,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    backend: Backend = "measure",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Answer PROMPT and write a page of the draft trees: what was tried, and what the target took."""
    from msd.cli.options import chosen_methods, use_drafter
    from msd.events import event_frames, open_chunks, view
    from msd.videos import Clip

    if out.is_dir() or not out.parent.is_dir():
        raise UserError(f"cannot write '{out}': name a file in a folder that exists")
    check_place(out)
    loaded = shown(images, video, frames, None, prompt)
    recording = None if events is None else open_chunks(events)
    trained = use_drafter(drafter)
    method = method or trained
    if method:
        chosen_methods(method, target)
    quiet()
    from msd import SpeculativeConfig, SpeculativeVLM
    from msd.inspect import page, tracing

    vlm = SpeculativeVLM.from_pretrained(target, method, SpeculativeConfig(label=True, backend=backend), device=device)
    with tracing(vlm.drafter) as steps:
        answer = vlm.generate(loaded, prompt, **settings(max_new_tokens, temperature, top_p, top_k, seed, recording))
    beside = ""
    if recording is not None:
        made = event_frames(recording)
        captions = [f"{n:,} events, {a:,} to {b:,} µs" for n, (a, b) in zip(made.counts, made.spans, strict=True)]
        beside = view.snippet(made.images(), captions, f"{events}: what the drafter sees beside")
    pictures: list[Image] = []
    for source in loaded:
        pictures += source.frames if isinstance(source, Clip) else [source]
    tokenizer = vlm.processor.tokenizer
    text = page(prompt, answer, steps, lambda token: tokenizer.decode([token]), pictures, beside)
    write_whole(out, text)
    if as_json:
        print(json.dumps({"out": str(out), "steps": len(steps), **answer.as_dict()}))
    else:
        print(f"{answer.text.strip()}\n{out}: {len(steps)} steps")
