"""`msd generate`: streams an answer about images, videos, sounds or events."""

from __future__ import annotations

import json
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from msd.cli import options

if TYPE_CHECKING:
    from msd import Result, SpeculativeVLM


@options.grouped
def generate(
    inputs: options.PromptInputs,
    drafting: options.Drafting,
    sampling: options.Sampling,
    policy: options.Policy,
    audio: Annotated[
        list[Path] | None, typer.Option("--audio", help="A sound file, for models with audio input; repeatable.")
    ] = None,
    max_new_tokens: options.MaxNewTokens = 128,
    as_json: options.Json = False,
) -> None:
    """Answer PROMPT about the given files; the text is printed as it is generated."""
    loaded = options.load_inputs(inputs, drafting.target, audio)
    vlm, settings = options.load_engine(loaded, drafting, sampling.settings(max_new_tokens), **policy.checked())
    if as_json:
        answer = vlm.generate(loaded.media, inputs.prompt, **settings).as_dict()
        print(json.dumps({**answer, "method_reason": vlm.reason}))
        return
    stream = vlm.stream(loaded.media, inputs.prompt, **settings)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    console = Console(file=sys.stderr)
    for line in _summary(stream.result, vlm, loaded):
        console.print(f"[dim]{line}[/dim]", soft_wrap=True)


def _summary(answer: Result, vlm: SpeculativeVLM, loaded: options.LoadedInputs) -> list[str]:
    """Returns the figures of an answer, one line each."""
    lines = [
        f"{len(answer.tokens)} tokens in {answer.seconds:.2f} s, {answer.tokens_per_second:.1f} tokens/s, "
        f"mean acceptance length {answer.statistics.mean_acceptance_length:.2f}, method {answer.method}"
    ]
    if loaded.from_events:
        lines.append(loaded.description(vlm.drafter))
    seconds = answer.statistics.seconds
    if "beside" in seconds:
        lines.append(
            f"auxiliary tokens of the drafter: {1000 * seconds['beside']:.1f} ms, "
            f"{1000 * seconds['beside_overlap']:.1f} of them while the target encoded and prefilled"
        )
    if answer.predicted_modality:
        counts = Counter(name for name in answer.predicted_modality if name)
        listed = ", ".join(f"{name} {n}" for name, n in counts.most_common())
        lines.append(f"tokens by modality, as the router predicts it: {listed}")
    if vlm.target.backend.lossy:
        lines.append(f"backend '{vlm.config.backend}' is lossy: its products are rounded")
    if divergence := answer.as_dict()["divergence"]:
        lines.append(
            f"'{vlm.config.verifier}' is lossy: total variation {divergence['per_token']:.4f} per token, at most "
            f"{min(1.0, divergence['total']):.2f} for the whole answer"
        )
    return lines
