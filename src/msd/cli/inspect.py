"""`msd inspect`: shows the draft trees of one answer, with accepted and rejected nodes by modality."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from msd.cli.options import Drafting, Json, MaxNewTokens, PromptInputs, Sampling, grouped, load_engine, load_inputs
from msd.errors import UserError
from msd.system.files import check_place, write_whole

if TYPE_CHECKING:
    from PIL.Image import Image

    from msd import SpeculativeVLM


@grouped
def inspect(
    inputs: PromptInputs,
    drafting: Drafting,
    sampling: Sampling,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="The page to write, such as trace.html; needed without --text.")
    ] = None,
    text: Annotated[bool, typer.Option("--text", help="Print the trees, instead of or beside the page.")] = False,
    max_new_tokens: MaxNewTokens = 96,
    as_json: Json = False,
) -> None:
    """Answer PROMPT and show the draft trees: what was drafted, and what the target accepted."""
    _check(out, text, as_json)
    sources = [*(inputs.images or ()), *(inputs.video or ()), inputs.events]
    if (
        out is not None
        and out.exists()
        and any(path and Path(path).exists() and out.samefile(path) for path in sources)
    ):
        raise UserError(f"--out '{out}' is an input; name another file")
    loaded = load_inputs(inputs, drafting.target)
    # every step drafts as much as it may, as in `msd verify`: the page does not depend on the clock
    vlm, settings = load_engine(loaded, drafting, sampling.settings(max_new_tokens), adaptive=False)
    from msd.inspect import Trace, page

    trace = Trace()
    answer = vlm.generate(loaded.media, inputs.prompt, on_step=trace, **settings)
    decode = vlm.processor.tokenizer.decode
    if text:
        from msd.cli.trace_text import trace_text

        Console(highlight=False).print(trace_text(answer, trace.passes, lambda token: decode([token])))
    if out is not None:
        recording = settings.get("events")
        events = "" if recording is None else _event_frames(recording, f"{inputs.events}: seen by the drafter only")
        pictures: list[Image] = []
        for source in loaded.media:
            pictures += getattr(source, "frames", [source])
        gains = _gains(vlm, loaded.media, inputs.prompt, answer.tokens)
        shown = page(inputs.prompt, answer, trace.passes, lambda token: decode([token]), pictures, events, gains)
        write_whole(out, shown)
    if as_json:
        print(json.dumps({"out": None if out is None else str(out), "steps": len(trace.passes), **answer.as_dict()}))
    elif out is not None:
        print(f"{answer.text.strip()}\n{out}: {len(trace.passes)} steps")


def _check(out: Path | None, text: bool, as_json: bool) -> None:
    """Raises UserError unless there is something to write, and a place for it."""
    if text and as_json:
        raise UserError("--text and --json both write to stdout; leave out one of the two")
    if out is None:
        if not text:
            raise UserError("name the page to write with --out trace.html, or print the trees with --text")
        return
    check_place(out)
    if not out.parent.is_dir():
        raise UserError(f"cannot write '{out}': name a file in a folder that exists")


def _event_frames(recording: Any, title: str) -> str:
    """Returns the HTML of a recording's frames."""
    from msd.events import event_frames
    from msd.events.frames import snippet

    drawn = event_frames(recording)
    captions = [f"{n:,} events, {a:,} to {b:,} µs" for n, (a, b) in zip(drawn.counts, drawn.spans, strict=True)]
    return snippet(drawn.images(), captions, title)


def _gains(vlm: SpeculativeVLM, media: list[Any], prompt: str, tokens: list[int]) -> list[Any] | None:
    """Returns the image gain of each token by blocks of the image; None unless there is exactly one image."""
    from msd.inputs.prompts import prepare
    from msd.labels.gain import gain_of_blocks

    if len(media) != 1 or not tokens:
        return None
    gains = gain_of_blocks(vlm.target, prepare(vlm.processor, [media], [prompt]), tokens)
    return None if gains is None else gains.tolist()
