"""`msd reference`: assembles the embedded reference model on this computer, checks it, and prints its folder."""

import json
import time
from pathlib import Path
from typing import Annotated

import typer

from msd.cli import terminal
from msd.cli.options import Json

PREPARING = "Preparing the reference model (half a minute the first time)…"
app = typer.Typer(help="The embedded reference model: assemble it, check it, find it.")

Cache = Annotated[
    Path | None, typer.Option("--cache", help="Folder to keep the model in, instead of the user's cache.")
]
Video = Annotated[bool, typer.Option("--video", help="Use 'reference-video', the target for clips, instead.")]


@app.command()
def install(
    force: Annotated[bool, typer.Option("--force", help="Assemble it again, even if it exists.")] = False,
    cache: Cache = None,
    video: Video = False,
    as_json: Json = False,
) -> None:
    """Assemble the reference model if needed, and verify the checksum of every file."""
    from msd import reference

    started = time.perf_counter()
    with terminal.status(PREPARING):
        folder = reference.install(cache, force, video)
    size = sum(file.stat().st_size for file in folder.iterdir())
    if as_json:
        print(json.dumps({"path": str(folder), "bytes": size, "seconds": round(time.perf_counter() - started, 3)}))
    else:
        print(f"{folder}: complete, {size / 1e6:.0f} MB")


@app.command()
def path(cache: Cache = None, video: Video = False, as_json: Json = False) -> None:
    """Print the folder of the reference model; assemble it first if needed."""
    from msd import reference

    with terminal.status(PREPARING):
        folder = reference.path(cache, video)
    print(json.dumps({"path": str(folder)}) if as_json else folder)
