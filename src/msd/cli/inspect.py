"""`msd inspect`: what was drafted for an answer, by modality, accepted and rejected, step by step, as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from PIL.Image import Image

from msd.cli import terminal
from msd.cli.asked import (
    Ask,
    AskedTarget,
    EventFile,
    Frames,
    ImageFiles,
    Seed,
    Temperature,
    TopK,
    TopP,
    VideoFiles,
    scene,
    settings,
)
from msd.cli.options import Backend, Device, Drafter, Json, MaxNewTokens, Method, quiet, share_cores
from msd.errors import UserError
from msd.files import check_place, write_whole


def inspect(
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write, such as trace.html.")],
    images: ImageFiles = None,
    video: VideoFiles = None,
    frames: Frames = None,
    events: EventFile = None,
    prompt: Ask = "",
    target: AskedTarget = None,
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
    from msd.events import event_frames, view
    from msd.videos import Clip

    check_place(out)
    if not out.parent.is_dir():
        raise UserError(f"cannot write '{out}': name a file in a folder that exists")
    seen = scene(target, images, video, frames, None, events, prompt)
    decoding = settings(max_new_tokens, temperature, top_p, top_k, seed)
    trained = use_drafter(drafter)
    method = trained if method is None else method
    if method is not None:
        chosen_methods(method, seen.target)
    quiet()
    share_cores()
    from msd import SpeculativeConfig, SpeculativeVLM
    from msd.inspect import page, tracing

    # in every step as much is drafted as may be, as by `msd verify`: the page shows the drafter, not the clock
    config = SpeculativeConfig(label=True, backend=backend, adaptive=False)
    with terminal.loading():
        vlm = SpeculativeVLM.from_pretrained(seen.target, method, config, device=device)
    asked = {**decoding, **seen.of(vlm.drafter)}
    with tracing(vlm.drafter) as steps:
        answer = vlm.generate(seen.shown, prompt, **asked)
    beside = ""
    if "events" in asked:
        made = event_frames(asked["events"])
        captions = [f"{n:,} events, {a:,} to {b:,} µs" for n, (a, b) in zip(made.counts, made.spans, strict=True)]
        beside = view.snippet(made.images(), captions, f"{events}: what the drafter sees beside")
    pictures: list[Image] = []
    for source in seen.shown:
        pictures += source.frames if isinstance(source, Clip) else [source]
    tokenizer = vlm.processor.tokenizer
    text = page(prompt, answer, steps, lambda token: tokenizer.decode([token]), pictures, beside)
    write_whole(out, text)
    if as_json:
        print(json.dumps({"out": str(out), "steps": len(steps), **answer.as_dict()}))
    else:
        print(f"{answer.text.strip()}\n{out}: {len(steps)} steps")
