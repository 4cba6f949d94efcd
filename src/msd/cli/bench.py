"""`msd bench`: methods side by side, in one run."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from msd.cli.options import Data, Images, Json, Limit, MaxNewTokens, Methods, Target, chosen_methods, quiet


def bench(
    target: Target = "reference",
    method: Methods = "all",
    data: Data = None,
    images: Images = None,
    limit: Limit = None,
    max_new_tokens: MaxNewTokens = 96,
    temperature: Annotated[float, typer.Option("--temperature", min=0.0, help="0 is greedy decoding.")] = 0.0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder for results.json and report.md.")] = None,
    as_json: Json = False,
) -> None:
    """Time methods, plain decoding and transformers' generate() on the same prompts, interleaved."""
    from msd.bench.data import load_data

    methods = chosen_methods(method)
    samples = load_data(data, images)[:limit]
    quiet()
    from msd.bench import measure, report
    from msd.loading import load_target

    model, processor = load_target(target)
    with Console(file=sys.stderr).status("measuring…") as status:
        results = measure.run(model, processor, samples, methods, max_new_tokens, temperature, status.update)
    if out is not None:
        report.write(results, out)
    print(json.dumps(results) if as_json else report.markdown(results))
