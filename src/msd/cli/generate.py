"""`msd generate`: an answer about images, videos or sounds, streamed."""

from __future__ import annotations

import json
import sys
from collections import Counter
from typing import TYPE_CHECKING

from rich.console import Console

from msd.cli import terminal
from msd.cli.options import (
    AudioFiles,
    Drafting,
    Json,
    MaxNewTokens,
    Policy,
    Sampling,
    Scene,
    Shown,
    grouped,
    quiet,
    scene,
    share_cores,
)

if TYPE_CHECKING:
    from msd import Result, SpeculativeVLM


@grouped
def generate(
    shown: Shown,
    drafting: Drafting,
    sampling: Sampling,
    policy: Policy,
    audio: AudioFiles = None,
    max_new_tokens: MaxNewTokens = 128,
    as_json: Json = False,
) -> None:
    """Answer PROMPT about what is shown; the text appears as it is made."""
    seen = scene(shown, drafting.target, audio)
    decoding = sampling.settings(max_new_tokens)
    checked = policy.checked()
    method = drafting.chosen(seen.target)
    quiet()
    share_cores()
    from msd import SpeculativeConfig, SpeculativeVLM

    config = SpeculativeConfig(label=True, backend=drafting.backend, **checked)
    with terminal.loading():
        vlm = SpeculativeVLM.from_pretrained(seen.target, method, config, device=drafting.device)
    asked = {**decoding, **seen.of(vlm.drafter)}
    if as_json:
        print(json.dumps(vlm.generate(seen.shown, shown.prompt, **asked).as_dict()))
        return
    stream = vlm.stream(seen.shown, shown.prompt, **asked)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    console = Console(file=sys.stderr)
    for line in _told(stream.result, vlm, seen):
        console.print(f"[dim]{line}[/dim]", soft_wrap=True)


def _told(answer: Result, vlm: SpeculativeVLM, seen: Scene) -> list[str]:
    """What there is to say of an answer, a line each."""
    lines = [
        f"{len(answer.tokens)} tokens in {answer.seconds:.2f} s, {answer.tokens_per_second:.1f} tokens/s, "
        f"mean acceptance length {answer.statistics.mean_acceptance_length:.2f}, method {answer.method}"
    ]
    if seen.drawn:
        lines.append(seen.told(vlm.drafter))
    hidden = answer.statistics.seconds
    if "beside" in hidden:
        lines.append(
            f"the drafter's own input: {1000 * hidden['beside']:.1f} ms, "
            f"{1000 * hidden['beside_overlap']:.1f} of them while the target encoded and prefilled"
        )
    if answer.predicted_modality:
        counts = Counter(name for name in answer.predicted_modality if name)
        told = ", ".join(f"{name} {n}" for name, n in counts.most_common())
        lines.append(f"tokens by modality, as the router predicts it: {told}")
    if vlm.target.backend.lossy:
        lines.append(f"backend '{vlm.config.backend}' is lossy: its products are rounded")
    if spent := answer.as_dict()["divergence"]:
        lines.append(
            f"'{vlm.config.verifier}' is lossy: total variation {spent['per_token']:.4f} a token, at most "
            f"{min(1.0, spent['total']):.2f} for the whole answer"
        )
    return lines
