"""`msd inspect`: what was drafted for an answer, by modality, accepted and rejected, step by step, as a page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from PIL.Image import Image

from msd.cli import terminal
from msd.cli.options import Drafting, Json, MaxNewTokens, Sampling, Shown, grouped, quiet, scene, share_cores
from msd.errors import UserError
from msd.system.files import check_place, write_whole

if TYPE_CHECKING:
    from msd import SpeculativeVLM


@grouped
def inspect(
    out: Annotated[Path, typer.Option("--out", "-o", help="The page to write, such as trace.html.")],
    shown: Shown,
    drafting: Drafting,
    sampling: Sampling,
    max_new_tokens: MaxNewTokens = 96,
    as_json: Json = False,
) -> None:
    """Answer PROMPT and write a page of the draft trees: what was tried, and what the target took."""
    check_place(out)
    if not out.parent.is_dir():
        raise UserError(f"cannot write '{out}': name a file in a folder that exists")
    seen = scene(shown, drafting.target)
    decoding = sampling.settings(max_new_tokens)
    method = drafting.chosen(seen.target)
    quiet()
    share_cores()
    from msd import SpeculativeConfig, SpeculativeVLM
    from msd.inspect import Trace, page

    # in every step as much is drafted as may be, as by `msd verify`: the page shows the drafter, not the clock
    config = SpeculativeConfig(label=True, backend=drafting.backend, adaptive=False)
    with terminal.loading():
        vlm = SpeculativeVLM.from_pretrained(seen.target, method, config, device=drafting.device)
    asked = {**decoding, **seen.of(vlm.drafter)}
    trace = Trace()
    answer = vlm.generate(seen.shown, shown.prompt, on_step=trace, **asked)
    events = _events(asked["events"], f"{shown.events}: what the drafter sees beside") if "events" in asked else ""
    pictures: list[Image] = []
    for source in seen.shown:
        pictures += getattr(source, "frames", [source])
    decode = vlm.processor.tokenizer.decode
    gains = _gains(vlm, seen.shown, shown.prompt, answer.tokens)
    text = page(shown.prompt, answer, trace.passes, lambda token: decode([token]), pictures, events, gains)
    write_whole(out, text)
    if as_json:
        print(json.dumps({"out": str(out), "steps": len(trace.passes), **answer.as_dict()}))
    else:
        print(f"{answer.text.strip()}\n{out}: {len(trace.passes)} steps")


def _events(recording: Any, title: str) -> str:
    """HTML of a recording's frames."""
    from msd.events import event_frames
    from msd.events.frames import snippet

    made = event_frames(recording)
    captions = [f"{n:,} events, {a:,} to {b:,} µs" for n, (a, b) in zip(made.counts, made.spans, strict=True)]
    return snippet(made.images(), captions, title)


def _gains(vlm: SpeculativeVLM, shown: list[Any], prompt: str, tokens: list[int]) -> list[Any] | None:
    """The image gain of every token by blocks of the one picture shown; None where that is not what is shown."""
    from msd.inputs.prompts import prepare
    from msd.labels.gain import gain_of_blocks

    if len(shown) != 1 or not tokens:
        return None
    found = gain_of_blocks(vlm.target, prepare(vlm.processor, [shown], [prompt]), tokens)
    return None if found is None else found.tolist()
