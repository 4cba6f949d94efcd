"""`msd generate`: an answer about images, videos or sounds, streamed."""

from __future__ import annotations

import json
import sys
from collections import Counter

from rich.console import Console

from msd.cli import terminal
from msd.cli.asked import (
    Ask,
    AskedTarget,
    AudioFiles,
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
from msd.cli.options import (
    Backend,
    Device,
    Drafter,
    Epsilon,
    Json,
    MaxNewTokens,
    Method,
    Thresholds,
    Verifier,
    policy,
    quiet,
    share_cores,
)


def generate(
    images: ImageFiles = None,
    video: VideoFiles = None,
    frames: Frames = None,
    audio: AudioFiles = None,
    events: EventFile = None,
    prompt: Ask = "",
    target: AskedTarget = None,
    method: Method = None,
    drafter: Drafter = None,
    max_new_tokens: MaxNewTokens = 128,
    temperature: Temperature = 0.0,
    top_p: TopP = None,
    top_k: TopK = None,
    seed: Seed = None,
    verifier: Verifier = "lossless",
    epsilon: Epsilon = 0.0,
    threshold: Thresholds = None,
    backend: Backend = "measure",
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Answer PROMPT about what is shown; the text appears as it is made."""
    from msd.cli.options import chosen_methods, use_drafter

    seen = scene(target, images, video, frames, audio, events, prompt)
    decoding = settings(max_new_tokens, temperature, top_p, top_k, seed)
    checked = policy(verifier, threshold, epsilon)
    trained = use_drafter(drafter)
    method = trained if method is None else method
    if method is not None:
        chosen_methods(method, seen.target)
    quiet()
    share_cores()
    from msd import SpeculativeConfig, SpeculativeVLM

    config = SpeculativeConfig(label=True, backend=backend, **checked)
    with terminal.loading():
        vlm = SpeculativeVLM.from_pretrained(seen.target, method, config, device=device)
    asked = {**decoding, **seen.of(vlm.drafter)}
    if as_json:
        print(json.dumps(vlm.generate(seen.shown, prompt, **asked).as_dict()))
        return
    stream = vlm.stream(seen.shown, prompt, **asked)
    for piece in stream:
        print(piece, end="", flush=True)
    print()
    answer = stream.result
    Console(file=sys.stderr).print(
        f"[dim]{len(answer.tokens)} tokens in {answer.seconds:.2f} s, {answer.tokens_per_second:.1f} tokens/s, "
        f"mean acceptance length {answer.statistics.mean_acceptance_length:.2f}, method {answer.method}[/dim]",
        soft_wrap=True,
    )
    if seen.drawn:
        Console(file=sys.stderr).print(f"[dim]{seen.told(vlm.drafter)}[/dim]", soft_wrap=True)
    hidden = answer.statistics.seconds
    if "beside" in hidden:
        Console(file=sys.stderr).print(
            f"[dim]the drafter's own input: {1000 * hidden['beside']:.1f} ms, "
            f"{1000 * hidden['beside_overlap']:.1f} of them while the target encoded and prefilled[/dim]",
            soft_wrap=True,
        )
    if answer.predicted_modality:
        counts = Counter(name for name in answer.predicted_modality if name)
        told = ", ".join(f"{name} {n}" for name, n in counts.most_common())
        Console(file=sys.stderr).print(
            f"[dim]tokens by modality, as the router predicts it: {told}[/dim]", soft_wrap=True
        )
    if vlm.target.backend.lossy:
        Console(file=sys.stderr).print(f"[dim]backend '{backend}' is lossy: its products are rounded[/dim]")
    spent = answer.as_dict()["divergence"]
    if spent:
        Console(file=sys.stderr).print(
            f"[dim]'{verifier}' is lossy: total variation {spent['per_token']:.4f} a token, at most "
            f"{min(1.0, spent['total']):.2f} for the whole answer[/dim]",
            soft_wrap=True,
        )
