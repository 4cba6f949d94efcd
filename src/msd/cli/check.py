"""`msd check`: says what format a draft head has, what target it is for, and what is wrong with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from msd.cli.options import Json, quiet


def check(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a draft head, or a hub id.")],
    format: Annotated[
        str | None,
        typer.Option("--format", help="The format to expect, or the engine that must serve it: vllm or sglang."),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--target", help="A target that the head must fit: a checkpoint folder, or a hub id.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Check a draft head, ours or another project's, to the last tensor; exit code 2 if it is refused."""
    quiet()
    from msd import formats
    from msd.loading import load_config

    config = None if target is None else load_config(target).get_text_config(decoder=True)
    found = formats.check(path, format, config)
    if as_json:
        print(json.dumps(found.as_dict()))
    else:
        c = found.config
        sizes = "" if c is None else f", for a target with hidden size {c.hidden} and {c.vocabulary} tokens"
        engines = f", for {' and '.join(found.engines)}" if found.engines else ""
        print(f"{found.place}: format {found.format}{engines}{sizes}: {'; '.join(found.faults) or 'no faults'}")
        for remark in found.remarks:
            print(f"  {remark}")
    if found.faults:
        raise typer.Exit(2)
