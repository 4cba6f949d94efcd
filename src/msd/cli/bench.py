"""`msd bench`: methods side by side, in one run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from msd.cli.options import (
    Backend,
    Data,
    Device,
    Drafter,
    Epsilon,
    Images,
    Json,
    Limit,
    MaxNewTokens,
    Methods,
    Target,
    Thresholds,
    Verifier,
    chosen_methods,
    policy,
    quiet,
    use_drafter,
)
from msd.errors import UserError


def bench(
    target: Target = "reference",
    method: Methods = "all",
    drafter: Drafter = None,
    data: Data = None,
    images: Images = None,
    suite: Annotated[
        str, typer.Option("--suite", help="Only these tasks of the data, separated by commas; all by default.")
    ] = "",
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 96,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy decoding.")] = 0.0,
    cuts: Annotated[
        Path | None,
        typer.Option("--cuts", help="Modality cuts of the target, from 'msd capture'; the reference model's own."),
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for results.json, report.md and report.html.")
    ] = None,
    baselines: Annotated[
        str,
        typer.Option(
            "--baselines",
            help="transformers' own ways to decode, separated by commas; all by default. Plain always runs.",
        ),
    ] = "",
    verifier: Verifier = "lossless",
    epsilon: Epsilon = 0.0,
    threshold: Thresholds = None,
    backend: Backend = "measure",
    device: Device = None,
    batch: Annotated[int, typer.Option("--batch", min=1, help="Prompts of a task that are answered together.")] = 1,
    warm: Annotated[
        bool, typer.Option("--warm", help="Also time every answer again with its photos encoded already.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Time methods, plain decoding and transformers' generate() on the same prompts, interleaved."""
    from msd.bench.data import in_suites, load_data

    checked = policy(verifier, threshold, epsilon)
    use_drafter(drafter)
    methods = chosen_methods(method, target, greedy=temperature == 0)
    samples = in_suites(load_data(data, images), [name.strip() for name in suite.split(",") if name.strip()])[:limit]
    if cuts is not None and temperature > 0:
        raise UserError("--cuts labels greedy answers; leave --temperature at 0")
    quiet()
    from msd.bench import files, measure, modal, report
    from msd.config import SpeculativeConfig
    from msd.loading import load_target
    from msd.targets.fingerprint import fingerprint

    ways = _ways(baselines, list(measure.LIBRARY))
    known = modal.find_cuts(target, cuts)
    model, processor = load_target(target, device)
    if known is not None:
        known.check_target(fingerprint(model))
    with Console(file=sys.stderr).status("measuring…") as status:
        results = measure.run(
            model, processor, samples, methods, max_new_tokens, temperature, status.update, known,
            SpeculativeConfig(**checked, backend=backend), warm, batch, ways,
        )  # fmt: skip
    if out is not None:
        files.write(results, out)
    print(json.dumps(results) if as_json else report.markdown(results))


def _ways(names: str, known: list[str]) -> list[str]:
    """Ways of the library to measure, plain `generate()` first; UserError for an unknown one."""
    chosen = [name.strip() for name in names.split(",") if name.strip()]
    for name in chosen:
        if name not in known:
            raise UserError(f"--baselines '{name}' is no way of transformers; known: {', '.join(known)}")
    return list(dict.fromkeys([known[0], *chosen])) if chosen else known
